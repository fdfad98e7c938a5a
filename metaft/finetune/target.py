"""The task to fine-tune to: labelled images, and which of them are for training, validation and test."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaft.errors import DataError, MetaftError, suggest
from metaft.names import is_text
from metaft.paths import local
from metaft.tasks.folder import preprocessing_for
from metaft.tasks.glyphs import glyphs
from metaft.tasks.images import is_dark_on_bright, is_grey, list_below, list_classes, read_all, subfolders
from metaft.tasks.pool import Preprocessing
from metaft.tasks.sampler import Stream, choose, raw_words

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
    changes: tuple[str, ...]
    """What was changed on the way from the files, in plain words."""
    notes: tuple[str, ...] = ()
    """What else there is to know of the files, in plain words."""

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
    """([C, H, W] of the target's images, whether another size will do). Raises as `load` does."""
    kind, _, rest = data.partition(":")
    if kind == "folder" and rest:
        with _named():
            _, files = _list(local(rest))
            p = preprocessing_for([f for _, _, f in files], sample=None)
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
        with _named():
            return _folder(local(rest), preprocessing)
    if kind == "glyphs" and rest:
        return _script(rest, preprocessing)
    raise MetaftError(f"data: write folder:PATH or glyphs:SCRIPT, not {data!r}")


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Lets every error inside name the option."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error) if str(error).startswith("data: ") else f"data: {error}") from error


class Look(NamedTuple):
    """What a picture file was before it was fitted to the run."""

    size: tuple[int, int]
    mode: str
    grey: bool


def _folder(path: Path, given: Preprocessing | None) -> Target:
    names, listed = _list(path)
    files = [file for _, _, file in listed]
    labels = np.array([label for _, label, _ in listed])
    parts = {part: np.flatnonzero([f[0] == part for f in listed]) for part in dict.fromkeys(f[0] for f in listed)}
    p = given or preprocessing_for(files, sample=None)
    looks: dict[int, Look] = {}
    raw = read_all(
        files, p.channels, p.height,
        lambda i, image: looks.update({i: Look(image.size, image.mode, p.channels == 3 or is_grey(image))}),
    )  # fmt: skip
    colour = [i for i in range(len(files)) if not looks[i].grey]
    if colour:
        width, height = looks[colour[0]].size
        raise DataError(
            f"data: {len(colour)} of the {len(files)} images of {path} are in colour, [3, {height}, {width}], such as "
            f"{files[colour[0]]}, but the run takes grey ones, [1, {p.height}, {p.width}]; make them grey first, or "
            "start from a run on colour images"
        )
    invert, odd = False, []
    if p.polarity == "bright-on-black" and p.channels == 1:
        # Test images have no say, where it is known which they are.
        rows = parts.get("train", np.arange(len(files)))
        invert = is_dark_on_bright(raw[rows])
        odd = [n for i, n in enumerate(names) if is_dark_on_bright(raw[rows[labels[rows] == i]]) != invert]
    notes = _ignored(path, tuple(parts), listed)
    if odd:
        ways = ("bright on dark", "dark on bright")
        notes.append(f"{_some(odd)}: {ways[not invert]}, but read as {ways[invert]}, as the other classes are")
    return Target(
        name=f"folder:{path}",
        class_names=names,
        images=torch.from_numpy(255 - raw if invert else raw),
        labels=torch.from_numpy(labels),
        parts=parts,
        files=tuple(map(str, files)),
        preprocessing=p,
        invert=invert,
        changes=_changes(list(looks.values()), p, invert),
        notes=tuple(notes),
    )


def _ignored(path: Path, parts: Sequence[str], listed: Sequence[tuple[str, int, Path]]) -> list[str]:
    """Notes on pictures that lie where nobody looks for them."""
    notes = []
    beside = [] if "all" in parts else [sub for sub in subfolders(path) if sub.name not in parts and list_below(sub)]
    if beside:
        notes.append(f"ignored beside {' and '.join(f'{part}/' for part in parts)}: {_some(beside)}")
    classes = dict.fromkeys(file.parent for _, _, file in listed)
    deeper = [sub for folder in classes for sub in subfolders(folder) if list_below(sub)]
    if deeper:
        notes.append(f"ignored, since they are inside class folders: {_some(deeper)}")
    return notes


def _some(names: Sequence[object]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _list(path: Path) -> tuple[tuple[str, ...], list[tuple[str, int, Path]]]:
    """(class names, (part, label, file) of every image), of either layout."""
    if not os.path.isdir(path):
        there = os.path.lexists(path)
        raise DataError(f"data: {path} is not a folder" if there else f"data: folder {path} does not exist")
    parts = {
        s: list_classes(path / s) for s in ("train", "val", "test") if os.path.isdir(path / s) and subfolders(path / s)
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


def _changes(looks: Sequence[Look], p: Preprocessing, invert: bool) -> tuple[str, ...]:
    """What happens to these pictures, in plain words."""
    changes = []
    sizes = sorted({look.size for look in looks})
    if sizes != [(p.width, p.height)]:
        was = f"{sizes[0][0]}x{sizes[0][1]}" if len(sizes) == 1 else "several sizes"
        changes.append(f"resized from {was} to {p.width}x{p.height}")
    grey = sum(look.mode == "L" for look in looks)
    if p.channels == 3 and grey:
        changes.append("grey to colour" if grey == len(looks) else f"{grey} of {len(looks)} from grey to colour")
    if p.channels == 1 and grey < len(looks):
        changes.append("colour files to grey, which their pixels are")
    if invert:
        changes.append("dark on bright to bright on black")
    return tuple(changes)


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
        changes=(),
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
        words = raw_words(seed, "train", [label], k, stream=Stream.TARGET_DRAWS)
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
        words = raw_words(seed, "val", [label], int(count) // VALIDATION_SHARE, stream=Stream.TARGET_DRAWS)
        val.append(own[choose(words, np.array([count]))[0]])
    picked = np.sort(np.concatenate(val))
    return np.setdiff1d(train, picked), picked
