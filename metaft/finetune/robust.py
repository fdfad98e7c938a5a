"""Accuracy on test images that an attack changed within a bound, over bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaft.errors import MetaftError
from metaft.finetune.attacks import attacked, span_of, within
from metaft.finetune.classifier import Classifier
from metaft.finetune.examples import like_of
from metaft.inputs.base import Examples, at_most
from metaft.spec import fraction

STEPS = 10
"""Of PGD."""


def bounds_of(texts: Sequence[str]) -> list[float]:
    """The bounds of `--robust`, the smallest first, in units of pixel values 0..1. Raises MetaftError for one that is
    no number above 0 and at most 1."""
    bounds = []
    for text in texts:
        try:
            eps = fraction(text)
        except ValueError:
            eps = 0.0
        if not 0 < eps <= 1:
            raise MetaftError(
                f"robust: {text!r} is no bound above 0 and at most 1, in units of pixel values 0..1, such as 2/255"
            )
        bounds.append(eps)
    return sorted(set(bounds))


def robust_curve(
    classifier: Classifier,
    examples: Examples,
    labels: Tensor,
    bounds: Sequence[float],
    *,
    right: Tensor,
    should_stop: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """For eps 0, which is `right` (bool [n]: images as they are), and each of the bounds, the smallest first: "eps",
    "accuracy" and "images".

    The classifier is attacked as it predicts, by PGD with `STEPS` steps from a point inside the bound that depends on
    the image's number alone (see `metaft.finetune.attacks`). What a smaller bound breaks a larger one does too, so that
    only what is left is attacked again. It is the accuracy under this attack: a stronger one may leave less.
    """
    like = like_of(classifier)
    span, right = span_of(classifier.inputs, like), right.clone()
    rows = [_row(0.0, right)]
    for eps in bounds:
        for some in right.nonzero().squeeze(-1).split(at_most(classifier.inputs.shape, 64)):
            if not len(some):  # nothing is left, of which `split` makes one part
                continue
            x, y = classifier.inputs(examples[some].to(like.device)).to(like), labels[some].to(like.device)

            def loss(x: Tensor, y: Tensor = y) -> Tensor:
                return F.cross_entropy(classifier.head(classifier.body(x)), y, reduction="sum")

            with torch.enable_grad():
                x = attacked(loss, x, span, eps=eps, steps=STEPS, begin=within(some, x))
            with torch.no_grad():
                right[some] = (classifier.head(classifier.body(x)).argmax(-1) == y).cpu()
            should_stop()
        rows.append(_row(eps, right))
    return rows


def _row(eps: float, right: Tensor) -> dict[str, Any]:
    return {"eps": eps, "accuracy": float(right.double().mean()), "images": len(right)}


def pooled_curve(curves: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """That of the images of several parts together."""
    rows = []
    for parts in zip(*curves, strict=True):
        images = sum(part["images"] for part in parts)
        right = sum(part["accuracy"] * part["images"] for part in parts)
        rows.append({"eps": parts[0]["eps"], "accuracy": right / images, "images": images})
    return rows


def shown_bound(eps: float) -> str:
    """As people write it: `2/255`."""
    return "0" if eps == 0 else f"{255 * eps:.4g}/255"


def under_attack(means: Mapping[str, Mapping[str, Any]], wide: int, ci: Callable[[float, float], str]) -> list[str]:
    """Lines of a report: a row for each start's mean over draws, where it was asked for."""
    means = {name: mean for name, mean in means.items() if "robust" in mean}
    if not means:
        return []
    first = next(iter(means.values()))
    of = "" if first["draws"] == 1 else f", mean ± 95 % interval of {first['draws']} draws"
    lines = [f"accuracy, %, on test images that PGD of {STEPS} steps changed by at most eps{of}"]
    lines += [f"  {'eps':<{wide}}" + "".join(f"{shown_bound(row['eps']):>17}" for row in first["robust"])]
    for name, mean in means.items():
        cells = [
            f"{100 * row['accuracy']:.2f}" if row["ci95"] is None else ci(row["accuracy"], row["ci95"])
            for row in mean["robust"]
        ]
        lines += [f"  {name:<{wide}}" + "".join(f"{cell:>17}" for cell in cells)]
    return [*lines, ""]
