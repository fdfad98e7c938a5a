"""The task to fine-tune to: labelled images, and which of them are for training, validation and test."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metaft.errors import DataError, MetaftError, suggest
from metaft.tasks.glyphs import glyphs
from metaft.tasks.images import is_dark_on_bright, list_classes, open_image, read_all, subfolders
from metaft.tasks.pool import Preprocessing
from metaft.tasks.sampler import choose, raw_words

STREAM = 3  # of raw_words: 0 episodes, 1 batches, 2 glyphs
VALIDATION_FROM, VALIDATION_SHARE = 10, 5  # from 10 images per class, one in 5 is for validation


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """Images with the run's preprocessing applied, and rows by use."""

    name: str
    class_names: tuple[str, ...]
    images: Tensor
    """uint8 [M, C, H, W]"""
    labels: Tensor
    """int64 [M]"""
    train: np.ndarray
    """int64 rows"""
    val: np.ndarray
    """int64 rows; empty where there is no validation part."""
    test: np.ndarray
    """int64 rows"""
    files: tuple[str, ...]
    """[M] what to call each image."""
    invert: bool
    """Whether the files' polarity was turned around."""
    notes: tuple[str, ...]
    """What was changed on the way from the files, in plain words."""


def load(data: str, preprocessing: Preprocessing, *, shots_per_class: int | None, seed: int) -> Target:
    """The target that `--data` names: "folder:PATH" or "glyphs:SCRIPT".

    PATH holds train/ and test/ (and val/, if there is one) folders of the same class folders, or class folders alone;
    then `shots_per_class` images of each class (by default four in five) are drawn for training by `seed` and the
    others are the test. Raises DataError or MetaftError for what cannot be read or does not suffice.
    """
    if shots_per_class is not None and shots_per_class < 1:
        raise MetaftError(f"shots_per_class must be at least 1, got {shots_per_class}")
    kind, _, rest = data.partition(":")
    if kind == "folder" and rest:
        return _folder(Path(rest), preprocessing, shots_per_class, seed)
    if kind == "glyphs" and rest:
        return _script(rest, preprocessing, shots_per_class, seed)
    raise MetaftError(f"data: write folder:PATH or glyphs:SCRIPT, not {data!r}")


def _folder(path: Path, p: Preprocessing, shots: int | None, seed: int) -> Target:
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
    if len(names) < 2:
        raise DataError(f"data: {path} holds {len(names)} class folders, fewer than 2")
    for classes in parts.values():
        if set(classes) != set(names):
            odd = min(set(classes) ^ set(names))
            raise DataError(f"data: class {odd!r} is not in every part of {path} ({', '.join(parts)})")
    files = [(part, label, f) for part in parts for label, name in enumerate(names) for f in parts[part][name]]
    raw = read_all([f for _, _, f in files], p.channels, p.height)
    invert = p.polarity == "bright-on-black" and p.channels == 1 and is_dark_on_bright(raw)
    labels = np.array([label for _, label, _ in files])
    uses = {part: np.flatnonzero([f[0] == part for f in files]) for part in parts}
    pool = uses["all"] if "all" in uses else uses["train"]
    train, rest = draw(labels, pool, shots, seed, names, keep_some="all" in uses)
    train, val = (train, uses["val"]) if "val" in uses else validation_part(labels, train, seed)
    return Target(
        name=str(path),
        class_names=names,
        images=torch.from_numpy(255 - raw if invert else raw),
        labels=torch.from_numpy(labels),
        train=train,
        val=val,
        test=rest if "all" in uses else uses["test"],
        files=tuple(str(f) for _, _, f in files),
        invert=invert,
        notes=_notes(files[0][2], p, invert),
    )


def _notes(file: Path, p: Preprocessing, invert: bool) -> tuple[str, ...]:
    """What happened to the pictures, of which `file` is the first."""
    first = open_image(file)
    notes = []
    if first.size != (p.width, p.height):
        notes.append(f"resized from {first.width}x{first.height} to {p.width}x{p.height}")
    if first.mode != ("L" if p.channels == 1 else "RGB"):
        notes.append("colour to grey" if p.channels == 1 else "grey to colour")
    if invert:
        notes.append("dark on bright to bright on black")
    return tuple(notes)


def _script(script: str, p: Preprocessing, shots: int | None, seed: int) -> Target:
    pool = glyphs()
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
    train, test = draw(labels, np.arange(len(rows)), shots, seed, names, keep_some=True)
    train, val = validation_part(labels, train, seed)
    return Target(
        name=f"glyphs:{script}",
        class_names=names,
        images=pool.images[torch.from_numpy(rows)],
        labels=torch.from_numpy(labels),
        train=train,
        val=val,
        test=test,
        files=tuple(f"{names[label]} #{i % 20}" for i, label in enumerate(labels)),
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
