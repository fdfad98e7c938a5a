"""The training loop: closed forms of its parts, and runs that are stopped anywhere and end with the same bytes."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import images, pool, remains, sinusoid, untimed

from metaft import meta_train
from metaft.config import MetaTrainConfig, Settled, read_toml
from metaft.errors import CheckpointError, Interrupted, MetaftError, NonFiniteError
from metaft.meta_train import resume_run, run
from metaft.outer import MetaGradient
from metaft.outer.update import Outer, outer_lr
from metaft.runs import checkpoint, report, training
from metaft.runs import folder as run_module
from metaft.runs.assemble import assemble
from metaft.runs.folder import RunFolder, read_rows
from metaft.runs.snapshot import Position, Snapshot, load_snapshot, save_snapshot
from metaft.tasks.pool import ClassEpisodes
from metaft.types import NORMS, Norm


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest of a small run; `test_commands` draws."""
    monkeypatch.setattr(report, "draw_pictures", lambda *_: [])


# ---- schedule, clipping, optimiser --------------------------------------------------------------------------------


def settled(**changes: Any) -> Settled:
    return helpers.settled(**{"iterations": 8, "outer_lr": 0.5, "outer_schedule": "constant", **changes})


def test_outer_learning_rate_in_closed_form():
    steps = range(8)
    assert [outer_lr(settled(), s) for s in steps] == [0.5] * 8
    linear = settled(outer_schedule="linear")
    assert [outer_lr(linear, s) for s in steps] == [0.5 * (1 - s / 8) for s in steps]
    cosine = settled(outer_schedule="cosine")
    assert [outer_lr(settled(outer_schedule="step:every=0.5,factor=0.2"), s) for s in steps] == [0.5] * 4 + [0.1] * 4
    half = math.sqrt(0.5)
    assert [outer_lr(cosine, s) for s in (0, 2, 4, 6, 8)] == pytest.approx(
        [0.5, 0.25 * (1 + half), 0.25, 0.25 * (1 - half), 0.0], abs=1e-15
    )


def sgd_step(grads: dict[str, list[float]], step: int = 0, **changes: Any) -> dict[str, list[float]]:
    """How far one SGD step at rate 0.5 moves parameters that start at 1."""
    meta = {name: torch.ones(len(g)) for name, g in grads.items()}
    outer = Outer(settled(outer_optimizer="sgd", **changes), meta)
    outer.step({name: torch.tensor(g) for name, g in grads.items()}, step)
    assert all(bool((p == 1).all()) for p in meta.values()), "the caller's tensors were changed"
    return {name: ((1 - p) / 0.5).tolist() for name, p in outer.meta.items()}


def test_a_step_without_clipping_follows_the_gradient_at_the_schedules_rate():
    assert sgd_step({"a": [3.0, -4.0], "b": [12.0]}) == {"a": [3.0, -4.0], "b": [12.0]}
    assert sgd_step({"a": [4.0]}, step=6, outer_schedule="linear") == {"a": [1.0]}


def test_clipping_by_value():
    assert sgd_step({"a": [3.0, -4.0, 1.0], "b": [12.0]}, clip_value=2.0) == {"a": [2.0, -2.0, 1.0], "b": [2.0]}


def test_clipping_by_norm_is_over_all_parameters_and_never_scales_up():
    assert sgd_step({"a": [3.0, -4.0], "b": [12.0]}, clip_norm=6.5) == {"a": [1.5, -2.0], "b": [6.0]}
    assert sgd_step({"a": [3.0, -4.0], "b": [12.0]}, clip_norm=14.0) == {"a": [3.0, -4.0], "b": [12.0]}
    assert sgd_step({"a": [0.0]}, clip_norm=1.0) == {"a": [0.0]}


def test_clipping_by_value_comes_before_clipping_by_norm():
    assert sgd_step({"a": [30.0], "b": [3.0]}, clip_value=4.0, clip_norm=2.5) == {"a": [2.0], "b": [1.5]}


