"""Omniglot (Lake et al., 2015): 1,623 handwritten characters of 50 alphabets, 20 drawings each.

Read from the original release's folders, which torchvision unpacks too. https://github.com/brendenlake/omniglot
"""

from __future__ import annotations

import csv
import functools
import os
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from metaft.errors import DataError, MetaftWarning, no_such, words_of
from metaft.inputs import ImageInputs
from metaft.inputs.flaws import flaws_note
from metaft.inputs.listing import Left, counted, left_note, list_classes, refusal, skipped_note, subfolders
from metaft.inputs.pictures import READER_VERSION, fingerprint
from metaft.support.paths import local
from metaft.tasks.folder import read_cached, rows_left
from metaft.tasks.pool import ClassPool
from metaft.types import SPLITS

SIDE = 28
DRAWINGS = 20
PARTS = ("images_background", "images_evaluation")

HELD_OUT_ALPHABETS = ("Balinese", "Early_Aramaic", "Korean", "N_Ko", "Tifinagh")
"""Background alphabets that are validation in the split "alphabets"; none has a close relative among the others."""

_HOW_TO_GET = "pass --data-root or set METAFT_DATA to where it is, or fetch it with --download"


class Character(NamedTuple):
    """One row of `omniglot_splits.tsv`."""

    name: str
    """Alphabet/characterNN."""
    part: str
    """"background" or "evaluation"."""
    finn: str
    vinyals: str

    @property
    def alphabets(self) -> str:
        if self.part == "evaluation":
            return "test"
        return "val" if self.name.split("/")[0] in HELD_OUT_ALPHABETS else "train"


OMNIGLOT_SPLITS: dict[str, Callable[[Character], str]] = {
    "finn": lambda character: character.finn,
    "vinyals": lambda character: character.vinyals,
    "alphabets": lambda character: character.alphabets,
}
"""Name of a class split -> which of "train", "val", "test" a character is in."""


@functools.cache
def characters() -> tuple[Character, ...]:
    """The 1,623 characters, sorted by name, with their place in the published or fixed splits."""
    text = resources.files("metaft.tasks").joinpath("omniglot_splits.tsv").read_text("utf-8")
    return tuple(Character(**row) for row in csv.DictReader(text.splitlines(), delimiter="\t"))


def omniglot(root: str | os.PathLike[str], split: str = "finn", *, skip_bad: bool = False) -> ClassPool:
    """Omniglot under `root` as a pool: uint8 [32460, 1, 28, 28], bright on black.

    split "finn":      1,100 / 100 / 423 characters, as many as in the MAML paper, which published no list: ours is the
                       order of the SHA-256 of the names. Episodes usually rotate (`default_rotate`).
    split "vinyals":   1,028 / 172 / 423, the list of Vinyals et al. as published with Prototypical Networks; each
                       quarter turn of a character is a class ("Greek/character03@90", counter-clockwise).
    split "alphabets": the evaluation part is test, five background alphabets are validation, the rest training.

    Raises DataError: nothing found under `root`, classes or drawings missing, broken images (`skip_bad` leaves those
    out, with a MetaftWarning); MetaftError: a split that is not one of these.
    """
    if split not in OMNIGLOT_SPLITS:
        raise no_such("split", split, OMNIGLOT_SPLITS, lacks="omniglot has no", says="only")
    table = characters()
    root = local(root)
    base = find(root)
    if base is None:
        raise DataError(f"omniglot: no {PARTS[0]}/ or {PARTS[1]}/ under {root}; {_HOW_TO_GET}")
    drawings, left = _files(base, table, skip_bad=skip_bad)
    files = [file for name in drawings for file in drawings[name]]
    key = f"{READER_VERSION} {SIDE} {fingerprint(base, files)}"
    inputs = ImageInputs(1, SIDE, SIDE, polarity="bright-on-black")
    pictures = read_cached("omniglot", key, files, inputs, invert=True)
    if pictures.bad and not skip_bad:
        raise DataError(f"omniglot: {refusal(pictures.bad, len(files), left)}")
    notes = (
        *left_note(left, len(files)), *skipped_note(pictures.bad, len(files)), *flaws_note(pictures.flaws)
    )  # fmt: skip
    for note in notes:
        warnings.warn(f"omniglot: {note}", MetaftWarning, stacklevel=2)
    starts, counts, skipped = rows_left(list(drawings.values()), list(drawings), pictures.bad)

    turns = 4 if split == "vinyals" else 1
    split_of = np.repeat([SPLITS.index(OMNIGLOT_SPLITS[split](c)) for c in table], turns)
    return ClassPool(
        name="omniglot",
        images=torch.from_numpy(pictures.images),
        class_names=tuple(c.name if turns == 1 else f"{c.name}@{90 * t}" for c in table for t in range(turns)),
        starts=np.repeat(starts, turns),
        counts=np.repeat(counts, turns),
        splits={name: np.flatnonzero(split_of == number) for number, name in enumerate(SPLITS)},
        inputs=inputs,
        turns=np.tile(np.arange(turns, dtype=np.int64), len(table)) if turns > 1 else None,
        skipped=skipped,
        default_rotate=split == "finn",
    )


def find(root: str | os.PathLike[str], *, whole: bool = False) -> Path | None:
    """The folder that holds the release's parts: `root/omniglot`, torchvision's `root/omniglot-py`, or `root`.

    One that holds both is preferred; with `whole` nothing less will do.
    """
    root = local(root)
    bases = (root / "omniglot", root / "omniglot-py", root)
    for enough in (all,) if whole else (all, any):
        for base in bases:
            if enough((base / part).is_dir() for part in PARTS):
                return base
    return None


def download(root: str | os.PathLike[str]) -> None:
    """Fetch and unpack both parts (about 17 MB) under `root` with torchvision. Raises DataError where that fails."""
    from metaft.support.vision import datasets

    root = local(root)
    try:
        for background in (True, False):
            datasets.Omniglot(str(root), background=background, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"omniglot: download to {root} failed: {words_of(error)}") from error


def _files(base: Path, table: tuple[Character, ...], *, skip_bad: bool) -> tuple[dict[str, list[Path]], list[Left]]:
    """The drawings of each character in the order of the table, and what is not taken.

    Raises DataError where any is missing; with `skip_bad` one that is there, but cannot be read, is not missed.
    """
    drawings_of: dict[str, list[Path]] = {}
    left: list[Left] = []
    for part in PARTS:
        for alphabet in subfolders(base / part) if (base / part).is_dir() else ():
            classes, left_here = list_classes(alphabet)
            drawings_of |= {f"{alphabet.name}/{character}": drawings for character, drawings in classes.items()}
            left += left_here
    missing = [c.name for c in table if c.name not in drawings_of]
    if missing:
        raise DataError(
            f"omniglot: {len(missing)} of {len(table)} characters are missing under {base}, "
            f"e.g. {missing[0]!r}; {_HOW_TO_GET}"
        )
    for character in table:
        drawings = drawings_of[character.name]
        folder = drawings[0].parent
        lost = [file for file in left if file.lost and file.path.parent == folder] if len(drawings) < DRAWINGS else []
        if len(drawings) + (len(lost) if skip_bad else 0) != DRAWINGS:
            besides = f" ({counted(lost)})" if lost else ""
            raise DataError(f"omniglot: {folder} holds {len(drawings)} images{besides}, not {DRAWINGS}")
    return {character.name: drawings_of[character.name] for character in table}, left
