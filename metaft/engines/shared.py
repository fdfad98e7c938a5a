"""Tensors in memory that processes share: inherited by a fork, or in a file whose descriptor is handed over."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Like:
    """What a row of a tensor looks like; a leaf of a tree, as a tuple would not be."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def inherited(shape: Any, dtype: torch.dtype) -> Tensor:
    """A tensor that forks share; anonymous, since /dev/shm has a size of its own to run out of."""
    return _tensor(mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize)), tuple(shape), dtype, 0)


@contextlib.contextmanager
def file_in_memory() -> Iterator[int]:
    """A descriptor of a file without a name. On Linux it is in memory and, unlike those of /dev/shm, of any size."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("metaft")
        try:
            yield file
        finally:
            os.close(file)
    else:
        with tempfile.TemporaryFile(prefix="metaft-") as stream:
            yield stream.fileno()


_ALIGNED = 64
"""Bytes that the place of each tensor in a file is a multiple of."""


def starts_of(slots: int, likes: Sequence[Like]) -> list[int]:
    """Where in a file so many rows of each begin, and behind the last one where the file ends."""
    sizes = [slots * math.prod(like.shape) * like.dtype.itemsize for like in likes]
    return list(itertools.accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0))


def mapped(file: int, slots: int, likes: Sequence[Like]) -> list[Tensor]:
    """For each a tensor of so many rows, one behind the other in the file, which is as long as `starts_of` says."""
    memory = mmap.mmap(file, 0)
    starts = starts_of(slots, likes)[:-1]
    return [_tensor(memory, (slots, *like.shape), like.dtype, start) for like, start in zip(likes, starts, strict=True)]


def _tensor(memory: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype, start: int) -> Tensor:
    count = math.prod(shape)
    if count == 0:  # which frombuffer does not take
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
