"""Greys of more than 8 bits: cameras and microscopes keep 10, 12 or 14 bits in files that could hold 16.

How many there are is a property of a data set, not of a file: a dark picture of 12 bits has small numbers too.
"""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

BITS = (8, 10, 12, 14, 16)

CONTAINER = 16
"""What is taken for the range where no file says otherwise."""


def is_deep(image: Image.Image) -> bool:
    """Whether a decoded picture has integers that need not fit into a byte."""
    return image.mode.startswith("I")


def scales_itself(file: Image.Image) -> bool:
    """Whether Pillow scales the greys of this file, opened and not yet loaded, to all of 16 bits.

    So it does with a PGM, by the largest number that the file says it may hold; 65535 says no more than the container.
    """
    if file.format != "PPM" or not is_deep(file):
        return False
    return any(isinstance(args, tuple) and args[-1] != 2**CONTAINER - 1 for args in _arguments(file))


def loses_levels(file: Image.Image) -> bool:
    """Whether Pillow takes the high bytes alone of this file, opened and not yet loaded: of deep colours or alpha."""
    # "BGR;16" is 5, 6 and 5 bits for a pixel.
    return not is_deep(file) and any(re.search(r"(?<!BGR);16", str(args)) for args in _arguments(file))


def _arguments(file: Image.Image) -> list[object]:
    """What Pillow's decoder of each tile is told, the raw mode among it."""
    return [tile[3] for tile in getattr(file, "tile", ())]


def sixteen(image: Image.Image) -> Image.Image:
    """A deep picture in mode "I;16". Raises ValueError for numbers that 16 bits do not hold."""
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() >= 2**CONTAINER):
        raise ValueError(f"integer pixels from {values.min()} to {values.max()} are not 16-bit grey")
    return Image.fromarray(values.astype(np.uint16))


def maximum(image: Image.Image) -> int:
    """The largest number in a deep picture."""
    return int(np.asarray(image).max())


def bits_for(most: int) -> int:
    """The fewest of BITS that hold this number."""
    return next(bits for bits in BITS if most < 2**bits)


def to_bytes(values: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of so many bits as uint8, by scale: x * 255 / (2^bits - 1). What lies beyond is cut off."""
    top = 2**bits - 1
    return np.round(np.clip(values, 0, top) * (255.0 / top)).astype(np.uint8)
