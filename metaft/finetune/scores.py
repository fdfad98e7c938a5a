"""How good a classifier is on labelled images, and what the difference between two is worth over several draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def scores(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro precision, recall and F1, the same per class, and the confusion matrix (rows: true class).

    A class that is never predicted has precision 0; the macro figures are means over all classes.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    every = np.arange(len(class_names))
    columns = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0.0)  # type: ignore[arg-type]
    precision, recall, f1, count = (np.asarray(column) for column in columns)
    return {
        "accuracy": float((labels == predicted).mean()),
        "macro_f1": float(np.mean(f1)),
        "macro_precision": float(np.mean(precision)),
        "macro_recall": float(np.mean(recall)),
        "per_class": [
            {"class": name, "test_images": int(n), "precision": float(p), "recall": float(r), "f1": float(f)}
            for name, n, p, r, f in zip(class_names, count, precision, recall, f1, strict=True)
        ],
        "confusion": confusion_matrix(labels, predicted, labels=every).tolist(),
    }


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
