"""Losses of one task, and the statistics in which results are reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metaft.objective import (
    OBJECTIVES,
    Objective,
    accuracy,
    figure,
    figure_name,
    label,
    loss_value,
    objective,
)
from metaft.types import Loss

__all__ = [
    "OBJECTIVES",
    "Objective",
    "accuracy",
    "better",
    "figure",
    "figure_name",
    "label",
    "loss_value",
    "mean_ci95",
    "mean_t95",
    "nearest_neighbour",
    "objective",
]


def better(loss: Loss, new: float, old: float) -> bool:
    """Whether a figure beats another; nothing beats by being NaN, anything finite beats NaN."""
    if math.isnan(new) or math.isnan(old):
        return math.isnan(old) and not math.isnan(new)
    return new > old if objective(loss).higher_is_better else new < old


def mean_ci95(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over axis 0 (tasks) and the half-width of its 95 % interval, 1.96 * sd / sqrt(n), in float64.

    The interval of a single value is NaN: one task says nothing about the spread.
    """
    values = values.double()
    n = values.shape[0]
    if n < 2:
        return values.mean(0), torch.full_like(values.mean(0), math.nan)
    return values.mean(0), 1.96 * values.std(0, correction=1) / math.sqrt(n)


def mean_t95(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of a few draws and the half-width of its 95 % interval by Student's t; None for a single draw."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    if len(set(values)) == 1:  # whose mean may be another number, by rounding
        return values[0], 0.0
    from scipy.stats import t

    return mean, float(t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)


def verdict(value: float, ci95: float | None) -> Literal["alone", "equal", "chance", "above", "below"]:
    """What a 95 % interval says of a difference: that it is one alone, or of several that happen to be equal, which
    tells nothing of the next; that chance would do; or that it is above or below 0.

    >>> [verdict(0.3, half) for half in (None, 0.0, 0.4, 0.2)], verdict(-0.3, 0.2), verdict(0.0, 0.0)
    (['alone', 'equal', 'chance', 'above'], 'below', 'chance')
    """
    if ci95 is None:
        return "alone"
    if not 0 < ci95 < abs(value):
        return "equal" if ci95 == 0 != value else "chance"
    return "above" if value > 0 else "below"


def nearest_neighbour(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
    """Accuracy of giving each query image the label of the support image nearest in pixels, for one task.

    The floor that any learned initialisation has to clear; no parameter, no normalisation. Of tokens, which are names
    and not sizes, the nearest is that with most in common.
    """
    query_x, support_x = query_x.flatten(1), support_x.flatten(1)
    if query_x.is_floating_point():
        distance = torch.cdist(query_x, support_x)
    else:
        distance = (query_x.unsqueeze(1) != support_x).sum(-1)
    return (support_y[distance.argmin(1)] == query_y).double().mean()


def describe(name: str, summary: Mapping[str, Any]) -> str:
    """`transductive 97.1 ± 0.4 %, inductive 95.0 ± 0.5 %`"""
    return ", ".join(f"{mode} {percent(name, summary[mode][name], summary[mode]['ci95'])}" for mode in summary)


def percent(name: str, value: float, ci95: float) -> str:
    """A figure with its interval, as people read it."""
    return f"{100 * value:.2f} ± {100 * ci95:.2f} %" if name == "accuracy" else f"{value:.3f} ± {ci95:.3f}"
