"""The task to fine-tune to: labelled images, and which of them are for training, validation and test."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from metaft.errors import DataError, MetaftError
from metaft.inputs import Inputs
from metaft.targets.draws import NUMBERS, Rows, distinct, draw, grouped_fold, strata, validation_part
from metaft.targets.duplicates import groups_of

FOLDS = 3
"""Of cross-validation, where a target has no test part."""


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """Labelled images as a model takes them, and their parts."""

    name: str
    class_names: tuple[str, ...]
    """Of the classes; none where labels are numbers."""
    examples: Tensor
    """[M, ...] raw, as `inputs` takes them: of pictures uint8 [M, C, H, W]."""
    labels: Tensor
    """int64 [M] of classes, or numbers, float64 [M]"""
    parts: Mapping[str, np.ndarray]
    """Rows of "train", "test" and perhaps "val", or of "all" where the data has no parts."""
    files: tuple[str, ...]
    """[M] what to call each image."""
    inputs: Inputs
    changes: tuple[str, ...]
    """What was changed on the way from the files, in plain words."""
    notes: tuple[str, ...] = ()
    """What else there is to know of the files, in plain words."""
    asked: Inputs | None = None
    """The inputs that it was to have, where files changed them (their polarity, their bits)."""
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Class name -> how many of its pictures could not be read and were left out."""

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """int64 [M]: the number of the first image that each is a duplicate of, see `metaft.targets.duplicates`."""
        return groups_of(self.examples)

    @property
    def strata(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """int64 [M] and the names of its values, see `metaft.targets.draws.strata`."""
        return strata(self.labels.numpy()), self.class_names or NUMBERS

    @property
    def folds(self) -> int:
        """Of cross-validation where there is no test part: three, or as many as the smallest class has images that are
        no duplicates. Raises DataError for a class with a single one."""
        labels, names = self.strata
        counts = distinct(labels, self.groups, len(names))
        if counts.min() < 2:
            what = f"class {names[int(counts.argmin())]!r}" if self.class_names else self.name
            raise DataError(f"data: {what} has {counts.min()} image, and without a test part needs 2 or more")
        return min(FOLDS, int(counts.min()))

    def rows_of_fold(self, number: int | None, *, seed: int, validate: bool = True) -> Rows:
        """The images of one fold of data without parts, see `folds`; None trains on all of them and tests on none."""
        train, test = self.parts["all"], np.empty(0, np.int64)
        if number is not None:
            train, test = grouped_fold(self.strata[0], self.groups, self.folds, number, seed)
        train, val = self._validated(train, seed) if validate else (train, test[:0])
        return Rows(train, val, test)

    def _validated(self, train: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(train, val): see `validation_part`; what has a duplicate that trains is trained on too."""
        train, val = validation_part(self.strata[0], train, seed)
        twins = np.isin(self.groups[val], self.groups[train])
        return np.sort(np.concatenate([train, val[twins]])), val[~twins]

    def rows(self, *, shots_per_class: int | None, seed: int, validate: bool = True) -> Rows:
        """The images to train, validate and test on; what is drawn is drawn by `seed` alone.

        `shots_per_class` images of each class are for training and validation together: drawn from train/, by default
        all of it, or from data without parts, by default four in five, whose rest is the test. Without a val/ folder
        one in five of every class is for validation if no class has fewer than ten. `validate=False` trains on those
        too.
        Raises DataError where a class has too few images, or all that are left to test have a duplicate that trains.
        """
        if shots_per_class is not None and shots_per_class < 1:
            raise MetaftError(f"shots_per_class must be at least 1, got {shots_per_class}")
        if shots_per_class is not None and not self.class_names:
            raise MetaftError(
                f"shots_per_class: the labels of {self.name} are numbers, of no class (given {shots_per_class})"
            )
        (labels, names), whole = self.strata, "all" in self.parts
        pool = self.parts["all" if whole else "train"]
        train, rest = draw(labels, pool, shots_per_class, seed, names, keep_some=whole, skipped=self.skipped)
        val = self.parts.get("val", np.empty(0, np.int64))
        if whole:  # a picture whose duplicate trains tests nothing
            left, rest = len(rest), rest[~np.isin(self.groups[rest], self.groups[train])]
            if len(rest) == 0:
                raise DataError(
                    f"data: with seed {seed} each of the {left} images that are left to test is also one of the "
                    f"{len(train)} to train on, to the pixel or nearly; take fewer (--shots-per-class)"
                )
        if validate and "val" not in self.parts:
            train, val = self._validated(train, seed)
        return Rows(train, val if validate else val[:0], rest if whole else self.parts["test"])
