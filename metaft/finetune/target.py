"""The task to fine-tune to: labelled images, and which of them are for training, validation and test."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metaft.errors import DataError, MetaftError, suggest
from metaft.names import is_text
from metaft.tasks.folder import preprocessing_for
from metaft.tasks.glyphs import glyphs
from metaft.tasks.images import is_dark_on_bright, is_grey, list_classes, open_image, read_all, subfolders
from metaft.tasks.pool import Preprocessing
from metaft.tasks.sampler import choose, raw_words

STREAM = 3  # of raw_words: 0 episodes, 1 batches, 2 glyphs
VALIDATION_FROM, VALIDATION_SHARE = 10, 5  # from 10 images per class, one in 5 is for validation


class Rows(NamedTuple):
    """Which images of a target are for what; int64 rows, disjoint."""

    train: np.ndarray
    val: np.ndarray
    """Empty where there is no validation part."""
    test: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """Labelled images as a model takes them, and their parts."""

    name: str
    class_names: tuple[str, ...]
    images: Tensor
    """uint8 [M, C, H, W]"""
    labels: Tensor
    """int64 [M]"""
    parts: Mapping[str, np.ndarray]
    """Rows of "train", "test" and perhaps "val", or of "all" where the data has no parts."""
    files: tuple[str, ...]
    """[M] what to call each image."""
    preprocessing: Preprocessing
    invert: bool
    """Whether the files' polarity was turned around."""
    notes: tuple[str, ...]
    """What was changed on the way from the files, in plain words."""

    def rows(self, *, shots_per_class: int | None, seed: int, validate: bool = True) -> Rows:
        """The images to train, validate and test on; what is drawn is drawn by `seed` alone.

        `shots_per_class` images of each class are for training and validation together: drawn from train/, by default
        all of it, or from data without parts, by default four in five, whose rest is the test. Without a val/ folder
        one in five of every class is for validation if no class has fewer than ten. `validate=False` trains on those
        too.
        Raises DataError where a class has too few images.
        """
        if shots_per_class is not None and shots_per_class < 1:
            raise MetaftError(f"shots_per_class must be at least 1, got {shots_per_class}")
        labels, whole = self.labels.numpy(), "all" in self.parts
        pool = self.parts["all" if whole else "train"]
        train, rest = draw(labels, pool, shots_per_class, seed, self.class_names, keep_some=whole)
        val = self.parts.get("val", np.empty(0, np.int64))
        if validate and "val" not in self.parts:
            train, val = validation_part(labels, train, seed)
        return Rows(train, val if validate else val[:0], rest if whole else self.parts["test"])


def shape_of(data: str) -> tuple[list[int], bool]:
    """([C, H, W] of the target's images, whether another size will do); a folder's first image stands for all.

    Raises as `load` does.
    """
    kind, _, rest = data.partition(":")
    if kind == "folder" and rest:
        _, files = _list(Path(rest))
        p = preprocessing_for([f for _, _, f in files])
        return [p.channels, p.height, p.width], True
    return list(load(data).images.shape[1:]), False


def load(data: str, preprocessing: Preprocessing | None = None) -> Target:
    """The target that `--data` names: "folder:PATH" or "glyphs:SCRIPT".

    PATH holds train/ and test/ (and val/, if there is one) folders of the same class folders, or class folders alone.
    Images get the run's `preprocessing`; without one, that of a folder which is meta-trained on. Raises DataError or
    MetaftError for what cannot be read, or not by this preprocessing.
    """
    kind, _, rest = data.partition(":")
    if kind == "folder" and rest:
        return _folder(Path(rest), preprocessing)
    if kind == "glyphs" and rest:
        return _script(rest, preprocessing)
    raise MetaftError(f"data: write folder:PATH or glyphs:SCRIPT, not {data!r}")


