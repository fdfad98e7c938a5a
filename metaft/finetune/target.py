"""The task to fine-tune to: labelled images, and which of them are for training, validation and test."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaft.errors import DataError, MetaftError, no_such, suggest
from metaft.finetune.draws import Rows, draw, fold, validation_part
from metaft.inputs import ImageInputs, Inputs
from metaft.inputs.flaws import flaws_note
from metaft.inputs.listing import (
    NAMED,
    Left,
    check_lost,
    left_note,
    list_classes,
    overlooked,
    refusal,
    skipped_note,
    some,
    subfolders,
)
from metaft.inputs.pictures import depth_note, read_all
from metaft.inputs.reading import border, is_dark_on_bright, is_grey
from metaft.spec import Takes, name_of, parse
from metaft.support.names import is_text, natural
from metaft.support.paths import local
from metaft.tasks.folder import inputs_for
from metaft.tasks.glyphs import glyphs

FOLDS = 3
"""Of cross-validation, where a target has no test part."""


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """Labelled images as a model takes them, and their parts."""

    name: str
    class_names: tuple[str, ...]
    examples: Tensor
    """[M, ...] raw, as `inputs` takes them: of pictures uint8 [M, C, H, W]."""
    labels: Tensor
    """int64 [M]"""
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

    @property
    def folds(self) -> int:
        """Of cross-validation where there is no test part: three, or as many as the smallest class has images. Raises
        DataError for a class with a single one."""
        counts = np.bincount(self.labels.numpy(), minlength=len(self.class_names))
        if counts.min() < 2:
            name = self.class_names[int(counts.argmin())]
            raise DataError(f"data: class {name!r} has {counts.min()} image, and without a test part needs 2 or more")
        return min(FOLDS, int(counts.min()))

    def rows_of_fold(self, number: int | None, *, seed: int, validate: bool = True) -> Rows:
        """The images of one fold of data without parts, see `folds`; None trains on all of them and tests on none."""
        labels, every = self.labels.numpy(), self.parts["all"]
        train, test = (every, every[:0]) if number is None else fold(labels, every, self.folds, number, seed)
        train, val = validation_part(labels, train, seed) if validate else (train, every[:0])
        return Rows(train, val, test)

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
        train, rest = draw(labels, pool, shots_per_class, seed, self.class_names, keep_some=whole, skipped=self.skipped)
        val = self.parts.get("val", np.empty(0, np.int64))
        if validate and "val" not in self.parts:
            train, val = validation_part(labels, train, seed)
        return Rows(train, val if validate else val[:0], rest if whole else self.parts["test"])


KINDS = {"folder": Takes("PATH"), "glyphs": Takes("SCRIPT")}
"""What `--data` names."""


def _named_by(data: str) -> tuple[str, str]:
    """(the kind, what stands behind its colon). Raises MetaftError."""
    try:
        kind, rest, _ = parse("data", data, KINDS)
    except MetaftError:
        name = name_of(data, KINDS)
        near = "" if name in KINDS else suggest(name, KINDS)
        raise MetaftError(f"data: write folder:PATH or glyphs:SCRIPT, not {data!r}{near}") from None
    assert rest is not None
    return kind, rest


def shape_of(data: str) -> tuple[list[int], bool]:
    """([C, H, W] of the target's images, whether another size will do). Raises as `load` does."""
    kind, rest = _named_by(data)
    if kind == "folder":
        with _named():
            _, files, _ = _list(local(rest))
            p = inputs_for([f for _, _, f in files], sample=None)
        return [p.channels, p.height, p.width], True
    return list(load(data).examples.shape[1:]), False


def load(data: str, inputs: Inputs | None = None, *, skip_bad: bool = False) -> Target:
    """The target that `--data` names: "folder:PATH" or "glyphs:SCRIPT".

    PATH holds train/ and test/ (and val/, if there is one) folders of the same class folders, or class folders alone.
    Images get the run's `inputs`; without any, those of a folder which is meta-trained on. How many bits greys
    of more than 8 have is for all of the target's files to say. Raises DataError or MetaftError for what cannot be read
    (`skip_bad` leaves such pictures out), or not by these inputs.
    """
    if inputs is not None and not isinstance(inputs, ImageInputs):
        raise MetaftError(f"data: {data} holds images, but the run takes {inputs.kind}")
    kind, rest = _named_by(data)
    if kind == "glyphs":
        return _script(rest, inputs)
    with _named():
        return dataclasses.replace(_folder(local(rest), inputs, skip_bad=skip_bad), asked=inputs)


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


def _folder(path: Path, given: ImageInputs | None, *, skip_bad: bool) -> Target:
    names, listed, left = _list(path)
    files = [file for _, _, file in listed]
    check_lost(left, len(files), skip_bad=skip_bad)
    p = given or inputs_for(files, sample=None)
    seen: dict[int, Look] = {}
    pictures = read_all(
        files, p.channels, p.fitting,
        lambda i, image: seen.update({i: Look(image.size, image.mode, p.channels == 3 or is_grey(image))}),
    )  # fmt: skip
    if pictures.bad and not skip_bad:
        raise DataError(f"data: {refusal(pictures.bad, len(files), left)}")
    notes = [
        *left_note(left, len(files)),
        *skipped_note(pictures.bad, len(files)),
        *overlooked(path, tuple(part for part in dict.fromkeys(f[0] for f in listed) if part != "all"),
                    dict.fromkeys(file.parent for file in files)),
        *flaws_note(pictures.flaws),
    ]  # fmt: skip
    parts_of_all = dict.fromkeys(part for part, _, _ in listed)
    skipped = collections.Counter(names[label] for _, label, file in listed if file in pictures.bad)
    listed = [listed[i] for i in pictures.good]
    files, looks = [file for _, _, file in listed], [seen[i] for i in pictures.good.tolist()]
    labels = np.array([label for _, label, _ in listed], np.int64)
    parts = {part: np.flatnonzero([f[0] == part for f in listed]) for part in parts_of_all}
    _check_nothing_is_gone(path, names, labels, parts, skipped)
    colour = [i for i, look in enumerate(looks) if not look.grey]
    if colour:
        width, height = looks[colour[0]].size
        raise DataError(
            f"data: {len(colour)} of the {len(files)} images of {path} are in colour, [3, {height}, {width}], such as "
            f"{files[colour[0]]}, but the run takes grey ones, [1, {p.height}, {p.width}]; make them grey first, or "
            "start from a run on colour images"
        )
    raw = pictures.images
    invert, odd = False, []
    if p.polarity == "bright-on-black" and p.channels == 1:
        # Test images have no say, where it is known which they are.
        rows = parts.get("train", np.arange(len(files)))
        edges = border(raw)  # the pictures themselves may be more than there is memory
        invert = is_dark_on_bright(edges[rows])
        odd = [n for i, n in enumerate(names) if is_dark_on_bright(edges[rows[labels[rows] == i]]) != invert]
    if invert:
        np.subtract(255, raw, out=raw)
    if odd:
        ways = ("bright on dark", "dark on bright")
        notes.append(f"{some(odd)}: {ways[not invert]}, but read as {ways[invert]}, as the other classes are")
    return Target(
        name=f"folder:{path}",
        class_names=names,
        examples=torch.from_numpy(raw),
        labels=torch.from_numpy(labels),
        parts=parts,
        files=tuple(map(str, files)),
        inputs=dataclasses.replace(p, invert=invert, bits=pictures.bits if pictures.deep else p.bits),
        changes=_changes(looks, p, invert),
        notes=(*notes, *depth_note(pictures.deep, pictures.bits)),
        skipped=skipped,
    )


def _check_nothing_is_gone(
    path: Path, names: Sequence[str], labels: np.ndarray, parts: Mapping[str, np.ndarray], skipped: Mapping[str, int]
) -> None:
    """Raises DataError for a class of which a part has nothing left, now that what cannot be read is left out."""
    for part, rows in parts.items():
        counts = np.bincount(labels[rows], minlength=len(names))
        if counts.min() == 0:
            name = names[int(counts.argmin())]
            where = path if part == "all" else path / part
            raise DataError(
                f"data: class {name!r} has no picture left in {where}: {skipped[name]} cannot be read and were skipped"
            )


def _list(path: Path) -> tuple[tuple[str, ...], list[tuple[str, int, Path]], list[Left]]:
    """(class names in natural order, (part, label, file) of every image, what is not taken), of either layout."""
    if not os.path.isdir(path):
        there = os.path.lexists(path)
        raise DataError(f"data: {path} is not a folder" if there else f"data: folder {path} does not exist")
    listed = {
        s: list_classes(path / s) for s in ("train", "val", "test") if os.path.isdir(path / s) and subfolders(path / s)
    }
    if not listed:
        listed = {"all": list_classes(path)}
    parts, left = {part: of.files for part, of in listed.items()}, [file for of in listed.values() for file in of.left]
    if "all" not in parts and not {"train", "test"} <= parts.keys():
        missing = max({"train", "test"} - parts.keys())
        place = path / missing
        lacks = "holds no class folders" if os.path.isdir(place) else "is not a folder"
        raise DataError(
            f"data: {place} {lacks if os.path.lexists(place) else 'is missing'}; "
            "give train/ and test/ (and val/, if you like), or no parts"
        )
    names = tuple(sorted(next(iter(parts.values())), key=natural))
    for name in names:
        if not is_text(name):
            raise DataError(f"data: the name of class folder {name!r} in {path} is not text")
    if len(names) < 2:
        raise DataError(f"data: {path} holds {len(names)} class folders, fewer than 2")
    odd = sorted({name for classes in parts.values() for name in set(classes) ^ set(names)}, key=natural)
    if odd:
        which = (
            f"class {odd[0]!r} is" if len(odd) == 1 else f"{len(odd)} classes, {some([*map(repr, odd)], NAMED)}, are"
        )
        raise DataError(f"data: {which} not in every part of {path} ({', '.join(parts)})")
    files = [(part, label, f) for part in parts for label, name in enumerate(names) for f in parts[part][name]]
    return names, files, left


def _changes(looks: Sequence[Look], p: ImageInputs, invert: bool) -> tuple[str, ...]:
    """What happens to these pictures, in plain words."""
    changes = []
    sizes = sorted({look.size for look in looks})
    if sizes != [(p.width, p.height)]:
        was = f"{sizes[0][0]}x{sizes[0][1]}" if len(sizes) == 1 else "several sizes"
        changes.append(f"resized from {was} to {p.width}x{p.height}")
    grey = sum(look.mode != "RGB" for look in looks)
    if p.channels == 3 and grey:
        changes.append("grey to colour" if grey == len(looks) else f"{grey} of {len(looks)} from grey to colour")
    if p.channels == 1 and grey < len(looks):
        changes.append("colour files to grey, which their pixels are")
    if invert:
        changes.append("dark on bright to bright on black")
    return tuple(changes)


def _script(script: str, given: ImageInputs | None) -> Target:
    pool = glyphs()
    p = given or pool.inputs
    if p.channels != 1 or (p.height, p.width) != pool.shape[1:]:
        raise MetaftError(
            f"data: glyphs are [1, 28, 28], but the run's images are [{p.channels}, {p.height}, {p.width}]"
        )
    scripts = {pool.class_names[c].split("/")[0] for c in pool.splits["test"]}
    if script not in scripts:
        raise no_such("data", script, sorted(scripts), lacks="no held-out script", says="there are")
    classes = [int(c) for c in pool.splits["test"] if pool.class_names[c].startswith(f"{script}/")]
    rows = np.concatenate([np.arange(pool.starts[c], pool.starts[c] + pool.counts[c]) for c in classes])
    labels = np.repeat(np.arange(len(classes)), pool.counts[classes])
    names = tuple(pool.class_names[c] for c in classes)
    return Target(
        name=f"glyphs:{script}",
        class_names=names,
        examples=pool.images[torch.from_numpy(rows)],
        labels=torch.from_numpy(labels),
        parts={"all": np.arange(len(rows))},
        files=tuple(f"{names[label]} #{i % 20}" for i, label in enumerate(labels)),
        inputs=p,
        changes=(),
    )
