"""Places that a command is to write to: whether they are free, or hold what may be replaced."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from metaft.errors import CheckpointError, MetaftError
from metaft.support.paths import to_replace


def fresh_folder(base: Path) -> Path:
    """`base`, or the first of `base-2`, `base-3`, ... that is not taken."""
    number, path = 1, base
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def check_new(out: Path) -> Path:
    """The same. Raises MetaftError for a place where there is something."""
    if os.path.lexists(out):
        raise MetaftError(f"out: {out} exists already; name another folder with --out")
    return out


def check_writable(path: Path, field: str, folder: Path) -> None:
    """Raises CheckpointError, naming `field`, for a file that could not be written; `folder` is to hold it.

    A device or pipe is left alone, since opening a pipe waits for its reader.
    """
    try:
        target = to_replace(path)
        if target is None:
            return
        with tempfile.TemporaryFile(dir=folder if target == path else target.parent):
            pass
    except OSError as error:
        raise CheckpointError(f"{field}: {path} cannot be written ({error.strerror})") from None


def check_own(path: Path, field: str, begins: Sequence[str], what: str) -> None:
    """Raises MetaftError, naming `field`, for a file that holds something else than `what`, and would be replaced: it
    does not begin with any of `begins`."""
    try:
        target = to_replace(path)
        if target is None:
            return
        with target.open("rb") as file:
            head = file.read(max(map(len, begins)))
    except OSError:  # nothing is there; or `check_writable` says what is
        return
    if head and not head.startswith(tuple(each.encode() for each in begins)):
        raise MetaftError(f"{field}: {path} is there, and is no {what}; name another file, or remove it")
