"""What Pillow warns of, kept beside the file that it is about instead of raw on the terminal."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_ONE_AT_A_TIME = threading.RLock()
"""The filters of `warnings` belong to the process, so that two threads may not change and restore them in turn."""

_reading = threading.local()


@contextlib.contextmanager
def noted() -> Iterator[dict[Path, str]]:
    """Inside, the first thing that Pillow warns of each file (see `about`) is put here, whichever thread reads it.

    Warnings of threads that read no file are shown as ever. Enter it once around all reading, in the thread that
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
        yield flaws


@contextlib.contextmanager
def about(file: Path) -> Iterator[None]:
    """Inside, what this thread is warned of concerns this file."""
    former = getattr(_reading, "file", None)
    _reading.file = file
    try:
        yield
    finally:
        _reading.file = former


def flaws_note(flaws: Mapping[Path, str]) -> list[str]:
    """One note with a count and the first file, or none."""
    if not flaws:
        return []
    file = min(flaws)
    count = "1 picture is" if len(flaws) == 1 else f"{len(flaws)} pictures are"
    return [f"{count} read in spite of flaws, such as {file} ({flaws[file]})"]
