"""Arrays that may be more than there is memory for: they lie in files, whose pages processes share."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
import tempfile
import zipfile
from typing import IO

import numpy as np

MAPPED_FROM = 2**28
"""Bytes from which an array lies in a file that the system can write back and read again as memory gets short."""


def room(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 zeros. A large array is mapped from a file without a name, in the folder for temporary files (TMPDIR); it
    is in memory where there is no room for that."""
    size = math.prod(shape)
    if size >= MAPPED_FROM:
        with contextlib.suppress(OSError, AttributeError), tempfile.TemporaryFile(prefix="metaft-") as file:
            # Without blocks of its own a full disk would end the process when a page is written. macOS lacks this.
            os.posix_fallocate(file.fileno(), 0, size)
            return np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8).reshape(shape)
    return np.zeros(shape, np.uint8)


def member(stream: IO[bytes], archive: np.lib.npyio.NpzFile, field: str) -> np.ndarray:
    """The array of that name in an `.npz` that was opened from this stream. A large one of bytes is mapped: what is
    written to it stays in this process. Raises ValueError where the file is too short for it, or its head is broken."""
    entry = archive.zip.getinfo(f"{field}.npy")  # type: ignore[reportOptionalMemberAccess]
    if entry.file_size < MAPPED_FROM or entry.compress_type != zipfile.ZIP_STORED:
        return archive[field]
    stream.seek(entry.header_offset + 26)  # where a local header has the lengths of its two last parts
    stream.seek(sum(struct.unpack("<HH", stream.read(4))), os.SEEK_CUR)
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)  # as savez writes one
    if dtype != np.uint8:  # others would not be aligned
        return archive[field]
    file = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    return np.frombuffer(file, np.uint8, math.prod(shape), stream.tell()).reshape(shape)
