"""What there is to warn of in a fit: predictions that mean little, and too much or too little learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NAMED = 4  # classes

UNDER = 0.8
"""Share of the loss of chance, log(classes), above which a training loss says that hardly anything was learned."""

DIVERGED = 1.5
"""The same, above which it learned worse than nothing."""

BY_HEART, SURER = 0.05, 0.15
"""Where nothing is set aside to validate: the share of the loss of chance below which training images are known by
heart, and the calibration error on test images from which that is over-fitting."""

OVER = 3.0
"""How many times the training loss a validation loss may be, where it is above half of that of chance."""


def warnings_of(
    fit: Mapping[str, Any],
    curve: Sequence[Mapping[str, float]],
    classes: int,
    *,
    changed: bool = False,
    searched: bool = False,
) -> list[str]:
    """In plain words, of the figures of one fit (with "confusion" and "per_class") and the rows of its epochs. Where
    there are no classes, labels are numbers. Where the training loss is `changed` by extras, it tells nothing beside
    that of chance; where a range test `searched` for the rate, nobody is told to raise it."""
    if classes == 0:
        return warnings_of_numbers(fit, curve, changed=changed, searched=searched)
    return [*_of_predictions(fit), *_of_losses(fit, curve, math.log(classes), changed, searched)]


def warnings_of_numbers(
    fit: Mapping[str, Any], curve: Sequence[Mapping[str, float]], *, changed: bool = False, searched: bool = False
) -> list[str]:
    """The same where labels are numbers. Losses are in units of the training labels' variance, which is what their mean
    gets."""
    said = list(_of_losses(fit, curve, 1.0, changed, searched))
    if len({predicted for _, predicted in fit["predictions"]}) == 1:
        said.insert(0, f"every test image is predicted to be {fit['predictions'][0][1]:.6g}")
    elif fit["r2"] is not None and fit["r2"] <= 0:
        said.insert(
            0, f"R² is {fit['r2']:.2f}: the mean of the test images' labels would do as well for all of them, or better"
        )
    return said


def _of_predictions(fit: Mapping[str, Any]) -> Iterator[str]:
    names = [row["class"] for row in fit["per_class"]]
    absent = [row["class"] for row in fit["per_class"] if row["test_images"] == 0]
    counts = [sum(column) for column in zip(*fit["confusion"], strict=True)]
    never = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if absent:
        yield f"no test image is of {_listed(absent)}: macro figures are of the other {len(names) - len(absent)}"
    if len(never) == len(names) - 1:
        yield f"every test image is predicted to be {names[counts.index(max(counts))]!r}"
    elif never:
        yield f"no test image is predicted to be {_listed(never)}"


def _of_losses(
    fit: Mapping[str, Any], curve: Sequence[Mapping[str, float]], chance: float, changed: bool, searched: bool
) -> Iterator[str]:
    row = next((row for row in curve if row["epoch"] == fit["kept_epoch"]), None)
    if row is None or row["epoch"] == 0:
        return
    if not changed and row["loss"] > DIVERGED * chance:
        smaller = "a smaller --lr than the one that was found" if searched else "a smaller --lr"
        yield f"diverged: the training loss is {row['loss']:.2f}, that of chance {chance:.2f}; {smaller} may help"
    elif not changed and row["loss"] > UNDER * chance:
        more = "more epochs" if searched else "more epochs, a higher rate"
        yield (
            f"under-fitted: the training loss is {row['loss']:.2f}, and that of chance {chance:.2f}; {more} or a "
            "strategy that trains more may help"
        )
    elif row.get("val_loss", 0.0) > max(OVER * row["loss"], 0.5 * chance):
        yield (
            f"over-fitted: the validation loss is {row['val_loss']:.2f}, the training loss {row['loss']:.2f}; more "
            "images or a strategy that trains less may help"
        )
    elif "val_loss" not in row and row["loss"] < BY_HEART * chance and fit.get("calibration_error", 0.0) > SURER:
        yield (
            f"over-fitted: the training loss is {row['loss']:.3f}, and on the test images its probabilities are off by "
            f"{100 * fit['calibration_error']:.0f} points; more images may help, and labels are worth more than how "
            "sure it is of them"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(repr, names[:NAMED])) + more