def test_adam_in_closed_form():
    """The first step of Adam moves each parameter by the rate, whatever the gradient's size."""
    outer = Outer(settled(outer_lr=0.25), {"a": torch.zeros(3)})
    outer.step({"a": torch.tensor([7.0, -0.01, 0.0])}, 0)
    assert outer.meta["a"].tolist() == pytest.approx([-0.25, 0.25, 0.0], rel=1e-5)


@pytest.mark.parametrize(("kind", "rule"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_outer_optimiser_has_the_bits_of_torchs_class(kind: Any, rule: Any, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in (("a", (5, 3)), ("b", ()))}
    outer = Outer(settled(outer_optimizer=kind, outer_lr=1e-3), start)
    theirs = {name: p.clone() for name, p in start.items()}
    optimizer = rule(theirs.values(), lr=1e-3)
    for step in range(5):
        grads = {name: torch.randn(p.shape, generator=generator).to(dtype) for name, p in start.items()}
        outer.step(grads, step)
        for name, p in theirs.items():
            p.grad = grads[name]
        optimizer.step()
        assert all(torch.equal(outer.meta[name], p) for name, p in theirs.items())
        assert all(torch.equal(outer.gradient[name], g) for name, g in grads.items())
    moments = {f"{name}/{slot}": v for name, p in theirs.items() for slot, v in optimizer.state[p].items()}
    moments = {key: value for key, value in moments.items() if value is not None}
    assert outer.moments().keys() == moments.keys()
    assert all(torch.equal(outer.moments()[key], value) for key, value in moments.items())


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_moments_make_the_optimiser_whole_again(kind: Any):
    config = settled(outer_optimizer=kind, outer_schedule="cosine", clip_norm=3.0)
    generator = torch.Generator().manual_seed(0)
    grads = [{"a/x": torch.randn(3, generator=generator), "b": torch.randn((), generator=generator)} for _ in range(6)]
    whole = Outer(config, {"a/x": torch.ones(3), "b": torch.tensor(2.0)})
    for step in range(3):
        whole.step(grads[step], step)
    again = Outer(config, whole.meta, whole.moments())
    for step in range(3, 6):
        whole.step(grads[step], step)
        again.step(grads[step], step)
    assert whole.moments().keys() == again.moments().keys()
    assert bool(whole.moments()) == (kind == "adam")
    for mine, theirs in ((whole.meta, again.meta), (whole.moments(), again.moments())):
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), name


def test_moments_of_another_model_are_refused():
    with pytest.raises(CheckpointError, match="'b/exp_avg' belongs to no meta-parameter"):
        Outer(settled(), {"a": torch.ones(1)}, {"b/exp_avg": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"moments of 'a' are \['exp_avg'\], not Adam's"):
        Outer(settled(), {"a": torch.ones(1)}, {"a/exp_avg": torch.ones(1)})


def test_a_snapshot_comes_back(tmp_path: Path):
    folder = RunFolder.create(tmp_path, "")
    position = Position(step=5, evaluated=4, best=0.1 + 0.2, best_step=4, window=((0.1, 1 / 3), (1e-300, 0.0)))
    ones = {"a/b": torch.rand(2, dtype=torch.float64)}
    save_snapshot(folder, Snapshot(ones, {"s": torch.ones(())}, {"a/b/step": torch.tensor(5.0)}, position, {"x": 1}))
    back = load_snapshot(folder.last)
    assert back.position == position
    assert torch.equal(back.meta["a/b"], ones["a/b"])
    assert back.state == {"s": torch.ones(())}
    assert back.optimizer == {"a/b/step": torch.tensor(5.0)}
    assert back.header["x"] == 1
    save_snapshot(folder, dataclasses.replace(back, position=Position(step=6)))
    assert math.isnan(load_snapshot(folder.last).position.best)
    assert load_snapshot(folder.previous).position.step == 5


# ---- rows and the choice of the best ------------------------------------------------------------------------------


def rows(path: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_rows(path / "metrics.jsonl") if r["kind"] == kind]


def test_a_row_is_the_mean_over_its_window(tmp_path: Path):
    run(sinusoid(tmp_path / "each", iterations=25, log_every=1, eval_every=100, checkpoint_every=100))
    run(sinusoid(tmp_path / "ten", iterations=25, log_every=10, eval_every=100, checkpoint_every=4))
    each = rows(tmp_path / "each", "train")
    ten = rows(tmp_path / "ten", "train")
    assert [r["step"] for r in each] == list(range(1, 26))
    assert [r["step"] for r in ten] == [10, 20, 25]
    assert len({r["loss"] for r in each}) == 25
    for row, first in zip(ten, (0, 10, 20), strict=True):
        window = each[first : row["step"]]
        for name in ("loss", "mse"):
            assert row[name] == math.fsum(r[name] for r in window) / len(window)


def test_validations_come_on_time_and_at_the_protocol(tmp_path: Path):
    found = {}
    for modes in ("training", "both"):
        run(sinusoid(tmp_path / modes, eval_modes=modes, batch_norm="inductive"))
        found[modes] = rows(tmp_path / modes, "val")
        assert [r["step"] for r in found[modes]] == [3, 6, 7]
    for deciding, both in zip(*found.values(), strict=True):
        assert "transductive" not in deciding
        for mode in ("transductive", "inductive"):
            assert both[mode]["episodes"] == 40
            assert len(both[mode]["mse_per_step"]) == 3
            assert both[mode]["mse"] == both[mode]["mse_per_step"][-1]
        assert deciding["inductive"].keys() == both["inductive"].keys()
        for figure, value in deciding["inductive"].items():
            whole = both["inductive"][figure]
            assert value == pytest.approx(whole[-1:] if isinstance(whole, list) else whole)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.slow
def test_each_part_of_a_run_draws_its_own_classes_by_its_own_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rotate: bool
):
    """Validation and test swapped, or on the training seed, would flatter every figure without a sound."""
    asked: list[tuple[Any, ...]] = []
    episodes = ClassEpisodes.episodes

    def recording(source: ClassEpisodes, seed: int, split: Any, indices: Any) -> Any:
        shape = (source.ways, source.shots, source.query_shots, source.rotate, source.splits)
        asked.append((split, seed, *shape, indices[0], indices[-1] + 1))
        return episodes(source, seed, split, indices)

    monkeypatch.setattr(ClassEpisodes, "episodes", recording)
    changes = {"iterations": 3, "seed": 7, "eval_seed": 8, "test_shots": 2, "test_query_shots": 3, "rotate": rotate}
    run(images(tmp_path / "r", **changes), dataset=pool())
    train = [("train", 7, 3, 1, 2, rotate, ("train",), 2 * i, 2 * i + 2) for i in range(3)]
    val = ("val", 8, 3, 2, 3, rotate, ("val",), 0, 4)
    test = ("test", 8, 3, 2, 3, rotate, ("test",), 0, 4)
    again = (*train[0][:-1], 1)  # a task of the first step, by whose images its dead units are counted
    assert asked.pop(1) == again
    assert asked[:5] == [*train[:2], val, train[2], val]
    assert asked[5:] == [test, test], "scores, and pixel nearest neighbour on the same episodes"


@pytest.mark.slow
def test_batch_norm_reaches_the_algorithm(tmp_path: Path):
    ends = {}
    for norm in ("transductive", "inductive"):
        run(images(tmp_path / norm, batch_norm=norm, iterations=2), dataset=pool())
        ends[norm] = load_snapshot(tmp_path / norm / "checkpoints/last.safetensors").meta
        assert assemble(images(batch_norm=norm), dataset=pool()).algorithm.norm == norm
    assert any(not torch.equal(ends["transductive"][k], v) for k, v in ends["inductive"].items())


def fake_scores(monkeypatch: pytest.MonkeyPatch, values: list[tuple[float, float]]) -> None:
    """The validations find these (transductive, inductive) figures after the last inner step."""
    left = list(values)

    def score(*_: Any, episodes: int, norms: Sequence[Norm], each_step: bool, **__: Any) -> torch.Tensor:
        assert not each_step
        found = dict(zip(NORMS, left.pop(0), strict=True))
        return torch.tensor([[found[norm]] for norm in norms], dtype=torch.float64).expand(episodes, -1, 1)

    monkeypatch.setattr(training, "score_episodes", score)


@pytest.mark.parametrize(
    ("mode", "best"),
    [("transductive", 4), ("inductive", 2)],  # the first of equals
)
def test_the_best_is_the_highest_accuracy_in_the_mode_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, best: int
):
    fake_scores(monkeypatch, [(0.2, 0.9), (0.7, 0.9), (0.7, 0.1)])
    result = run(images(tmp_path / "r", batch_norm=mode), dataset=pool())
    assert result["best_step"] == best
    snapshot = load_snapshot(tmp_path / "r/checkpoints/best.safetensors")
    assert (snapshot.position.step, snapshot.position.best_step) == (best, best)
    assert snapshot.position.best == pytest.approx({"transductive": 0.7, "inductive": 0.9}[mode])
    assert load_snapshot(tmp_path / "r/checkpoints/last.safetensors").position.best_step == best


