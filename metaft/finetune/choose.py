"""Choosing how to fine-tune, by cross-validation inside the images that are there to train on, and no others."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from metaft.errors import NonFiniteError
from metaft.finetune.examples import Part, Prepared, like_of
from metaft.finetune.features import evaluating, features_of, takes_alone
from metaft.finetune.fit import fit
from metaft.finetune.recipes import CLIPPED, PROBED_FIRST, epochs_of, on_features
from metaft.inputs import Inputs
from metaft.settings.finetuning import RATE, RATE_OF_HEAD, RATE_OF_PUBLISHED, Recipe
from metaft.targets.draws import distinct, grouped_fold, strata

FOLDS = 5
"""And images per class from which there is a choice; with fewer the head alone trains."""

SETTLED = ("strategy", "lr", "epochs", "schedule", "clip_norm")
"""Fields of a recipe that a choice decides."""

MOVED = ("epochs", "schedule", "clip_norm")
"""Fields that a candidate which moves a backbone fills in where they are left open, beside its rate."""

MOVING = Recipe(strategy="lp-ft:rise=0.2", epochs=12, schedule="cosine", clip_norm=CLIPPED)
"""How candidates move published weights, as far as nothing else was asked for; each epoch is a pass forth and back
through all of them. Without a rise or with longer gradients the first steps of the backbone may undo the start, at a
rate that stays up to the end the last ones: see the trials in benchmarks/README.md."""

RATES_OF_MOVING = (3e-4, 1e-3)


class _OutOfTime(Exception):
    """A candidate takes longer than there is time for."""


class Choice(NamedTuple):
    """What came of it."""

    recipe: Recipe
    """For all images, without validation."""
    table: tuple[dict[str, Any], ...]
    """For each candidate "strategy", "lr", "epochs", and its "accuracy" (of classes) and "loss" on images that it had
    not seen (None where it was not finite, or where there was no time for it, which "late" says)."""


def candidates_of(recipe: Recipe, *, published: bool, images: int, many: bool = False) -> list[Recipe]:
    """Recipes to choose from for so many images; they fill in what the given one leaves open. The cheapest come first,
    behind them, where `many` are wanted, those that are to be tried if there is time."""

    def at(recipe: Recipe, *rates: float) -> list[Recipe]:
        return [dataclasses.replace(recipe, lr=lr) for lr in (rates if recipe.lr is None else [recipe.lr])]

    alone = dataclasses.replace(recipe, strategy="head", freeze="none")
    head = at(dataclasses.replace(alone, epochs=epochs_of(alone, images)), RATE, RATE_OF_HEAD)

    def like(example: Recipe) -> Recipe:
        open_values = {name: getattr(recipe, name) or getattr(example, name) for name in MOVED}
        return dataclasses.replace(recipe, strategy=example.strategy, freeze="none", **open_values)

    if not published:
        full, *others = (like(Recipe(strategy=strategy)) for strategy in ("full", "lp-ft", "last:blocks=2"))
        more = [*at(full, RATE / 3, 3 * RATE), *(candidate for each in others for candidate in at(each, RATE))]
        return [*dict.fromkeys([*head, *at(full, RATE), *(more if many else ())])]
    fastest = max(RATES_OF_MOVING)
    # Where images change from epoch to epoch its many epochs of the head alone are passes through everything.
    probed = [PROBED_FIRST] if on_features(recipe) else []
    more = [
        *(c for each in probed for c in at(like(dataclasses.replace(each, clip_norm=CLIPPED)), RATE_OF_PUBLISHED)),
        *at(like(dataclasses.replace(MOVING, epochs=2 * MOVING.passes)), fastest),
        *at(like(dataclasses.replace(MOVING, strategy="last:blocks=2")), fastest),
        *at(like(Recipe(strategy="full", schedule="cosine", clip_norm=CLIPPED)), RATE_OF_PUBLISHED),
    ]
    return [*dict.fromkeys([*head, *at(like(MOVING), *RATES_OF_MOVING), *(more if many else ())])]


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
    seconds: float | None = None,
    known: Sequence[Mapping[str, Any]] = (),
    should_stop: Callable[[], None] = lambda: None,
    on_candidate: Callable[[Mapping[str, Any], list[list[float]]], None] = lambda row, by_fold: None,
) -> Choice:
    """The candidate that is most often right in a stratified 5-fold cross-validation of these examples; the first of
    those that are alike. Where `labels` are numbers (`classes` 0) it is that of the lowest loss. Each is judged after
    all its epochs: the one at which the loss is lowest may be among the first, of a head that has learned little.
    `on_candidate` is told of each row of the table, with the figures of each fold that was done; what it was told of
    the first candidates, as {"row": ..., "by_fold": ...}, is not computed again where it is `known`.

    With so many `seconds` the candidates after the first are tried as long as there is time. One is given up where the
    last fold of its strategy, its own or another's, says that its folds will not all be done. Since the best of many is
    partly the luckiest, it is the first candidate then that is no worse than the best by more than one standard error
    of their paired difference over the folds (Breiman et al. 1984, section 3.4.3).

    Examples of one of `groups`, int64 [n], are duplicates and stay in one fold. A candidate whose loss is not finite is
    none. With fewer than `FOLDS` images of a class, duplicates aside, it is the first candidate as it is. Without
    `seconds` a pure function of its arguments.
    """
    began = time.monotonic()
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
    table: list[dict[str, Any]] = [dict(each["row"]) for each in known]
    by_fold = [np.array(each["by_fold"]).reshape(-1, len(figures)) for each in known]  # [FOLDS, figures] where judged
    paces: dict[str, float] = {}  # seconds per epoch of a fold, by strategy
    sizes = np.array([[len(test)] for _, test in parts])
    for candidate in candidates[len(table) :]:
        ends, late = [], False
        limit = math.inf if seconds is None or not table else began + seconds

        def stop(limit: float = limit) -> None:
            should_stop()
            if time.monotonic() > limit:
                raise _OutOfTime

        for train, test in parts:
            rows, val = torch.from_numpy(train), torch.from_numpy(test)
            try:
                began_fold = time.monotonic()
                needed = paces.get(candidate.trains, 0.0) * candidate.passes * (FOLDS - len(ends))
                if began_fold + needed > limit:
                    raise _OutOfTime
                fitted = fit(
                    body, inputs, Part(examples.whole, examples.rows[rows]), labels[rows], classes,
                    candidate, seed=seed, each_epoch=False, should_stop=stop,
                    val_examples=Part(examples.whole, examples.rows[val]), val_labels=labels[val],
                    known=None if features is None else (features[rows], features[val]),
                )  # fmt: skip
            except NonFiniteError:
                break
            except _OutOfTime:
                late = True
                break
            paces[candidate.trains] = (time.monotonic() - began_fold) / candidate.passes
            ends.append([len(val) * fitted.curve[-1][of] for of in figures])
        table.append(_figures(candidate, ends, len(labels)) | ({"late": True} if late else {}))
        by_fold.append(np.array(ends).reshape(-1, len(figures)) / sizes[: len(ends)])
        on_candidate(table[-1], by_fold[-1].tolist())
    best = max(range(len(table)), key=lambda i: (_worth(table[i]), -i))
    if seconds is not None and len(by_fold[best]) == FOLDS:
        best = next(i for i in range(best + 1) if _as_good(by_fold[i], by_fold[best], classes))
    chosen = dataclasses.replace(candidates[best], epochs=table[best]["epochs"])
    return Choice(chosen, tuple(table))


def _as_good(one: np.ndarray, best: np.ndarray, classes: int) -> bool:
    """Whether a candidate's figures by fold are no worse than the best one's by more than one standard error."""
    if len(one) < FOLDS:
        return False
    less = best[:, -1] - one[:, -1] if classes else one[:, 0] - best[:, 0]
    return bool(less.mean() <= less.std(ddof=1) / math.sqrt(FOLDS))


def _worth(row: Mapping[str, Any]) -> float:
    """Of a row of the table, the more the better."""
    return -math.inf if row["loss"] is None else row.get("accuracy", -row["loss"])


def _figures(candidate: Recipe, ends: list[list[float]], images: int) -> dict[str, Any]:
    """A row of the table, of all folds at their end; there are no figures where one's loss was not finite."""
    row: dict[str, Any] = {"strategy": candidate.trains, "lr": candidate.rate, "epochs": candidate.passes}
    if len(ends) < FOLDS:
        return {**row, "loss": None}
    return {**row, **dict(zip(("loss", "accuracy"), (np.sum(ends, axis=0) / images).tolist(), strict=False))}
