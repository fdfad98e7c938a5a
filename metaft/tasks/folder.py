"""A folder of class folders as a pool: a user's own images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from metaft.errors import DataError, MetaftWarning
from metaft.inputs import ImageInputs
from metaft.inputs.fitting import border, is_dark_on_bright
from metaft.inputs.flaws import flaws_note
from metaft.inputs.listing import (
    Left,
    check_lost,
    left_note,
    list_classes,
    overlooked,
    refusal,
    skipped_note,
    subfolders,
)
from metaft.inputs.pictures import (
    READER_VERSION,
    Opened,
    Pictures,
    depth_note,
    fingerprint,
    looks_grey,
    read_all,
    rows_of,
)
from metaft.inputs.reading import try_open
from metaft.support.cache import cached
from metaft.support.paths import local
from metaft.tasks.pool import ClassPool
from metaft.types import SPLITS

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

GREY_SIDE, COLOUR_SIDE = 28, 84

_Classes = Mapping[str, list[Path]]


def folder(
    path: str | os.PathLike[str],
    image_size: int | None = None,
    channels: int | None = None,
    *,
    skip_bad: bool = False,
) -> ClassPool:
    """Images under `path`, which holds either train/, val/ and test/ folders of class folders, or class folders.

    Without given splits the classes are ranked by the SHA-256 of their name and cut 64 / 16 / 20 %, each part with at
    least one class where there are three or more. One channel where all images are grey (28x28, stored bright on black
    whatever the files hold), else three (84x84, ImageNet's mean and deviation). Greys of more than 8 bits are scaled by
    the fewest of 8, 10, 12, 14 and 16 bits that hold all of them.

    A MetaftWarning says what is not read. Raises DataError: a path or split folder that is missing, no class folders, a
    class without images or in two splits, two whose names differ in Unicode form alone, broken images (`skip_bad`
    leaves those out), more than half of the pictures gone, `image_size` or `channels` that cannot be.
    """
    check_form(image_size, channels)
    path = local(path)
    splits, classes, left = _list(path)
    first = next(files[0] for files in classes.values())
    parts = () if first.parents[1] == path else SPLITS
    looked_at = [files[0].parent for files in classes.values()]
    return pool_of(
        f"folder:{path}", path, splits, classes, image_size, channels,
        left=left, notes=overlooked(path, parts, looked_at), skip_bad=skip_bad,
    )  # fmt: skip


def check_form(image_size: int | None, channels: int | None) -> None:
    """Raises DataError for a form that pictures cannot have."""
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size must be at least 1, got {image_size}")
    if channels not in (None, 1, 3):
        raise DataError(f"channels must be 1 (grey) or 3 (colour), got {channels}")


def pool_of(
    name: str,
    path: Path,
    splits: Mapping[str, Sequence[str]],
    classes: Mapping[str, Sequence[Path]],
    image_size: int | None,
    channels: int | None,
    *,
    left: Sequence[Left],
    notes: Sequence[str],
    skip_bad: bool,
    alone: Collection[str] = (),
) -> ClassPool:
    """Picture files below `path` as a pool: `splits` have names of `classes`. `left` are those that are not taken, and
    `notes` say more of what is not. Classes of a single picture that are `alone` go with it where it cannot be read.
    Warns and raises as `folder` does."""
    names = tuple(sorted(classes))
    files = [file for name in names for file in classes[name]]
    check_lost(left, len(files), skip_bad=skip_bad)

    inputs = inputs_for(files, image_size, channels)
    key = f"{READER_VERSION} {inputs.channels} {inputs.height} {path.resolve()} {fingerprint(path, files)}"
    pictures = read_cached("folder", key, files, inputs)
    if pictures.bad and not skip_bad:
        raise DataError(refusal(pictures.bad, len(files), left))
    notes = (
        *left_note(left, len(files)),
        *notes,
        *skipped_note(pictures.bad, len(files)),
        *depth_note(pictures.deep, pictures.bits),
        *flaws_note(pictures.flaws),
    )
    for note in notes:
        warnings.warn(f"{path}: {note}", MetaftWarning, stacklevel=3)
    if pictures.bad and alone:
        names = tuple(name for name in names if name not in alone or classes[name][0] not in pictures.bad)
        there = set(names)
        splits = {split: [name for name in of if name in there] for split, of in splits.items()}
    starts, counts, skipped = rows_left([classes[name] for name in names], names, pictures.bad)
    number = {name: i for i, name in enumerate(names)}
    return ClassPool(
        name=name,
        images=torch.from_numpy(pictures.images),
        class_names=names,
        starts=starts,
        counts=counts,
        splits={split: np.array(sorted(number[n] for n in splits[split]), np.int64) for split in SPLITS},
        inputs=dataclasses.replace(inputs, bits=pictures.bits),
        skipped=skipped,
    )


class _Unkept(Exception):
    """Carries pictures past the cache: a file that could not be read today may be whole tomorrow."""

    def __init__(self, pictures: Pictures) -> None:
        super().__init__()
        self.pictures = pictures


def read_cached(
    name: str, key: str, files: Sequence[Path], inputs: ImageInputs, *, invert: bool | None = None
) -> Pictures:
    """The files as these inputs, from the cache where they are there and nothing was wrong with any.

    Grey ones are turned to bright on black: all of them (`invert`), none, or as their borders say.
    """
    channels, side = inputs.channels, inputs.height

    def build() -> dict[str, np.ndarray]:
        pictures = read_all(files, channels, side)
        images = pictures.images
        if (channels == 1 and len(images) > 0 and is_dark_on_bright(border(images))) if invert is None else invert:
            np.subtract(255, images, out=images)
        if pictures.bad:
            raise _Unkept(pictures)
        flaws = {i: pictures.flaws[file] for i, file in enumerate(files) if file in pictures.flaws}
        text = np.frombuffer(json.dumps(flaws).encode(), np.uint8)
        return {"images": images, "depth": np.array([pictures.deep, pictures.bits]), "flaws": text}

    try:
        arrays = cached(name, key, build)
    except _Unkept as unkept:
        return unkept.pictures
    deep, bits = arrays["depth"].tolist()
    flaws = {files[int(i)]: text for i, text in json.loads(arrays["flaws"].tobytes()).items()}
    return Pictures(arrays["images"], np.arange(len(files)), {}, deep, bits, flaws)


def rows_left(
    classes: Sequence[Sequence[Path]], names: Sequence[str], bad: Mapping[Path, str]
) -> tuple[np.ndarray, np.ndarray, Mapping[str, int]]:
    """(starts, counts, class name -> how many are left out) of what is left without the bad ones.

    Raises DataError for a class of which nothing is left.
    """
    starts, counts = rows_of([[file for file in files if file not in bad] for files in classes] if bad else classes)
    skipped = {name: len(files) - int(n) for name, files, n in zip(names, classes, counts, strict=True)}
    for name, n in zip(names, counts, strict=True):
        if n == 0:
            raise DataError(f"class {name!r} has no picture left: none of its {skipped[name]} can be read")
    return starts, counts, {name: n for name, n in skipped.items() if n}


def inputs_for(
    files: Sequence[Path],
    image_size: int | None = None,
    channels: int | None = None,
    *,
    sample: int | None = 64,
    opened: Opened = try_open,
) -> ImageInputs:
    """One channel where images are grey (28x28, bright on black), else three (84x84, ImageNet's mean and deviation).

    So many of the files are looked at, or all of them.
    """
    return inputs_of(channels or (1 if looks_grey(files, sample, opened) else 3), image_size)


def inputs_of(channels: int, side: int | None) -> ImageInputs:
    """What goes with so many channels; `side` None is the usual size."""
    if channels == 1:
        side = side or GREY_SIDE
        return ImageInputs(1, side, side, polarity="bright-on-black")
    side = side or COLOUR_SIDE
    return ImageInputs(3, side, side, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def ranked_by_hash(names: Iterable[str]) -> list[str]:
    """By the SHA-256 of each, so that an order is nobody's."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())


def rank_split(names: list[str]) -> dict[str, list[str]]:
    """64 / 16 / 20 % of the classes by rank of the SHA-256 of their name; fewer than three are all for training."""
    ranked = ranked_by_hash(names)
    n = len(ranked)
    val, test = (max(1, round(0.16 * n)), max(1, round(0.20 * n))) if n >= 3 else (0, 0)
    train = n - val - test
    return {"train": ranked[:train], "val": ranked[train : train + val], "test": ranked[train + val :]}


def _list(path: Path) -> tuple[dict[str, list[str]], _Classes, list[Left]]:
    """(split -> class names, class name -> files, what is not taken) of either layout."""
    if not path.exists():
        raise DataError(f"folder: {path} does not exist")
    if not path.is_dir():
        raise DataError(f"folder: {path} is a file, not a folder of class folders")
    # A class may itself be called "train": only a folder that holds folders is a split.
    if any((path / split).is_dir() and subfolders(path / split) for split in SPLITS):
        return list_splits(path)
    classes, left = list_classes(path)
    if not classes:
        raise DataError(f"folder: {path} holds no class folders")
    return rank_split(list(classes)), classes, left


def list_splits(
    path: Path, parts: Sequence[str] = SPLITS, *, kind: str = "folder"
) -> tuple[dict[str, list[str]], dict[str, list[Path]], list[Left]]:
    """What `_list` gives, of the class folders in these parts of a folder. Raises DataError that names the `kind`."""
    splits: dict[str, list[str]] = {}
    left: list[Left] = []
    classes: dict[str, list[Path]] = {}
    for split in parts:
        if not (path / split).is_dir():
            raise DataError(f"{kind}: {path / split} is missing; give all of train/, val/ and test/, or no splits")
        in_split, left_here = list_classes(path / split)
        left += left_here
        if not in_split:
            raise DataError(f"{kind}: {path / split} holds no class folders")
        for name in in_split:
            if name in classes:
                raise DataError(
                    f"{kind}: class {name!r} is in {classes[name][0].parent} and in {in_split[name][0].parent}; "
                    "meta-learning needs different classes in train/, val/ and test/"
                )
        splits[split] = list(in_split)
        classes.update(in_split)
    return splits, classes, left
