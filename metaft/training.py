"""Meta-training: one visible loop over an explicit position that a checkpoint holds whole."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from metaft import checkpoint, static
from metaft.algorithms.base import Algorithm
from metaft.config import Settled
from metaft.engines.base import Engine
from metaft.errors import CheckpointError, MetaftWarning, NonFiniteError, RankLost, RanksDiffer
from metaft.metrics import better, figure_name
from metaft.models import Model
from metaft.outer import meta_gradient
from metaft.progress import Progress
from metaft.ranks import ALONE, Ranks
from metaft.run import RunFolder, append_row, cut_back
from metaft.static import Steps, Taken, logged, why_not_finite
from metaft.testing import score_episodes, summarise
from metaft.types import Params, Source
from metaft.update import Outer


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands, besides its tensors."""

    step: int = 0
    """Meta-steps done."""
    evaluated: int = 0
    """Step of the last validation that was finished."""
    best: float = math.nan
    """Best validation figure so far."""
    best_step: int = 0
    window: tuple[tuple[float, ...], ...] = ()
    """Metrics (`metaft.static.logged`) of the steps since the last row of metrics.jsonl."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory."""

    meta: Params
    state: Params
    optimizer: dict[str, Tensor]
    position: Position
    header: Mapping[str, Any]
    frozen: Params = dataclasses.field(default_factory=dict)
    """Parameters of the user's module that stay as they were handed over; in a checkpoint they are beside the others
    of `meta`, and the header has their names."""
    buffers: Params = dataclasses.field(default_factory=dict)


def tensors_of(snapshot: Snapshot) -> dict[str, Tensor]:
    """All of them, named as in a checkpoint."""
    parts = {
        "meta": {**snapshot.meta, **snapshot.frozen},
        "state": snapshot.state,
        "optimizer": snapshot.optimizer,
        "buffers": snapshot.buffers,
    }
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def save_snapshot(run: RunFolder, snapshot: Snapshot, *, best: bool = False) -> None:
    """Write `checkpoints/best` or `checkpoints/last`; the former last one is kept as `previous`."""
    tensors = tensors_of(snapshot)
    header = {**snapshot.header, "position": dataclasses.asdict(snapshot.position)}
    if snapshot.frozen:
        header["frozen"] = list(snapshot.frozen)
    # JSON has no NaN
    header["position"]["best"] = None if math.isnan(snapshot.position.best) else snapshot.position.best
    if best:
        checkpoint.save(run.best, tensors, header)
        return
    run.save_last(tensors, header)


def load_snapshot(path: Any) -> Snapshot:
    """Raises CheckpointError, see `metaft.checkpoint.load`, and for a checkpoint of another command."""
    tensors, header = checkpoint.load(path)
    if "position" not in header:
        raise CheckpointError(f"checkpoint {path}: not of a meta-training run")
    p = header["position"]
    position = Position(
        step=p["step"],
        evaluated=p["evaluated"],
        best=math.nan if p["best"] is None else p["best"],
        best_step=p["best_step"],
        window=tuple(tuple(metrics) for metrics in p["window"]),
    )
    parts = ("meta", "state", "optimizer", "buffers")
    meta, state, optimizer, buffers = (checkpoint.under(tensors, part) for part in parts)
    frozen = {name: meta.pop(name) for name in header.get("frozen", ())}
    return Snapshot(meta, state, optimizer, position, header, frozen, buffers)


def begin(algorithm: Algorithm, seed: int, header: Mapping[str, Any], model: Model | None = None) -> Snapshot:
    """The first snapshot of a run, on the CPU, with what nothing learns of its `model`."""
    still = ({}, {}) if model is None else (model.frozen, model.buffers)
    meta, state, frozen, buffers = ({k: t.cpu() for k, t in each.items()} for each in (*algorithm.init(seed), *still))
    return Snapshot(meta, state, {}, Position(), header, frozen, buffers)