def test_the_best_of_a_regression_is_the_lowest_error_and_never_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_scores(monkeypatch, [(math.nan, 0.0), (0.5, 0.0), (0.6, 0.0)])
    assert run(sinusoid(tmp_path / "r"))["best_step"] == 6


def test_the_meta_test_is_of_the_best_checkpoint(tmp_path: Path):
    """With a rate that ruins the later steps, best and last differ, and the figures are the best one's."""
    config = sinusoid(tmp_path / "r", outer_optimizer="sgd", outer_lr=0.001, outer_schedule="constant")
    step = Outer.step

    def ruin(self: Outer, grads: Any, number: int) -> None:
        step(self, {k: -100 * g for k, g in grads.items()} if number > 3 else grads, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outer, "step", ruin)
        result = run(config)
    assert result["best_step"] == 3
    from metaft.config import EvaluateConfig
    from metaft.evaluate import run as evaluate

    best = evaluate(tmp_path / "r")
    last = evaluate(tmp_path / "r", EvaluateConfig(checkpoint="last", out=str(tmp_path / "last.json")))
    assert best["test"] == result["test"]
    assert last["test"]["transductive"]["mse"] > best["test"]["transductive"]["mse"]


# ---- the same bytes, however it is stopped ------------------------------------------------------------------------


