"""From picture files to decoded pictures: what every image source shares."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from metaft.errors import DataError, words_of
from metaft.inputs import listing
from metaft.inputs.depth import CONTAINER, bits_for, is_deep, loses_levels, maximum, scales_itself
from metaft.inputs.fitting import Fitting, pixels_of, plain, shallow, upright
from metaft.inputs.flaws import HIGH_BYTES, about, remark
from metaft.inputs.formats import formats_for, named_as_picture


class Unreadable(DataError):
    """A picture file that cannot be read."""

    def __init__(self, path: Path, kind: str, why: str) -> None:
        super().__init__(f"image {path} cannot be read: {why}")
        self.path, self.kind, self.why = path, kind, why


def open_image(path: Path, *, deep: bool = False) -> Image.Image:
    """A picture file as mode "L" where its mode is grey, else "RGB": first frame, upright, without transparency.

    Greys of more than 8 bits become "L" by the range that this one file needs; with `deep` they are left in mode
    "I;16", for those who know more files of the set, but for a PGM, which says itself how bright white is.
    Raises Unreadable, a DataError, where it cannot be decoded.
    """
    kind = listing.no_file(path)
    if kind is not None and kind != listing.GONE:
        raise Unreadable(path, kind, f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}")
    try:
        with about(path), Image.open(path, formats=formats_for(path)) as file:
            if loses_levels(file):
                remark(HIGH_BYTES)
            whole_range = scales_itself(file)
            file.load()
            image = plain(upright(file))
    except MemoryError:
        raise
    except UnidentifiedImageError:
        other = None if named_as_picture(path.name) else listing.why_not(path, open_it=False)
        kind = listing.DAMAGED if other is None else other.kind
        raise Unreadable(path, kind, "it is no picture that can be read here, or damaged") from None
    except OSError as error:
        if error.errno is None:
            raise Unreadable(path, listing.DAMAGED, words_of(error)) from error
        kinds = {errno.ENOENT: listing.GONE, errno.EACCES: listing.LOCKED, errno.EPERM: listing.LOCKED}
        raise Unreadable(path, kinds.get(error.errno, listing.DAMAGED), os.strerror(error.errno)) from error
    except Exception as error:  # a broken file makes a decoder raise anything: IndexError, struct.error, ...
        raise Unreadable(path, listing.DAMAGED, words_of(error)) from error
    if whole_range:  # whatever the others of its set need
        return shallow(image, CONTAINER)
    return image if deep else shallow(image)


def try_open(path: Path) -> Image.Image | Unreadable:
    """What `open_image` makes of a file, deep, or why it cannot."""
    try:
        return open_image(path, deep=True)
    except Unreadable as error:
        return error


def read(path: Path, channels: int, side: Fitting | int) -> np.ndarray:
    """One picture file as uint8 [channels, side, side], polarity as in the file. Raises DataError naming the file.

    More than 8 bits are scaled by the range that this one file needs.
    """
    image = open_image(path, deep=True)
    return pixels_of(image, channels, side, bits_for(maximum(image)) if is_deep(image) else CONTAINER)
