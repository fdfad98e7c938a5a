"""`unlabelled:PATH`: episodes out of pictures that nobody labelled, each a class of its own with views of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaft.errors import DataError
from metaft.inputs.listing import list_below
from metaft.sampler import choose, raw_words, uniform
from metaft.support.paths import local
from metaft.tasks import warps
from metaft.tasks.folder import check_form, list_splits, pool_of, ranked_by_hash
from metaft.tasks.pool import ClassEpisodes, ClassPool, Draw, Drawn
from metaft.types import SPLITS, Split

FEWEST = 10
"""Pictures to train on."""


@dataclasses.dataclass(frozen=True, eq=False)
class UnlabelledPool(ClassPool):
    """A pool whose labels count in no split of `hidden`."""

    hidden: tuple[Split, ...] = ("train",)

    def describe(self) -> Mapping[str, object]:
        """As a pool does; a hidden split has no classes."""
        described = dict(super().describe())
        classes: Any = described["classes"]
        return {**described, "classes": {split: [] if split in self.hidden else classes[split] for split in SPLITS}}

    def source(
        self, *, ways: int, shots: int, query_shots: int, rotate: bool = False, splits: Sequence[Split] = SPLITS
    ) -> UnlabelledEpisodes:
        """As a pool's. In a hidden split the classes of an episode are pictures: `ways` of all that the split has."""
        return UnlabelledEpisodes(self, ways, shots, query_shots, rotate, tuple(splits))


class Views(NamedTuple):
    """A `Drawn` with what makes views of its pictures. Fields up to `key` are those of `Drawn`."""

    images: Tensor
    turns: Tensor
    labels: Tensor
    class_ids: Tensor
    key: Tensor
    moves: Tensor
    """float32 [B, n, numbers of a view] in -1..1."""
    still: Tensor
    """bool [B, n]: pictures that are left as they are."""


