"""mini-ImageNet (Vinyals et al., 2016) by Ravi and Larochelle's split: 64 / 16 / 20 classes of 600 photos.

Read in any of the forms in which it goes around: class folders, the published tables beside the photos, or pickles.
https://openreview.net/forum?id=rJY0-Kcll
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metaft.errors import DataError, MetaftWarning
from metaft.inputs import unpickled
from metaft.inputs.pictures import READER_VERSION, fingerprint
from metaft.support import large
from metaft.support.cache import cached
from metaft.support.paths import local
from metaft.tasks.folder import COLOUR_SIDE, folder, inputs_of
from metaft.tasks.pool import ClassPool
from metaft.tasks.tables import tables
from metaft.types import SPLITS

FOLDERS = ("mini_imagenet", "mini-imagenet", "miniImagenet", "miniImageNet")

CLASSES: Mapping[str, int] = {"train": 64, "val": 16, "test": 20}
IMAGES = 600

SPLIT_HASH = "7ae5933a06e4be52e759e4c51d9c794408e296dcc74539d25255cb12655b642b"
"""`ClassPool.split_hash` of the published split, whose classes have WordNet's names ("n01532829")."""

_PICKLE, _TABLE, _FOLDER = "mini-imagenet-cache-{split}.pkl", "{split}.csv", "{split}"
"""What each split is, in the three forms."""


def mini_imagenet(root: str | os.PathLike[str], image_size: int | None = None, *, skip_bad: bool = False) -> ClassPool:
    """mini-ImageNet under `root` as a pool: uint8 [60000, 3, 84, 84], or photos of `image_size` pixels a side.

    `root`, or its folder mini_imagenet (or mini-imagenet, miniImagenet), holds one of three things: class folders in
    train/, val/ and test/; Ravi and Larochelle's train.csv, val.csv and test.csv with the photos in images/; or
    mini-imagenet-cache-train.pkl and its like, of which nothing is executed.

    A MetaftWarning says where the classes are not the published ones. Raises DataError: nothing found, classes or
    photos missing (`skip_bad` goes on without the latter), photos that are broken, a pickle that is no such file.
    """
    base, form = _found(local(root))
    if form == _PICKLE:
        pool = _from_pickles(base, image_size)
    else:
        pool = (tables if form == _TABLE else folder)(base, image_size, 3, skip_bad=skip_bad)
    pool = dataclasses.replace(pool, name="mini-imagenet")
    _check(base, pool, skip_bad)
    return pool


def _found(root: Path) -> tuple[Path, str]:
    """The folder that holds it, and in which form. Raises DataError where there is none."""
    places = [*(root / name for name in FOLDERS), root]
    for base in places:
        for form in (_PICKLE, _TABLE, _FOLDER):
            if all((base / form.format(split=split)).exists() for split in SPLITS):
                return base, form
    raise DataError(
        f"mini-imagenet: neither {places[0]} nor {root} holds train/, val/ and test/, nor train.csv, val.csv and "
        f"test.csv, nor {_PICKLE.format(split='train')} and its like"
    )


def _check(base: Path, pool: ClassPool, skip_bad: bool) -> None:
    for split, classes in CLASSES.items():
        found = pool.splits[split]
        if len(found) != classes:
            raise DataError(f"mini-imagenet: {base} holds {len(found)} classes for {split}, not {classes}")
        for c in found.tolist():
            if pool.counts[c] != IMAGES and not (skip_bad and pool.counts[c] < IMAGES):
                name = pool.class_names[c]
                raise DataError(f"mini-imagenet: class {name!r} of {base} has {pool.counts[c]} photos, not {IMAGES}")
    if pool.split_hash != SPLIT_HASH:
        warnings.warn(
            f"{base}: the names of the classes in train, val and test are not those of Ravi and Larochelle's split",
            MetaftWarning, stacklevel=3,
        )  # fmt: skip


