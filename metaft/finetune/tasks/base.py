"""How the losses of several targets, which share a backbone, become one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Given(NamedTuple):
    """What a step knows of T targets, each on a batch of its own."""

    losses: Tensor
    """[T]"""
    gradients: Tensor
    """[T, P] of each loss, by the parameters of the backbone, which all share."""
    log_variances: Tensor
    """[T], learned where `Tasks.weighs`; else zeros."""
    orders: Sequence[Sequence[int]]
    """For each target the others in an order that is drawn anew in each step."""


class Combined(NamedTuple):
    """The gradients that an optimiser is given."""

    shared: Tensor
    """[P] of the backbone."""
    factors: Tensor
    """[T]: what the gradient of each target's own head is multiplied by."""
    log_variances: Tensor
    """[T] of the log-variances."""


class Tasks(NamedTuple):
    """One way to combine them."""

    combine: Callable[[Given], Combined]
    weighs: bool = False
    """Whether each target has a log-variance, which is learned at the head's rate."""
