"""Where an adapt run stands, written down so that a kill anywhere loses little."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metaft.errors import CheckpointError
from metaft.finetune.fit import Fitted
from metaft.finetune.states import flatten, unflatten
from metaft.runs import checkpoint
from metaft.runs.checkpoint import write_atomically
from metaft.runs.events import Events
from metaft.runs.folder import RunFolder, append_row, read_rows
from metaft.runs.folder import write_rows as write_line_file

SAVE_EVERY = 5.0  # seconds; a killed run loses at most these


@dataclasses.dataclass(frozen=True)
class Position:
    """Where an adapt run stands."""

    fits: tuple[Mapping[str, Any], ...] = ()
    """The figures of each finished fit; the starts of one draw follow one another."""
    rows: tuple[Mapping[str, Any], ...] = ()
    """metrics.jsonl: every epoch so far, of the fit in progress too."""
    current: Mapping[str, Any] | None = None
    """`fit`'s state after the last epoch of the fit in progress."""
    chosen: Mapping[str, Any] | None = None
    """What `--strategy chosen` chose for that fit, see `metaft.finetune.choose`, or under "tried" what it knows of the
    first candidates."""
    singles: tuple[Mapping[str, Any], ...] = ()
    """Figures of the fits of `--soup` that are done for that fit; their values lie beside the checkpoint."""


class Journal:
    """Writes a run's position down: after each fit, and within one every `SAVE_EVERY` seconds."""

    def __init__(
        self, run: RunFolder, header: Mapping[str, Any], position: Position, events: Events | None = None
    ) -> None:
        self.run, self.header, self.position, self.events = run, header, position, events
        self._clock = time.monotonic()
        self._before: tuple[Mapping[str, Any], tuple[Mapping[str, Any], ...]] = ({}, ())
        """The tag of the fit in progress, and the rows of all others."""
        self._own: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
        """Each row of its curve, and what is written of it."""
        self._follow()
        self._updates = _known(read_rows(run.updates, ["epoch", "step"]), position)

    def epoch(self, number: int, tag: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """`state` is that of the fit in progress, as `fit` gives it."""
        rows = self._rows(tag, state["curve"])
        self.position = dataclasses.replace(self.position, rows=rows, current=state)
        self._follow()
        if time.monotonic() - self._clock > SAVE_EVERY:
            self._keep(number)

    def update(self, tag: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """A row of updates.jsonl, which is no part of the position: it changes nothing of the run."""
        self._updates.append({**tag, **row})

    def fit(self, number: int, tag: Mapping[str, Any], seed: int, fitted: Fitted, figures: Mapping[str, Any]) -> None:
        """A fit is done."""
        epochs = len([row for row in fitted.curve if row["epoch"] > 0])
        chosen = {} if self.position.chosen is None else {"chosen": self.position.chosen}
        trained = {"trained": fitted.trained} if fitted.trained else {}
        done = {**tag, "seed": seed, "epochs": epochs, "kept_epoch": fitted.kept, **trained, **figures, **chosen}
        self.position = Position((*self.position.fits, _as_read(done)), self._rows(tag, fitted.curve))
        self._follow()
        self._keep(number)

    def single(self, number: int, figures: Mapping[str, Any], values: Mapping[str, torch.Tensor]) -> None:
        """One of the fits of a soup is done."""
        checkpoint.save(self.run.single(len(self.position.singles)), values, {"single": figures["seed"]})
        singles = (*self.position.singles, _as_read(figures))
        self.position = dataclasses.replace(self.position, current=None, singles=singles)
        self._keep(number)

    def values_of_singles(self) -> list[dict[str, torch.Tensor]]:
        """Of those that are done. Raises CheckpointError."""
        return [checkpoint.load(self.run.single(number))[0] for number in range(len(self.position.singles))]

    def choice(self, number: int, made: Mapping[str, Any]) -> None:
        """What was chosen for the fit that is next, or what is known of the candidates; a resume goes on from it."""
        self.position = dataclasses.replace(self.position, chosen=_as_read(made))
        self._keep(number)

    def interrupted(self) -> None:
        """Something ends the run; what the fit in progress has so far is kept."""
        if self.position.current is not None:
            self._keep(len(self.position.fits))

    def _rows(self, tag: Mapping[str, Any], curve: Sequence[Mapping[str, float]]) -> tuple[Mapping[str, Any], ...]:
        if self._before[0] != tag:
            rows = self.position.rows
            self._before = tag, tuple(row for row in rows if {k: row.get(k) for k in tag} != tag)
            self._own = []
        known = len(self._own)
        if known and (len(curve) < known or curve[known - 1] is not self._own[-1][0]):
            self._own = []  # the curve of another fit of the same name, as a soup has several
        self._own += ((row, {**tag, **row}) for row in curve[len(self._own) :])
        return (*self._before[1], *(row for _, row in self._own))

    def _follow(self) -> None:
        if self.events is not None:
            self.events.follow(self.position.rows)

    def _keep(self, number: int) -> None:
        now = time.monotonic()
        append_row(self.run.timing, {"fit": number, "seconds": now - self._clock}, sync=True)
        if self._updates:
            write_line_file(self.run.updates, self._updates)  # before the checkpoint, which may be ahead of no row
        write(self.run, self.position, self.header)
        self._clock = now


def _known(rows: Sequence[dict[str, Any]], position: Position) -> list[dict[str, Any]]:
    """Those rows of updates.jsonl that the position knows: of its fits, and of the epochs of the one in progress."""

    def tag(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("draw", "start", "fold"))

    done = {tag(fit): math.inf for fit in position.fits}
    if position.current is not None and position.rows:
        done[tag(position.rows[-1])] = len(position.current["curve"])
    return [row for row in rows if row["epoch"] <= done.get(tag(row), 0)]


def write(run: RunFolder, position: Position, header: Mapping[str, Any]) -> None:
    """The checkpoint, and metrics.jsonl from the same position. Raises CheckpointError."""
    tensors, plain = ({}, None) if position.current is None else flatten(position.current)
    state = {"fits": position.fits, "rows": position.rows, "current": plain, "chosen": position.chosen}
    state |= {"singles": position.singles} if position.singles else {}
    run.save_last(tensors, {**header, **state})
    write_rows(run, position)


def write_rows(run: RunFolder, position: Position) -> None:
    """metrics.jsonl. Raises CheckpointError."""
    write_atomically(run.metrics, "".join(json.dumps(row, sort_keys=True) + "\n" for row in position.rows).encode())


def _as_read(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Plain data as a checkpoint gives it back, so that a run that was stopped writes its results in the same order."""
    return json.loads(json.dumps(value, sort_keys=True))


def read(run: RunFolder) -> tuple[Position, Mapping[str, Any]]:
    """The last checkpoint: a position, and the header. Raises CheckpointError, and says which other one is good."""
    tensors, header = run.load(run.last, _load, lambda loaded: f"after {len(loaded[1]['rows'])} epochs")
    current = None if header["current"] is None else unflatten(tensors, header["current"])
    return Position(
        tuple(header["fits"]), tuple(header["rows"]), current, header.get("chosen"), tuple(header.get("singles", ()))
    ), header


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, header = checkpoint.load(path)
    if "fits" not in header:
        raise CheckpointError(f"checkpoint {path}: not of an adapt run")
    return tensors, header


def seconds(rows: Sequence[Mapping[str, Any]], number: int | None = None) -> float:
    """Time spent on a fit, or on all, from the rows of timing.jsonl."""
    return sum(row["seconds"] for row in rows if number in (None, row["fit"]))
