"""Folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from metaft.errors import CheckpointError, MetaftError


def check_new(out: Path) -> Path:
    """The same. Raises MetaftError for a place where there is something."""
    if os.path.lexists(out):
        raise MetaftError(f"out: {out} exists already; name another folder with --out")
    return out


@contextlib.contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end and goes where there is an error. Raises
    CheckpointError."""
    new = [parent for parent in out.parents if not os.path.lexists(parent)]  # the innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"out: {out} cannot be written ({error.strerror})") from None
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(out)
    except OSError as error:
        raise CheckpointError(f"out: {out} cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # where `out` is there they are not empty
            for parent in new:
                parent.rmdir()
