"""Which files are pictures: by what is in them, and among those that their name says are some, by the name alone.

A name that says so is not doubted here, so that a large data set is not opened twice: a file that is none then fails
to decode, which is said as loudly.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from PIL import Image

from metaft.inputs.fitting import REFUSED
from metaft.inputs.flaws import about, noted

# What people would call pictures, though they are not read.
_UNREAD = frozenset({
    ".heic", ".heif", ".hif", ".jxl", ".svg", ".svgz", ".eps", ".ps", ".pdf", ".wmf", ".emf", ".raw", ".dng", ".cr2",
    ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".exr", ".hdr", ".dcm", ".nii", ".ai", ".xcf", ".djvu",
})  # fmt: skip

# What often lies beside pictures.
_BESIDE = frozenset({
    ".json", ".jsonl", ".xml", ".txt", ".csv", ".tsv", ".md", ".yaml", ".yml", ".toml", ".html", ".ini", ".db", ".log",
    ".lst", ".npy", ".npz", ".mat", ".pkl", ".pickle", ".pt", ".pth", ".h5", ".hdf5", ".parquet", ".py", ".sh", ".zip",
    ".gz", ".tar", ".lnk", ".url", ".xmp", ".wav", ".mp3", ".mp4", ".mov", ".avi", ".mkv",
    ".mpg", ".mpeg", ".bak",
})  # fmt: skip

_MAGIC = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|II\*\x00|MM\x00\*|II\+\x00|MM\x00\+|RIFF....WEBP|....ftypavi[fs]|"
    rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|8BPS\x00\x01|qoif|icns|DDS ",
    re.DOTALL,
)
"""How a picture begins that no other file is taken for; one that is damaged further on is still one."""

_PLAIN_PPM = re.compile(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s+\d+\s")


def _named() -> tuple[tuple[str, ...], dict[str, str]]:
    """(formats that are told by how a file begins, ending -> format), of all that Pillow has here."""
    Image.init()
    return _named_of(len(Image.ID), len(Image.EXTENSION))


@functools.lru_cache(maxsize=2)
def _named_of(*registered: int) -> tuple[tuple[str, ...], dict[str, str]]:
    """By how many there are, since it is asked for each file of a data set: anew where a plugin registered more."""
    formats = tuple(name for name in Image.ID if name not in REFUSED)
    sure = tuple(name for name in formats if Image.OPEN[name][1] is not None)
    endings = {end: name for end, name in Image.registered_extensions().items() if name in formats}
    return sure, {**endings, ".mpo": "JPEG"} if "JPEG" in formats else endings


def formats_for(path: Path) -> tuple[str, ...]:
    """Pillow's formats to try: those that begin in a way of their own, and the one that goes by this name."""
    sure, endings = _named()
    by_name = endings.get(path.suffix.lower())
    return sure if by_name is None or by_name in sure else (*sure, by_name)


def named_as_picture(name: str) -> bool:
    """Whether the ending of a file's name is a picture's."""
    dot = name.rfind(".")  # as Path.suffix, which takes longer than all the rest
    return 0 < dot < len(name) - 1 and name[dot:].lower() in _named()[1]


def starts_as_picture(path: Path, *, open_it: bool = True) -> bool:
    """Whether the file begins as a picture does, whatever it is called. Raises OSError where it cannot be read.

    Where its first bytes do not say, Pillow is asked, but not with `open_it` False: a thread that another one waits
    for inside `noted` must not, since that would wait for the other.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    if start.startswith((b"II", b"MM")) and path.suffix.lower() in _UNREAD:
        return False  # a camera's raw file, whose TIFF holds no more than a thumbnail that can be read
    if _MAGIC.match(start) or _PLAIN_PPM.match(start):
        return True
    if not start or _is_text(start) or not open_it:
        return False
    with noted(), about(path):
        try:
            with Image.open(path, formats=formats_for(path)):
                return True
        except Exception:  # a decoder raises anything at what is not for it
            return False


def is_beside(path: Path) -> bool:
    """Whether a file that is no picture was never meant to be one: a description, a table, a text."""
    ending = path.suffix.lower()
    if ending in _BESIDE or ending in _UNREAD:
        return ending in _BESIDE
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:  # nobody can tell
        return False
    return bool(start) and _is_text(start)


def _is_text(start: bytes) -> bool:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    try:
        start[: max(1, len(start) - 3)].decode("utf-8")  # a letter of several bytes may be cut in two
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return b"\0" not in start
