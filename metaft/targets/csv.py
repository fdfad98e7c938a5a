"""`csv:FILE`: a table of pictures and their labels or numbers, columns path and label, and perhaps part."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from metaft.errors import DataError
from metaft.inputs import table
from metaft.support.names import natural
from metaft.targets.files import Listed

PARTS = ("train", "val", "test")

MANY = 20
"""Classes: where there are more, and all are numbers, they may be meant as such."""

LARGEST, STEP = float(np.finfo(np.float32).max), float(np.finfo(np.float32).eps)
"""Of float32, in which heads predict: its largest number, and the step from one number to the next, relative."""

RESOLVED = 1e-3
"""Of the deviation of numbers: what the largest of them may be rounded by at most."""


def listed(file: Path, *, numbers: bool = False) -> Listed:
    """The pictures of a table; paths are relative to it. With a part column every row has train, val or test there.
    Labels are names of classes, or `numbers`.

    Raises DataError that names the file, the line and what is wrong there: a column that is missing, a value that is
    empty or no part, a picture that is not there or stands there twice, a class that a part lacks, and a label that is
    no number where it is to be one.
    """
    rows = list(_rows(file))
    known: dict[Path, int] = {}
    for line, path, _, _ in rows:
        if path in known:
            raise DataError(f"data: {file}, line {line}: {path} stands in line {known[path]} already")
        known[path] = line
    parts = [part for part in (*PARTS, "all") if any(row[3] == part for row in rows)]
    if "all" not in parts and not {"train", "test"} <= set(parts):
        raise DataError(f"data: {file} has no row of part {max({'train', 'test'} - set(parts))!r}")
    names = () if numbers else _classes(file, rows, parts)
    values = _numbers(file, rows) if numbers else {name: i for i, name in enumerate(names)}
    files = [(part, values[label], path) for of in parts for _, path, label, part in rows if part == of]
    meant = len(names) > MANY and all(map(_is_number, names))
    notes = [f"its {len(names)} labels are numbers, taken for names of classes; see --loss mse"] if meant else []
    if others := table.unread(file, ("path", "label", "part")):
        notes.append(f"columns of {file} that are not read: {', '.join(map(repr, others))}")
    return Listed(f"csv:{file}", file, names, files, notes=notes)


def _classes(file: Path, rows: Sequence[tuple[int, Path, str, str]], parts: Sequence[str]) -> tuple[str, ...]:
    """The labels in natural order. Raises DataError where they are too few, and for one that a part lacks."""
    names = tuple(sorted({label for _, _, label, _ in rows}, key=natural))
    if len(names) < 2:
        raise DataError(f"data: {file} holds {len(names)} classes, fewer than 2")
    for part in parts:
        lacking = sorted(set(names) - {label for _, _, label, of in rows if of == part}, key=natural)
        if lacking:
            hint = "; labels that are to be predicted as numbers want --loss mse" if all(map(_is_number, names)) else ""
            raise DataError(f"data: {file}: class {lacking[0]!r} has no row of part {part!r}{hint}")
    return names


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False


def _numbers(file: Path, rows: Sequence[tuple[int, Path, str, str]]) -> dict[str, float]:
    """The number that each label is. Raises DataError for what is none, or beyond float32, in which heads predict, and
    where those to train on are alike, or hardly differ for their size."""
    for line, _, label, _ in rows:
        if not _is_number(label):
            raise DataError(f"data: {file}, line {line}: label {label!r} is no number, as --loss mse wants it")
        if abs(float(label)) > LARGEST:
            raise DataError(f"data: {file}, line {line}: label {label!r} is more than float32 holds, {LARGEST:g}")
    values = {label: float(label) for _, _, label, _ in rows}
    trained = np.array([values[label] for _, _, label, part in rows if part in ("train", "all")])
    if len(different := set(trained.tolist())) < 2:
        raise DataError(f"data: {file} holds {len(different)} different numbers to train on, fewer than 2")
    largest, deviation = float(np.abs(trained).max()), float(trained.std())
    if STEP * largest > RESOLVED * deviation:
        raise DataError(
            f"data: {file}: its labels differ by too little for their size in float32, {largest:g} with a deviation of "
            f"{deviation:.3g}; take an offset away"
        )
    return values


def _rows(file: Path) -> Iterator[tuple[int, Path, str, str]]:
    """(line, picture, label, part) of each row; "all" where there is no part column."""
    try:
        for line, values in table.rows(file, {"path": ["path"], "label": ["label"]}, ["part"]):
            part = values.get("part", "all")
            if "part" in values and part not in PARTS:
                raise DataError(f"{file}, line {line}: part {part!r} is none of {', '.join(PARTS)}")
            path = file.parent / os.path.expanduser(values["path"])
            if not os.path.isfile(path):
                why = "is no file" if os.path.lexists(path) else "is not there"
                raise DataError(f"{file}, line {line}: {path} {why}")
            yield line, path, values["label"], part
    except DataError as error:
        raise DataError(f"data: {error}") from None
