"""Folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from metaft.errors import CheckpointError


@contextlib.contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end and goes where there is an error. Raises CheckpointError
    where there can be none; errors of what goes on inside are left as they are."""
    new = [parent for parent in out.parents if not os.path.lexists(parent)]  # the innermost first
    # No process's number: in a container the next one has it again, and meets what a killed one left.
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        with _named(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        yield folder
        with _named(out):
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # where `out` is there they are not empty
            for parent in new:
                parent.rmdir()


@contextlib.contextmanager
def _named(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"out: {out} cannot be written ({error.strerror})") from None
