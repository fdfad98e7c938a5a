"""Examples that are taken from a larger tensor batch by batch, so that no part of a data set is ever copied whole."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from metaft.inputs import Inputs
from metaft.inputs.base import Examples, at_most


def evenly(count: int, most: int) -> np.ndarray:
    """At most so many of the rows 0 .. count - 1, the first and the last among them.

    >>> evenly(10, 4).tolist(), evenly(3, 9).tolist()
    ([0, 3, 6, 9], [0, 1, 2])
    """
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some rows of a tensor, which is not copied."""

    whole: Tensor
    rows: Tensor
    """int64 [n]"""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.whole[self.rows[rows]]


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """Examples as a model computes with them, part by part, made anew each time that they are gone through."""

    examples: Examples
    inputs: Inputs
    like: Tensor
    """Of the device and type that they are to have."""
    at_once: int | None = None
    """Examples in a part (None: up to 1024, fewer of large ones)."""

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.prepare(self.examples[rows])

    def __iter__(self) -> Iterator[Tensor]:
        at_once = self.at_once or at_most(self.inputs.shape)
        return (self[rows] for rows in torch.arange(len(self)).split(at_once))

    def prepare(self, raw: Tensor) -> Tensor:
        return self.inputs(raw.to(self.like.device)).to(self.like.dtype)


def like_of(body: nn.Module) -> Tensor:
    """A tensor of the device and type that a body computes with; where it holds none, as pictures come."""
    tensors = itertools.chain(body.parameters(), body.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))
