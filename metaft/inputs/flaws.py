"""What Pillow warns of or logs, kept beside the file that it is about instead of raw on the terminal."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_ONE_AT_A_TIME = threading.RLock()
"""The filters of `warnings` belong to the process, so that two threads may not change and restore them in turn."""

_reading = threading.local()

_notes: list[dict[Path, str]] = []
"""Of every `noted` that is entered, the innermost last; whoever holds the lock puts them here."""

HIGH_BYTES = "16 bits for each colour or for transparency, of which only the high 8 are read"
"""What `remark` is given of pictures whose levels Pillow does not hand over: a loss, and no flaw of the file."""


@contextlib.contextmanager
def noted() -> Iterator[dict[Path, str]]:
    """Inside, the first thing that Pillow warns of each file (see `about`), or logs as an error of it, is put here,
    whichever thread reads it.

    What threads that read no file warn of is shown as ever. Enter it once around all reading, in the thread that
    starts the others: those need not, and must not, touch any filter, nor enter this, which waits until it is left.
    """
    flaws: dict[Path, str] = {}
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        shown = warnings.showwarning

        def keep(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            file = getattr(_reading, "file", None)
            if file is None:
                shown(message, category, *place, **more)
            else:
                flaws.setdefault(file, " ".join(str(message).split()).rstrip("."))

        warnings.filterwarnings("always", module=r"PIL\.")
        warnings.showwarning = keep
        _notes.append(flaws)
        try:
            with _logged_to(flaws):
                yield flaws
        finally:
            _notes.pop()


@contextlib.contextmanager
def _logged_to(flaws: dict[Path, str]) -> Iterator[None]:
    """Pillow's log goes to the file's flaws, and to the handlers that a program has set up, but to no terminal."""
    log, handler = logging.getLogger("PIL"), _Handler(flaws)
    outer = [other for other in log.handlers if isinstance(other, _Handler)]
    for other in outer:
        log.removeHandler(other)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        for other in outer:
            log.addHandler(other)


class _Handler(logging.Handler):
    def __init__(self, flaws: dict[Path, str]) -> None:
        super().__init__(logging.WARNING)
        self.flaws = flaws

    def emit(self, record: logging.LogRecord) -> None:
        file = getattr(_reading, "file", None)
        if file is not None:
            self.flaws.setdefault(file, " ".join(record.getMessage().split()).rstrip("."))
        elif logging.lastResort is not None and not logging.getLogger().handlers:
            logging.lastResort.handle(record)  # as without this handler


@contextlib.contextmanager
def about(file: Path) -> Iterator[None]:
    """Inside, what this thread is warned of concerns this file."""
    former = getattr(_reading, "file", None)
    _reading.file = file
    try:
        yield
    finally:
        _reading.file = former


def remark(text: str) -> None:
    """Put this of the file that `about` names where Pillow's warnings go, before them; outside `noted`, nowhere."""
    file = getattr(_reading, "file", None)
    if file is not None and _notes:
        _notes[-1][file] = text


def flaws_note(flaws: Mapping[Path, str]) -> list[str]:
    """A note on flaws and one on levels that are lost, each with a count and the first file, where there are any."""
    lossy = [file for file, text in flaws.items() if text == HIGH_BYTES]
    flawed = [file for file, text in flaws.items() if text != HIGH_BYTES]
    notes = []
    if flawed:
        file, count = min(flawed), "1 picture is" if len(flawed) == 1 else f"{len(flawed)} pictures are"
        notes.append(f"{count} read in spite of flaws, such as {file} ({flaws[file]})")
    if lossy:
        count = "1 picture has" if len(lossy) == 1 else f"{len(lossy)} pictures have"
        notes.append(f"{count} {HIGH_BYTES}, such as {min(lossy)}; what uses fewer bits is too dark: scale it up first")
    return notes
