"""Meta-steps over tensors that stay in place: the numbers of the eager loop, and what a recording may not change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
import toys
from helpers import SAME_RUN, images, pool, remains, rounded_alike, settled, sinusoid, untimed

from metaft import algorithms, engines
from metaft.algorithms import Algorithm
from metaft.cli import StopSignals
from metaft.config import Settled
from metaft.dist.ranks import ALONE
from metaft.errors import Interrupted, MetaftWarning, NonFiniteError
from metaft.meta_train import resume_run, run
from metaft.outer.static import StaticSteps, obstacle
from metaft.runs import report
from metaft.runs.folder import read_rows
from metaft.runs.snapshot import Position, Snapshot, load_snapshot
from metaft.runs.training import Eager
from metaft.tasks.pool import ClassEpisodes
from metaft.types import Batch, Episode, Params, Split

STEPS = 20


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_pictures", lambda *_: [])


@dataclasses.dataclass(frozen=True)
class Wide:
    """Tasks of a small pool in float64, so that two ways to one number can be told from two numbers."""

    inner: ClassEpisodes
    device: str = "cpu"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def episodes(self, seed: int, split: Split, indices: Sequence[int]) -> Episode:
        return self.gather(type(self).sent(self.inner.indices(seed, split, indices), self.device))

    def batches(self, seed: int, split: Split, indices: Sequence[int], size: int) -> Batch:
        return self.gather_batch(type(self).sent(self.inner.batch_indices(seed, split, indices, size), self.device))

    def indices(self, seed: int, split: Split, indices: Sequence[int]) -> Any:
        return self.inner.indices(seed, split, indices)

    def batch_indices(self, seed: int, split: Split, indices: Sequence[int], size: int) -> Any:
        return self.inner.batch_indices(seed, split, indices, size)

    def gather(self, drawn: Any) -> Episode:
        return type(self).widened(self.inner.gather(drawn))

    def gather_batch(self, drawn: Any) -> Batch:
        return type(self).widened(self.inner.gather_batch(drawn))

    @staticmethod
    def sent(drawn: Any, device: str) -> Any:
        return type(drawn)(*(t.to(device) for t in drawn))

    @staticmethod
    def widened(data: Any) -> Any:
        return type(data)(*(t.double() if t.is_floating_point() else t for t in data))


def source(device: str = "cpu", **changes: Any) -> Any:
    data = scenarios.noise_pool(classes=30, per_class=6).to(device)
    return Wide(data.source(ways=3, shots=1, query_shots=2, **{"rotate": True, **changes}), device)


def settings(**changes: Any) -> Settled:
    return settled(**{"ways": 3, "query_shots": 2, "meta_batch": 4, "iterations": STEPS, "outer_lr": 1e-3,
                      "log_every": 3, "eval_every": 7, "checkpoint_every": 10, **changes})  # fmt: skip


def begun(algorithm: Algorithm, device: str = "cpu") -> Snapshot:
    meta, state = ({k: v.to(device) for k, v in part.items()} for part in algorithm.init(0))
    return Snapshot(meta, state, {}, Position(), {})


def taken(steps: Any, config: Settled, first: int = 0) -> list[tuple[float, ...]]:
    rows: list[tuple[float, ...]] = []
    while first < config.outer.iterations:
        found = steps.advance(first)
        assert found.failure is None
        first += len(found.window)
        rows += found.window
    return rows


def walked(algorithm: Algorithm, config: Settled, **how: Any) -> tuple[Any, list[tuple[float, ...]]]:
    """All steps of a run: eager, or static with what `how` says."""
    with engines.engine("graph", chunk=how.pop("chunk", None)) as engine:
        made = how.pop("kind", StaticSteps)
        start, data = begun(algorithm), how.pop("source", None) or source()
        steps = made(config, engine, algorithm, data, start, *([ALONE] if made is Eager else []), **how)
        return steps, taken(steps, config)


def apart(found: Params, expected: Params) -> float:
    assert found.keys() == expected.keys()
    scale = max(float(v.abs().max()) for v in expected.values())
    return max(float((found[k] - v).abs().max()) for k, v in expected.items()) / scale


def alike(rows: Any, expected: Any, rel: float = 1e-9) -> bool:
    """Each loss and each figure."""
    return torch.allclose(torch.tensor(rows), torch.tensor(expected), rtol=rel, atol=1e-9)


REPTILE = {"inner_steps": 2, "inner_lr": 0.05, "keep_moments": True}
MEMBERS: dict[str, Callable[[], Algorithm]] = {
    "maml": lambda: algorithms.maml(scenarios.model(), inner_lr=0.1, inner_steps=2),
    "meta-sgd": lambda: algorithms.meta_sgd(scenarios.model(), inner_lr=0.1, norm="inductive"),
    "proto-maml": lambda: algorithms.proto_maml(scenarios.model("mlp")),
    "protonet": lambda: algorithms.protonet(scenarios.model("mlp")),
    "state": lambda: toys.with_state(scenarios.model("mlp"), "transductive"),
    "knobs": lambda: toys.multi_step(scenarios.model("mlp"), "transductive"),
    "task's own optimiser": lambda: algorithms.build("reptile", scenarios.model("mlp"), REPTILE),
    "batches": lambda: algorithms.build("baseline", scenarios.model("mlp"), {"classes": 10}),
}


UPDATES: list[dict[str, Any]] = [
    {"outer_schedule": "cosine"},
    {"outer_schedule": "linear", "clip_value": 0.05, "clip_norm": 0.1},
    {"outer_optimizer": "sgd", "outer_schedule": "constant", "clip_norm": 0.3},
]


# An update knows nothing of the member whose gradient it takes: two of them go through all updates, with a state and
# without, and the others share them out.
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (name, changes)
        for i, name in enumerate(MEMBERS)
        for j, changes in enumerate(UPDATES)
        if name in ("maml", "state") or (i - j) % len(UPDATES) == 0
    ],
)
@pytest.mark.slow
def test_twenty_static_steps_are_twenty_eager_ones_in_float64(name: str, changes: dict[str, Any]) -> None:
    algorithm, config = MEMBERS[name](), settings(**changes)
    (static, rows), (eager, expected) = (walked(algorithm, config, kind=kind) for kind in (StaticSteps, Eager))
    assert alike(rows, expected)
    assert apart(static.meta, eager.meta) < 1e-11
    assert apart(static.meta, begun(algorithm).meta) > 1e-6, "nothing was learned"
    assert apart({"": torch.ones(()), **static.state}, {"": torch.ones(()), **eager.state}) < 1e-11
    moments = eager.moments()
    assert bool(moments) == (config.outer.outer_optimizer == "adam")
    assert {k: v.dtype for k, v in static.moments().items()} == {k: v.dtype for k, v in moments.items()}
    assert apart({"": torch.ones(()), **static.moments()}, {"": torch.ones(()), **moments}) < 1e-11


@pytest.mark.filterwarnings("ignore::metaft.MetaftWarning")  # noise curves the wrong way for iMAML
@pytest.mark.parametrize("norm", ["transductive", "inductive"])
@pytest.mark.parametrize("name", sorted(algorithms.ALGORITHMS))
def test_every_member_declares_rightly_whether_its_steps_are_static(name: str, norm: str) -> None:
    algorithm = algorithms.build(name, scenarios.model("mlp"), {"norm": norm})
    assert algorithm.static
    config = settings(iterations=4)
    (static, rows), (eager, expected) = (walked(algorithm, config, kind=kind) for kind in (StaticSteps, Eager))
    assert alike(rows, expected)
    assert apart(static.meta, eager.meta) < 1e-11


def test_what_a_member_cautions_of_is_warned_of() -> None:
    algorithm = algorithms.build("imaml", scenarios.model("mlp"), {"strength": 0.01, "damping": 0.0, "inner_lr": 0.01})
    for kind in (StaticSteps, Eager):
        with pytest.warns(MetaftWarning, match="not positive definite"):
            walked(algorithm, settings(iterations=3), kind=kind)
    calm = dataclasses.replace(algorithm, cautions={"accuracy": "a share of right answers"})
    with pytest.warns(MetaftWarning, match="right answers"):
        walked(calm, settings(iterations=3))


@pytest.mark.slow
def test_tasks_in_chunks_are_all_tasks_at_once() -> None:
    algorithm, config = MEMBERS["maml"](), settings()
    (whole, rows), (parts, same) = (walked(algorithm, config, chunk=chunk) for chunk in (None, 3))
    assert alike(rows, same)
    assert apart(parts.meta, whole.meta) < 1e-11


@pytest.mark.slow
def test_what_recording_computes_is_undone() -> None:
    def record(step: Callable[[], None]) -> Callable[[], None]:
        for _ in range(5):  # more than a stretch has
            step()
        return step

    for name in ("maml", "state"):
        algorithm, config = MEMBERS[name](), settings()
        (plain, rows), (after, same) = (walked(algorithm, config, **how) for how in ({}, {"record": record}))
        assert rows == same
        assert all(torch.equal(after.meta[k], v) for k, v in plain.meta.items())
        assert all(torch.equal(after.state[k], v) for k, v in plain.state.items())


def test_an_error_within_a_stretch_leaves_the_state_before_it() -> None:
    """An interrupted run saves that state, as the one after the last step that the caller was told of."""
    left = [9]  # of steps until one fails

    def record(step: Callable[[], None]) -> Callable[[], None]:
        def run_() -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            step()

        return run_

    algorithm, config = MEMBERS["state"](), settings()
    with engines.engine("graph") as engine:
        steps = StaticSteps(config, engine, algorithm, source(), begun(algorithm), record=record)
        rows = [row for first in (0, 3, 6) for row in steps.advance(first).window]
        before = {**{k: v.clone() for k, v in steps.meta.items()}, **steps.state, **steps.moments()}
        before = {k: v.clone() for k, v in before.items()}
        with pytest.raises(KeyboardInterrupt):
            steps.advance(7)
        after = {**steps.meta, **steps.state, **steps.moments()}
        assert all(torch.equal(after[k], v) for k, v in before.items())
        rows += taken(steps, config, 7)
    assert rows == walked(algorithm, config)[1]


@pytest.mark.parametrize("batches", [False, True])
def test_a_pool_that_stays_in_host_memory_gives_the_same(batches: bool) -> None:
    algorithm, config = MEMBERS["batches" if batches else "maml"](), settings()
    data = scenarios.noise_pool(classes=30, per_class=6)
    kept = data.to("cpu", budget=data.images.nbytes - 1)
    assert kept.kept_from == "cpu" and data.to("cpu", budget=data.images.nbytes).kept_from is None
    assert kept.to("cpu").kept_from is None
    found = []
    for each in (data, kept):
        drawn = each.source(ways=3, shots=1, query_shots=2, rotate=True)
        found.append(walked(algorithm, config, source=Wide(drawn))[0])
        sent = drawn.indices(0, "train", range(2)).images
        assert (sent.dtype is torch.uint8) == (each is kept)
    assert all(torch.equal(found[0].meta[k], v) for k, v in found[1].meta.items())


def test_a_stretch_sends_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, config = MEMBERS["maml"](), settings(log_every=10)
    whole = walked(algorithm, config)[0]
    monkeypatch.setattr("metaft.outer.static._STRETCH_BYTES", 2500)  # two steps' indices
    sent: list[int] = []
    real = ClassEpisodes.indices

    def recording(self: ClassEpisodes, seed: int, split: Split, indices: Sequence[int]) -> Any:
        sent.append(len(indices) // config.task.meta_batch)
        return real(self, seed, split, indices)

    monkeypatch.setattr(ClassEpisodes, "indices", recording)
    parts = walked(algorithm, config)[0]
    assert sent[0] == 1 and max(sent) == 2
    assert all(torch.equal(parts.meta[k], v) for k, v in whole.meta.items())


def test_why_steps_are_taken_one_by_one() -> None:
    algorithm = MEMBERS["maml"]()
    meta = algorithm.init(0)[0]
    assert obstacle(algorithm, source(), meta, ALONE) is None
    assert obstacle(dataclasses.replace(algorithm, static=False), source(), meta, ALONE) == (
        "the work of maml depends on its data"
    )
    assert "cannot draw indices" in str(obstacle(algorithm, Plain(), meta, ALONE))  # type: ignore[arg-type]
    assert "several types" in str(obstacle(algorithm, source(), {**meta, "x": torch.ones(1)}, ALONE))
    ranks = type(ALONE)(0, 2)
    assert "2 processes" in str(obstacle(algorithm, source(), meta, ranks))


class Plain:
    """Has episodes, and nothing else."""

    name = "plain"


# ---- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64_runs")
def test_a_run_writes_the_rows_of_the_eager_loop(tmp_path: Path) -> None:
    for begin, more in ((sinusoid, {}), (images, {"outer_optimizer": "sgd", "clip_value": 0.02})):
        data = None if begin is sinusoid else pool()
        ends = {}
        for engine in ("vmap", "graph"):
            out = tmp_path / f"{begin.__name__}-{engine}"
            run(begin(out, engine=engine, iterations=STEPS, log_every=3, eval_every=7, **more), dataset=data)
            ends[engine] = (read_rows(out / "metrics.jsonl"), load_snapshot(out / "checkpoints/last.safetensors"))
        (rows, last), (expected, eager) = ends["graph"], ends["vmap"]
        assert [row["step"] for row in rows] == [row["step"] for row in expected]
        assert rounded_alike(rows, expected)
        assert last.position.step == STEPS and last.position.window == ()
        assert apart(last.meta, eager.meta) < SAME_RUN
        assert last.optimizer.keys() == eager.optimizer.keys()


def test_a_run_stopped_anywhere_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(sinusoid(tmp_path / "whole", engine="graph"))
    for stop_at in range(1, 8):
        left = [stop_at]

        def check(self: StopSignals, message: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Interrupted(message, 15)

        out = tmp_path / str(stop_at)
        with monkeypatch.context() as patch:
            patch.setattr(StopSignals, "check", check)
            with pytest.raises(Interrupted):
                run(sinusoid(out, engine="graph"))
        assert untimed(resume_run(out)) == untimed(whole)
        assert remains(out) == remains(tmp_path / "whole")


@pytest.mark.usefixtures("float64_runs")
def test_a_run_of_one_engine_goes_on_with_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(sinusoid(tmp_path / "whole", engine="vmap", outer_schedule="constant"))
    for first, then in (("graph", "vmap"), ("vmap", "graph")):
        out = tmp_path / first
        config = sinusoid(out, engine=first, iterations=4, outer_schedule="constant")
        run(config)
        resume_run(out, dataclasses.replace(config, out=None, engine=then, iterations=7))
        assert f"engine {first} -> {then}" in capsys.readouterr().err
        last, expected = (load_snapshot(path / "checkpoints/last.safetensors") for path in (out, tmp_path / "whole"))
        assert apart(last.meta, expected.meta) < SAME_RUN
        assert apart(last.optimizer, expected.optimizer) < SAME_RUN


@pytest.mark.parametrize("ruined", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_named_and_the_state_before_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ruined: str
) -> None:
    """Step 5 is the last but one of a stretch of three."""
    settings = {"engine": "graph", "iterations": 9, "log_every": 3, "checkpoint_every": 9, "eval_every": 9}
    real, bad = ClassEpisodes.gather, pool().source(ways=3, shots=1, query_shots=2).draw(0, "train", [8]).key[0]

    def gather(self: ClassEpisodes, drawn: Any) -> Episode:
        task = real(self, drawn)
        marked = (drawn.key == int(bad)).view(-1, 1, 1, 1, 1)
        if ruined == "loss":
            return task._replace(query_x=task.query_x.masked_fill(marked, math.nan))
        return task._replace(support_x=task.support_x.masked_fill(marked, 1e30))

    with monkeypatch.context() as patch:
        patch.setattr(ClassEpisodes, "gather", gather)
        what = "the loss is nan" if ruined == "loss" else "the "
        with pytest.raises(NonFiniteError, match=rf"^step 5: {what}.*is kept in .*last"):
            run(images(tmp_path / "r", **settings), dataset=pool())
    snapshot = load_snapshot(tmp_path / "r/checkpoints/last.safetensors")
    assert snapshot.position.step == 4 and len(snapshot.position.window) == 1
    assert all(bool(t.isfinite().all()) for t in (*snapshot.meta.values(), *snapshot.optimizer.values()))
    resume_run(tmp_path / "r", dataset=pool())
    run(images(tmp_path / "whole", **settings), dataset=pool())
    assert remains(tmp_path / "r") == remains(tmp_path / "whole")


# ---- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maml", "meta-sgd", "protonet", "state", "knobs", "batches"])
@pytest.mark.parametrize("in_host_memory", [False, True])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_recorded_steps_are_the_cpus_in_float64(name: str, in_host_memory: bool) -> None:
    """Every step has other tasks, rates and knobs: a recording that kept some would drift away."""
    config = settings()
    expected, rows = walked(MEMBERS[name](), config)
    data = scenarios.noise_pool(classes=30, per_class=6).to("cuda", budget=0 if in_host_memory else None)
    algorithm = MEMBERS[name]()
    there = Wide(data.source(ways=3, shots=1, query_shots=2, rotate=True), "cuda")
    with engines.engine("graph", device="cuda") as engine:
        steps = StaticSteps(config, engine, algorithm, there, begun(algorithm, "cuda"))  # type: ignore[arg-type]
        found = taken(steps, config)
    assert getattr(steps._run, "__name__", "") == "replay", "nothing was recorded"
    assert alike(found, rows, 1e-7)
    assert apart({k: v.cpu() for k, v in steps.meta.items()}, expected.meta) < 1e-8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_recorded_run_goes_on_after_a_stop(tmp_path: Path) -> None:
    config = images(tmp_path / "r", device="cuda", outer_schedule="constant", iterations=4)
    run(config, dataset=pool())
    resume_run(tmp_path / "r", dataclasses.replace(config, out=None, iterations=9), dataset=pool())
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"), iterations=9)
    run(whole, dataset=pool())
    last, expected = (load_snapshot(tmp_path / n / "checkpoints/last.safetensors") for n in ("r", "whole"))
    assert apart(last.meta, expected.meta) < 1e-5