def _from_pickles(base: Path, image_size: int | None) -> ClassPool:
    """Of {"image_data": uint8 [n, 84, 84, 3], "class_dict": class -> numbers of its images} for each split."""
    if image_size not in (None, COLOUR_SIDE):
        raise DataError(
            f"image_size: the pickles in {base} hold photos of {COLOUR_SIDE} pixels a side, so {image_size} would need "
            "the photos themselves"
        )
    files = {split: base / _PICKLE.format(split=split) for split in SPLITS}
    key = f"{READER_VERSION} pickles {base.resolve()} {fingerprint(base, files.values())}"
    arrays = cached("mini-imagenet", key, lambda: _unpickled(files))
    names = tuple(arrays["names"].tolist())
    starts, counts, splits = arrays["starts"], arrays["counts"], arrays["splits"]
    return ClassPool(
        name="mini-imagenet",
        images=torch.from_numpy(arrays["images"]),
        class_names=names,
        starts=starts,
        counts=counts,
        splits={split: np.flatnonzero(splits == i) for i, split in enumerate(SPLITS)},
        inputs=inputs_of(3, COLOUR_SIDE),
    )


def _unpickled(files: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """The images of all classes, split by split, and for each class in the order of the names where it is."""
    images = large.room((sum(CLASSES.values()) * IMAGES, 3, COLOUR_SIDE, COLOUR_SIDE))
    rows: dict[str, tuple[int, int, str]] = {}
    filled = 0
    for split, file in files.items():
        pixels, classes = _checked(file, unpickled.arrays(file), CLASSES[split])
        for name, numbers in classes.items():
            if name in rows:
                raise DataError(f"{file}: class {name!r} is in {files[rows[name][2]]} too")
            images[filled : filled + len(numbers)] = pixels[numbers].transpose(0, 3, 1, 2)
            rows[name] = (filled, len(numbers), split)
            filled += len(numbers)
    names = sorted(rows)
    starts, counts = (np.array([rows[name][i] for name in names], np.int64) for i in (0, 1))
    splits = np.array([SPLITS.index(rows[name][2]) for name in names], np.int64)
    return {"images": images, "names": np.array(names), "starts": starts, "counts": counts, "splits": splits}


def _checked(file: Path, held: Any, classes: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pixels [n, 84, 84, 3] and the rows of each class. Raises DataError where a pickle holds anything else."""
    pixels, rows = (held.get(key) if isinstance(held, dict) else None for key in ("image_data", "class_dict"))
    shape = (classes * IMAGES, COLOUR_SIDE, COLOUR_SIDE, 3)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != shape:
        found = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else "none"
        raise DataError(f"{file}: image_data must be uint8 {list(shape)}, got {found}")
    if not isinstance(rows, dict) or not all(isinstance(name, str) for name in rows):
        raise DataError(f"{file}: class_dict must hold the numbers of each class's images, got {type(rows).__name__}")
    numbers: dict[str, np.ndarray] = {}
    owners: list[str] = []
    for name, own in rows.items():
        given = np.asarray(own) if isinstance(own, list | tuple | np.ndarray) else np.empty(0)
        if given.ndim != 1 or given.dtype.kind not in "iu" or len(set(given.tolist())) != IMAGES:
            raise DataError(f"{file}: class {name!r} must have {IMAGES} different images")
        if given.min() < 0 or given.max() >= len(pixels):
            wrong = given.min() if given.min() < 0 else given.max()
            raise DataError(f"{file}: class {name!r} has an image {wrong}, of {len(pixels)}")
        numbers[name] = given
        owners += [name] * len(given)
    if sum(map(len, numbers.values())) != len(pixels):
        raise DataError(f"{file}: its {len(numbers)} classes are not {classes}")
    rows_of_all = np.concatenate(list(numbers.values()))
    order = np.argsort(rows_of_all, kind="stable")
    twice = np.flatnonzero(np.diff(rows_of_all[order]) == 0)
    if len(twice):
        first, second = order[twice[0]], order[twice[0] + 1]
        both = f"{owners[first]!r} and {owners[second]!r}"
        raise DataError(f"{file}: image {rows_of_all[first]} is in two classes, {both}")
    return pixels, numbers
