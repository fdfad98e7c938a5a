"""Choosing how to fine-tune, by cross-validation inside the images that are there to train on, and no others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from metaft.errors import NonFiniteError
from metaft.finetune.examples import Part, Prepared, like_of
from metaft.finetune.features import evaluating, features_of, takes_alone
from metaft.finetune.fit import fit
from metaft.finetune.recipes import epochs_of
from metaft.inputs import Inputs
from metaft.settings import RATE, RATE_OF_HEAD, Recipe
from metaft.targets.draws import distinct, grouped_fold, strata

FOLDS = 5
"""And images per class from which there is a choice; with fewer the head alone trains."""

SETTLED = ("strategy", "lr", "epochs", "schedule", "clip_norm")
"""Fields of a recipe that a choice decides."""

MOVING = Recipe(strategy="lp-ft:rise=0.2", epochs=12, schedule="cosine", clip_norm=1.0)
"""How candidates move published weights, as far as nothing else was asked for; each epoch is a pass forth and back
through all of them. Without a rise or with longer gradients the first steps of the backbone may undo the start, at a
rate that stays up to the end the last ones: see the trials in benchmarks/README.md."""

RATES_OF_MOVING = (3e-4, 1e-3)


class Choice(NamedTuple):
    """What came of it."""

    recipe: Recipe
    """For all images, without validation."""
    table: tuple[dict[str, Any], ...]
    """For each candidate "strategy", "lr", "epochs", and its "accuracy" (of classes) and "loss" on images that it had
    not seen (None where it was not finite)."""


def candidates_of(recipe: Recipe, *, published: bool, images: int) -> list[Recipe]:
    """Recipes to choose from for so many images, the cheapest first; they fill in what the given one leaves open."""

    def at(recipe: Recipe, *rates: float) -> list[Recipe]:
        return [dataclasses.replace(recipe, lr=lr) for lr in (rates if recipe.lr is None else [recipe.lr])]

    alone = dataclasses.replace(recipe, strategy="head", freeze="none")
    head = at(dataclasses.replace(alone, epochs=epochs_of(alone, images)), RATE, RATE_OF_HEAD)
    if not published:
        return [*head, *at(dataclasses.replace(recipe, strategy="full", freeze="none"), RATE)]
    moving = dataclasses.replace(
        recipe,
        strategy=MOVING.strategy,
        freeze="none",
        epochs=recipe.epochs or MOVING.epochs,
        schedule=recipe.schedule or MOVING.schedule,
        clip_norm=recipe.clip_norm or MOVING.clip_norm,
    )
    return [*head, *at(moving, *RATES_OF_MOVING)]


def choose(
    body: nn.Module,
    inputs: Inputs,
    examples: Part,
    labels: Tensor,
    classes: int,
    candidates: Sequence[Recipe],
    *,
    groups: np.ndarray,
    seed: int,
    should_stop: Callable[[], None] = lambda: None,
    on_candidate: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> Choice:
    """The candidate that is most often right in a stratified 5-fold cross-validation of these examples; the first of
    those that are alike. Where `labels` are numbers (`classes` 0) it is that of the lowest loss. Each is judged after
    all its epochs: the one at which the loss is lowest may be among the first, of a head that has learned little.
    `on_candidate` is told of each row of the table.

    Examples of one of `groups`, int64 [n], are duplicates and stay in one fold. A candidate whose loss is not finite is
    none. With fewer than `FOLDS` images of a class, duplicates aside, it is the first candidate as it is. A pure
    function of its arguments.
    """
    first = candidates[0]
    kinds = strata(labels.numpy())
    if int(distinct(kinds, groups, classes).min()) < FOLDS:
        return Choice(first, ())
    parts = [grouped_fold(kinds, groups, FOLDS, number, seed) for number in range(FOLDS)]
    figures = ("val_loss", "val_accuracy") if classes else ("val_loss",)
    features = None
    if takes_alone(body):  # and is the same start for every fold of every candidate
        with evaluating(body):
            features = features_of(body, Prepared(examples, inputs, like_of(body)))
    table: list[dict[str, Any]] = []
    for candidate in candidates:
        ends = []
        for train, test in parts:
            rows, val = torch.from_numpy(train), torch.from_numpy(test)
            try:
                fitted = fit(
                    body, inputs, Part(examples.whole, examples.rows[rows]), labels[rows], classes,
                    candidate, seed=seed, each_epoch=False, should_stop=should_stop,
                    val_examples=Part(examples.whole, examples.rows[val]), val_labels=labels[val],
                    known=None if features is None else (features[rows], features[val]),
                )  # fmt: skip
            except NonFiniteError:
                break
            ends.append([len(val) * fitted.curve[-1][of] for of in figures])
        table.append(_figures(candidate, ends, len(labels)))
        on_candidate(table[-1])
    best = max(range(len(table)), key=lambda i: (_worth(table[i]), -i))
    chosen = dataclasses.replace(candidates[best], epochs=table[best]["epochs"])
    return Choice(chosen, tuple(table))


def _worth(row: Mapping[str, Any]) -> float:
    """Of a row of the table, the more the better."""
    return -math.inf if row["loss"] is None else row.get("accuracy", -row["loss"])


def _figures(candidate: Recipe, ends: list[list[float]], images: int) -> dict[str, Any]:
    """A row of the table, of all folds at their end; there are no figures where one's loss was not finite."""
    row: dict[str, Any] = {"strategy": candidate.trains, "lr": candidate.rate, "epochs": candidate.passes}
    if len(ends) < FOLDS:
        return {**row, "loss": None}
    return {**row, **dict(zip(("loss", "accuracy"), (np.sum(ends, axis=0) / images).tolist(), strict=False))}
