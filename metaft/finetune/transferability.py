"""How well a start is likely to serve a target, from its features of labelled images alone: nothing is trained but
linear classifiers. All in float64, pure functions of their arguments."""

from __future__ import annotations

import math

import numpy as np

from metaft.finetune.probe import regression
from metaft.targets.draws import distinct, grouped_fold

FOLDS = 5

ITERATIONS, CLOSE = 200, 1e-9
"""Of LogME's fixed point, at most, and the relative change of its precisions that ends it."""

MOST = 1e12
"""Of a precision, which has no bound where features say all or nothing."""


def logme(features: np.ndarray, labels: np.ndarray) -> float:
    """LogME: the largest log evidence, per image and class, of a Bayesian linear model from features [n, D] to whether
    an image is of a class; labels int64 [n].

    You, Liu, Wang and Long 2021, https://arxiv.org/abs/2102.11005, equation 2 and algorithm 1. With y the column of a
    class, weights of precision alpha and noise of precision beta, A = alpha I + beta F'F and m = beta A^-1 F'y,

        log p(y) = n/2 log beta + D/2 log alpha - n/2 log 2pi - beta/2 |Fm - y|^2 - alpha/2 m'm - 1/2 log|A|,

    at the fixed point of gamma = sum beta s_i / (alpha + beta s_i), alpha = gamma / m'm and
    beta = (n - gamma) / |Fm - y|^2, with s_i the eigenvalues of F'F.
    """
    n = len(features)
    left, sizes, _ = np.linalg.svd(features.astype(np.float64), full_matrices=False)
    total = 0.0
    classes = np.unique(labels)
    for label in classes:
        y = (labels == label).astype(np.float64)
        along = left.T @ y
        total += _evidence(sizes**2, along**2, max(0.0, float(y @ y - along @ along)), n, features.shape[1])
    return total / (n * len(classes))


def _evidence(s: np.ndarray, z: np.ndarray, rest: float, n: int, width: int) -> float:
    """log p(y) at its fixed point: eigenvalues `s` of F'F, squares `z` of y along its directions, and of y across."""
    alpha = beta = 1.0

    def parts(alpha: float, beta: float) -> tuple[float, float]:
        """(m'm, |Fm - y|^2)"""
        shrunk = beta * s / (alpha + beta * s)
        mm = float(np.sum(z[s > 0] * (shrunk[s > 0] ** 2) / s[s > 0]))
        return mm, rest + float(np.sum(z * (1 - shrunk) ** 2))

    tiny = 1e-12 * max(1.0, float(z.sum()) + rest)
    for _ in range(ITERATIONS):
        mm, residual = parts(alpha, beta)
        gamma = float(np.sum(beta * s / (alpha + beta * s)))
        before = alpha, beta
        alpha, beta = (
            min(max(value, 1 / MOST), MOST) for value in (gamma / max(mm, tiny), (n - gamma) / max(residual, tiny))
        )
        if all(abs(new / old - 1) < CLOSE for new, old in zip((alpha, beta), before, strict=True)):
            break
    mm, residual = parts(alpha, beta)
    determinant = float(np.sum(np.log(alpha + beta * s))) + (width - len(s)) * math.log(alpha)
    return (
        n / 2 * (math.log(beta) - math.log(2 * math.pi))
        + width / 2 * math.log(alpha)
        - beta / 2 * residual
        - alpha / 2 * mm
        - determinant / 2
    )


def h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """H-score: how much of the features' [n, D] spread lies between the classes of labels [n], tr(C^-1 C_between).

    Bao et al. 2019, https://doi.org/10.1109/ICIP.2019.8803726, with the shrunk covariance of Ibrahim,
    Ponomareva and Mazumder 2021, https://arxiv.org/abs/2110.06893: C by Ledoit and Wolf's share a of a multiple of the
    identity, and C_between times 1 - a.
    """
    from sklearn.covariance import ledoit_wolf

    x = features.astype(np.float64)
    x = x - x.mean(0)
    covariance, share = ledoit_wolf(x, assume_centered=True)
    between = np.zeros_like(x)
    for label in np.unique(labels):
        between[labels == label] = x[labels == label].mean(0)
    inverse = np.linalg.pinv(covariance, hermitian=True)
    return float((1 - share) * np.sum(inverse * (between.T @ between / len(x))))


def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """LEEP: the mean log of what the source head's probabilities [n, Z] say of labels [n] by way of its own classes.

    Nguyen, Hassner, Seeger and Archambeau 2020, https://arxiv.org/abs/2002.12462, equation 2: the mean over images of
    log sum_z P(y|z) p(z|x), with P(y|z) from the joint mean of p(z|x) over the images of a class.
    """
    p = probabilities.astype(np.float64)
    classes, numbers = np.unique(labels, return_inverse=True)
    joint = np.stack([p[numbers == k].sum(0) for k in range(len(classes))]) / len(p)
    given = joint / np.maximum(joint.sum(0), np.finfo(np.float64).tiny)
    return float(np.mean(np.log(np.sum(given[numbers] * p, axis=1))))


def folds_of(labels: np.ndarray, groups: np.ndarray) -> int:
    """Into how many folds images can go: `FOLDS`, or as many as the smallest class has images that are no duplicates.
    With fewer than 2 there are none."""
    return min(FOLDS, int(distinct(labels, groups, int(labels.max()) + 1).min()))


def right_in_folds(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """(nearest neighbour by the cosine, probe): whether each image is labelled right by those of the other folds, bool
    [n]. Images of one of `groups` are duplicates and stay in one fold. None where there are too few for folds."""
    count = folds_of(labels, groups)
    if count < 2:
        return None
    nearest, probed = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    directions = features / np.maximum(lengths, 1e-12)
    classes = int(labels.max()) + 1
    for number in range(count):
        train, test = grouped_fold(labels, groups, count, number, seed)
        like = directions[test] @ directions[train].T
        nearest[test] = labels[train][like.argmax(1)] == labels[test]
        weight, bias = regression(features[train], labels[train], classes)
        probed[test] = (features[test] @ weight.T + bias).argmax(1) == labels[test]
    return nearest, probed
