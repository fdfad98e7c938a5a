"""Where data lie: names of data sets that hold a path, and data that moved since a run began."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import unicodedata
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from metaft.errors import DataError, MetaftError, MetaftWarning
from metaft.options import Config, flat
from metaft.spec import Spec, Takes, parse, write
from metaft.support.output import say
from metaft.support.paths import absolute, local

SPLITS = ("train", "val", "test")
_PATHS = {"folder": Takes("PATH"), "csv": Takes("FILE"), "unlabelled": Takes("PATH")}
"""Kinds of data that a path names."""

NAMED = ("glyphs", "omniglot", "mini-imagenet")
"""What stands after "unlabelled:" and is a data set's name, no path."""


_DRAWN = ("glyphs", "sinusoid")
"""Data that metaft makes itself."""


def note_root(data_root: str | None, *names: str) -> None:
    """Warns of a folder of data sets where none of these data lie in files."""
    kinds = {name.removeprefix("unlabelled:").partition(":")[0] for name in names}
    if data_root is not None and kinds <= set(_DRAWN):
        of = " and ".join(sorted(kinds))
        said = f"data_root: no files belong to {of}, so nothing is looked for there (given {data_root!r})"
        warnings.warn(said, MetaftWarning, stacklevel=3)


def parsed(field: str, name: str, members: Mapping[str, Takes]) -> Spec:
    """As `metaft.spec.parse`, which it raises as too; a path without its kind is told how to write it."""
    try:
        return parse(field, name, members)
    except MetaftError:
        path = local(name)
        kind = "folder" if os.path.isdir(path) else "csv" if os.path.isfile(path) and path.suffix == ".csv" else None
        if not name or kind is None or kind not in members:
            raise
        written = write(Spec(kind, name), members[kind])
        raise MetaftError(f"{field}: {name!r} is a path without a kind of data; write {written!r}") from None


def check_root(data_root: str | None) -> None:
    """Raises MetaftError where `--data-root` is no folder."""
    if data_root is not None and not os.path.isdir(local(data_root)):
        raise MetaftError(f"data_root: {data_root} is no folder")


def in_full(config: Config) -> Config:
    """Settings with absolute paths, except for `out`, which is only the run's own place."""
    changed: dict[str, Any] = {}
    values = flat(config)
    for field in ("dataset", "data"):
        name = values.get(field)
        if name is not None:
            changed[field] = named_in_full(name)
    if values.get("also"):
        changed["also"] = tuple(map(named_in_full, values["also"]))
    if values.get("data_root"):
        changed["data_root"] = str(absolute(values["data_root"]))
    return dataclasses.replace(config, **changed)


def named_in_full(name: str) -> str:
    """`"folder:PATH"` with an absolute path; other data sets have names alone."""
    kind, path = path_of(name)
    return name if path is None else write(Spec(kind, str(absolute(path))), _PATHS[kind])


def folder_of(name: str) -> str | None:
    """PATH of `"folder:PATH"`, without quotes."""
    kind, path = path_of(name)
    return path if kind == "folder" else None


def path_of(name: str) -> tuple[str, str | None]:
    """(kind, path) of data that a path names, without quotes; no path of other data."""
    kind = name.partition(":")[0]
    if kind not in _PATHS or kind == name:
        return kind, None
    try:
        path = parse("dataset", name, _PATHS).positional
        return kind, None if kind == "unlabelled" and path in NAMED else path
    except MetaftError:  # which whoever reads the data says, with the option's own name
        return kind, None


def shown(name: str) -> str:
    """A path, or a data set's name, as short as it can be written in this folder: `"folder:x"`."""
    kind, path = path_of(name)
    if path is not None:
        return f"{kind}:{shown(path)}"
    if not os.path.isabs(name):
        return name
    with contextlib.suppress(OSError, ValueError):
        return min(os.path.relpath(name), name, key=len)
    return name


def typed(name: str) -> str:
    """A data set's name for a run folder's own: as it was written, but for `~`."""
    kind, path = path_of(name)
    return name if path is None else f"{kind}:{local(path)}"


def found(path: str | os.PathLike[str], data_root: str | None, classes: Collection[str] = ()) -> Path:
    """Where a folder of data is: where it is named, or else by its last name in `data_root` (by default the
    environment's METAFT_DATA), or that folder itself where it holds the `classes` that a run knows.

    A line on stderr says so where it is elsewhere, and where `data_root` is not looked into. Raises DataError, which
    lists all that was looked for.
    """
    place, note = _search(path, data_root, classes)
    if note:
        say(f"note: {note}")
    return place


def located(field: str, name: str, data_root: str | None, classes: Collection[str] = ()) -> str:
    """A name of data with the folder where `found` finds it; other data have no place to be looked for. Raises
    DataError, naming the field."""
    path = folder_of(name)
    if path is None:
        return name
    try:
        return f"folder:{found(path, data_root, classes)}"
    except DataError as error:
        raise DataError(f"{field}: folder {error}") from None


def as_run_names(name: str, own: str, data_root: str | None, classes: Collection[str] = ()) -> str:
    """A run's `own` name of its data, where `name` is a path that is gone and both are found in one place: the
    command that began a run whose data moved since. Otherwise `name`."""
    (kind, path), (own_kind, known) = path_of(name), path_of(own)
    if path is None or known is None or kind != own_kind or name == own or not _is_missing(local(path)):
        return name
    with contextlib.suppress(DataError):
        place, note = _search(path, data_root, classes)
        if _is_same(place, _search(known, data_root, classes)[0]):
            say(f"note: {note}")
            return own
    return name


def _search(path: str | os.PathLike[str], data_root: str | None, classes: Collection[str]) -> tuple[Path, str]:
    """What `found` finds, and what it says."""
    first, root = local(path), data_root or os.environ.get("METAFT_DATA")
    inside = None if root is None else absolute(root) / absolute(path).name
    if not _is_missing(first):
        if data_root and inside is not None and os.path.isdir(inside) and not _is_same(first, inside):
            return first, f"data_root: {first} is there, so {inside} is not read"
        return first, ""
    if root is None or inside is None:
        hint = "; where it moved, --data-root names the folder that holds it" if classes else ""
        raise DataError(f"{first} does not exist{hint}")
    places = [inside] if os.path.isdir(inside) else [absolute(root)] if _holds(absolute(root), classes) else []
    if not places:
        source = "data_root" if data_root else "METAFT_DATA"
        also = f", and {absolute(root)} does not hold its class folders" if classes else ""
        raise DataError(f"{first} does not exist, nor does {inside} (from {source}){also}")
    return places[0], f"{first} does not exist; the data are read from {places[0]}"


def _is_missing(path: Path) -> bool:
    """Whether a path is sure not to exist: of one in a locked folder whoever reads it shall say why it cannot."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return not os.path.islink(path)
    except (OSError, ValueError):
        return False
    return False


def _is_same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return os.path.samefile(one, other)
    return False


def _holds(root: Path, classes: Collection[str]) -> bool:
    """Whether the class folders are in a folder, or in its parts."""
    names: set[str] = set()
    for part in (".", *SPLITS):
        with contextlib.suppress(OSError, ValueError):
            names |= {unicodedata.normalize("NFC", name) for name in os.listdir(root / part)}
    return bool(classes) and set(classes) <= names
