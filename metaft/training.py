"""Meta-training: one visible loop over an explicit position that a checkpoint holds whole."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metaft import checkpoint
from metaft.algorithms.base import Algorithm
from metaft.config import Settled
from metaft.errors import CheckpointError, NonFiniteError
from metaft.metrics import FIGURES, better
from metaft.outer import Engine, meta_gradient
from metaft.progress import Progress
from metaft.ranks import ALONE, Ranks
from metaft.run import RunFolder, append_row, cut_back
from metaft.testing import score_episodes, summarise
from metaft.types import Params, Source


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
    window: tuple[tuple[float, float], ...] = ()
    """(loss, figure) of the steps since the last row of metrics.jsonl."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory."""

    meta: Params
    state: Params
    optimizer: dict[str, Tensor]
    position: Position
    header: Mapping[str, Any]


def tensors_of(snapshot: Snapshot) -> dict[str, Tensor]:
    """All of them, named as in a checkpoint."""
    parts = {"meta": snapshot.meta, "state": snapshot.state, "optimizer": snapshot.optimizer}
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def save_snapshot(run: RunFolder, snapshot: Snapshot, *, best: bool = False) -> None:
    """Write `checkpoints/best` or `checkpoints/last`; the former last one is kept as `previous`."""
    tensors = tensors_of(snapshot)
    header = {**snapshot.header, "position": dataclasses.asdict(snapshot.position)}
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
        window=tuple((a, b) for a, b in p["window"]),
    )
    meta, state, optimizer = (checkpoint.under(tensors, part) for part in ("meta", "state", "optimizer"))
    return Snapshot(meta, state, optimizer, position, header)


def begin(algorithm: Algorithm, seed: int, header: Mapping[str, Any]) -> Snapshot:
    """The first snapshot of a run, on the CPU."""
    meta, state = ({k: t.cpu() for k, t in tensors.items()} for tensors in algorithm.init(seed))
    return Snapshot(meta, state, {}, Position(), header)


def outer_lr(config: Settled, step: int) -> float:
    """Outer learning rate of meta-step `step` (0-based) under `--outer-schedule`."""
    done = step / config.iterations
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return config.outer_lr * factor[config.outer_schedule]


class Outer:
    """The outer optimiser over the meta-parameters: torch.optim's, with its moments as named tensors."""

    def __init__(self, config: Settled, meta: Params, moments: Mapping[str, Tensor] | None = None) -> None:
        self.config = config
        self.meta = {name: p.detach().clone() for name, p in meta.items()}
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.outer_optimizer]
        self.optimizer = kind(list(self.meta.values()), lr=config.outer_lr)
        for key, value in (moments or {}).items():
            name, _, slot = key.rpartition("/")
            if name not in self.meta:
                raise CheckpointError(f"checkpoint: optimiser moment {key!r} belongs to no meta-parameter")
            # Adam counts its steps in a CPU tensor, wherever the parameter is
            device = "cpu" if slot == "step" else self.meta[name].device
            self.optimizer.state[self.meta[name]][slot] = value.to(device).clone()

    def step(self, grads: Params, step: int) -> None:
        """Clip, then one update of `meta` in place at the rate of meta-step `step`."""
        parts = list(grads.values())
        if self.config.clip_value is not None:
            parts = [g.clamp(-self.config.clip_value, self.config.clip_value) for g in parts]
        if self.config.clip_norm is not None:
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in parts]))
            scale = (self.config.clip_norm / norm.clamp_min(1e-12)).clamp_max(1.0)
            parts = [g * scale for g in parts]
        for group in self.optimizer.param_groups:
            group["lr"] = outer_lr(self.config, step)
        for (name, p), g in zip(self.meta.items(), parts, strict=True):
            assert g.shape == p.shape, name
            p.grad = g
        self.optimizer.step()

    def moments(self) -> dict[str, Tensor]:
        return {
            f"{name}/{slot}": value
            for name, p in self.meta.items()
            for slot, value in self.optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor)
        }


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
    NonFiniteError at a loss or gradient that is not finite, with the state before that step saved.
    """
    name = FIGURES[algorithm.loss]
    outer = Outer(config, start.meta, start.optimizer)
    state, position = start.state, start.position
    writes = ranks.rank == 0
    if writes:
        # A row of training that the checkpoint's window still holds will be written again.
        cut_back(run.metrics, position.step - len(position.window), position.evaluated)
        cut_back(run.timing, position.step, position.evaluated)
    bar = Progress("meta-train", config.iterations, "step", done=position.step, per_unit=config.meta_batch)
    clock, clock_step, validating = time.perf_counter(), position.step, 0.0

    def snapshot() -> Snapshot:
        meta = {k: v.detach().clone() for k, v in outer.meta.items()}
        return Snapshot(meta, state, outer.moments(), position, start.header)

    def log(row: Mapping[str, Any], *, sync: bool = False) -> None:
        if writes:
            append_row(run.metrics, row, sync=sync)

    def save() -> None:
        nonlocal clock, clock_step, validating
        if not writes:
            return
        now = time.perf_counter()
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
                loss, shown = (math.fsum(c) / len(position.window) for c in zip(*position.window, strict=True))
                log({"kind": "train", "step": position.step, "loss": loss, name: shown})
                position = dataclasses.replace(position, window=())
                bar.update(position.step, **_shown(name, loss, shown))

            due = position.step % config.eval_every == 0 or position.step == config.iterations
            if due and position.evaluated < position.step:
                before = time.perf_counter()
                scores = score_episodes(
                    engine, algorithm, outer.meta, state, val_source,
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

            first = position.step * config.meta_batch
            mine = ranks.share(range(first, first + config.meta_batch))
            tasks = draw(algorithm, source, config.seed, mine)
            result = meta_gradient(engine, algorithm, outer.meta, state, tasks, step=position.step, ranks=ranks)
            _check_finite(result.metrics, result.grads, position.step, run)
            outer.step(result.grads, position.step)
            state = result.state

            window = (*position.window, (result.metrics["loss"], result.metrics[name]))
            position = dataclasses.replace(position, step=position.step + 1, window=window)
            if position.step % config.checkpoint_every == 0:
                ranks.check_same(f"step {position.step}: the digest of the parameters", lambda: _digest(snapshot()))
                save()
            should_stop()
    except CheckpointError:  # the disk refuses; trying once more would hide why
        raise
    except BaseException:
        # A signal, a non-finite loss or a bug: what was computed is kept. `position` and `outer` belong together
        # here, since both change only after everything that can fail.
        if position.step > start.position.step:
            save()
        raise
    finally:
        bar.close()


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


def _check_finite(metrics: Mapping[str, float], grads: Params, step: int, run: RunFolder) -> None:
    if math.isfinite(metrics["loss"]) and all(bool(g.isfinite().all()) for g in grads.values()):
        return
    what = f"the loss is {metrics['loss']}" if not math.isfinite(metrics["loss"]) else "the meta-gradient is not finite"
    raise NonFiniteError(
        f"step {step + 1}: {what}; the state before it is kept in {run.last}"
        f"{f', the best one on validation in {run.best}' if run.best.exists() else ''}. "
        "Start again with a smaller --outer-lr or --inner-lr, or with --clip-norm 10"
    )
