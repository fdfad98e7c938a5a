"""Which images of a target train, validate and test, drawn by a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from metaft.errors import DataError
from metaft.sampler import Stream, choose, raw_words
from metaft.tasks.pool import skipped_words

VALIDATION_FROM, VALIDATION_SHARE = 10, 5  # from 10 images per class, one in 5 is for validation


NUMBERS = ("numbers",)
"""The name of the one stratum of images whose labels are numbers."""


class Rows(NamedTuple):
    """Which images of a target are for what; int64 rows, disjoint."""

    train: np.ndarray
    val: np.ndarray
    """Empty where there is no validation part."""
    test: np.ndarray


def strata(labels: np.ndarray) -> np.ndarray:
    """int64 [n]: what each part is to have its share of: the classes, or of numbers all images alike."""
    return labels if np.issubdtype(labels.dtype, np.integer) else np.zeros(len(labels), np.int64)


def draw(
    labels: np.ndarray,
    rows: np.ndarray,
    shots: int | None,
    seed: int,
    names: tuple[str, ...],
    *,
    keep_some: bool,
    skipped: Mapping[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    """(drawn, left): `shots` of `rows` for each class, a function of `seed` alone, and the others.

    `shots=None` draws all, or four in five where `keep_some`. Raises DataError where a class has too few.
    """
    drawn = []
    for label, name in enumerate(names):
        members = rows[labels[rows] == label]
        spare = 1 if keep_some else 0
        k = shots if shots is not None else max(1, len(members) * 4 // 5) if keep_some else len(members)
        if len(members) < k + spare:
            need = f"shots_per_class + 1 for the test = {k + 1}" if keep_some else f"shots_per_class = {k}"
            gone = skipped_words(skipped, name)
            raise DataError(f"data: class {name!r} has {len(members)} images to draw from{gone}, fewer than {need}")
        words = raw_words(seed, "train", [label], k, stream=Stream.TARGET_DRAWS)
        drawn.append(members[choose(words, np.array([len(members)]))[0]])
    taken = np.sort(np.concatenate(drawn))
    return taken, np.setdiff1d(rows, taken)


def fold(labels: np.ndarray, rows: np.ndarray, count: int, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) of fold `number` of `count`: each of `rows` is in the test of one fold, and folds are stratified,
    so that no class has more than one image more in one of them than in another. A function of `seed` alone."""
    test: list[np.ndarray] = []
    before = 0  # so that what is over of one class does not go where that of the last one went
    for label in np.unique(labels[rows]):
        members = rows[labels[rows] == label]
        words = raw_words(seed, "test", [int(label)], len(members), stream=Stream.TARGET_DRAWS)
        shuffled = members[choose(words, np.array([len(members)]))[0]]
        test.append(shuffled[(np.arange(len(members)) + before) % count == number])
        before += len(members)
    tested = np.sort(np.concatenate(test))
    return np.setdiff1d(rows, tested), tested


def grouped_fold(
    labels: np.ndarray, groups: np.ndarray, count: int, number: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) of all rows by `fold`, where those of one group, which are duplicates, go with its first one."""
    groups_tested = groups[fold(labels, firsts(groups), count, number, seed)[1]]
    tested = np.isin(groups, groups_tested)
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def firsts(groups: np.ndarray) -> np.ndarray:
    """The first row of each group, int64, in their order."""
    return np.sort(np.unique(groups, return_index=True)[1])


def distinct(labels: np.ndarray, groups: np.ndarray, classes: int) -> np.ndarray:
    """int64 [classes]: how many images each class has, those of one group, which are duplicates, counted once."""
    return np.bincount(labels[firsts(groups)], minlength=classes)


def validation_part(labels: np.ndarray, train: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, val): one in five of every class for validation, or none where a class has fewer than ten images."""
    counts = np.bincount(labels[train])
    if counts.min() < VALIDATION_FROM:
        return train, np.empty(0, np.int64)
    val = []
    for label, count in enumerate(counts):
        members = train[labels[train] == label]
        words = raw_words(seed, "val", [label], int(count) // VALIDATION_SHARE, stream=Stream.TARGET_DRAWS)
        val.append(members[choose(words, np.array([count]))[0]])
    picked = np.sort(np.concatenate(val))
    return np.setdiff1d(train, picked), picked