def checks(monkeypatch: pytest.MonkeyPatch, allowed: float) -> list[int]:
    """A signal that comes just before the run asks for the time number `allowed` + 1; returns the count of asks."""
    asked = [0]

    def check(self: Any, message: str) -> None:
        asked[0] += 1
        if asked[0] > allowed:
            raise Interrupted(message, 15)

    monkeypatch.setattr(meta_train.StopSignals, "check", check)
    return asked


@pytest.mark.slow
def test_stopped_at_any_safe_point_and_resumed_it_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Safe points are after every step, in the middle of validations and in the middle of the meta-test."""
    asked = checks(monkeypatch, math.inf)
    run(sinusoid(tmp_path / "whole"))
    whole = remains(tmp_path / "whole")
    assert asked[0] == 7 + 3 * 2 + 2
    for allowed in range(asked[0]):
        path = tmp_path / str(allowed)
        checks(monkeypatch, allowed)
        with pytest.raises(Interrupted, match=f"go on with: python -m metaft.meta_train --resume {path}$"):
            run(sinusoid(path))
        assert not (path / "result.json").exists()
        checks(monkeypatch, math.inf)
        resume_run(path)
        assert remains(path) == whole, allowed


@pytest.mark.parametrize(
    ("config", "dataset"),
    [
        (sinusoid(outer_optimizer="sgd", algorithm="fomaml", outer_schedule="linear", clip_norm=1.0), None),
        (images(algorithm="protonet"), pool()),
        (images(batch_norm="inductive", threads=2), pool()),
        (sinusoid(algorithm="reptile", hyper=("keep_moments=true",)), None),
    ],
    ids=["sgd", "protonet", "threads", "state"],
)
@pytest.mark.slow
def test_stopped_again_and_again_it_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: MetaTrainConfig, dataset: Any
):
    run(dataclasses.replace(config, out=str(tmp_path / "whole")), dataset=dataset)
    path = tmp_path / "often"
    checks(monkeypatch, 2)
    with pytest.raises(Interrupted):
        run(dataclasses.replace(config, out=str(path)), dataset=dataset)
    times = 0
    while not (path / "result.json").exists():
        checks(monkeypatch, 3)  # a whole validation of two chunks, and a step
        times += 1
        with contextlib.suppress(Interrupted):
            resume_run(path, dataset=dataset)
    assert times > 2
    assert remains(path) == remains(tmp_path / "whole")


def test_a_run_cut_short_between_two_rows_still_logs_its_last_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checks(monkeypatch, 6)  # four steps and a validation of two chunks: step 5 is not one of log_every = 2
    with pytest.raises(Interrupted):
        run(sinusoid(tmp_path / "r"))
    checks(monkeypatch, math.inf)
    assert load_snapshot(tmp_path / "r/checkpoints/last.safetensors").position.step == 5
    resume_run(tmp_path / "r", sinusoid(iterations=5))
    rows = read_rows(tmp_path / "r/metrics.jsonl")
    assert [r["step"] for r in rows if r["kind"] == "train"] == [2, 4, 5]


class PowerCut(BaseException):
    """Not an Exception: no handler of the product may survive it."""


class Disk:
    """Counts what a run does to the disk and cuts the power at one of these moments: nothing is written from then on.

    A write at that moment leaves the first half of its data.
    """

    def __init__(self, patch: pytest.MonkeyPatch, cut_at: float = math.inf) -> None:
        self.count, self.cut_at = 0, cut_at
        for name in ("replace", "fsync"):
            patch.setattr(os, name, self._before(getattr(os, name)))
        for module in (checkpoint, run_module):
            patch.setattr(module, "open", self._open, raising=False)

    def tick(self) -> None:
        self.count += 1
        if self.count >= self.cut_at:
            raise PowerCut

    def _before(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def ticked(*arguments: Any) -> Any:
            self.tick()
            return act(*arguments)

        return ticked

    def _open(self, *arguments: Any, **options: Any) -> Any:
        self.tick()
        return Writer(builtins.open(*arguments, **options), self)


class Writer:
    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk
        self.flush, self.fileno = file.flush, file.fileno

    def write(self, data: Any) -> None:
        try:
            self.disk.tick()
        except PowerCut:
            self.file.write(data[: len(data) // 2])
            raise
        self.file.write(data)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def power_cuts(tmp_path: Path, config: MetaTrainConfig, every: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        run(dataclasses.replace(config, out=str(tmp_path / "whole")))
    whole = remains(tmp_path / "whole")
    assert disk.count > 60
    resumed = 0
    for moment in range(1, disk.count + 1, every):
        path = tmp_path / str(moment)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, cut_at=moment)
            with pytest.raises(PowerCut):
                run(dataclasses.replace(config, out=str(path)))
        if not (path / "config.toml").exists():  # before the run had begun
            continue
        resume_run(path)
        assert remains(path) == whole, moment
        resumed += 1
    assert resumed > 0.8 * disk.count / every


@pytest.mark.slow
def test_cut_off_at_moments_of_the_disk_it_ends_with_the_same_bytes(tmp_path: Path):
    """Between the two renames of a checkpoint, between best and last, in the middle of a row, ..."""
    power_cuts(tmp_path, sinusoid(eval_episodes=4, test_episodes=4), every=7)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("METAFT_FAULTS") != "full", reason="takes minutes: make test-faults")
def test_cut_off_at_every_moment_of_the_disk_it_ends_with_the_same_bytes(tmp_path: Path):
    power_cuts(tmp_path, sinusoid(eval_episodes=4, test_episodes=4), every=1)


def test_cut_off_between_the_two_renames_the_former_checkpoint_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = sinusoid(tmp_path / "r")
    run(dataclasses.replace(config, out=str(tmp_path / "whole")))
    run(config)
    folder = RunFolder(tmp_path / "r")
    folder.last.rename(folder.checkpoints / "next.safetensors")
    resume_run(folder.path)
    assert f"resuming {folder.path} at step 6" in capsys.readouterr().err
    assert remains(folder.path) == remains(tmp_path / "whole")


@pytest.mark.slow
def test_threads_and_their_number_leave_no_trace(tmp_path: Path):
    for threads in (1, 2, 3):
        run(images(tmp_path / str(threads), threads=threads, task_chunk=2, meta_batch=5), dataset=pool())
    one = RunFolder(tmp_path / "1")
    for threads in (2, 3):
        other = RunFolder(tmp_path / str(threads))
        assert other.metrics.read_bytes() == one.metrics.read_bytes()
        for mine, theirs in ((one.last, other.last), (one.best, other.best)):
            a, b = checkpoint.load(mine)[0], checkpoint.load(theirs)[0]
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)
        assert untimed(json.loads(one.result.read_text())) == untimed(json.loads(other.result.read_text()))


@pytest.mark.slow
def test_a_run_writes_down_how_it_maps_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So that a resume has the same bits wherever it is, and `--engine tune` is asked once."""
    run(images(tmp_path / "auto", threads=2, meta_batch=5), dataset=pool())
    assert read_toml(tmp_path / "auto/config.toml")["task_chunk"] == 3  # half of the tasks for each

    found = {("threads", 2): 0.1, ("vmap", None): 0.2}
    monkeypatch.setattr("metaft.runs.compute.tune", lambda *_, **__: found)
    run(images(tmp_path / "tuned", engine="tune", iterations=2), dataset=pool())
    settings = read_toml(tmp_path / "tuned/config.toml")
    assert (settings["engine"], settings["task_chunk"]) == ("threads", 2)
    monkeypatch.setattr("metaft.runs.compute.tune", lambda *_, **__: pytest.fail("tuned once more"))
    resume_run(tmp_path / "tuned", dataset=pool())
    settings = read_toml(tmp_path / "tuned/config.toml")
    assert (settings["engine"], settings["task_chunk"]) == ("threads", 2)