@dataclasses.dataclass(frozen=True, eq=False)
class UnlabelledEpisodes(ClassEpisodes):
    """A `Source` over an `UnlabelledPool`.

    In a hidden split an episode's classes are N random pictures. The first support image of a class is the picture
    itself, all others are views of it (`metaft.tasks.warps`): Khodadadeh et al. 2019 (UMTRA,
    https://arxiv.org/abs/1811.11819), algorithm 1; with `--algorithm protonet` Medina et al. 2020 (ProtoTransfer,
    https://arxiv.org/abs/2006.11325). Two of the pictures may be of one class that nobody knows of. The views are ours,
    not the papers'.
    """

    pool: UnlabelledPool  # type: ignore[reportIncompatibleVariableOverride]

    def _check(self, split: Split) -> None:
        if split not in self.pool.hidden:
            super()._check(split)
        elif (pictures := len(self._pictures(split)[0])) < self.ways:
            raise DataError(f"{self.name}: split {split!r} has {pictures} pictures, fewer than ways = {self.ways}")

    def draw(self, seed: int, split: Split, indices: Sequence[int]) -> Draw:
        if split not in self.pool.hidden:
            return super().draw(seed, split, indices)
        self._classes(split)
        n, k, m = self.ways, self.shots, self.shots + self.query_shots
        words = raw_words(seed, split, indices, 2 * n + n * m + 1)
        w_picture, *w_rest = np.split(words, np.cumsum([n, n, n * k, n * (m - k)]), axis=1)
        rows, turns = self._pictures(split)
        chosen = choose(w_picture, np.full(len(words), len(rows)))
        return self._laid_out(np.repeat(rows[chosen][:, :, None], m, axis=2), turns[chosen], chosen, *w_rest)

    def indices(self, seed: int, split: Split, indices: Sequence[int]) -> Drawn | Views:  # type: ignore[reportIncompatibleMethodOverride]
        drawn = super().indices(seed, split, indices)
        if split not in self.pool.hidden:
            return drawn
        b, n = drawn.labels.shape
        numbers = warps.PHOTO if self.shape[0] == 3 else warps.DRAWING
        # A generator of its own for each episode, by the episode's key: words of one stretch would be very many.
        moves = np.stack([uniform(np.random.Philox(key=int(key)).random_raw(n * numbers)) for key in drawn.key])
        support = drawn.labels[:, : self.ways * self.shots].numpy()
        still = np.zeros((b, n), bool)
        for i in range(b):
            still[i, np.unique(support[i], return_index=True)[1]] = True  # where each class comes first
        return Views(
            *drawn, torch.from_numpy((2 * moves - 1).astype(np.float32)).view(b, n, numbers), torch.from_numpy(still)
        )

    def _pixels(self, drawn: Drawn | Views) -> Tensor:
        x = super()._pixels(drawn)  # type: ignore[reportArgumentType]
        if not isinstance(drawn, Views):
            return x
        view = warps.photo if self.shape[0] == 3 else warps.drawing
        seen = view(x.flatten(0, 1), drawn.moves.flatten(0, 1)).view_as(x)
        return torch.where(drawn.still[..., None, None, None], x, seen)

    def batch_indices(self, seed: int, split: Split, indices: Sequence[int], size: int) -> Drawn:
        if split in self.pool.hidden:
            raise DataError(f"{self.name}: no labels to train on; choose an algorithm that trains on episodes")
        return super().batch_indices(seed, split, indices, size)

    def _pictures(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """(rows, quarter turns) of all pictures of a split; one that is a class of its own for each turn is there as
        often."""
        classes = self.pool.splits[split]
        counts = self.pool.counts[classes]
        first = self.pool.starts[classes] - (np.cumsum(counts) - counts)  # less the pictures before, which are counted
        rows = np.repeat(first, counts) + np.arange(counts.sum())
        turns = np.zeros(len(classes), np.int64) if self.pool.turns is None else self.pool.turns[classes]
        return rows, np.repeat(turns, counts)


def hide(pool: ClassPool, hidden: tuple[Split, ...] = ("train",)) -> UnlabelledPool:
    """The same pool, without the labels of these splits."""
    values = {field.name: getattr(pool, field.name) for field in dataclasses.fields(pool) if field.init}
    return UnlabelledPool(**{**values, "name": f"unlabelled:{pool.name.removeprefix('folder:')}"}, hidden=hidden)


def unlabelled(
    path: str | os.PathLike[str],
    image_size: int | None = None,
    channels: int | None = None,
    *,
    skip_bad: bool = False,
) -> UnlabelledPool:
    """Pictures under `path`, in whatever folders. With train/, val/ and test/ all pictures below train/ are without
    labels, and val/ and test/ hold class folders, whose labels count; otherwise no folder says anything, and pictures
    go to training, validation and test by a hash of their names, 80 / 10 / 10 %. Warns and raises as `folder` does, and
    DataError for some of these three folders without the others, and for fewer than ten pictures to train on.
    """
    check_form(image_size, channels)
    path = local(path)
    if not path.is_dir():
        raise DataError(f"unlabelled: {path} {'is no folder' if path.exists() else 'does not exist'}")
    parted = [split for split in SPLITS if (path / split).is_dir()]
    if parted and len(parted) < len(SPLITS):
        raise DataError(
            f"unlabelled: {path} has {parted[0]}/ but no {next(s for s in SPLITS if s not in parted)}/; give all of "
            "train/, val/ and test/, so that no test picture is trained on, or none"
        )
    files, left = list_below(path / "train" if parted else path)
    if len(files) < FEWEST:
        raise DataError(f"unlabelled: {path} holds {len(files)} pictures to train on, fewer than {FEWEST}")
    alone = {file.relative_to(path).as_posix(): [file] for file in files}  # no class folder's name has a slash
    classes: dict[str, list[Path]] = dict(alone)
    if parted:
        splits, labelled, others = list_splits(path, ("val", "test"), kind="unlabelled")
        splits, left, classes = {**splits, "train": list(alone)}, [*left, *others], {**classes, **labelled}
    else:
        ranked, tenth = ranked_by_hash(alone), len(files) // 10
        splits = {"val": ranked[:tenth], "test": ranked[tenth : 2 * tenth], "train": ranked[2 * tenth :]}
    pool = pool_of(
        f"folder:{path}", path, splits, classes, image_size, channels,
        left=left, notes=(), skip_bad=skip_bad, alone=alone,
    )  # fmt: skip
    return hide(pool, ("train",) if parted else SPLITS)
