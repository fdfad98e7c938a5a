"""Training images whose labels look wrong: confident disagreement of a classifier that has not seen them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from metaft.finetune.examples import Part, Prepared, like_of
from metaft.finetune.features import features_of
from metaft.finetune.probe import regression
from metaft.finetune.setup import Setup, rows_of
from metaft.models.stored import with_stored_moments
from metaft.starts.base import body
from metaft.targets.draws import firsts, grouped_fold

FOLDS, FEWEST = 5, 3
"""Of the cross-validation, and images of a class from which there is one."""


class Suspect(NamedTuple):
    """A training image that looks like another class."""

    row: int
    """Among the images that were judged."""
    looks: int
    """The class that it looks like."""
    probability: float
    """Of that one."""
    own: float
    """Of the class that it has."""


def suspects(labels: np.ndarray, probabilities: np.ndarray) -> list[Suspect]:
    """Of labels [n] and probabilities [n, classes] that were predicted without them, the surest first.

    A class is taken for confident where its probability is at least the mean that its own images get; an image whose
    most probable confident class is not its own is a suspect (Northcutt et al. 2021, https://arxiv.org/abs/1911.00068,
    section 3.1, the off-diagonal of the confident joint), if that class is also more probable than all others together.
    """
    classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    sure = np.array([own[labels == c].mean() if (labels == c).any() else np.inf for c in range(classes)])
    confident = np.where((probabilities >= sure) & (probabilities >= 0.5), probabilities, -1.0)
    looks = confident.argmax(-1)
    rows = np.flatnonzero((confident.max(-1) >= 0) & (looks != labels))
    listed = [Suspect(int(i), int(looks[i]), float(probabilities[i, looks[i]]), float(own[i])) for i in rows]
    return sorted(listed, key=lambda s: (s.own - s.probability, s.row))


def cross_validated(
    features: np.ndarray, labels: np.ndarray, classes: int, *, groups: np.ndarray, seed: int
) -> np.ndarray:
    """Probabilities [n, classes] of the probe on features [n, D], each image's by one that has seen neither it nor a
    duplicate of it, which is of the same of `groups` [n]: stratified folds, `FOLDS` or as many as the smallest class
    has images."""
    from scipy.special import softmax

    folds = min(FOLDS, int(np.bincount(labels[firsts(groups)], minlength=classes).min()))
    probabilities = np.zeros((len(labels), classes))
    for number in range(folds):
        train, test = grouped_fold(labels, groups, folds, number, seed)
        weight, bias = regression(features[train], labels[train], classes)
        probabilities[test] = softmax(features[test] @ weight.T + bias, axis=-1)
    return probabilities


def tells_apart(labels: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether predictions are right about most images, and about more than the largest class's share of them by two
    standard errors, which is what chance may come to."""
    right = float((probabilities.argmax(-1) == labels).mean())
    share = float(np.bincount(labels).max()) / len(labels)
    return right >= 0.5 and right > share + 2 * float(np.sqrt(share * (1 - share) / len(labels)))


def suspects_of(setup: Setup, device: str) -> list[dict[str, Any]] | None:
    """Of the images that the first draw trains and validates on (without a test part: of all), as `result.json` has
    them: "file", "label", "looks_like", "probability" and "own_probability", the surest first.

    None where nobody can tell: without the probe, where labels are numbers, where a class has fewer than `FEWEST`
    images, and where the probe does not tell the classes apart.
    """
    target, rows = setup.target, rows_of(setup, 0, None if setup.folds > 1 else 0)
    some = np.concatenate([rows.train, rows.val])
    labels, groups, classes = target.labels.numpy()[some], target.groups[some], len(target.class_names)
    if not any(contender.probe for contender in setup.contenders) or not classes:
        return None
    if int(np.bincount(labels[firsts(groups)], minlength=classes).min()) < FEWEST:
        return None
    backbone = body(setup.start, setup.config.draws.seed).to(device)
    parts = [
        Prepared(Part(target.examples, torch.from_numpy(part)), target.inputs, like_of(backbone))
        for part in (rows.train, rows.val)
        if len(part)
    ]
    backbone = with_stored_moments(backbone, parts[0]).eval()
    features = torch.cat([features_of(backbone, part) for part in parts]).cpu().double().numpy()
    probabilities = cross_validated(features, labels, classes, groups=groups, seed=setup.config.draws.seed)
    if not tells_apart(labels, probabilities):
        return None
    return [
        {
            "file": target.files[some[s.row]],
            "label": target.class_names[labels[s.row]],
            "looks_like": target.class_names[s.looks],
            "probability": s.probability,
            "own_probability": s.own,
        }
        for s in suspects(labels, probabilities)
    ]