def test_a_chunk_is_forgotten_with_the_kind_of_engine_that_it_was_chosen_for(tmp_path: Path):
    config = images(tmp_path / "run", threads=2, meta_batch=5, engine="threads", iterations=1)
    run(config, dataset=pool())
    assert read_toml(tmp_path / "run/config.toml")["task_chunk"] == 3
    longer = dataclasses.replace(config, out=None, iterations=2, engine="vmap", threads=1)
    resume_run(tmp_path / "run", longer, dataset=pool())
    assert "task_chunk" not in read_toml(tmp_path / "run/config.toml")
    longer = dataclasses.replace(longer, iterations=3, engine="threads", task_chunk=2)
    resume_run(tmp_path / "run", longer, dataset=pool())
    assert read_toml(tmp_path / "run/config.toml")["task_chunk"] == 2


def test_another_seed_gives_another_run(tmp_path: Path):
    """The tests above compare bytes; this one says that the bytes are about something."""
    run(sinusoid(tmp_path / "0"))
    run(sinusoid(tmp_path / "1", seed=1))
    a, b = remains(tmp_path / "0"), remains(tmp_path / "1")
    assert all(a[name] != b[name] for name in a)


def test_resume_of_a_finished_run_repeats_the_meta_test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = run(sinusoid(tmp_path / "r"))
    before = remains(tmp_path / "r")
    (tmp_path / "r/result.json").unlink()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run was trained further")

    monkeypatch.setattr(training, "meta_gradient", never)
    monkeypatch.setattr(training, "score_episodes", never)
    assert untimed(resume_run(tmp_path / "r")) == untimed(first)
    assert remains(tmp_path / "r") == before


