"""learn2learn's data sets, and any other that gives (image, label), as class pools.

learn2learn itself is needed for its data sets by name alone (`--dataset l2l:NAME`), and imported when one is asked for.
https://github.com/learnables/learn2learn
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metaft.errors import DataError, MetaftError, MetaftWarning, no_such, words_of
from metaft.inputs.depth import CONTAINER, bits_for, is_deep, maximum, to_bytes
from metaft.inputs.fitting import border, fitted_deep, is_dark_on_bright, is_grey, pixels_of, plain, upright
from metaft.inputs.flaws import about, flaws_note, noted
from metaft.inputs.pictures import depth_note
from metaft.support.foreign import in_our_words
from metaft.support.paths import local
from metaft.tasks.folder import inputs_of, rank_split
from metaft.tasks.pool import ClassPool
from metaft.types import SPLITS

NAMES = {
    "omniglot": "FullOmniglot",
    "mini-imagenet": "MiniImagenet",
    "tiered-imagenet": "TieredImagenet",
    "cifarfs": "CIFARFS",
    "fc100": "FC100",
    "vgg-flowers": "VGGFlower102",
    "fgvc-aircraft": "FGVCAircraft",
    "cu-birds200": "CUBirds200",
    "describable-textures": "DescribableTextures",
    "quickdraw": "Quickdraw",
    "fgvc-fungi": "FGVCFungi",
}
"""What follows "l2l:" -> the class in `learn2learn.vision.datasets`."""

_WHOLE = ("omniglot",)
"""Those that learn2learn does not split: its benchmark shuffles the classes with the global generator."""

_SAMPLE = 64  # images that are looked at for size, colour and range

_CHANNELS = (1, 3, 4)

INSTALL = (
    "install it with `pip install learn2learn==0.2.0`; where that does not build (Python 3.11 and newer), with "
    "benchmarks/peers/install.sh DIR and PYTHONPATH=DIR, or as the comment in metaft's pyproject.toml says"
)


class Labelled(Protocol):
    """learn2learn's MetaDataset, torchvision's data sets, or anything else of this form."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """(image, label, ...): a PIL image, or a tensor [C, H, W], or an array [H, W] or [H, W, C]."""
        ...


# Above 60 lines: half of it says what it takes and gives.
def pool(
    dataset: Labelled,
    val: Labelled | None = None,
    test: Labelled | None = None,
    *,
    name: str = "learn2learn",
    image_size: int | None = None,
    channels: int | None = None,
) -> ClassPool:
    """A labelled data set as a pool. All its images are read, into memory, as uint8.

    With `val` and `test` each data set is one split, and its classes are its own even where numbers repeat; otherwise
    the classes of the one are split by a hash of their names, as a folder's are. Names are those of an attribute
    `classes`, where there is one, or the labels themselves.

    Numbers in tensors and arrays are 0..255, or in 0..1 where they are floats none of which is above 1. Images that are
    square and of one size keep it, others are fitted as a folder's are; so are grey ones, which are stored bright on
    black. A sample of the images decides about size, colour and range.

    Raises DataError: only one of `val` and `test`, nothing in a data set, a class in two of them, an image or label
    that is none, numbers out of range (hand over images before they are normalised).
    """
    if (val is None) != (test is None):
        raise DataError(f"{name}: give data sets for both val and test, or for neither")
    parts: list[Labelled] = [dataset] if val is None or test is None else [dataset, val, test]
    if not all(len(part) for part in parts):
        raise DataError(f"{name}: a data set without images")

    with noted(), about(Path(name)):  # what there is to warn of comes once more when all are read
        sample = [_item(name, part, i)[0] for part in parts for i in range(0, len(part), max(1, len(part) // _SAMPLE))]
        floats = [_numbers(image) for image in sample if not isinstance(image, Image.Image)]
        unit = all(a.dtype.kind in "fb" and a.size and a.max() <= 1 for a in floats)
        looks = [_picture(name, image, unit) for image in sample]
    sizes = {look.size for look in looks}
    side = looks[0].width if len(sizes) == 1 and looks[0].width == looks[0].height else None
    inputs = inputs_of(channels or (1 if all(map(is_grey, looks)) else 3), image_size or side)

    images = np.empty((sum(map(len, parts)), *inputs.shape), np.uint8)
    owners: list[tuple[int, Any]] = []  # (number of the data set, label) of each image
    deep: dict[int, tuple[int, np.ndarray]] = {}  # image -> its largest number, and its pixels
    with noted() as flaws:
        for number, part in enumerate(parts):
            for i in range(len(part)):
                with about(Path(f"{SPLITS[number]} item {i}")):
                    image, label = _item(name, part, i)
                    picture = _picture(name, image, unit)
                if is_deep(picture):
                    deep[len(owners)] = maximum(picture), fitted_deep(picture, *inputs.shape[:2])
                else:
                    images[len(owners)] = pixels_of(picture, inputs.channels, inputs.height)
                owners.append((number, label))
    bits = bits_for(max((most for most, _ in deep.values()), default=2**CONTAINER - 1))
    for row, (_, values) in deep.items():
        images[row] = to_bytes(values, bits)
    for note in (*depth_note(len(deep), bits), *flaws_note(flaws)):
        warnings.warn(f"{name}: {note}", MetaftWarning, stacklevel=2)
    if inputs.channels == 1 and is_dark_on_bright(border(images)):
        np.subtract(255, images, out=images)

    classes = sorted(set(owners), key=lambda owner: (owner[0], isinstance(owner[1], str), owner[1]))
    rank = {owner: c for c, owner in enumerate(classes)}
    class_of = np.array([rank[owner] for owner in owners], np.int64)
    if (class_of[1:] < class_of[:-1]).any():
        images = images[np.argsort(class_of, kind="stable")]
    counts = np.bincount(class_of).astype(np.int64)
    names = _names(name, parts, classes)
    of = {split: {c for c, (number, _) in enumerate(classes) if number == s} for s, split in enumerate(SPLITS)}
    if len(parts) == 1:
        of = {split: {names.index(n) for n in chosen} for split, chosen in rank_split(names).items()}
    return ClassPool(
        name=name,
        images=torch.from_numpy(images),
        class_names=tuple(names),
        starts=np.cumsum(counts) - counts,
        counts=counts,
        splits={split: np.array(sorted(of[split]), np.int64) for split in SPLITS},
        inputs=dataclasses.replace(inputs, bits=bits),
    )


def named(
    name: str,
    root: str | os.PathLike[str],
    *,
    download: bool = False,
    image_size: int | None = None,
    channels: int | None = None,
) -> ClassPool:
    """One of learn2learn's data sets, read (and with `download` fetched) by learn2learn under `root`.

    Splits are learn2learn's; of omniglot, which it does not split, they are by a hash of the classes. Some of the
    files are pickles, which can run code when they are read: take them from where learn2learn does.

    Raises MetaftError: a name that is not in NAMES, or learn2learn is not there; DataError: it cannot read the data.
    """
    if name not in NAMES:
        raise no_such("dataset", name, sorted(NAMES), lacks="learn2learn has no")
    make = getattr(_datasets(), NAMES[name])
    modes = [{}] if name in _WHOLE else [{"mode": mode} for mode in ("train", "validation", "test")]
    hint = "" if download else "; --download fetches it"

    def not_there(error: Exception) -> DataError:  # whichever of learn2learn, pickle, zipfile, requests, ... says it
        return DataError(f"l2l:{name}: learn2learn cannot read it under {local(root)} ({words_of(error)}){hint}")

    with in_our_words(not_there), contextlib.redirect_stdout(sys.stderr):
        parts = [make(root=str(local(root)), download=download, **mode) for mode in modes]
    return pool(*parts, name=f"l2l:{name}", image_size=image_size, channels=channels)


def _datasets() -> Any:
    """learn2learn.vision.datasets. Raises MetaftError that says how to install it."""
    importlib.import_module("metaft.support.vision")  # without which torchvision may not import
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # gym, which it imports, says that it is no longer maintained
            return importlib.import_module("learn2learn.vision.datasets")
    except ImportError as error:
        raise MetaftError(
            f"dataset: l2l:NAME needs learn2learn, which cannot be imported: {error}; {INSTALL}"
        ) from None


def _item(name: str, part: Labelled, index: int) -> tuple[Any, Any]:
    """Image and label, a number or a string, of one item."""
    item = part[index]
    if not isinstance(item, (tuple, list)) or len(item) < 2:  # a dict would take 0 and 1, or a slice, for keys
        raise DataError(f"{name}: item {index} is not (image, label) but {type(item).__name__}")
    image, label = item[:2]
    if isinstance(label, (Tensor, np.ndarray, np.generic)) and _numbers(label).size == 1:
        label = label.item()
    if not isinstance(label, (int, str)):
        raise DataError(f"{name}: the label of item {index} must be a number or a name, got {label!r}")
    return image, label


def _numbers(image: Any) -> np.ndarray:
    return np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)


def _picture(name: str, image: Any, unit: bool) -> Image.Image:
    """Any image as mode "L", "RGB" or, of more than 8 bits, "I;16". `unit`: floats are in 0..1.

    Raises DataError where it is none.
    """
    if isinstance(image, Image.Image):
        try:
            return plain(upright(image))
        except (ValueError, OSError, SyntaxError) as error:  # it may be read from its file only now
            raise DataError(f"{name}: {words_of(error)}") from None
    pixels = _numbers(image)
    axes = (0, -1) if isinstance(image, Tensor) else (-1, 0)
    axis = next((a for a in axes if pixels.ndim == 3 and pixels.shape[a] in _CHANNELS), None)
    if pixels.dtype.kind not in "uifb" or pixels.size == 0 or (pixels.ndim != 2 and axis is None):
        raise DataError(f"{name}: an image must be [H, W] or have 1, 3 or 4 channels, got {list(pixels.shape)}")
    if axis is not None:
        pixels = np.moveaxis(pixels, axis, -1)
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    if pixels.dtype != np.uint8:
        most = 1 if unit else 255
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= most):  # NaN too
            raise DataError(
                f"{name}: numbers of an image are from {low:g} to {high:g}, not in 0..{most}; hand the data set over "
                "without its normalisation"
            )
        pixels = np.round(pixels.astype(np.float64) * (255 / most)).astype(np.uint8)
    return plain(Image.fromarray(np.ascontiguousarray(pixels)))


def _names(name: str, parts: Sequence[Labelled], classes: Sequence[tuple[int, Any]]) -> list[str]:
    """A name for each class, in Unicode's composed form. Raises DataError for one that two have."""
    known = [next(_class_lists(part), None) for part in parts]
    written: list[str] = []
    for number, label in classes:
        words, split = known[number], f"{SPLITS[number]}/" if len(parts) > 1 else ""
        is_number = words and isinstance(label, int) and 0 <= label < len(words)
        written.append(str(words[label]) if words and is_number else f"{split}{label}")
    names = [unicodedata.normalize("NFC", text) for text in written]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        first, second = [text for text, n in zip(written, names, strict=True) if n == twice][:2]
        if first != second:
            raise DataError(
                f"{name}: classes {first!a} and {second!a} have the same name, {twice!r}, in two Unicode forms; "
                "merge them or rename one"
            )
        raise DataError(f"{name}: {twice!r} names two classes; meta-learning needs different ones in each split")
    return names


def _class_lists(part: Any) -> Iterator[Sequence[str]]:
    """`classes` of a data set, or of one that it wraps under the same labels, as a MetaDataset or a Subset does."""
    while part is not None:
        if isinstance(getattr(part, "classes", None), (list, tuple)):
            yield part.classes
        part = getattr(part, "dataset", None)
