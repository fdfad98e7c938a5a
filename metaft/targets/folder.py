"""`folder:PATH`: class folders, with or without train/ and test/ (and val/) around them."""

from __future__ import annotations

import os
from pathlib import Path

from metaft.errors import DataError
from metaft.inputs.listing import NAMED, Left, list_classes, overlooked, some, subfolders
from metaft.support.names import is_text, natural
from metaft.targets.files import Listed


def listed(path: Path) -> Listed:
    """The files of either layout. Raises DataError where they are none."""
    names, files, left = _list(path)
    parts = tuple(part for part in dict.fromkeys(f[0] for f in files) if part != "all")
    notes = overlooked(path, parts, dict.fromkeys(file.parent for _, _, file in files))
    return Listed(f"folder:{path}", path, names, files, left, notes)


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
