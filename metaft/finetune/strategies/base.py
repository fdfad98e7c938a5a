"""What a strategy is: what trains, how fast and when."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torch import nn

Groups = tuple[tuple[str, ...], ...]
"""Names of the parameters that can be trained, block by block (see `metaft.models.blocks`) from the input to the head,
which is the last group. Names are those in a module of "body" and "head"."""


def same(model: nn.Module) -> nn.Module:
    return model


def unchanged(model: nn.Module, seed: int) -> nn.Module:
    return model


def none(body: nn.Module) -> list[str]:
    return []


@dataclasses.dataclass(frozen=True, eq=False)
class Strategy:
    """What trains, how fast and when, as pure functions of the step: a resume needs nothing else to go on alike."""

    rates: Callable[[Groups, int, int, int], Mapping[str, float]]
    """(groups, step, steps of the whole fit, steps of an epoch) -> factor of the rate for each parameter by name. Where
    it is 0 or left out, the parameter is frozen in that step: bit-equal afterwards. A body of which no parameter moves
    in any step computes in evaluation mode and with stored moments; one that is to move later has its batches'
    statistics from the first step on. Patience counts from the epoch after which the same parameters train to the
    end."""
    prepare: Callable[[nn.Module, int], nn.Module] = unchanged
    """(model of "body" and "head", seed) -> what is trained in its place: again of "body" and "head", by these names,
    with other layers and parameters inside. It is what validation predicts with, and predicts as the model did where
    the body is the same object. Raises MetaftError for a backbone of which nothing could train."""
    finish: Callable[[nn.Module], nn.Module] = same
    """What was trained -> the model that is kept, which predicts alike. Moments are stored after it."""
    few: bool = False
    """Whether what moves in the backbone is so little that published weights are safe from a higher rate."""
    stays: Callable[[nn.Module], list[str]] = none
    """Names of the weights of a body that `prepare` had to leave as they are, for the report."""


def every(groups: Groups, factor: float = 1.0) -> dict[str, float]:
    """The same factor for all parameters of these groups."""
    return {name: factor for group in groups for name in group}


def falling(groups: Groups, share: float) -> dict[str, float]:
    """1 for the head, and for each block this share of what the one above it gets."""
    return {name: share**depth for depth, group in enumerate(reversed(groups)) for name in group}