class Eager:
    """Meta-steps one by one, as any engine, source and number of ranks can take them (see `metaft.static.Steps`)."""

    def __init__(
        self, config: Settled, engine: Engine, algorithm: Algorithm, source: Source, start: Snapshot, ranks: Ranks
    ) -> None:
        self._config, self._engine, self._algorithm = config, engine, algorithm
        self._source, self._ranks = source, ranks
        self._outer = Outer(config, start.meta, start.optimizer)
        self.meta, self.state = self._outer.meta, start.state

    def moments(self) -> Params:
        return self._outer.moments()

    def advance(self, step: int) -> Taken:
        first = step * self._config.meta_batch
        mine = self._ranks.share(range(first, first + self._config.meta_batch))
        tasks = draw(self._algorithm, self._source, self._config.seed, mine)
        result = meta_gradient(
            self._engine, self._algorithm, self.meta, self.state, tasks, step=step, ranks=self._ranks
        )
        shown = tuple(result.metrics[name] for name in logged(self._algorithm))
        failure = why_not_finite(result.metrics["loss"], all(bool(g.isfinite().all()) for g in result.grads.values()))
        if failure is None:
            self._outer.step(result.grads, step)
            self.state = result.state
            return Taken((shown,))
        return Taken((), failure)


def train(
    run: RunFolder,
    config: Settled,
    algorithm: Algorithm,
    engine: Engine,
    source: Source,
    val_source: Source,
    start: Snapshot,
    *,
    ranks: Ranks = ALONE,
    should_stop: Callable[[], None] = lambda: None,
) -> Snapshot:
    """Train from `start` to `config.iterations`, writing rows, checkpoints and validations; returns the final state.

    All ranks start alike and take the same steps, each with its share of the tasks; rank 0 alone writes. `should_stop`
    is asked after every step and chunk of validation, and raises to stop; the checkpoint is then written first. Raises
    NonFiniteError at a loss or gradient that is not finite, with the state before that step saved, and RanksDiffer
    before a validation or checkpoint of parameters that are not the same on all ranks, with nothing of them saved.
    """
    name = figure_name(algorithm.loss)
    steps = _steps(config, engine, algorithm, source, start, ranks)
    position = start.position
    writes = ranks.rank == 0
    if writes:
        # A row of training that the checkpoint's window still holds will be written again.
        cut_back(run.metrics, position.step - len(position.window), position.evaluated)
        cut_back(run.timing, position.step, position.evaluated)
    bar = Progress("meta-train", config.iterations, "step", done=position.step, per_unit=config.meta_batch)
    clock, clock_step, validating = time.perf_counter(), position.step, 0.0
    same = position.step  # the last after which all ranks were seen to have the same parameters

    def snapshot() -> Snapshot:
        meta, state = ({k: v.detach().clone() for k, v in part.items()} for part in (steps.meta, steps.state))
        return Snapshot(meta, state, steps.moments(), position, start.header, start.frozen, start.buffers)

    def log(row: Mapping[str, Any], *, sync: bool = False) -> None:
        if writes:
            append_row(run.metrics, row, sync=sync)

    def check_ranks() -> None:
        nonlocal same
        if same == position.step:
            return
        try:
            ranks.check_same(f"step {position.step}: the digest of the parameters", lambda: _digest(snapshot()))
        except RanksDiffer as error:
            raise RanksDiffer(f"{error}; the state of step {clock_step} is kept in {run.last}") from None
        same = position.step

    def save() -> None:
        nonlocal clock, clock_step, validating
        now = time.perf_counter()
        if writes:
            row = {"step": position.step, "seconds": now - clock, "validation_seconds": validating}
            if position.step > clock_step:
                row["tasks_per_second"] = (position.step - clock_step) * config.meta_batch / (now - clock - validating)
            append_row(run.timing, row, sync=True)
            save_snapshot(run, snapshot())
        clock, clock_step, validating = now, position.step, 0.0

    try:
        if writes and not run.last.exists():  # a run killed before its first step must begin with the same parameters
            save_snapshot(run, snapshot())
        while True:
            if position.window and (position.step % config.log_every == 0 or position.step == config.iterations):
                means = [math.fsum(c) / len(position.window) for c in zip(*position.window, strict=True)]
                row = dict(zip(logged(algorithm), means, strict=True))
                log({"kind": "train", "step": position.step, **row})
                position = dataclasses.replace(position, window=())
                bar.update(position.step, **_shown(name, row["loss"], row[name]))

            due = position.step % config.eval_every == 0 or position.step == config.iterations
            if due and position.evaluated < position.step:
                check_ranks()
                before = time.perf_counter()
                scores = score_episodes(
                    engine, algorithm, steps.meta, steps.state, val_source,
                    split="val", seed=config.eval_seed, episodes=config.eval_episodes,
                    steps=config.test_inner_steps, ranks=ranks, progress=lambda done: should_stop(),
                )  # fmt: skip
                summary = summarise(scores, name)
                log({"kind": "val", "step": position.step, **summary}, sync=True)
                validating += time.perf_counter() - before
                value = summary[config.batch_norm][name]
                position = dataclasses.replace(position, evaluated=position.step)
                if better(algorithm.loss, value, position.best):
                    position = dataclasses.replace(position, best=value, best_step=position.step)
                    if writes:
                        save_snapshot(run, snapshot(), best=True)
                save()
                bar.say(f"step {position.step}: validation {describe(name, summary)}")
            if position.step == config.iterations:
                return snapshot()

            taken = steps.advance(position.step)
            window = (*position.window, *taken.window)
            position = dataclasses.replace(position, step=position.step + len(taken.window), window=window)
            if taken.failure is not None:
                raise _not_finite(taken.failure, position.step, run)
            if position.step % config.checkpoint_every == 0:
                check_ranks()
                save()
            should_stop()
    except (CheckpointError, RanksDiffer):
        # The disk refuses, and trying once more would hide why; or there is nothing worth keeping.
        raise
    except BaseException as error:
        # A signal, a non-finite loss or a bug: what was computed is kept. `position` and `steps` belong together
        # here, since both change only after everything that can fail.
        if position.step > start.position.step:
            save()
        if writes and isinstance(error, RankLost):
            error.kept = clock_step
        raise
    finally:
        bar.close()


