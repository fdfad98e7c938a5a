"""A learning rate by a range test: one fit whose rate grows from step to step until its loss does too."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from metaft.config import AdaptConfig
from metaft.errors import MetaftError
from metaft.finetune import strategies
from metaft.finetune.examples import Part
from metaft.finetune.extras import all_named
from metaft.finetune.lessons import Labelled, as_they_are, turns
from metaft.finetune.training import Training, begin
from metaft.settings.finetuning import AUTO, Recipe
from metaft.starts.base import Start
from metaft.starts.base import body as start_body
from metaft.targets import Target

LOWEST, HIGHEST, STEPS = 1e-6, 10.0, 100
"""The rates of the test, and how many."""

WINDOW = 15
"""Steps, about a decade, that a loss is the mean of: batches differ, and the mean around a step does not lag behind."""

DONE = 0.9
"""Share of its whole fall by which the loss is to have fallen at the rate that is taken."""

FALLS = 0.05
"""Share of the first loss by which it has to fall, or it does not fall at all."""

DIVERGED = 4.0
"""Times the first loss, beyond which higher rates tell nothing more."""


def range_test(
    body: nn.Module,
    given: Labelled,
    recipe: Recipe,
    *,
    seed: int = 0,
    should_stop: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The loss of `STEPS` steps of a fit whose rate grows by the same factor in each (Smith 2017,
    https://arxiv.org/abs/1506.01186, section 3.3), and the rate to train at: the lowest at which `DONE` of the whole
    fall of the loss is behind.

    Neither that of the lowest loss nor that of the steepest fall is taken, which tell little of few images: a fit knows
    them by heart on the way, so that its loss stays at nothing up to rates at which a fit from the start never would,
    and falls the fastest at rates of which so short a fit as theirs needs many times the steps. For gradient descent on
    a quadratic of curvature c, at rates that grow by a factor g, the loss is about exp(-2 c r / (g - 1)): nine tenths
    are gone at r = log 10 (g - 1) / 2 c = 0.2 / c, a tenth of the 2 / c from which it diverges.

    Body, head, batches, losses and clipping are those of `fit` by the same arguments. What moves, and at which factors
    of the rate, is what the strategy moves in its last step, when most of it has set in. Nothing that a fit works with
    is touched: it trains copies, and random numbers are functions of the seed and the step. "rates" and "losses" (each
    before its step) end early where the loss has diverged; "smoothed" are their means around each step, and "rate" is
    the one to train at, rounded to two digits. A pure function of its arguments. Raises MetaftError where the loss
    never fell.
    """
    recipe = dataclasses.replace(recipe, lr=LOWEST)
    training = begin(body, given, recipe, strategies.named(recipe.trains), all_named(recipe.extra), seed)
    rates = np.geomspace(LOWEST, HIGHEST, STEPS)
    losses = _losses(training, rates, seed, should_stop)
    smoothed = smooth(losses)
    first, low = (float(np.mean(losses[: WINDOW // 2 + 1])), min(smoothed)) if losses else (0.0, 0.0)
    if first - low <= FALLS * first:
        raise MetaftError(
            f"lr: auto finds none, since the loss fell at no rate from {LOWEST:g} to {HIGHEST:g}; give a number"
        )
    taken = next(i for i, loss in enumerate(smoothed) if loss <= first - DONE * (first - low))
    return {
        "rates": rates[: len(losses)].tolist(), "losses": losses, "smoothed": smoothed,
        "rate": float(f"{rates[taken]:.1e}"),
    }  # fmt: skip


def _losses(training: Training, rates: np.ndarray, seed: int, should_stop: Callable[[], None]) -> list[float]:
    """Before each step, as long as they are finite and have not diverged."""
    recipe, per_epoch, lesson = training.recipe, training.per_epoch, training.lesson
    factors, on_features = training.rates(training.steps - 1), _on_features(training)
    losses: list[float] = []
    for epoch in range(math.ceil(len(rates) / per_epoch)):
        for number, turn in enumerate(turns(len(lesson.train), recipe, seed, epoch, per_epoch)):
            step = epoch * per_epoch + number
            if step == len(rates):
                break
            [total] = training.step([turn], factors, float(rates[step]), on_features=on_features)
            loss = total / len(turn.batch)
            should_stop()
            if not math.isfinite(loss):
                return losses
            losses.append(loss)
            if loss > DIVERGED * losses[0]:
                return losses
    return losses


def _on_features(training: Training) -> bool:
    """Whether nothing below the head moves, nor any image changes."""
    return bool(training.still) and as_they_are(training.recipe, all_named(training.recipe.extra))


def smooth(losses: Sequence[float]) -> list[float]:
    """Each the mean of the `WINDOW` around it, at the ends of as many as there are on both sides.

    >>> smooth([4.0, 1.0, 1.0])
    [4.0, 2.0, 1.0]
    """
    values, half = np.asarray(losses, dtype=float), WINDOW // 2
    reach = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return [float(values[i - r : i + r + 1].mean()) for i, r in enumerate(reach)]


def searched(
    config: AdaptConfig, start: Start, target: Target, train: np.ndarray, device: str
) -> tuple[AdaptConfig, dict[str, Any] | None]:
    """The settings with a number in the place of `--lr auto`, and the test that led to it, on the images `train` of the
    first draw from the start that was asked for: for others, draws and starts, it is as if it had been given."""
    recipe, seed = config.recipe, config.draws.seed
    if recipe is None or recipe.lr != AUTO:
        return config, None
    rows = torch.from_numpy(train)
    given = Labelled(target.inputs, Part(target.examples, rows), target.labels[rows], len(target.class_names))
    test = range_test(start_body(start, seed).to(device), given, recipe, seed=seed)
    print(f"lr: {test['rate']:g}, by a range test", file=sys.stderr)
    return dataclasses.replace(config, lr=test["rate"]), test


def said_of(test: Mapping[str, Any]) -> str:
    """What a report says of a test."""
    return (
        f"rate: {test['rate']:g}, at which nine tenths of the fall of the loss are behind in a range test of "
        f"{len(test['rates'])} steps on the training images of the first draw"
    )
