"""What an extra is: a change to the loss of a fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from metaft.types import Params


class Batch(NamedTuple):
    """Examples of one step."""

    x: Tensor
    """[n, ...] as the model computes with them."""
    y: Tensor
    """[n] labels as the loss takes them: int64 of classes, or numbers."""
    rows: Tensor
    """int64 [n]: which examples of the training part they are. With `epoch` a key for random numbers that a resume and
    another order of batches leave as they are."""
    epoch: int


class Origin(NamedTuple):
    """What a fit began with."""

    params: Params
    """Of the model, by name, before the first step."""
    seed: int


Objective = Callable[[nn.Module, Batch], Tensor]
"""(model of "body" and "head", batch) -> scalar to minimise."""


@dataclasses.dataclass(frozen=True, eq=False)
class Extra:
    """A change to the loss. Several compose: each wraps the objective that the one before it left."""

    wrap: Callable[[Objective, Origin], Objective]
