"""Picture files as a target: read, fitted to a start's inputs, with what there is to know of them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from metaft.errors import DataError, MetaftError
from metaft.inputs import ImageInputs
from metaft.inputs.fitting import border, is_dark_on_bright, is_grey
from metaft.inputs.flaws import flaws_note
from metaft.inputs.listing import Left, check_lost, left_note, refusal, skipped_note, some
from metaft.inputs.pictures import Opened, depth_note, read_all
from metaft.inputs.reading import try_open
from metaft.targets.base import Target
from metaft.targets.draws import NUMBERS, strata
from metaft.tasks.folder import inputs_for


class Listed(NamedTuple):
    """The files of a target, before any is opened."""

    name: str
    """As `--data` has it."""
    path: Path
    class_names: tuple[str, ...]
    """In natural order, where their numbers are not given; none where labels are numbers."""
    files: Sequence[tuple[str, float, Path]]
    """(part, label, file) of each image; the label is a class's number where there are classes."""
    left: Sequence[Left] = ()
    """What is not taken."""
    notes: Sequence[str] = ()
    """What else there is to know of the listing."""
    opened: Opened = try_open
    """How a file is opened."""


class Look(NamedTuple):
    """What a picture file was before it was fitted to a start."""

    size: tuple[int, int]
    mode: str
    grey: bool


# Above 60 lines: what is noted on the way belongs to the pictures that it is noted of.
def target_of(listed_files: Listed, given: ImageInputs | None, *, skip_bad: bool) -> Target:
    """The pictures of these files as a target, fitted to the `given` inputs, or to those that they would have without
    any start. Raises DataError for pictures that cannot be read, MetaftError for coloured ones for grey inputs."""
    name, path, names, listed, left, more, opened = listed_files
    files = [file for _, _, file in listed]
    check_lost(left, len(files), skip_bad=skip_bad)
    p = given or inputs_for(files, sample=None, opened=opened)
    seen: dict[int, Look] = {}
    pictures = read_all(
        files, p.channels, p.fitting,
        lambda i, image: seen.update({i: Look(image.size, image.mode, p.channels == 3 or is_grey(image))}),
        opened,
    )  # fmt: skip
    if pictures.bad and not skip_bad:
        raise DataError(f"data: {refusal(pictures.bad, len(files), left)}")
    notes = [
        *left_note(left, len(files)),
        *skipped_note(pictures.bad, len(files)),
        *more,
        *flaws_note(pictures.flaws),
    ]  # fmt: skip
    type_of_label = np.int64 if names else np.float64
    parts_of_all = dict.fromkeys(part for part, _, _ in listed)
    lost = strata(np.array([label for _, label, file in listed if file in pictures.bad], type_of_label))
    skipped = collections.Counter((names or NUMBERS)[stratum] for stratum in lost)
    listed = [listed[i] for i in pictures.good]
    files, looks = [file for _, _, file in listed], [seen[i] for i in pictures.good.tolist()]
    labels = np.array([label for _, label, _ in listed], type_of_label)
    parts = {part: np.flatnonzero([f[0] == part for f in listed]) for part in parts_of_all}
    _check_nothing_is_gone(path, names or NUMBERS, strata(labels), parts, skipped)
    colour = [i for i, look in enumerate(looks) if not look.grey]
    if colour:
        width, height = looks[colour[0]].size
        raise MetaftError(
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
        name=name,
        class_names=names,
        examples=torch.from_numpy(raw),
        labels=torch.from_numpy(labels),
        parts=parts,
        files=tuple(map(str, files)),
        inputs=dataclasses.replace(p, invert=invert, bits=pictures.bits if pictures.deep else p.bits),
        changes=_changes(looks, p, invert),
        notes=(*notes, *depth_note(pictures.deep, pictures.bits)),
        skipped=skipped,
        asked=given,
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
            what = "there is" if names == NUMBERS else f"class {name!r} has"
            raise DataError(f"data: {what} no picture left in {where}: {skipped[name]} cannot be read and were skipped")


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
