"""Random numbers as a pure function of a key: the same in every thread, process and engine, and on every device."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def words(key: Tensor, *where: int, count: int) -> Tensor:
    """[count] int64 in 0..2^32-1 for a key [] int64 and the place `where` that asks, a few numbers in 0..2^32-1.

    Neither state nor generator: element i is a hash of (key, where, i), so that under vmap each task has its own.
    """
    stream = _mixed(_mixed(key & _MASK) ^ ((key >> 32) & _MASK))
    for number in where:
        stream = _mixed(stream ^ number)
    elements = torch.arange(count, device=key.device)
    # Mixed once before they meet the stream: otherwise two streams that differ in low bits would be permutations.
    return _mixed(_mixed(elements) ^ stream)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that spreads every bit over all: the hash of Wellons' hash-prospector, public domain.

    In int64, where its multipliers below 2^31 cannot overflow. 1 is added first, since 0 would stay 0.
    """
    x = (x + 1) & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
