"""What an extra is: a change to the loss of a fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from metaft.inputs import Inputs
from metaft.types import Params


class Batch(NamedTuple):
    """Examples of one step."""

    x: Tensor
    """[n, ...] as the model computes with them; of a model on features that are computed once, those."""
    y: Tensor
    """[n] labels as the loss takes them: int64 of classes, or numbers; of mixed examples float [n, classes], the share
    of each class."""
    rows: Tensor
    """int64 [n]: which examples of the training part they are. With `epoch` a key for random numbers that a resume and
    another order of batches leave as they are."""
    epoch: int


class Origin(NamedTuple):
    """What a fit began with."""

    params: Params
    """Of the model, by name, before the first step."""
    seed: int
    classes: int = 0
    """0: labels are numbers."""
    inputs: Inputs | None = None
    """What made `Batch.x` of raw examples."""
    dropout: float = 0.0
    """The share of the features before the head that a pass in training leaves out."""


Objective = Callable[[nn.Module, Batch], Tensor]
"""(model of "body" and "head", batch) -> scalar to minimise."""


def anything(inputs: Inputs, class_names: Sequence[str]) -> None:
    """Nothing is wrong with any."""


@dataclasses.dataclass(frozen=True, eq=False)
class Extra:
    """A change to the loss. Several compose: each wraps the objective that the one before it left."""

    wrap: Callable[[Objective, Origin], Objective]
    said: str = "a loss of its own"
    """What it does, in a report's words."""
    of_inputs: bool = True
    """Whether it needs the examples themselves. One that looks at parameters alone leaves a backbone that stays its
    features, which are computed once."""
    of_start: bool = False
    """Whether it is about what a start knows: a random one has nothing to keep, and trains without."""
    of_classes: bool = False
    """Whether it means nothing where labels are numbers."""
    run: Path | None = None
    """The adapt run whose classifier it depends on."""
    check: Callable[[Inputs, Sequence[str]], None] = anything
    """(inputs, class names) -> raises MetaftError that begins with `extra` where it cannot be applied to them."""
