"""How good a classifier is on labelled images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BINS = 15
"""Of confidences, for the calibration error."""


def scores(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Of probabilities [n, classes]: accuracy, balanced accuracy, macro precision, recall and F1, the same per class,
    the confusion matrix (rows: true class), and the calibration error with its bins.

    A class that is never predicted has precision 0. Macro figures are means over the classes that have test images, and
    balanced accuracy is their mean recall.
    """
    error, bins = calibration(labels, probabilities)
    return {**_of_predictions(labels, probabilities.argmax(-1), class_names), **_calibrated(error, bins)}


def pooled(parts: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> dict[str, Any]:
    """The scores of several parts of the images together, from those of each part: of the folds of a cross-validation,
    each image then counts once."""
    counts = np.sum([part["confusion"] for part in parts], axis=0)
    true, predicted = (np.repeat(side.ravel(), counts.ravel()) for side in np.indices(counts.shape))
    bins: dict[int, list[Mapping[str, float]]] = {}
    for part in parts:
        for b in part["calibration"]:  # the mean of a bin's confidences is in the bin
            bins.setdefault(min(int(b["confidence"] * BINS), BINS - 1), []).append(b)
    merged = [_merged(bins[number]) for number in sorted(bins)]
    return {**_of_predictions(true, predicted, class_names), **_calibrated(_error_of(merged), merged)}


def _calibrated(error: float, bins: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {"calibration_error": error, "calibration": list(bins)}


def _merged(bins: Sequence[Mapping[str, float]]) -> dict[str, float]:
    images = [b["images"] for b in bins]
    means = {key: math.fsum(b[key] * b["images"] for b in bins) / sum(images) for key in ("confidence", "accuracy")}
    return {**means, "images": int(sum(images))}


def _error_of(bins: Sequence[Mapping[str, float]]) -> float:
    total = sum(b["images"] for b in bins)
    return math.fsum(b["images"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / total


def _of_predictions(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """All but the calibration."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    every = np.arange(len(class_names))
    columns = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0.0)  # type: ignore[arg-type]
    precision, recall, f1, count = (np.asarray(column) for column in columns)
    there = count > 0
    return {
        "accuracy": float((labels == predicted).mean()),
        "balanced_accuracy": float(np.mean(recall[there])),
        "macro_f1": float(np.mean(f1[there])),
        "macro_precision": float(np.mean(precision[there])),
        "macro_recall": float(np.mean(recall[there])),
        "per_class": [
            {"class": name, "test_images": int(n), "precision": float(p), "recall": float(r), "f1": float(f)}
            for name, n, p, r, f in zip(class_names, count, precision, recall, f1, strict=True)
        ],
        "confusion": confusion_matrix(labels, predicted, labels=every).tolist(),
    }


def calibration(labels: np.ndarray, probabilities: np.ndarray) -> tuple[float, list[dict[str, float]]]:
    """The expected calibration error, sum over bins of n_b / n |accuracy_b - confidence_b|, and the bins.

    `BINS` bins of equal width hold the predictions by their largest probability (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599, eq. 3); those without any are left out.
    """
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    numbers = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [
        {
            "confidence": float(confidence[numbers == b].mean()),
            "accuracy": float(right[numbers == b].mean()),
            "images": int((numbers == b).sum()),
        }
        for b in np.unique(numbers)
    ]
    return _error_of(bins), bins
