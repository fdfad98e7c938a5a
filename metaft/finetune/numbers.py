"""How good predictions of numbers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FIGURES = ("mae", "rmse", "r2")


def number_scores(labels: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Of predictions [n]: the mean absolute error, the root of the mean squared one, the coefficient of determination
    R^2 = 1 - sum (y - p)^2 / sum (y - mean y)^2, and each label with its prediction.

    R^2 is None where all labels are alike. The errors are in units of the labels.
    """
    error = predicted - labels
    spread = float(np.square(labels - labels.mean()).sum())
    return {
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt(np.square(error).mean())),
        "r2": None if labels.min() == labels.max() else 1 - float(np.square(error).sum()) / spread,
        "predictions": [[float(y), float(p)] for y, p in zip(labels, predicted, strict=True)],
    }


def pooled_numbers(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of several parts of the images together: of the folds of a cross-validation each image counts once."""
    labels, predicted = np.array([pair for part in parts for pair in part["predictions"]]).T
    return number_scores(labels, predicted)
