"""A target in a fit: its examples, what is trained on together when, and the loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from metaft.finetune.augment import Change, of_epoch
from metaft.finetune.batches import batches_of
from metaft.finetune.examples import Prepared
from metaft.finetune.extras import Batch, Extra, Objective
from metaft.finetune.features import Features
from metaft.finetune.outcomes import Outcome
from metaft.inputs import Inputs
from metaft.inputs.base import Examples
from metaft.settings.finetuning import Recipe


class Labelled(NamedTuple):
    """What a target gives a fit to learn from."""

    inputs: Inputs
    examples: Examples
    """[n, ...] raw."""
    labels: Tensor
    """int64 [n] of so many classes, or numbers where that is 0."""
    classes: int
    val_examples: Examples | None = None
    val_labels: Tensor | None = None
    known: tuple[Tensor, Tensor] | None = None
    """The features of training and validation examples, where the caller has them."""


class Turn(NamedTuple):
    """What one step trains on."""

    batch: np.ndarray
    """Rows of the training examples."""
    epoch: int
    change: Change | None
    """What becomes of them in this epoch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lesson:
    """A target, ready to be trained on."""

    train: Prepared
    val: Prepared | None
    val_labels: Tensor | None
    outcome: Outcome
    targets: Tensor
    """Labels as the loss takes them."""
    model: nn.Module
    """Of "body" and "head"."""
    objective: Objective
    features: Features

    @functools.cached_property
    def alone(self) -> nn.Module:
        """The head on features."""
        return nn.ModuleDict({"body": nn.Identity(), "head": self.model.get_submodule("head")})

    def loss(self, rows: Tensor, turn: Turn, computed: Tensor | None) -> Tensor:
        """Of some of a turn's batch; on `computed` features where they are given."""
        y = self.targets[rows.to(self.targets.device)]
        if computed is not None:
            return self.objective(self.alone, Batch(computed[rows.to(computed.device)], y, rows, turn.epoch))
        return self.objective(self.model, Batch(self.inputs(rows, turn), y, rows, turn.epoch))

    def inputs(self, rows: Tensor, turn: Turn) -> Tensor:
        """Some of a turn's batch as the model takes them."""
        raw = self.train.examples[rows]
        raw = raw if turn.change is None else turn.change(raw.to(self.train.like.device), rows)
        return self.train.prepare(raw)

    def share(self, rows: Tensor, turn: Turn) -> float:
        """Of some of a turn's batch in the mean over all of it."""
        weight = self.outcome.weight
        return weight(self.targets[rows.to(self.targets.device)]) / weight(self.targets[torch.from_numpy(turn.batch)])


def as_they_are(recipe: Recipe, extras: Sequence[Extra]) -> bool:
    """Whether images reach the model unchanged, so that one epoch's features serve the next."""
    return recipe.augment == "none" and not any(extra.of_inputs for extra in extras)


def turns(images: int, recipe: Recipe, seed: int, epoch: int, per_epoch: int) -> Iterator[Turn]:
    """What the steps of one epoch of the fit train on. A function of the step alone: a target of fewer images than make
    so many steps is gone through again and again, each time in another order."""
    steps = np.arange(epoch * per_epoch, (epoch + 1) * per_epoch)
    of_own = steps // len(batches_of(images, recipe.images_per_step, seed, 0))
    for own in np.unique(of_own).tolist():
        batches = batches_of(images, recipe.images_per_step, seed, own)
        change = of_epoch(recipe.augment, images, seed, own)
        for step in steps[of_own == own].tolist():
            yield Turn(batches[step % len(batches)], own, change)
