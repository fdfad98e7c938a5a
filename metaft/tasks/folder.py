"""A folder of class folders as a pool: a user's own images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from metaft.errors import DataError
from metaft.tasks.cache import cached
from metaft.tasks.images import (
    READER_VERSION,
    fingerprint,
    is_dark_on_bright,
    list_classes,
    looks_grey,
    read_all,
    rows_of,
    subfolders,
)
from metaft.tasks.pool import ClassPool, Preprocessing
from metaft.types import SPLITS

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

GREY_SIDE, COLOUR_SIDE = 28, 84

_Classes = Mapping[str, list[Path]]


def folder(path: Path, image_size: int | None = None, channels: int | None = None) -> ClassPool:
    """Images under `path`, which holds either train/, val/ and test/ folders of class folders, or class folders.

    Without given splits the classes are ranked by the SHA-256 of their name and cut 64 / 16 / 20 %, each part with at
    least one class where there are three or more. One channel where all images are grey (28x28, stored bright on black
    whatever the files hold), else three (84x84, ImageNet's mean and deviation).

    Raises DataError: a path or split folder that is missing, no class folders, a class without images or in two splits,
    a broken image, `image_size` or `channels` that cannot be.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size must be at least 1, got {image_size}")
    if channels not in (None, 1, 3):
        raise DataError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
    splits, classes = _list(path)
    names = tuple(sorted(classes))
    files = [file for name in names for file in classes[name]]

    preprocessing = preprocessing_for(files, image_size, channels)
    channels, side = preprocessing.channels, preprocessing.height

    def build() -> dict[str, np.ndarray]:
        images = read_all(files, channels, side)
        if channels == 1 and is_dark_on_bright(images):
            np.subtract(255, images, out=images)
        return {"images": images}

    key = f"{READER_VERSION} {channels} {side} {path.resolve()} {fingerprint(path, files)}"
    images = cached("folder", key, build)["images"]
    starts, counts = rows_of(classes[name] for name in names)
    number = {name: i for i, name in enumerate(names)}
    return ClassPool(
        name=f"folder:{path}",
        images=torch.from_numpy(images),
        class_names=names,
        starts=starts,
        counts=counts,
        splits={split: np.array(sorted(number[n] for n in splits[split]), np.int64) for split in SPLITS},
        preprocessing=preprocessing,
    )


def preprocessing_for(
    files: Sequence[Path], image_size: int | None = None, channels: int | None = None, *, sample: int | None = 64
) -> Preprocessing:
    """One channel where images are grey (28x28, bright on black), else three (84x84, ImageNet's mean and deviation).

    So many of the files are looked at, or all of them.
    """
    return preprocessing_of(channels or (1 if looks_grey(files, sample) else 3), image_size)


def preprocessing_of(channels: int, side: int | None) -> Preprocessing:
    """What goes with so many channels; `side` None is the usual size."""
    if channels == 1:
        side = side or GREY_SIDE
        return Preprocessing(1, side, side, polarity="bright-on-black")
    side = side or COLOUR_SIDE
    return Preprocessing(3, side, side, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def rank_split(names: list[str]) -> dict[str, list[str]]:
    """64 / 16 / 20 % of the classes by rank of the SHA-256 of their name; fewer than three are all for training."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    n = len(ranked)
    val, test = (max(1, round(0.16 * n)), max(1, round(0.20 * n))) if n >= 3 else (0, 0)
    train = n - val - test
    return {"train": ranked[:train], "val": ranked[train : train + val], "test": ranked[train + val :]}


def _list(path: Path) -> tuple[dict[str, list[str]], _Classes]:
    """(split -> class names, class name -> files) of either layout."""
    if not path.exists():
        raise DataError(f"folder: {path} does not exist")
    if not path.is_dir():
        raise DataError(f"folder: {path} is a file, not a folder of class folders")
    # A class may itself be called "train": only a folder that holds folders is a split.
    if any((path / split).is_dir() and subfolders(path / split) for split in SPLITS):
        return _list_splits(path)
    classes = list_classes(path)
    if not classes:
        raise DataError(f"folder: {path} holds no class folders")
    return rank_split(list(classes)), classes


def _list_splits(path: Path) -> tuple[dict[str, list[str]], _Classes]:
    splits: dict[str, list[str]] = {}
    classes: dict[str, list[Path]] = {}
    for split in SPLITS:
        if not (path / split).is_dir():
            raise DataError(f"folder: {path / split} is missing; give all of train/, val/ and test/, or no splits")
        found = list_classes(path / split)
        if not found:
            raise DataError(f"folder: {path / split} holds no class folders")
        for name in found:
            if name in classes:
                raise DataError(
                    f"folder: class {name!r} is in {classes[name][0].parent} and in {found[name][0].parent}; "
                    "meta-learning needs different classes in train/, val/ and test/"
                )
        splits[split] = list(found)
        classes.update(found)
    return splits, classes
