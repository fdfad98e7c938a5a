"""What a search has asked and been told, as JSON lines in `journal.jsonl`; all else of a search follows from it.

    {"search": {...}}                                   once, the first: the space, and how it is searched
    {"asked": 0, "values": {...}}                       before trial 0 begins
    {"told": 0, "value": 0.93, "loss": 0.2, ...}        when it has ended; value null: it failed, and "message" says how
    {"trials": 40}                                      another number of trials is wanted

A line counts when its newline is on the disk. One that a crash cut off is what the search does next, with the same
values; what it was about lies in the trial's own run folder, which goes on or is read again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metaft.errors import CheckpointError
from metaft.runs.checkpoint import write_atomically
from metaft.runs.folder import append_row, read_rows, write_rows
from metaft.trials.methods.base import Values

Told = Mapping[str, Any]
"""A line of what a trial came to: "told", "value" and "loss" (null where it failed), "status" and "message" of its
process, "seconds" of its own and "at", those since the search began."""


class Journal:
    """Where a search stands. Raises CheckpointError for what is none, and where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: dict[int, Values] = {}
        self.told: dict[int, Told] = {}
        self.events: list[tuple[str, int]] = []
        """("asked" or "told", number of the trial), in their order."""
        _mend(path)
        rows = read_rows(path)
        if not rows or not isinstance(rows[0].get("search"), dict):
            raise CheckpointError(f"{path}: not the journal of a search")
        self.search: dict[str, Any] = rows[0]["search"]
        for number, row in enumerate(rows[1:], 2):
            if not self._take(row):
                raise CheckpointError(f"{path}, line {number}: not what comes there: {str(row)[:60]!r}")

    @classmethod
    def begin(cls, path: Path, search: Mapping[str, Any]) -> Journal:
        """A new one."""
        write_rows(path, [{"search": search}])
        return cls(path)

    def _take(self, row: Mapping[str, Any]) -> bool:
        """Whether a row may follow those before it; then it counts."""
        if isinstance(row.get("trials"), int):
            self.search["trials"] = row["trials"]
        elif row.get("asked") == len(self.asked) and isinstance(row.get("values"), dict):
            self.asked[row["asked"]] = row["values"]
            self.events.append(("asked", row["asked"]))
        elif isinstance(row.get("told"), int) and row["told"] in self.asked.keys() - self.told.keys():
            if not {"value", "loss", "at"} <= row.keys() or not isinstance(row["value"], (int, float, type(None))):
                return False
            self.told[row["told"]] = row
            self.events.append(("told", row["told"]))
        else:
            return False
        return True

    @contextlib.contextmanager
    def read_whole(self) -> Iterator[None]:
        """Whatever is missing in it, or of another kind, is a CheckpointError."""
        try:
            yield
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{self.path} is damaged: {error!r}") from None

    def write(self, row: Mapping[str, Any]) -> None:
        """One row more, which is on the disk when this returns."""
        append_row(self.path, row, sync=True)
        assert self._take(row), row

    def pending(self) -> Iterator[int]:
        """Trials that were asked and not told."""
        return (number for number in self.asked if number not in self.told)


def _mend(path: Path) -> None:
    """Cut off what a crash left of a last line. Raises CheckpointError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_atomically(path, whole)
