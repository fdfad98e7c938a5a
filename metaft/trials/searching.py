"""A search from its journal to its end: asks, runs trials, is told what they came to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metaft.errors import CheckpointError, MetaftError
from metaft.options import flat
from metaft.runs.checkpoint import write_atomically
from metaft.runs.folder import RunFolder, read_rows
from metaft.trials.journal import Journal, Told
from metaft.trials.methods import METHODS
from metaft.trials.methods.base import Method
from metaft.trials.over import OVER, higher_is_better, settings_of
from metaft.trials.processes import LAUNCH, Trial, run_all
from metaft.trials.space import Space

UNTIL = 20
"""Trials, where the number is left open and the method has none of its own."""


class Search:
    """A search in its folder. Raises CheckpointError for a journal that is damaged."""

    def __init__(self, path: Path, journal: Journal, space: Space) -> None:
        self.path, self.journal = path, journal
        with journal.read_whole():
            self._replay(space)

    def _replay(self, space: Space) -> None:
        journal = self.journal
        self.space = space = space._replace(fixed={**space.fixed, **journal.search["chosen"]})
        self.over, self.measure = OVER[space.command], journal.search["measure"]
        self.method = method_of(space, journal.search)
        for what, number in journal.events:
            if what == "asked":
                self.method.ask(number, as_given(space, journal.asked[number]))
            else:
                self.method.tell(number, journal.told[number]["value"])
        self._begun = set(journal.told)
        self._since = time.monotonic() - max((row["at"] for row in journal.told.values()), default=0.0)

    @property
    def trials(self) -> int:
        """How many there are to be."""
        wanted, most = self.journal.search["trials"], self.method.size
        if most is None:
            return wanted or UNTIL
        return min(wanted or (most if self.method.exhausts else UNTIL), most)

    def folder(self, number: int) -> RunFolder:
        """The run folder of a trial."""
        return RunFolder(self.path / "trials" / f"{number:04d}")

    def run(
        self,
        *,
        workers: int,
        seconds: float | None,
        launch: Sequence[str] = LAUNCH,
        should_stop: Callable[[], None] = lambda: None,
        on_trial: Callable[[Told], None] = lambda row: None,
    ) -> None:
        """Go on to the last trial, or until no more are to begin after so many `seconds`. `on_trial` is told of each.
        Raises what `should_stop` does, with all kept, and CheckpointError where the folder cannot be written."""
        limit = None if seconds is None else time.monotonic() + seconds
        (self.path / "trials").mkdir(exist_ok=True)

        def following() -> Trial | None:
            late = limit is not None and time.monotonic() > limit
            return None if late and self._begun else self._following()  # one at least, to come to something

        def ended(number: int, status: int) -> None:
            self._ended(number, status)
            on_trial(self.journal.told[number])

        run_all(following, ended, workers=workers, launch=launch, should_stop=should_stop)

    def _following(self) -> Trial | None:
        """The next trial: one that was asked for and has not ended, or a new one."""
        number = next((n for n in self.journal.pending() if n not in self._begun), len(self.journal.asked))
        if number not in self.journal.asked:
            if number >= self.trials:
                return None
            values = self.method.ask(number)
            self.journal.write({"asked": number, "values": _plain(values)})
        self._begun.add(number)
        folder = self.folder(number)
        write_atomically(folder.path.with_suffix(".toml"), self.toml(number, beside=True).encode())
        words = ["--config", str(folder.path.with_suffix(".toml")), "--out", str(folder.path), "--auto-resume"]
        return Trial(number, [self.space.command, *words], folder.path.with_suffix(".log"), folder.lock)

    def toml(self, number: int, *, beside: bool = False) -> str:
        """The settings of a trial as `--config` takes them; with those of a trial `beside` them, as it is run."""
        import tomli_w

        values = self.journal.asked[number]
        settings = flat(settings_of(self.space, values))
        said = {name: settings[name] for name in (*self.space.fixed, *values) if settings[name] is not None}
        return tomli_w.dumps({**said, **{k: v for k, v in self.over.beside.items() if beside and k not in said}})

    def _ended(self, number: int, status: int) -> None:
        figure, message, folder = None, "", self.folder(number)
        if status == 0:
            try:
                figure = self.over.validated(folder)
            except (MetaftError, KeyError, TypeError, StopIteration) as error:
                message = str(error) if isinstance(error, MetaftError) else f"its rows are damaged: {error!r}"
        else:
            message = _last_words(folder.path.with_suffix(".log")) or "it said nothing"
            message = f"killed by signal {-status}" if status < 0 else message
        self.journal.write(
            {
                "told": number,
                "value": None if figure is None else figure.value,
                "loss": None if figure is None else figure.loss,
                "status": status,
                **({"message": message} if message else {}),
                "seconds": _seconds(folder),
                "at": round(time.monotonic() - self._since, 3),
            }
        )
        self.method.tell(number, None if figure is None else figure.value)

    def order(self) -> list[int]:
        """Trials that came to a figure, the best first: of equal ones that of the lower loss, then the earlier."""
        sign = -1 if higher_is_better(self.measure) else 1
        done = [row for row in self.journal.told.values() if row["value"] is not None]
        key = lambda row: (sign * row["value"], row["loss"] or 0.0, row["told"])  # noqa: E731
        return [row["told"] for row in sorted(done, key=key)]


def method_of(space: Space, search: Mapping[str, Any]) -> Method:
    """Raises MetaftError for a space that the method cannot search, or a library that is not there."""
    return METHODS[search["method"]](space, search["seed"], higher_is_better(search["measure"]))


def as_given(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values from a journal, in the order and types of the space."""
    return {d.name: tuple(v) if isinstance(v := values[d.name], list) else v for d in space.searched}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _last_words(log: Path) -> str:
    """Why a command ended, from what it printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    said = [line for line in lines if line.startswith("metaft: error: ")] or [line for line in lines if line.strip()]
    return said[-1].removeprefix("metaft: error: ")[:500] if said else ""


def _seconds(folder: RunFolder) -> float | None:
    """That a trial computed, in all its parts."""
    try:
        return round(sum(row["seconds"] for row in read_rows(folder.timing, ["seconds"])), 3)
    except CheckpointError:
        return None