def _steps(
    config: Settled, engine: Engine, algorithm: Algorithm, source: Source, start: Snapshot, ranks: Ranks
) -> Steps:
    if engine.whole_steps:
        obstacle = static.obstacle(algorithm, source, start.meta, ranks)
        if obstacle is None:
            return static.StaticSteps(config, engine, algorithm, source, start)
        if ranks.rank == 0:
            text = f"engine {engine.name}: {obstacle}; steps are taken as with vmap"
            warnings.warn(text, MetaftWarning, stacklevel=3)
    return Eager(config, engine, algorithm, source, start, ranks)


def _digest(snapshot: Snapshot) -> str:
    return checkpoint.digest("", tensors_of(snapshot))[:16]


def draw(algorithm: Algorithm, source: Source, seed: int, indices: range) -> Any:
    """One meta-batch of what the algorithm trains on: episodes, or batches of as many images as an episode has."""
    if algorithm.data == "episodes":
        return source.episodes(seed, "train", indices)
    return source.batches(seed, "train", indices, source.ways * (source.shots + source.query_shots))


def describe(name: str, summary: Mapping[str, Any]) -> str:
    """`transductive 97.1 ± 0.4 %, inductive 95.0 ± 0.5 %`"""
    return ", ".join(f"{mode} {percent(name, summary[mode][name], summary[mode]['ci95'])}" for mode in summary)


def percent(name: str, value: float, ci95: float) -> str:
    """A figure with its interval, as people read it."""
    return f"{100 * value:.2f} ± {100 * ci95:.2f} %" if name == "accuracy" else f"{value:.3f} ± {ci95:.3f}"


def _shown(name: str, loss: float, value: float) -> dict[str, str]:
    return {"loss": f"{loss:.3f}", name: f"{100 * value:.1f} %" if name == "accuracy" else f"{value:.3f}"}


def _not_finite(what: str, step: int, run: RunFolder) -> NonFiniteError:
    return NonFiniteError(
        f"step {step + 1}: {what}; the state before it is kept in {run.last}"
        f"{f', the best one on validation in {run.best}' if run.best.exists() else ''}. "
        "Start again with a smaller --outer-lr or --inner-lr, or with --clip-norm 10"
    )
