"""Meta-training: one visible loop over a position that a checkpoint holds whole."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metaft.algorithms.base import Algorithm
from metaft.config import Settled
from metaft.dist.ranks import ALONE, Ranks
from metaft.engines.base import Engine
from metaft.errors import CheckpointError, MetaftWarning, NonFiniteError, RankLost, RanksDiffer
from metaft.metrics import better, describe, figure_name
from metaft.outer import meta_gradient, static
from metaft.outer.static import Steps, Taken, logged, why_not_finite
from metaft.outer.update import Outer
from metaft.runs import checkpoint
from metaft.runs.events import Events
from metaft.runs.folder import RunFolder, append_row, cut_back, read_rows
from metaft.runs.measuring import Measuring
from metaft.runs.snapshot import Snapshot, save_snapshot, tensors_of
from metaft.runs.trail import Trail
from metaft.support.progress import Progress
from metaft.testing import score_episodes, summarise
from metaft.types import NORMS, Loss, Norm, Params, Source

META = "meta"
"""The name of the trail of a meta-training."""


class Eager:
    """Meta-steps one by one, as any engine, source and number of ranks can take them: a
    `metaft.outer.static.Steps`."""

    def __init__(
        self, config: Settled, engine: Engine, algorithm: Algorithm, source: Source, start: Snapshot, ranks: Ranks
    ) -> None:
        self._config, self._engine, self._algorithm = config, engine, algorithm
        self._source, self._ranks = source, ranks
        self._outer = Outer(config, start.meta, start.optimizer)
        self.meta, self.state = self._outer.meta, start.state

    def moments(self) -> Params:
        return self._outer.moments()

    def gradient(self) -> Params:
        return self._outer.gradient

    def advance(self, step: int) -> Taken:
        first = step * self._config.task.meta_batch
        share = self._ranks.share(range(first, first + self._config.task.meta_batch))
        tasks = draw(self._algorithm, self._source, self._config.compute.seed, share)
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
    events: Events | None = None,
) -> Snapshot:
    """Train from `start` to the last iteration, writing rows, checkpoints and validations; returns the final state.

    All ranks start alike and take the same steps, each with its share of the tasks; rank 0 alone writes. `should_stop`
    is asked after every step and chunk of validation, and raises to stop; the checkpoint is then written first. Raises
    NonFiniteError at a loss or gradient that is not finite, with the state before that step saved, and RanksDiffer
    before a validation or checkpoint of parameters that are not the same on all ranks, with nothing of them saved.
    `events` gets the rows too.
    """
    measuring = Measuring(run, config, algorithm, source, start, ranks)
    steps = _steps(config, engine, algorithm, source, start, ranks, measuring.every)
    if ranks.rank == 0:
        # A row of training that the checkpoint's window still holds will be written again.
        cut_back(run.metrics, start.position.step - len(start.position.window), start.position.evaluated)
        cut_back(run.timing, start.position.step, start.position.evaluated)
        cut_back(run.updates, start.position.step, start.position.evaluated)
        if events is not None:
            events.follow(read_rows(run.metrics))
    bar = Progress(
        "meta-train", config.outer.iterations, "step", done=start.position.step, per_unit=config.task.meta_batch
    )
    loop = _Loop(run, config, algorithm, start, ranks, steps, measuring, bar, events)
    try:
        loop.write_first()
        while True:
            if loop.position.window and loop.is_due(config.output.log_every):
                loop.write_row()
            if loop.position.evaluated < loop.position.step and loop.is_due(config.test.eval_every):
                loop.validate(engine, val_source, should_stop)
            if loop.position.step == config.outer.iterations:
                return loop.snapshot()
            loop.advance()
            if loop.position.step % config.output.checkpoint_every == 0:
                loop.check_ranks()
                loop.save()
            should_stop()
    except (CheckpointError, RanksDiffer):
        # The disk refuses, and trying once more would hide why; or there is nothing worth keeping.
        raise
    except BaseException as error:
        # A signal, a non-finite loss or a bug: what was computed is kept. `position` and `steps` belong together
        # here, since both change only after everything that can fail.
        if loop.position.step > start.position.step:
            loop.save()
        if ranks.rank == 0 and isinstance(error, RankLost):
            error.kept = loop.saved_step
        raise
    finally:
        bar.close()


class _Loop:
    """A run while it trains: where it stands, and the things that its loop does, each by name."""

    def __init__(
        self,
        run: RunFolder,
        config: Settled,
        algorithm: Algorithm,
        start: Snapshot,
        ranks: Ranks,
        steps: Steps,
        measuring: Measuring,
        bar: Progress,
        events: Events | None,
    ) -> None:
        self._run, self._config, self._algorithm, self._start = run, config, algorithm, start
        self._ranks, self._steps, self._measuring, self._bar = ranks, steps, measuring, bar
        self._name, self._events = figure_name(algorithm.loss), events
        self._trail = Trail(run.snapshots, META, asked=config.output.snapshots, every=config.output.log_every)
        self.position = start.position
        self.saved_step = start.position.step
        """The last step of which a checkpoint is kept."""
        self._saved_at, self._validating = time.perf_counter(), 0.0
        self._checked_step = start.position.step
        """The last step after which all ranks were seen to have the same parameters."""

    def is_due(self, every: int) -> bool:
        """Whether this is a step, or the last one, after which something comes that comes so often."""
        return self.position.step % every == 0 or self.position.step == self._config.outer.iterations

    def snapshot(self) -> Snapshot:
        meta, state = ({k: v.detach().clone() for k, v in p.items()} for p in (self._steps.meta, self._steps.state))
        start = self._start
        return Snapshot(meta, state, self._steps.moments(), self.position, start.header, start.frozen, start.buffers)

    def write_first(self) -> None:
        """A run that is killed before its first step must begin with the same parameters."""
        if self._ranks.rank == 0 and not self._run.last.exists():
            first = self.snapshot()
            save_snapshot(self._run, first, to=self._run.first)
            save_snapshot(self._run, first)
        if self._ranks.rank == 0:  # where a run goes on, too: it may have ended before this one was whole
            self._trail.visit(self.position.step, self._steps.meta)

    def write_snapshot(self, to: Path | None = None) -> None:
        if self._ranks.rank == 0:
            save_snapshot(self._run, self.snapshot(), to=to)

    def keep(self, norm: Norm) -> None:
        """Write this checkpoint too where it is among the best so far, and remove what no longer is. Which those are
        the rows of metrics.jsonl say, so that a resume keeps the same."""
        if self._config.test.keep_best == 1 or self._ranks.rank != 0:
            return
        rows = [row for row in read_rows(self._run.metrics) if row["kind"] == "val"]
        steps = best_steps(self._algorithm.loss, rows, norm, self._name)[: self._config.test.keep_best]
        if self.position.step in steps:
            self.write_snapshot(self._run.kept(self.position.step))
        for step, path in self._run.all_kept().items():
            if step not in steps:
                path.unlink()

    def write_row(self) -> None:
        """The means over the steps since the last row."""
        window, step = self.position.window, self.position.step
        means = [math.fsum(c) / len(window) for c in zip(*window, strict=True)]
        row = dict(zip(logged(self._algorithm), means, strict=True))
        self._log({"kind": "train", "step": step, **row})
        self.position = dataclasses.replace(self.position, window=())
        if self._ranks.rank == 0:
            self._trail.visit(step, self._steps.meta)
        self._bar.update(step, **_shown(self._name, row["loss"], row[self._name]))

    def validate(self, engine: Engine, source: Source, should_stop: Callable[[], None]) -> None:
        """Test on the validation classes, and keep the parameters where they are the best so far."""
        self.check_ranks()
        begin, step, c = time.perf_counter(), self.position.step, self._config
        deciding = c.learner.batch_norm
        norms = NORMS if c.test.eval_modes == "both" else (deciding,)
        scores = score_episodes(
            engine, self._algorithm, self._steps.meta, self._steps.state, source,
            split="val", seed=c.test.eval_seed, episodes=c.test.eval_episodes, steps=c.test.test_inner_steps,
            norms=norms, each_step=c.test.eval_modes == "both", ranks=self._ranks, progress=lambda done: should_stop(),
        )  # fmt: skip
        summary = summarise(scores, self._name, norms)
        self._log({"kind": "val", "step": step, **summary}, sync=True)
        self._validating += time.perf_counter() - begin
        value = summary[deciding][self._name]
        self.position = dataclasses.replace(self.position, evaluated=step)
        if better(self._algorithm.loss, value, self.position.best):
            self.position = dataclasses.replace(self.position, best=value, best_step=step)
            self.write_snapshot(self._run.best)
        self.keep(deciding)
        self.save()
        self._bar.say(f"step {step}: validation {describe(self._name, summary)}")

    def advance(self) -> None:
        """Take the next meta-step, or a stretch of them. Raises NonFiniteError, with what came before it taken."""
        step = self.position.step
        before = self._measuring.before(step + 1, self._steps.meta)
        taken = self._steps.advance(step)
        window = (*self.position.window, *taken.window)
        self.position = dataclasses.replace(self.position, step=self.position.step + len(taken.window), window=window)
        if taken.failure is not None:
            raise _not_finite(taken.failure, self.position.step, self._run)
        if before is not None:
            self._measuring.write(step + 1, before, self._steps)

    def check_ranks(self) -> None:
        """Raises RanksDiffer where parameters are not the same on all ranks."""
        step = self.position.step
        if self._checked_step == step:
            return
        try:
            self._ranks.check_same(f"step {step}: the digest of the parameters", lambda: _digest(self.snapshot()))
        except RanksDiffer as error:
            kept = f"the state of step {self.saved_step} is kept in {self._run.last}"
            raise RanksDiffer(f"{error}; {kept}") from None
        self._checked_step = step

    def save(self) -> None:
        """Write the last checkpoint, and how long the steps since the one before took."""
        now, step = time.perf_counter(), self.position.step
        if self._ranks.rank == 0:
            seconds, count = now - self._saved_at, step - self.saved_step
            row = {"step": step, "seconds": seconds, "validation_seconds": self._validating}
            if count > 0:
                row["tasks_per_second"] = count * self._config.task.meta_batch / (seconds - self._validating)
            append_row(self._run.timing, row, sync=True)
            self.write_snapshot()
        self._saved_at, self.saved_step, self._validating = now, step, 0.0

    def _log(self, row: Mapping[str, Any], *, sync: bool = False) -> None:
        if self._ranks.rank == 0:
            append_row(self._run.metrics, row, sync=sync)
            if self._events is not None:
                self._events.row(row)


def _steps(
    config: Settled,
    engine: Engine,
    algorithm: Algorithm,
    source: Source,
    start: Snapshot,
    ranks: Ranks,
    every: int | None = None,
) -> Steps:
    if engine.whole_steps:
        obstacle = static.obstacle(algorithm, source, start.meta, ranks)
        if obstacle is None:
            return static.StaticSteps(config, engine, algorithm, source, start, every=every)
        if ranks.rank == 0:
            text = f"engine {engine.name}: {obstacle}; steps are taken as with vmap"
            warnings.warn(text, MetaftWarning, stacklevel=3)
    return Eager(config, engine, algorithm, source, start, ranks)


def best_steps(loss: Loss, rows: Sequence[Mapping[str, Any]], norm: Norm, name: str) -> list[int]:
    """Steps of these validations, the best first, of equal ones the earlier; those without a figure are left out."""
    values = {row["step"]: row[norm][name] for row in rows if row[norm][name] is not None}
    sign = -1 if better(loss, 1.0, 0.0) else 1
    return sorted(values, key=lambda step: (sign * values[step], step))


def _digest(snapshot: Snapshot) -> str:
    return checkpoint.digest("", tensors_of(snapshot))[:16]


def draw(algorithm: Algorithm, source: Source, seed: int, indices: range) -> Any:
    """One meta-batch of what the algorithm trains on: episodes, or batches of as many images as an episode has."""
    if algorithm.data == "episodes":
        return source.episodes(seed, "train", indices)
    return source.batches(seed, "train", indices, source.ways * (source.shots + source.query_shots))


def _shown(name: str, loss: float, value: float) -> dict[str, str]:
    return {"loss": f"{loss:.3f}", name: f"{100 * value:.1f} %" if name == "accuracy" else f"{value:.3f}"}


def _not_finite(what: str, step: int, run: RunFolder) -> NonFiniteError:
    return NonFiniteError(
        f"step {step + 1}: {what}; the state before it is kept in {run.last}"
        f"{f', the best one on validation in {run.best}' if run.best.exists() else ''}. "
        "Start again with a smaller --outer-lr or --inner-lr, or with --clip-norm 10"
    )
