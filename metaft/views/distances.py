"""Features of images, and what is near what among them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from metaft.finetune.examples import Prepared, like_of
from metaft.finetune.features import evaluating, in_parts
from metaft.inputs import Inputs
from metaft.inputs.base import Examples
from metaft.models.stored import with_stored_moments


def features_of(body: nn.Module, inputs: Inputs, examples: Examples) -> np.ndarray:
    """float64 [n, D] of a body whose layers look at no batch."""
    with torch.no_grad(), evaluating(body):
        return in_parts(body, Prepared(examples, inputs, like_of(body))).double().cpu().numpy()


def as_stored(body: nn.Module, inputs: Inputs, examples: Examples) -> nn.Module:
    """The body with the moments of these examples, where it has none of its own."""
    return with_stored_moments(body, Prepared(examples, inputs, like_of(body))).eval()


def nearest(queries: np.ndarray, features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(int [n, k] rows of features [m, D] that are nearest to each of queries [n, D], their Euclidean distances)."""
    squares = (queries**2).sum(1)[:, None] + (features**2).sum(1) - 2 * queries @ features.T
    rows = np.argsort(squares, axis=1, kind="stable")[:, :k]
    differences = queries[:, None] - features[rows]
    return rows, np.sqrt((differences**2).sum(-1))


def own_neighbours(features: np.ndarray, labels: np.ndarray) -> float:
    """The share of images [n, D] whose nearest other one is of the same class."""
    squares = (features**2).sum(1)[:, None] + (features**2).sum(1) - 2 * features @ features.T
    np.fill_diagonal(squares, np.inf)
    return float((labels[squares.argmin(1)] == labels).mean())


def principal(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features [n, D] in the two directions in which they spread most, the share of the variance in each).

    Of the two signs of a direction that one in which its largest entry is above 0.
    """
    centred = features - features.mean(0)
    if centred.shape[1] == 1:
        centred = np.concatenate([centred, np.zeros_like(centred)], axis=1)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    axes = directions[:2]
    axes = axes * np.where(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1) < 0, -1.0, 1.0)
    total = float((sizes**2).sum())
    return centred @ axes.T, sizes[:2] ** 2 / total if total else np.zeros(2)
