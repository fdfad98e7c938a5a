"""From a decoded picture to uint8 pixels of a model's size: mode, alpha, fitting, polarity.

This file and `depth.py` import nothing of metaft but each other: an exported model carries them beside it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from metaft.inputs.depth import CONTAINER, bits_for, is_deep, sixteen, to_bytes

REFUSED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF", "WMF"})
"""Pillow's formats that start other programs, hold no pixels without a program of their own, or are no pictures."""

_GREY_TOLERANCE = 4
"""Grey levels by which the channels of a colour file may differ and still count as grey: what JPEG adds."""


Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


class Fitting(NamedTuple):
    """How a picture becomes a square."""

    side: int
    """In pixels."""
    resize: int | None = None
    """The shorter side before a square is cut out of the middle, as those who train on ImageNet do; None: the largest
    square becomes the whole."""
    interpolation: Interpolation = "lanczos"


def upright(file: Image.Image) -> Image.Image:
    """Turned as its EXIF data says; of data that cannot be read nobody knows what they say."""
    try:
        return ImageOps.exif_transpose(file)
    except MemoryError:
        raise
    except Exception:
        return file.copy()


def plain(image: Image.Image) -> Image.Image:
    """A decoded picture as mode "L", "RGB" or, of more than 8 bits, "I;16". Raises ValueError for pixels without a
    fixed range."""
    if is_deep(image):
        return sixteen(image)
    if image.mode in ("1", "L"):
        # Never resize mode "1": Pillow falls back to the nearest pixel, and two grey levels are left of many.
        return image.convert("L")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; store them as 8 or 16 bit")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _without_alpha(image)
    return image.convert("RGB")


def shallow(image: Image.Image, bits: int | None = None) -> Image.Image:
    """A picture of `plain` in 8 bits. `bits` None: as many as this picture needs."""
    if not is_deep(image):
        return image
    values = np.asarray(image)
    return Image.fromarray(to_bytes(values, bits_for(int(values.max())) if bits is None else bits))


def _without_alpha(image: Image.Image) -> Image.Image:
    """Composite over white, or over black where the picture is grey and bright: white ink must not vanish."""
    rgba = image.convert("RGBA")
    pixels = np.asarray(rgba)
    visible = pixels[pixels[..., 3] > 127, :3]
    grey = _channels_agree(visible)
    dark_behind = grey and visible.size > 0 and visible.mean() > 127.5
    ground = Image.new("RGBA", rgba.size, (0, 0, 0, 255) if dark_behind else (255, 255, 255, 255))
    return Image.alpha_composite(ground, rgba).convert("L" if grey else "RGB")


def _channels_agree(pixels: np.ndarray) -> bool:
    """uint8 [..., 3]: whether every pixel is grey."""
    if pixels.size == 0:
        return True
    return int((pixels.max(-1) - pixels.min(-1)).max()) <= _GREY_TOLERANCE


def is_grey(image: Image.Image) -> bool:
    """Whether an opened picture is grey by mode or by equal channels."""
    return image.mode != "RGB" or _channels_agree(np.asarray(image))


def fit(image: Image.Image, fitting: Fitting | int, *, crop: bool | None = None) -> Image.Image:
    """A picture as a square; a number is that of its side in pixels.

    Grey ones are padded with the median of their border, so that no part of a letter is cut off; colour ones (and all
    with `crop`) are cropped at the centre, so that no bars are added to a photograph. Squares are only resized.
    """
    side, resize, interpolation = Fitting(fitting) if isinstance(fitting, int) else fitting
    crop, filter = image.mode == "RGB" if crop is None else crop, Image.Resampling[interpolation.upper()]
    if crop and resize is not None:
        return _cut_out(image, side, resize, filter)
    width, height = image.size
    if not crop and width != height:
        longest = max(width, height)
        square = Image.new(image.mode, (longest, longest), int(np.median(border(np.asarray(image)))))
        square.paste(image, ((longest - width) // 2, (longest - height) // 2))
        image = square
    elif width != height:
        image = _cropped(image)
    return image if image.width == side else image.resize((side, side), filter)


def _cut_out(image: Image.Image, side: int, resize: int, filter: Image.Resampling) -> Image.Image:
    """The square of `side` pixels in the middle of a picture whose shorter side is `resize`, by the roundings of
    torchvision's Resize and CenterCrop."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((resize * width // short, resize * height // short), filter)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return image.crop((left, top, left + short, top + short))


def pixels_of(image: Image.Image, channels: int, side: Fitting | int, bits: int = CONTAINER) -> np.ndarray:
    """An opened picture as uint8 [channels, side, side], polarity as in the file; deep ones are of so many bits."""
    if is_deep(image):
        return np.repeat(to_bytes(fitted_deep(image, channels, side), bits)[None], channels, 0)
    pixels = np.asarray(fit(image.convert("L" if channels == 1 else "RGB"), side))
    return pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)


def fitted_deep(image: Image.Image, channels: int, side: Fitting | int) -> np.ndarray:
    """float32 [side, side]: a deep picture fitted as others are, in the numbers of its file."""
    grey = image.convert("F")
    return np.asarray(fit(grey, side, crop=channels != 1))


def border(images: np.ndarray) -> np.ndarray:
    """[..., H, W] to [..., n]: the pixels along the four edges."""
    edges = [images[..., 0, :], images[..., -1, :], images[..., 1:-1, 0], images[..., 1:-1, -1]]
    return np.concatenate(edges, axis=-1)


def is_dark_on_bright(borders: np.ndarray) -> bool:
    """Whether grey pictures of these borders, uint8 [..., n], must be inverted to be bright on black: by the median."""
    return float(np.median(borders)) > 127.5
