"""Pictures that are there twice: to the pixel, or nearly, as a copy in another size or format is.

A copy of a training picture in the test part tells nothing, so both are kept in one part where parts are drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BITS_APART = 2
"""Of the 64 of a difference hash, at most, between near duplicates."""

LEVELS_APART = 3.0
"""Mean distance of their grey levels at 16 x 16, at most: letters alike in outline are further apart."""

COMPARED = 64
"""Pictures of one bucket that each is compared with, at most, so that a set of blank ones takes no square of time."""

_BANDS = 4  # of 16 bits: two hashes that are at most 3 bits apart agree in one of them


def groups_of(pictures: Tensor) -> np.ndarray:
    """For uint8 pictures [M, C, H, W] the number of the first one that each is a duplicate of, its own where there is
    none: int64 [M]."""
    first = _exact(pictures)
    different = np.flatnonzero(first == np.arange(len(first)))
    for one, other in _near(pictures, different):
        first[first == first[other]] = min(first[one], first[other])
    return first


def _exact(pictures: Tensor) -> np.ndarray:
    seen: dict[bytes, int] = {}
    marks = (hashlib.blake2b(np.ascontiguousarray(x.numpy()).data, digest_size=16).digest() for x in pictures)
    return np.array([seen.setdefault(mark, i) for i, mark in enumerate(marks)], np.int64)


def _near(pictures: Tensor, rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of rows that are nearly the same, the earlier one first."""
    hashes, small = _hashes(pictures, rows)
    for band in range(_BANDS):
        buckets: dict[int, list[int]] = {}
        for i, key in enumerate(((hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)).tolist()):
            bucket = buckets.setdefault(key, [])
            for j in bucket[:COMPARED]:
                apart = int(hashes[i] ^ hashes[j]).bit_count()
                if apart <= BITS_APART and np.abs(small[i] - small[j]).mean() <= LEVELS_APART:
                    yield int(rows[j]), int(rows[i])
                    break
            bucket.append(i)


def _hashes(pictures: Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 [m], float32 [m, 16, 16]): whether each of 8 x 8 cells is darker than its right neighbour, and the grey
    levels of a smaller picture."""
    hashes, small = [], []
    weights = torch.from_numpy(np.uint64(1) << np.arange(64, dtype=np.uint64)).view(torch.int64)
    for part in torch.from_numpy(rows).split(256):
        grey = pictures[part].float().mean(1, keepdim=True)
        cells = F.interpolate(grey, size=(8, 9), mode="area")[:, 0]
        bits = (cells[:, :, 1:] > cells[:, :, :-1]).flatten(1).long()
        hashes.append((bits * weights).sum(1))
        small.append(F.interpolate(grey, size=(16, 16), mode="area")[:, 0])
    if not hashes:
        return np.empty(0, np.uint64), np.empty((0, 16, 16), np.float32)
    return torch.cat(hashes).numpy().view(np.uint64), torch.cat(small).numpy()
