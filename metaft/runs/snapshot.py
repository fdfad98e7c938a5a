"""A run's whole state, in memory and as a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from metaft.algorithms.base import Algorithm
from metaft.errors import CheckpointError
from metaft.models import Model
from metaft.runs import checkpoint
from metaft.runs.folder import RunFolder
from metaft.types import Params


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
    """Metrics (`metaft.outer.static.logged`) of the steps since the last row of metrics.jsonl."""


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


def save_snapshot(run: RunFolder, snapshot: Snapshot, *, to: Path | None = None) -> None:
    """Write a checkpoint `to` this file or, by default, to `checkpoints/last`, whose former one becomes `previous`."""
    tensors = tensors_of(snapshot)
    header = {**snapshot.header, "position": dataclasses.asdict(snapshot.position)}
    if snapshot.frozen:
        header["frozen"] = list(snapshot.frozen)
    # JSON has no NaN
    header["position"]["best"] = None if math.isnan(snapshot.position.best) else snapshot.position.best
    if to is not None:
        checkpoint.save(to, tensors, header)
        return
    run.save_last(tensors, header)


def load_snapshot(path: Any) -> Snapshot:
    """Raises CheckpointError, see `metaft.runs.checkpoint.load`, and for a checkpoint of another command."""
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
