"""Greys of more than 8 bits: cameras and microscopes keep 10, 12 or 14 bits in files that could hold 16.

How many there are is a property of a data set, not of a file: a dark picture of 12 bits has small numbers too.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

BITS = (8, 10, 12, 14, 16)

CONTAINER = 16
"""What is taken for the range where no file says otherwise."""


def is_deep(image: Image.Image) -> bool:
    """Whether a decoded picture has integers that need not fit into a byte."""
    return image.mode.startswith("I")


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
