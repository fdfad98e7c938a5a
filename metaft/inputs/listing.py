"""Which picture files a folder holds, and what in it is not taken: nothing is left out without a word."""

from __future__ import annotations

import collections
import errno
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from metaft.errors import DataError
from metaft.inputs.formats import is_beside, named_as_picture, starts_as_picture

NAMED = 10
"""How many files an error names; of more it says how many."""

# Why a file is not taken, in words that can be counted.
BROKEN_LINK = "broken link"
ENDLESS_LINK = "endless link"
EMPTY = "empty file"
SPECIAL = "special file (a pipe, socket or device)"
LOCKED = "locked file"
GONE = "missing file"
DAMAGED = "damaged file"
UNREAD = "file in a format that is not read"
NO_PICTURE = "file that is no picture"
HIDDEN = "hidden file"
BESIDE = "picture file beside the class folders"
FOLDER = "folder that cannot be read"


class Left(NamedTuple):
    """A file that is not taken."""

    path: Path
    kind: str
    lost: bool
    """Whether it was to be a picture, as far as anyone can tell: notes and tables beside pictures are not."""


class Listed(NamedTuple):
    """What a folder holds, each in order."""

    files: list[Path]
    left: list[Left]


class Classes(NamedTuple):
    """What a folder of class folders holds."""

    files: dict[str, list[Path]]
    """Class name, in Unicode's composed form, -> picture files."""
    left: list[Left]


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, sorted; hidden ones and archive leftovers (`.git`, `__MACOSX`) are not looked at.

    Raises DataError where the folder cannot be read, as all that list do.
    """
    names = [e.name for e in _entries(folder) if not e.name.startswith((".", "__")) and _is(e.is_dir)]
    return sorted(folder / name for name in names)


def list_images(folder: Path) -> Listed:
    """Picture files right in a folder. A file whose ending is a picture's is one, others are by what they hold."""
    files: list[Path] = []
    left: list[Left] = []
    for entry in sorted(_entries(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        if _is(entry.is_dir):
            continue
        if entry.name.startswith("."):
            if named_as_picture(entry.name):
                left.append(Left(path, HIDDEN, False))
        elif (_is(entry.is_file) and named_as_picture(entry.name)) or (why := why_not(path)) is None:
            files.append(path)
        else:
            left.append(why)
    return Listed(files, left)


def why_not(path: Path, *, open_it: bool = True) -> Left | None:
    """What keeps a file from being read as a picture, as far as can be told without decoding it; None: nothing.

    `open_it` False: Pillow has been asked, see `starts_as_picture`.
    """
    kind = no_file(path)
    if kind == EMPTY:
        return Left(path, EMPTY, not is_beside(path))
    if kind is not None:
        return Left(path, kind, True)
    try:
        if starts_as_picture(path, open_it=open_it):
            return None
        beside = is_beside(path)
        ending = path.suffix.lower()
        return Left(path, NO_PICTURE if beside else f"{UNREAD} ({ending or 'no ending'})", not beside)
    except OSError:  # reading it will say why
        return None


def is_no_picture(path: Path) -> bool:
    """Whether neither its name nor what it holds ever made a picture of it."""
    why = None if named_as_picture(path.name) else why_not(path)
    return why is not None and not why.lost


def no_file(path: Path) -> str | None:
    """Why this is no file to read from, or None. Never waits, as opening a pipe would."""
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return ENDLESS_LINK
        if error.errno in (errno.EACCES, errno.EPERM):
            return LOCKED
        return BROKEN_LINK if os.path.islink(path) else GONE
    if stat.S_ISDIR(status.st_mode):
        return None
    if not stat.S_ISREG(status.st_mode):
        return SPECIAL
    return EMPTY if status.st_size == 0 else None


def list_below(folder: Path, *, lost: bool = False) -> Listed:
    """Picture files in a folder and in all below it; folders that cannot be read are among what is left.

    A folder that links lead to again is searched once. `lost` puts what was to be a picture among the files, each in
    its place.
    """
    files: list[Path] = []
    left: list[Left] = []
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            listed, inside = list_images(folder), subfolders(folder)
        except DataError:
            listed, inside = Listed([], [Left(folder, FOLDER, True)]), []
        kept = [file.path for file in listed.left if file.lost and lost]
        files += sorted([*listed.files, *kept]) if kept else listed.files
        left += [file for file in listed.left if not (file.lost and lost)]
        waiting += reversed(inside)
    return Listed(files, left)


def list_classes(folder: Path) -> Classes:
    """The picture files of each class, for a folder of class folders.

    Raises DataError that names the class folders without pictures, and for two whose names differ in Unicode form
    alone.
    """
    stray = list_images(folder)
    left = [Left(path, BESIDE, False) for path in stray.files] + [file for file in stray.left if file.lost]
    classes: dict[str, list[Path]] = {}
    places: dict[str, Path] = {}
    hollow: dict[Path, list[Left]] = {}
    for sub in subfolders(folder):
        name = unicodedata.normalize("NFC", sub.name)
        if name in classes:
            raise DataError(
                f"class folders {places[name].name!a} and {sub.name!a} in {folder} have the same name, "
                f"{name!r}, in two Unicode forms; merge them or rename one"
            )
        listed = list_images(sub)
        if not listed.files:
            hollow[sub] = listed.left
        classes[name], places[name] = listed.files, sub
        left += listed.left
    if hollow:
        inside = [file for files in hollow.values() for file in files]
        why = f" ({counted(inside)})" if inside else ""
        if len(hollow) == 1:
            raise DataError(f"class folder {next(iter(hollow))} holds no images{why}")
        raise DataError(f"{len(hollow)} class folders hold no images: {some(list(hollow), NAMED)}{why}")
    return Classes(classes, left)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read ({error.strerror})") from None


def _is(what: Callable[[], bool]) -> bool:
    """Whether an entry is a file, or a folder; of a link to itself, or into a locked folder, nobody can tell."""
    try:
        return what()
    except OSError:
        return False


def counted(left: Iterable[Left], *, where: bool = True) -> str:
    """How many there are of each kind, the most first, and where the first of them is."""
    kinds: dict[str, list[Path]] = collections.defaultdict(list)
    for file in left:
        kinds[file.kind].append(file.path)
    parts = []
    for kind, paths in sorted(kinds.items(), key=lambda item: -len(item[1])):
        single = len(paths) == 1
        number = f"{len(paths)} {kind if single else _several(kind)}"
        place = f" ({paths[0]})" if single else f", such as {paths[0]}"
        parts.append(f"{number}{place if where else ''}")
    return "; ".join(parts) if where else ", ".join(parts)


def _several(kind: str) -> str:
    kind = kind.replace("that is no picture", "that are no pictures")
    return kind.replace("file", "files", 1).replace("link", "links", 1).replace("folder that", "folders that", 1)


def left_note(left: Sequence[Left], taken: int) -> list[str]:
    """One note on what is not taken, or none."""
    if not left:
        return []
    return [f"ignored {len(left)} of {len(left) + taken} files: {counted(left)}"]


def check_lost(left: Sequence[Left], taken: int, *, skip_bad: bool) -> None:
    """Raises DataError where more than half of what was to be pictures is none, unless that is asked for."""
    lost = [file for file in left if file.lost]
    if len(lost) > taken and not skip_bad:
        raise DataError(
            f"{len(lost)} of the {len(lost) + taken} pictures, more than half, cannot be read: {counted(lost)}; "
            "mend them, or go on without them with --skip-bad"
        )


def refusal(bad: Mapping[Path, str], of: int, left: Sequence[Left] = ()) -> str:
    """What to say of pictures that cannot be read, with the reason for each: all of them at once."""
    how = "; mend or remove" + (" it" if len(bad) == 1 else " them")
    how += ", or go on without with --skip-bad" if len(bad) < of else ""  # without all of them nobody can
    lost = [file for file in left if file.lost]
    also = f"; ignored besides: {counted(lost)}" if lost else ""
    return f"{unreadable(bad, of)}{also}{how}"


def unreadable(bad: Mapping[Path, str], of: int) -> str:
    """That so many of the images cannot be read, which, and why."""
    if len(bad) == 1:
        [(path, why)] = bad.items()
        return f"image {path} cannot be read: {why}"
    return f"{len(bad)} of {of} images cannot be read: {listed_files(bad)}"


def skipped_note(bad: Mapping[Path, str], of: int) -> list[str]:
    """A note on pictures that cannot be read and are left out, as was asked for; or none."""
    return [f"skipped {len(bad)} of {of} pictures that cannot be read: {listed_files(bad)}"] if bad else []


def listed_files(bad: Mapping[Path, str]) -> str:
    """The first of them, each with the reason, and how many more there are."""
    first = [f"{path} ({why})" for path, why in list(bad.items())[:NAMED]]
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return ", ".join(first) + more


def overlooked(path: Path, parts: Sequence[str], class_folders: Iterable[Path]) -> list[str]:
    """Notes on pictures, lost ones too, that lie where nobody looks: beside the `parts` (none: there are no parts), or
    too deep."""
    notes = []
    beside: list[Path] = []
    if parts:
        beside = [sub for sub in subfolders(path) if sub.name not in parts and list_below(sub, lost=True).files]
        files, left = list_images(path)
        beside += sorted([*files, *(file.path for file in left if file.lost)])
    if beside:
        notes.append(f"ignored beside {' and '.join(f'{part}/' for part in parts)}: {some(beside)}")
    deeper = [sub for folder in class_folders for sub in subfolders(folder) if list_below(sub, lost=True).files]
    if deeper:
        notes.append(f"ignored, since they are inside class folders: {some(deeper)}")
    hidden = [sub for place in (path, *(path / part for part in parts)) for sub in _hidden(place)]
    if hidden:
        notes.append(f"ignored, since folders of such names are hidden or an archive's: {some(hidden)}")
    return notes


def _hidden(place: Path) -> list[Path]:
    """Hidden folders with pictures right in them, which may have been meant for classes."""
    folders = [place / e.name for e in _entries(place) if e.name.startswith((".", "__")) and _is(e.is_dir)]
    return [sub for sub in sorted(folders) if os.access(sub, os.R_OK | os.X_OK) and list_images(sub).files]


def some(names: Sequence[object], at_most: int = 3) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(map(str, names[:at_most])) + more
