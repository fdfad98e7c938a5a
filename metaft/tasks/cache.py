"""Arrays that took a while to make, kept on disk and checked by digest when they come back.

A cache file is a plain `.npz` (never a pickle) with one more entry, the SHA-256 of all the others. Losing or breaking
one costs time and nothing else: whatever is wrong with it, the arrays are built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

_DIGEST = "sha256"

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$METAFT_CACHE`, else `$XDG_CACHE_HOME/metaft`, else `~/.cache/metaft`."""
    if own := os.environ.get("METAFT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaft"


def cached(name: str, key: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of `build()`, from the cache where they are there and whole.

    `key` must name everything that the arrays depend on. `name` starts the file's name, for people who look into the
    folder. A broken file is logged and replaced; a folder that cannot be written only costs the next run its time.
    Any number of processes may call this at once: each file appears whole or not at all, and the last one stays.
    """
    path = cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    arrays = _load(path)
    if arrays is None:
        arrays = build()
        _save(path, arrays)
    return arrays


def _digest(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    digest = hashlib.sha256()
    for field in sorted(arrays):
        array = np.ascontiguousarray(arrays[field])
        digest.update(f"{field} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data if array.size else b"")
    return np.frombuffer(digest.digest(), np.uint8)


def _load(path: Path) -> dict[str, np.ndarray] | None:
    try:
        # Opened here: numpy leaves the file open when it turns out to be cut short.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {field: file[field] for field in file.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile) as error:
        log.warning("cache file %s cannot be read and is built again: %s", path, error)
        return None
    stored = arrays.pop(_DIGEST, None)
    if stored is None or not np.array_equal(stored, _digest(arrays)):
        log.warning("cache file %s does not match its digest and is built again", path)
        return None
    return arrays


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write beside the target, sync, rename: a reader never meets half a file."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez(file, **arrays, **{_DIGEST: _digest(arrays)})  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        log.info("cache file %s is not kept: %s", path, error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
