"""Arrays that took a while to make, kept on disk and checked by digest when they come back.

A cache file is a plain `.npz` (never a pickle) with one more entry, a SHA-256 of its key and all the
others. Large arrays of bytes are mapped, so that processes share them. Losing or breaking a file
costs time and nothing else: whatever is wrong with it, the arrays are built again. So does a folder
that cannot be written, or that a user without a home does not have: a line says so, once. What is
mapped already is safe from files that are deleted or renamed, not from one that is written over in
its place, which nothing here does.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np

from metaft.support.large import member
from metaft.support.output import say

_DIGEST = "sha256"
_FORMAT = 3
"""Of the files; one of another format is not looked for."""

_PIECE = 2**25
"""Bytes that have a digest of their own."""

log = logging.getLogger(__name__)
_said: set[str] = set()


def cache_folder() -> Path | None:
    """`$METAFT_CACHE`, else `$XDG_CACHE_HOME/metaft`, else `~/.cache/metaft`; None for a user without a home."""
    if folder := os.environ.get("METAFT_CACHE"):
        return Path(os.path.expanduser(folder))
    home = os.path.expanduser("~")
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "metaft"
    return Path(home) / ".cache/metaft" if os.path.isabs(home) else None


def cached(name: str, key: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of `build()`, from the cache where they are there and whole.

    `key` must name everything that the arrays depend on. `name` starts the file's name, for people who look into the
    folder. A broken file is logged and replaced; a folder that cannot be written only costs the next run its time.
    Any number of processes may call this at once: each file appears whole or not at all, and the last one stays.
    """
    data = f"{_FORMAT} {key}".encode("utf-8", "surrogateescape")
    file = f"{name}-{hashlib.sha256(data).hexdigest()[:32]}.npz"
    folder = cache_folder()
    arrays = None if folder is None else _load(folder / file, data)
    if arrays is None:
        arrays = build()
        content = {**arrays, _DIGEST: _digest(arrays, data)}
        keep(file, lambda stream: np.savez(stream, **content))  # pyright: ignore[reportArgumentType]
    return arrays


def keep(file: str, write: Callable[[IO[bytes]], object]) -> None:
    """Put what `write` writes into the cache folder under this name, whole or not at all. That it cannot be is said
    once."""
    folder, temporary = cache_folder(), None
    if folder is None:
        _say("the user has no home folder for it")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Written beside the target, synced, renamed: a reader never meets half a file.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=Path(file).stem, suffix=".tmp", delete=False) as stream:
            temporary = stream.name
            write(stream)  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, folder / file)
    except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
        _say(f"{folder} cannot be written, {getattr(error, 'strerror', None) or error}")
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _say(why: str) -> None:
    if why not in _said:
        _said.add(why)
        say(f"metaft: note: nothing is cached: {why}; METAFT_CACHE can name another folder")


def _digest(arrays: Mapping[str, np.ndarray], key: bytes) -> np.ndarray:
    digest = hashlib.sha256(hashlib.sha256(key).digest())
    for field in sorted(arrays):
        array = np.ascontiguousarray(arrays[field])
        digest.update(f"{field} {array.dtype.str} {array.shape}\n".encode())
        for piece in _pieces(array.reshape(-1).view(np.uint8)):
            digest.update(piece)
    return np.frombuffer(digest.digest(), np.uint8)


def _pieces(values: np.ndarray) -> list[bytes]:
    """The digest of each piece of bytes; those of a large array take all cores."""

    def digest(start: int) -> bytes:
        return hashlib.sha256(values[start : start + _PIECE].data).digest()

    starts = range(0, len(values), _PIECE)
    if len(starts) < 2:
        return [digest(start) for start in starts]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(digest, starts))


def _load(path: Path, key: bytes) -> dict[str, np.ndarray] | None:
    try:
        # Opened here: numpy leaves the file open when it turns out to be cut short.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {field: member(stream, file, field) for field in file.files}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # one flipped bit, and zipfile, zlib, struct or numpy raise anything, MemoryError too
        log.warning("cache file %s cannot be read and is built again: %s", path, error)
        return None
    stored = arrays.pop(_DIGEST, None)
    if stored is None or not np.array_equal(stored, _digest(arrays, key)):
        log.warning("cache file %s does not match its digest and is built again", path)
        return None
    return arrays