@pytest.mark.slow
def test_the_config_that_began_a_run_serves_to_resume_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From Python, with fields left open that the run folder has settled, and data of one's own."""
    config = images(tmp_path / "r", query_shots=None, test_query_shots=3, model=None)
    whole = run(dataclasses.replace(config, out=str(tmp_path / "whole")), dataset=pool())
    checks(monkeypatch, 2)
    with pytest.raises(Interrupted):
        run(config, dataset=pool())
    checks(monkeypatch, math.inf)
    assert untimed(resume_run(tmp_path / "r", config, dataset=pool())) == untimed(whole)
    with pytest.raises(MetaftError, match=r"^seed: .* started with 0, given 1"):
        resume_run(tmp_path / "r", dataclasses.replace(config, seed=1), dataset=pool())


def test_a_run_can_be_made_longer(tmp_path: Path):
    short = sinusoid(tmp_path / "r", outer_schedule="constant")
    run(short)
    result = resume_run(tmp_path / "r", dataclasses.replace(_config_of(tmp_path / "r"), iterations=10))
    assert result["iterations"] == 10
    run(dataclasses.replace(short, out=str(tmp_path / "long"), iterations=10))
    mine, theirs = (
        load_snapshot(path / "checkpoints/last.safetensors") for path in (tmp_path / "r", tmp_path / "long")
    )
    assert mine.position.step == 10
    assert all(torch.equal(mine.meta[name], theirs.meta[name]) for name in theirs.meta)


