"""Adapting by the run's own inner loop: the meta-test's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapting import GREY, OWN, Seen, Text, learned, result_of
from helpers import (
    ONE_PASS,
    files_of,
    inner_words,
    meta_trained,
    pixels_of,
    same,
    words,
    write_target,
)
from torch import Tensor

import metaft
from metaft import adapt, models
from metaft.algorithms import ALGORITHMS, hyper_parameters
from metaft.finetune import study
from metaft.models.stored import StoredNorm
from metaft.runs.folder import read_rows
from metaft.runs.snapshot import load_snapshot
from metaft.types import Fast, Params


def meta_test(name: str, meta: Params, x: Tensor, y: Tensor, *, ways: int, steps: int) -> tuple[Any, Fast]:
    """The algorithm over a model of its own, adapted to one task as in the meta-test."""
    model = models.build("conv4", ways=ways, shape=(1, 8, 8), width=4, seed=99)
    hyper = {k: v for k, v in OWN[name].items() if k != "test_inner_steps"}
    algorithm = ALGORITHMS[name](model, **hyper)
    return algorithm, algorithm.adapt(meta, {}, x, y, torch.tensor(0), ways=ways, steps=steps)


def support_and_test(data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """What the files of train/ and test/ are to a run, read without its code."""
    (train, labels), (test, _) = files_of(data / "train"), files_of(data / "test")
    x, query = (GREY(pixels_of(files)) for files in (train, test))
    return x, torch.from_numpy(labels), query


def parts_of(fast: Fast) -> tuple[Params, Params]:
    """The parameters of the backbone and of the head of a classifier that holds these fast weights."""
    body = {k: v for k, v in fast.params.items() if not k.startswith("head.")}
    head = {k.removeprefix("head."): v for k, v in fast.params.items() if k.startswith("head.")}
    learned = {"prototypes": "points", "support": "support"}
    return body, {learned[k]: v for k, v in fast.extra.items() if k in learned} if fast.extra else head


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_inner_loop_is_that_of_the_meta_test_to_the_bit(
    name: str, runs: dict[str, Path], data: Path, tmp_path: Path, capsys: Text
) -> None:
    assert adapt.main(inner_words(runs[name], data, tmp_path / "o")) == 0
    steps = OWN[name].get("test_inner_steps", 0)
    x, y, query = support_and_test(data)
    algorithm, fast = meta_test(name, learned(runs[name]), x, y, ways=3, steps=steps)
    made = metaft.load(tmp_path / "o")
    body, head = parts_of(fast)
    assert same(dict(made.body.named_parameters()), body)
    assert same(dict(made.head.named_parameters()), head)
    layers = [layer for layer in made.body.modules() if isinstance(layer, StoredNorm)]
    for layer, (mean, var) in zip(layers, fast.moments, strict=True):
        assert torch.equal(layer.mean, mean)
        assert torch.equal(layer.var, var)
    files, labels = files_of(data / "test")
    logits = made(pixels_of(files)).detach()
    torch.testing.assert_close(logits, algorithm.predict(fast, query, "inductive"), rtol=0, atol=ONE_PASS)
    assert (logits - algorithm.predict(fast, query, "transductive")).abs().max() > 1e-3
    result = result_of(tmp_path / "o")
    assert result["accuracy"] == float((logits.argmax(-1).numpy() == labels).mean())
    assert (result["method"], result["inner_steps"], result["epochs_run"], result["notes"]) == (
        *("inner", steps, steps),
        [],
    )
    assert [result[f"{part}_images"] for part in ("train", "val", "test")] == [30, 0, 15]
    assert f"adapted by {steps} steps of the run's own inner loop" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_losses_along_the_inner_loop(name: str, runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    steps = 3 if "inner_lr" in hyper_parameters(name) else 0
    given = {"inner_steps": steps} if steps else {}
    assert adapt.main(inner_words(runs[name], data, tmp_path / "o", **given)) == 0
    rows = [row for row in read_rows(tmp_path / "o/metrics.jsonl") if row["start"] == "meta-learned"]
    x, y, _ = support_and_test(data)
    expected = []
    for step in range(steps + 1):
        algorithm, fast = meta_test(name, learned(runs[name]), x, y, ways=3, steps=step)
        expected.append(float(F.cross_entropy(algorithm.predict(fast, x, "transductive"), y)))
    assert [row["epoch"] for row in rows] == list(range(steps + 1))
    assert [row["loss"] for row in rows] == pytest.approx(expected, abs=ONE_PASS)
    assert result_of(tmp_path / "o")["inner_steps"] == steps


@pytest.mark.parametrize("name", ["maml", "fomaml", "anil", "meta-sgd", "maml++", "meta-curvature"])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.slow
def test_with_another_number_of_classes_each_starts_from_the_mean_head_row(
    name: str, classes: int, runs: dict[str, Path], tmp_path: Path
) -> None:
    data = write_target(tmp_path / "d", {"train": 3, "test": 2}, classes="abcde"[:classes])
    meta = learned(runs[name])
    rows = {k: v.double().numpy().mean(0) for k, v in meta.items() if k.startswith("head.") and len(v) == 3}
    assert np.abs(rows["head.weight"] - meta["head.weight"][0].numpy()).max() > 0.01
    assert adapt.main(inner_words(runs[name], data, tmp_path / "0", inner_steps=0)) == 0
    start = dict(metaft.load(tmp_path / "0").head.named_parameters())
    for part in (k for k in rows if k in ("head.weight", "head.bias")):
        row = rows[part]
        found = start[part.removeprefix("head.")].detach().numpy()
        assert found.shape == (classes, *row.shape)
        for own in found:
            np.testing.assert_allclose(own, row, rtol=0, atol=1e-7)
    assert adapt.main(inner_words(runs[name], data, tmp_path / "2", inner_steps=2)) == 0
    whole = meta | {k: torch.from_numpy(np.stack([row] * classes)).float() for k, row in rows.items()}
    x, y, query = support_and_test(data)
    algorithm, fast = meta_test(name, whole, x, y, ways=classes, steps=2)
    made = metaft.load(tmp_path / "2")
    for part, expected in parts_of(fast)[1].items():
        # Two steps from a start that differs by the rounding of the mean row; another row is 0.01 away, as seen above.
        torch.testing.assert_close(made.head.get_parameter(part).detach(), expected, rtol=0, atol=ONE_PASS)
    logits = made(pixels_of(files_of(data / "test")[0]))
    torch.testing.assert_close(logits.detach(), algorithm.predict(fast, query, "inductive"), rtol=0, atol=10 * ONE_PASS)
    (note,) = result_of(tmp_path / "2")["notes"]
    assert note == f"the run learned 3-way tasks: each of the {classes} classes starts from its mean head row"


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_moments_that_reptile_kept_of_head_rows_are_the_mean_ones_too(
    optimizer: str, squares: Path, tmp_path: Path
) -> None:
    hyper: dict[str, Any] = {"inner_lr": 0.01, "inner_steps": 3, "inner_optimizer": optimizer}
    run = meta_trained(tmp_path / "r", squares, algorithm="reptile", hyper="keep_moments=true", **hyper)
    data = write_target(tmp_path / "d", {"train": 3, "test": 2}, classes="abcde")
    assert adapt.main(inner_words(run, data, tmp_path / "o", inner_steps=2)) == 0
    snapshot = load_snapshot(run / "checkpoints/best.safetensors")
    kept = {k: v for k, v in snapshot.state.items() if k.startswith("head.")}
    assert kept and all(len(v) == 3 and bool((v != v[0]).any()) for v in kept.values())

    def five(tensors: Params) -> Params:
        return {k: torch.stack([v.mean(0)] * 5) if k.startswith("head.") else v for k, v in tensors.items()}

    model = models.build("conv4", ways=5, shape=(1, 8, 8), width=4, seed=99)
    algorithm = ALGORITHMS["reptile"](model, keep_moments=True, **hyper)
    x, y, _ = support_and_test(data)
    meta, state = five(snapshot.meta), five(snapshot.state)
    fast = algorithm.adapt(meta, state, x, y, torch.tensor(0), ways=5, steps=2)
    made = metaft.load(tmp_path / "o")
    for part, expected in parts_of(fast)[1].items():
        torch.testing.assert_close(made.head.get_parameter(part).detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["boil", "cavia"])
def test_a_head_that_stays_as_it_is_cannot_learn_another_number_of_classes(
    name: str, runs: dict[str, Path], data: Path, tmp_path: Path, capsys: Text
) -> None:
    other = write_target(tmp_path / "d", {"train": 3, "test": 2}, classes="abcde")
    assert adapt.main(inner_words(runs[name], other, tmp_path / "o")) == 2
    message = f"{name} keeps the head of its 3-way tasks as it is, so its inner loop cannot learn the 5 classes"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert adapt.main(words(runs[name], other, tmp_path / "o", epochs=1)) == 0


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"maml", "fomaml", "protonet"}))
def test_every_run_is_fine_tuned_from_its_backbone(
    name: str, runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen]
) -> None:
    assert adapt.main(words(runs[name], data, tmp_path / "o", epochs=1)) == 0
    assert fits[0].body
    assert same(fits[0].body, {k: learned(runs[name])[k] for k in fits[0].body})


@pytest.mark.parametrize("name", ["proto-maml", "unicorn-maml", "protonet", "matching-net", "baseline", "baseline++"])
def test_members_without_a_learned_head_need_no_head_rows(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    steps = 5 if "inner_lr" in hyper_parameters(name) else 0
    data = write_target(tmp_path / "d", {"train": 3, "test": 2}, classes="abcde")
    assert adapt.main(inner_words(runs[name], data, tmp_path / "o", **({"inner_steps": steps} if steps else {}))) == 0
    assert result_of(tmp_path / "o")["notes"] == []
    x, y, query = support_and_test(data)
    algorithm, fast = meta_test(name, learned(runs[name]), x, y, ways=5, steps=steps)
    logits = metaft.load(tmp_path / "o")(pixels_of(files_of(data / "test")[0]))
    torch.testing.assert_close(logits.detach(), algorithm.predict(fast, query, "inductive"), rtol=0, atol=ONE_PASS)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_random_start_of_the_inner_loop_is_the_algorithms_own_initialisation(
    name: str, runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = study.inner
    monkeypatch.setattr(study, "inner", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    assert adapt.main(inner_words(runs[name], data, tmp_path / "o", seed=8)) == 0
    fresh = models.build("conv4", ways=3, shape=(1, 8, 8), width=4, seed=8).params
    own = {k: v for k, v in OWN[name].items() if k != "test_inner_steps"}
    first, _ = ALGORITHMS[name](models.build("conv4", ways=3, shape=(1, 8, 8), width=4, seed=99), **own).init(8)
    assert first.keys() == learned(runs[name]).keys()
    fresh = {k: fresh[k][: len(v)] if k in fresh else v for k, v in first.items()}
    x, y, _ = support_and_test(data)
    _, fast = meta_test(name, fresh, x, y, ways=3, steps=OWN[name].get("test_inner_steps", 0))
    body, head = parts_of(fast)
    assert len(made) == 2
    assert same(dict(made[1].body.named_parameters()), body)
    assert same(dict(made[1].head.named_parameters()), head)
