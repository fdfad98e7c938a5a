"""Several checkpoints of a run, kept and tested together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IMAGES, one_line, one_thread, options, pool, write_folder

from metaft import algorithms, engines, evaluate, meta_train, models
from metaft.inner import at_step
from metaft.metrics import figure
from metaft.runs.folder import RunFolder, read_rows
from metaft.runs.snapshot import load_snapshot
from metaft.runs.training import best_steps
from metaft.testing import score_episodes


def row(step: int, accuracy: float | None) -> dict[str, Any]:
    return {"kind": "val", "step": step, "transductive": {"accuracy": accuracy, "mse": accuracy}}


def test_the_best_come_first_and_of_equal_ones_the_earlier() -> None:
    rows = [row(1, 0.5), row(2, 0.7), row(3, None), row(4, 0.7), row(5, 0.6)]
    assert best_steps("cross_entropy", rows, "transductive", "accuracy") == [2, 4, 5, 1]
    assert best_steps("mse", rows, "transductive", "mse") == [1, 5, 2, 4]


@pytest.mark.slow
def test_the_best_checkpoints_are_kept_also_by_a_run_that_was_stopped(in_tmp: Path, capsys: Any) -> None:
    write_folder(in_tmp / "data")
    words = options(IMAGES, dataset="folder:data", image_size=8, iterations=8, eval_every=1, eval_episodes=6)
    words += ["--keep-best", "3", "--outer-lr", "0.05"]
    assert meta_train.main([*words, "--out", "whole"]) == 0
    assert meta_train.main([*words, "--iterations", "4", "--outer-schedule", "constant", "--out", "short"]) == 0
    run = RunFolder(in_tmp / "whole")
    rows = [r for r in read_rows(run.metrics) if r["kind"] == "val"]
    wanted = sorted(best_steps("cross_entropy", rows, "transductive", "accuracy")[:3])
    assert list(run.all_kept()) == wanted
    assert [load_snapshot(path).position.step for path in run.all_kept().values()] == wanted
    best = load_snapshot(run.best)
    assert best.position.step in wanted
    kept = load_snapshot(run.kept(best.position.step))
    assert all(torch.equal(kept.meta[k], best.meta[k]) for k in best.meta)

    short = RunFolder(in_tmp / "short")
    assert len(short.all_kept()) == 3
    (short.kept(99)).write_bytes(short.best.read_bytes())  # as a run leaves it that was killed later than it resumes
    assert meta_train.main(["--resume", "short", "--iterations", "8"]) == 0
    rows = [r for r in read_rows(short.metrics) if r["kind"] == "val"]
    assert list(short.all_kept()) == sorted(best_steps("cross_entropy", rows, "transductive", "accuracy")[:3])

    for which in ("best", "ensemble"):
        assert evaluate.main(["whole", "--checkpoint", which, "--episodes", "8", "--out", f"{which}.json"]) == 0
    one, several = (json.loads((in_tmp / f"{which}.json").read_text()) for which in ("best", "ensemble"))
    assert several["ensemble_of_steps"] == wanted
    assert several["checkpoint"] == "ensemble"
    assert "ensemble_of_steps" not in one
    assert several["test"]["transductive"]["episodes"] == 8


def test_without_an_ensemble_that_is_said(in_tmp: Path, capsys: Any) -> None:
    write_folder(in_tmp / "data")
    assert meta_train.main(options(IMAGES, dataset="folder:data", image_size=8, iterations=1, out="run")) == 0
    assert not RunFolder(in_tmp / "run").all_kept()
    capsys.readouterr()
    assert evaluate.main(["run", "--checkpoint", "ensemble"]) == 2
    one_line(capsys, "checkpoint: run kept no ensemble", "metaft.meta_train --keep-best 5 keeps")
    more = options(IMAGES, dataset="folder:data", image_size=8, iterations=1, out="several", keep_best=3)
    assert meta_train.main(more) == 0
    capsys.readouterr()
    assert evaluate.main(["several", "--checkpoint", "ensemble"]) == 2
    one_line(
        capsys, "several kept no ensemble; it was to keep 3 checkpoints, one at each validation, and has come to 1"
    )


@pytest.mark.parametrize("name", ["maml", "protonet", "baseline"])
def test_the_mean_of_the_outputs_decides(name: str) -> None:
    data = pool()
    source = data.source(ways=2, shots=1, query_shots=3)
    model = models.build("conv4", ways=2, shape=data.shape, width=4, seed=0)
    member = algorithms.build(name, model, {"loss": "cross_entropy"})
    starts = tuple(member.init(seed) for seed in range(3))
    generator = torch.Generator().manual_seed(0)
    for meta, _ in starts:
        for value in meta.values():
            value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    steps = 2
    how: Any = {"split": "test", "seed": 1, "episodes": 5, "steps": steps}
    with one_thread():
        alone = score_episodes(engines.Threads(1, 1), member, *starts[0], source, **how)
        same = score_episodes(engines.Threads(1, 1), member, *starts[0], source, others=(starts[0],) * 2, **how)
        several = score_episodes(engines.Processes(2, 1), member, *starts[0], source, others=starts[1:], **how)
    assert torch.equal(alone, same)
    tasks = source.episodes(1, "test", range(5))
    for i in range(5):
        task = type(tasks)(*[v[i] for v in tasks])
        outputs = []
        for meta, state in starts:
            with torch.no_grad():
                fast = member.adapt(
                    meta, state, task.support_x, task.support_y, task.key, ways=2, steps=steps, trajectory=True
                )
                last = at_step(fast, steps if name != "protonet" else 0)
                outputs.append([member.predict(last, task.query_x, norm) for norm in ("transductive", "inductive")])
        for mode in (0, 1):
            mean = torch.stack([output[mode] for output in outputs]).mean(0)
            assert several[i, mode, -1] == float(figure("cross_entropy", mean, task.query_y))