def _config_of(path: Path) -> MetaTrainConfig:
    from metaft.runs.opened import open_run

    return open_run(path)[1]


# ---- what is not finite -------------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, at: int, change: Callable[[MetaGradient], MetaGradient]) -> None:
    real = training.meta_gradient

    def meta_gradient(*arguments: Any, step: int, **more: Any) -> MetaGradient:
        result = real(*arguments, step=step, **more)
        return change(result) if step == at else result

    monkeypatch.setattr(training, "meta_gradient", meta_gradient)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("the loss is", lambda r, v: r._replace(metrics={**r.metrics, "loss": v})),
        ("the meta-gradient is not finite", lambda r, v: r._replace(grads={k: g * v for k, g in r.grads.items()})),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, what: str, change: Any
):
    spoil(monkeypatch, 4, lambda result: change(result, value))
    last = tmp_path / "r/checkpoints/last.safetensors"
    with pytest.raises(NonFiniteError, match=rf"^step 5: {what}.* is kept in {last}.*--inner-lr.*--clip-norm") as e:
        run(sinusoid(tmp_path / "r"))
    assert e.value.status == 1
    snapshot = load_snapshot(last)
    assert snapshot.position.step == 4
    assert all(bool(t.isfinite().all()) for t in (*snapshot.meta.values(), *snapshot.optimizer.values()))
    monkeypatch.undo()
    monkeypatch.setattr(report, "draw_pictures", lambda *_: [])
    resume_run(tmp_path / "r")  # what was kept is good: without the trouble it goes on
    run(sinusoid(tmp_path / "whole"))
    assert remains(tmp_path / "r") == remains(tmp_path / "whole")


def test_the_first_step_too_leaves_a_checkpoint(tmp_path: Path):
    with pytest.raises(NonFiniteError, match=r"^step 1: .*is kept in .*last"):
        run(sinusoid(tmp_path / "r", inner_lr=1e38))
    assert load_snapshot(tmp_path / "r/checkpoints/last.safetensors").position.step == 0


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(sinusoid(tmp_path / "whole"))
    real = checkpoint.write_atomically

    def full(path: Path, data: bytes) -> None:
        if "safetensors" in path.name and load_snapshot(tmp_path / "r/checkpoints/last.safetensors").position.step == 4:
            raise CheckpointError(f"{path}: cannot be written (No space left on device)")
        real(path, data)

    checks(monkeypatch, 2)
    with pytest.raises(Interrupted):
        run(sinusoid(tmp_path / "r"))
    checks(monkeypatch, math.inf)
    monkeypatch.setattr(checkpoint, "write_atomically", full)
    with pytest.raises(CheckpointError, match="No space left"):
        resume_run(tmp_path / "r")
    assert load_snapshot(tmp_path / "r/checkpoints/last.safetensors").position.step == 4
    monkeypatch.setattr(checkpoint, "write_atomically", real)
    resume_run(tmp_path / "r")
    assert remains(tmp_path / "r") == remains(tmp_path / "whole")