def _folder(path: Path, given: Preprocessing | None) -> Target:
    names, files = _list(path)
    sample = [open_image(f) for _, _, f in files[:: max(1, len(files) // 64)]]
    p = given or preprocessing_for([f for _, _, f in files])
    if p.channels == 1 and not all(is_grey(image) for image in sample):
        size = f"{sample[0].height}, {sample[0].width}"
        raise DataError(
            f"data: the images of {path} are in colour, [3, {size}], but the run takes grey ones, "
            f"[1, {p.height}, {p.width}]; make them grey first, or start from a run on colour images"
        )
    raw = read_all([f for _, _, f in files], p.channels, p.height)
    invert = p.polarity == "bright-on-black" and p.channels == 1 and is_dark_on_bright(raw)
    return Target(
        name=f"folder:{path}",
        class_names=names,
        images=torch.from_numpy(255 - raw if invert else raw),
        labels=torch.tensor([label for _, label, _ in files]),
        parts={part: np.flatnonzero([f[0] == part for f in files]) for part in dict.fromkeys(f[0] for f in files)},
        files=tuple(str(f) for _, _, f in files),
        preprocessing=p,
        invert=invert,
        notes=_notes(sample, p, invert),
    )


def _list(path: Path) -> tuple[tuple[str, ...], list[tuple[str, int, Path]]]:
    """(class names, (part, label, file) of every image), of either layout."""
    if not path.is_dir():
        raise DataError(f"data: folder {path} does not exist")
    parts = {
        s: list_classes(path / s) for s in ("train", "val", "test") if (path / s).is_dir() and subfolders(path / s)
    }
    if parts and not {"train", "test"} <= parts.keys():
        missing = max({"train", "test"} - parts.keys())
        raise DataError(
            f"data: {path / missing} is missing; give train/ and test/ (and val/, if you like), or no parts"
        )
    if not parts:
        parts = {"all": list_classes(path)}
    names = tuple(sorted(next(iter(parts.values()))))
    for name in names:
        if not is_text(name):
            raise DataError(f"data: the name of class folder {name!r} in {path} is not text")
    if len(names) < 2:
        raise DataError(f"data: {path} holds {len(names)} class folders, fewer than 2")
    for classes in parts.values():
        if set(classes) != set(names):
            odd = min(set(classes) ^ set(names))
            raise DataError(f"data: class {odd!r} is not in every part of {path} ({', '.join(parts)})")
    return names, [(part, label, f) for part in parts for label, name in enumerate(names) for f in parts[part][name]]


def _notes(sample: Sequence[Image.Image], p: Preprocessing, invert: bool) -> tuple[str, ...]:
    """What happens to pictures of which these are a sample, in plain words."""
    notes = []
    sizes = sorted({image.size for image in sample})
    if sizes != [(p.width, p.height)]:
        was = f"{sizes[0][0]}x{sizes[0][1]}" if len(sizes) == 1 else "several sizes"
        notes.append(f"resized from {was} to {p.width}x{p.height}")
    if p.channels == 3 and all(image.mode == "L" for image in sample):
        notes.append("grey to colour")
    if p.channels == 1 and any(image.mode != "L" for image in sample):
        notes.append("colour files to grey, which their pixels are")
    if invert:
        notes.append("dark on bright to bright on black")
    return tuple(notes)


def _script(script: str, given: Preprocessing | None) -> Target:
    pool = glyphs()
    p = given or pool.preprocessing
    if p.channels != 1 or (p.height, p.width) != pool.shape[1:]:
        raise MetaftError(
            f"data: glyphs are [1, 28, 28], but the run's images are [{p.channels}, {p.height}, {p.width}]"
        )
    scripts = {pool.class_names[c].split("/")[0] for c in pool.splits["test"]}
    if script not in scripts:
        raise MetaftError(f"data: no held-out script {script!r}, there are {sorted(scripts)}{suggest(script, scripts)}")
    classes = [int(c) for c in pool.splits["test"] if pool.class_names[c].startswith(f"{script}/")]
    rows = np.concatenate([np.arange(pool.starts[c], pool.starts[c] + pool.counts[c]) for c in classes])
    labels = np.repeat(np.arange(len(classes)), pool.counts[classes])
    names = tuple(pool.class_names[c] for c in classes)
    return Target(
        name=f"glyphs:{script}",
        class_names=names,
        images=pool.images[torch.from_numpy(rows)],
        labels=torch.from_numpy(labels),
        parts={"all": np.arange(len(rows))},
        files=tuple(f"{names[label]} #{i % 20}" for i, label in enumerate(labels)),
        preprocessing=p,
        invert=False,
        notes=(),
    )


def draw(
    labels: np.ndarray, rows: np.ndarray, shots: int | None, seed: int, names: tuple[str, ...], *, keep_some: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(drawn, left): `shots` of `rows` for each class, a function of `seed` alone, and the others.

    `shots=None` draws all, or four in five where `keep_some`. Raises DataError where a class has too few.
    """
    drawn = []
    for label, name in enumerate(names):
        own = rows[labels[rows] == label]
        spare = 1 if keep_some else 0
        k = shots if shots is not None else max(1, len(own) * 4 // 5) if keep_some else len(own)
        if len(own) < k + spare:
            need = f"shots_per_class + 1 for the test = {k + 1}" if keep_some else f"shots_per_class = {k}"
            raise DataError(f"data: class {name!r} has {len(own)} images to draw from, fewer than {need}")
        words = raw_words(seed, "train", [label], k, stream=STREAM)
        drawn.append(own[choose(words, np.array([len(own)]))[0]])
    taken = np.sort(np.concatenate(drawn))
    return taken, np.setdiff1d(rows, taken)


def validation_part(labels: np.ndarray, train: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, val): one in five of every class for validation, or none where a class has fewer than ten images."""
    counts = np.bincount(labels[train])
    if counts.min() < VALIDATION_FROM:
        return train, np.empty(0, np.int64)
    val = []
    for label, count in enumerate(counts):
        own = train[labels[train] == label]
        words = raw_words(seed, "val", [label], int(count) // VALIDATION_SHARE, stream=STREAM)
        val.append(own[choose(words, np.array([count]))[0]])
    picked = np.sort(np.concatenate(val))
    return np.setdiff1d(train, picked), picked
