"""`csv:PATH`: pictures whose classes and splits stand in train.csv, val.csv and test.csv, as Ravi and Larochelle's."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from metaft.errors import DataError
from metaft.inputs import table
from metaft.inputs.listing import GONE, Left
from metaft.support.paths import local
from metaft.tasks.folder import check_form, pool_of
from metaft.tasks.pool import ClassPool
from metaft.types import SPLITS

COLUMNS = {"filename": ("filename", "path"), "label": ("label",)}

_PLACES = (
    "images/{filename}",
    "{filename}",
    "images/{label}/{filename}",
    "{label}/{filename}",
    "{split}/{label}/{filename}",
)
"""Where pictures may lie: all of them in the one of these where the first does that is there."""


class _Row(NamedTuple):
    split: str
    line: int
    filename: str
    label: str
    """As it is written, for folders that are; of a class it is in Unicode's composed form."""

    @property
    def name(self) -> str:
        return unicodedata.normalize("NFC", self.label)

    def path(self, root: Path, place: str) -> Path:
        parts = {"split": self.split, "filename": self.filename, "label": self.label}
        return Path(os.path.normpath(root / place.format(**parts)))


def tables(
    path: str | os.PathLike[str],
    image_size: int | None = None,
    channels: int | None = None,
    *,
    skip_bad: bool = False,
) -> ClassPool:
    """Pictures of the tables `path`/train.csv, val.csv and test.csv, with columns filename (or path) and label, as a
    pool. They lie in `path`/images/ or beside the tables, in a folder of their label's or not.

    Size and colour are as of `metaft.tasks.folder`. Raises DataError that names the file and line: a table or column
    that is missing, a value that is empty, a picture that is not there (`skip_bad` leaves it out) or stands there
    twice, a class in two tables; and, as `folder` does, for broken pictures.
    """
    check_form(image_size, channels)
    path = local(path)
    rows = [row for split in SPLITS for row in _rows(path, split)]
    place = _place(path, rows)
    classes: dict[str, list[Path]] = {}
    split_of: dict[str, str] = {}
    lines: dict[Path, _Row] = {}
    left: list[Left] = []
    for row in rows:
        where, label = f"{path / row.split}.csv, line {row.line}", row.name
        if split_of.setdefault(label, row.split) != row.split:
            raise DataError(
                f"{where}: class {label!r} is in {split_of[label]}.csv too; meta-learning needs different classes in "
                "each"
            )
        file = row.path(path, place)
        if file in lines:
            raise DataError(
                f"{where}: {row.filename} stands in {lines[file].split}.csv, line {lines[file].line} already"
            )
        lines[file] = row
        if os.path.isfile(file):
            classes.setdefault(label, []).append(file)
        elif not skip_bad:
            raise DataError(f"{where}: {file} is not there; go on without such pictures with --skip-bad")
        else:
            left.append(Left(file, GONE, True))
    lost = sorted(split_of.keys() - classes.keys())
    if lost:
        raise DataError(f"{path / split_of[lost[0]]}.csv: class {lost[0]!r} has no picture: none of its files is there")
    classes = {label: sorted(files) for label, files in classes.items()}  # in the order of a folder's
    splits = {split: [label for label in classes if split_of[label] == split] for split in SPLITS}
    return pool_of(f"csv:{path}", path, splits, classes, image_size, channels, left=left, notes=(), skip_bad=skip_bad)


def _rows(path: Path, split: str) -> Iterator[_Row]:
    file = path / f"{split}.csv"
    line = 0
    for line, values in table.rows(file, COLUMNS):
        yield _Row(split, line, values["filename"], values["label"])
    if not line:
        raise DataError(f"{file} has no rows")


def _place(path: Path, rows: Sequence[_Row]) -> str:
    """Of `_PLACES` that where the first picture is that is there at all."""
    for row in rows:
        for place in _PLACES:
            if os.path.isfile(row.path(path, place)):
                return place
    first = rows[0]
    tried = ", ".join(str(first.path(path, place)) for place in _PLACES[:3])
    raise DataError(
        f"{path / first.split}.csv, line {first.line}: neither {first.filename} nor any other picture of the tables is "
        f"there; the first would be one of {tried}"
    )
