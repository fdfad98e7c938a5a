"""Many picture files at once: whether they are grey, their pixels, and what tells that they changed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, features

from metaft.errors import DataError
from metaft.inputs import listing
from metaft.inputs.depth import CONTAINER, bits_for, is_deep, maximum, to_bytes
from metaft.inputs.fitting import Fitting, fitted_deep, is_grey, pixels_of
from metaft.inputs.flaws import noted
from metaft.inputs.reading import Unreadable, try_open
from metaft.support import large
from metaft.support.output import steady
from metaft.support.progress import Progress

READER_VERSION = 3
"""Part of every cache key; raise it with every change to the pixels that `read` returns."""

_CHUNK = 64  # files a thread reads at a time

_WAIT = 3.0
"""Seconds of reading that need no bar."""

Opened = Callable[[Path], Image.Image | Unreadable]
"""How a file is opened, from many threads at once: `try_open`, or what gives the pictures of another store by name."""


def fingerprint(root: Path, files: Iterable[Path]) -> str:
    """Digest of the files' names, sizes, times, inodes and decoders: it changes when a picture is added, removed or
    edited, whatever times its new content claims. So does a copy to another place, which only costs a reading.

    Waits, for at most two seconds, until a change from now on would show. Raises DataError for a file that is gone.
    """
    decoders = [PIL.__version__, *(features.version(name) for name in ("jpg", "webp"))]
    digest, newest = hashlib.sha256(f"{decoders}\n".encode()), 0
    inside = f"{root}{os.sep}"
    for path in files:
        file = str(path)
        try:
            stat = os.stat(file)  # as Path.stat, which takes half as long again
        except OSError as error:
            raise DataError(f"image {path} cannot be read ({error.strerror})") from None
        name = file.removeprefix(inside)  # as relative_to, which takes longer than all the rest
        # cp -p, rsync and touch -r set the time of modification, but nobody that of the change itself.
        marks = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        digest.update("\t".join((name, *map(str, marks), "\n")).encode("utf-8", "surrogateescape"))
        newest = max(newest, stat.st_ctime_ns)
    # A file that is written twice within a tick of its clock has the same time both times.
    tick = 2_000_000_000 if newest % 1_000_000_000 == 0 else 20_000_000
    time.sleep(max(0, min(tick, newest + tick - time.time_ns())) / 1e9)
    return digest.hexdigest()


def looks_grey(files: Sequence[Path], sample: int | None = 64, opened: Opened = try_open) -> bool:
    """Whether all of `sample` files, evenly spread, or of all files are grey by mode or by equal channels.

    Those that cannot be read have no say; where none of the sample can, the first of the others that can has it.
    Raises DataError that names all files where there is none either.
    """
    step = 1 if sample is None else max(1, len(files) // sample)
    bad: dict[Path, str] = {}
    with noted():  # whoever reads them all will say it
        spread = _greys(files[::step], bad, opened)
        first = next(spread, None)
        if first is None:
            first = next(_greys([file for i, file in enumerate(files) if i % step], bad, opened), None)
        grey = first is not False and all(spread)
    if first is None and files:
        raise DataError(listing.refusal({file: bad[file] for file in files}, len(files)))
    return grey


def _greys(files: Iterable[Path], bad: dict[Path, str], opened: Opened) -> Iterator[bool]:
    """Whether each file that can be read is grey; the others are put into `bad`, each with the reason."""
    for path in files:
        image = opened(path)
        if isinstance(image, Unreadable):
            bad[path] = image.why
        else:
            yield is_grey(image)


class Pictures(NamedTuple):
    """What came of reading files."""

    images: np.ndarray
    """uint8 [good, channels, side, side], in the order of the files."""
    good: np.ndarray
    """int64: the numbers of the files that could be read."""
    bad: dict[Path, str]
    """The others, and why."""
    deep: int
    """How many have more than 8 bits in them, or room for more."""
    bits: int
    """How many bits those need, together."""
    flaws: Mapping[Path, str]
    """What Pillow warned of."""


def read_all(
    files: Sequence[Path],
    channels: int,
    fitting: Fitting | int,
    look: Callable[[int, Image.Image], None] = lambda i, image: None,
    opened: Opened = try_open,
) -> Pictures:
    """Every file that can be read, as uint8 [channels, side, side]; greys of more than 8 bits by one range for all.

    `look` is shown each good file's number and its picture as it was opened, in no order.
    """
    side = fitting if isinstance(fitting, int) else fitting.side
    images = large.room((len(files), channels, side, side))
    bad: dict[int, Unreadable] = {}
    deep: dict[int, tuple[int, np.ndarray]] = {}

    def fill(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(files))):
            image = opened(files[i])
            if isinstance(image, Unreadable):
                bad[i] = image
                continue
            look(i, image)
            if is_deep(image):
                deep[i] = maximum(image), fitted_deep(image, channels, fitting)
            else:
                images[i] = pixels_of(image, channels, fitting)

    # Decoding and resizing release the interpreter lock, which pays for photographs.
    with steady(), noted() as flaws, ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        bar = Progress("read", len(files), "picture", after=_WAIT)
        for number, _ in enumerate(threads.map(fill, range(0, len(files), _CHUNK)), 1):
            bar.update(min(number * _CHUNK, len(files)))
        bar.close()
    bits = bits_for(max((most for most, _ in deep.values()), default=2**CONTAINER - 1))
    for i, (_, values) in deep.items():
        images[i] = to_bytes(values, bits)
    why = {files[i]: bad[i].why for i in sorted(bad)}
    good = np.array([i for i in range(len(files)) if i not in bad], np.int64)
    flaws = {file: text for file, text in flaws.items() if file not in why}
    if bad:  # moved up in their place: a copy of all of them may be more than there is memory
        for place, i in enumerate(good.tolist()):
            images[place] = images[i]
    return Pictures(images[: len(good)], good, why, len(deep), bits, flaws)


def depth_note(deep: int, bits: int) -> list[str]:
    """A note on the range of files of more than 8 bits, where it is not the one that they have room for."""
    if not deep or bits == CONTAINER:
        return []
    files = "1 file holds" if deep == 1 else f"{deep} files hold"
    return [f"{files} {bits}-bit greys in {CONTAINER} bits: their range is 0 to {2**bits - 1}"]


def rows_of(files: Iterable[Sequence[Path]]) -> tuple[np.ndarray, np.ndarray]:
    """(starts, counts), int64 [classes] each, for classes laid one after the other."""
    counts = np.array([len(f) for f in files], np.int64)
    return np.cumsum(counts) - counts, counts
