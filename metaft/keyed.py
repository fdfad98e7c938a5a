"""Randomness as an argument: choices that are a function of an integer key, for ONE task. Pure, also under vmap."""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), in signed integers that
# wrap around.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_INVERSE = pow(_STEP, -1, 2**64) - 2**64  # of _STEP: their product wraps around to 1
_FACTORS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def permutation(key: Tensor, n: int, draw: int = 0) -> Tensor:
    """An order of n things, int64 [n], that depends on (key, draw) alone: key [] int64."""
    mixed = _mixed(_mixed(key) + draw * _STEP % 2**63)
    return _stream(mixed, n).sort(stable=True).indices


def minibatches(key: Tensor, n: int, size: int, steps: int) -> Tensor:
    """Which of n examples each step takes, int64 [steps, size]: passes over all of them, each in an order of its own.

    A batch may end one pass and begin the next.
    """
    passes = -(-steps * size // n)
    return torch.cat([permutation(key, n, i) for i in range(max(1, passes))])[: steps * size].view(steps, size)


def words(key: Tensor, *where: int, count: int) -> Tensor:
    """Numbers in 0..2^32-1, int64 [count], that depend on (key, where) alone: key [] int64, `where` from 0 on.

    `where` says what they are for (the step, the layer, ...), so that one key serves for all.
    """
    mixed = _mixed(key)
    for number in where:
        mixed = _mixed(mixed + (number + 1) * _STEP % 2**63)
    return _shifted(_stream(mixed, count), 32)


def _stream(own: Tensor, n: int) -> Tensor:
    """`own` plus 1, 2, ..., n times _STEP, scrambled: int64 [n].

    The sum is written as a product whose factor depends on `own`: torch.compile would work out multiples of 1, 2, ...
    by themselves in integers without bound, and find no room for them.
    """
    return _mixed((own * _INVERSE + torch.arange(1, n + 1, device=own.device)) * _STEP)


def _mixed(x: Tensor) -> Tensor:
    """Scrambled bits of int64 x, one to one."""
    for shift, factor in _FACTORS:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by with zeros coming in: of signed integers torch would copy the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
