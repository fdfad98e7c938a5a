"""The data set that needs no download: letters of twelve scripts, drawn with the fonts that matplotlib ships.

A class is a letter, an alphabet is a script, an instance is a face bent by a random affine and elastic map. The scripts
of training, validation and test are disjoint, and no letter has the shape of another (see `metaft.tasks.letters`).
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata

import numpy as np
import PIL
import torch
from PIL import Image, features

from metaft.errors import DataError
from metaft.inputs import ImageInputs
from metaft.sampler import Stream, raw_words, uniform
from metaft.support.cache import cached
from metaft.tasks.letters import SCRIPTS, face_paths, faces_of, ink, load_face, table
from metaft.tasks.pool import ClassPool
from metaft.types import SPLITS

SIDE = 28
INSTANCES = 20

_VERSION = 1
"""Of the renderer; raise it with every change to the pixels."""

_POINTS = 64  # size at which a face is rasterised, before it is bent to its place
_FINE = 2 * SIDE  # bent at twice the size, then averaged down, which smooths the edges
_CELLS = 4  # the elastic map is bilinear within each of 4 x 4 cells
_FILL = 0.68  # longer side of the letter, as a part of the picture, before random scaling

# Half-widths of the uniform distributions, and the elastic one in parts of half the picture.
_ROTATION, _SHEAR, _LOG_SCALE, _SHIFT, _ELASTIC = 0.32, 0.28, 0.24, 0.17, 0.11

_VERTICES = (_CELLS + 1) ** 2
_WORDS = 6 + 2 * _VERTICES


def glyphs() -> ClassPool:
    """Letters as a pool: uint8 [M, 1, 28, 28], bright on black, 20 instances a class, split "scripts".

    Class names read "Greek/U+03B1 GREEK SMALL LETTER ALPHA"; the part before the slash is the alphabet. Raises
    DataError where matplotlib came without its fonts.
    """
    letters = [(script, code_point) for script, points in table().items() for code_point in points]
    code_points = tuple(code_point for _, code_point in letters)
    images = cached("glyphs", _cache_key(code_points), lambda: {"images": render(code_points)})["images"]
    split_of = np.array([SPLITS.index(SCRIPTS[script][0]) for script, _ in letters])
    return ClassPool(
        name="glyphs",
        images=torch.from_numpy(images).view(-1, 1, SIDE, SIDE),
        class_names=tuple(f"{script}/U+{c:04X} {unicodedata.name(chr(c))}" for script, c in letters),
        starts=np.arange(len(letters), dtype=np.int64) * INSTANCES,
        counts=np.full(len(letters), INSTANCES, np.int64),
        splits={split: np.flatnonzero(split_of == number) for number, split in enumerate(SPLITS)},
        inputs=ImageInputs(1, SIDE, SIDE, polarity="bright-on-black"),
    )


def render(code_points: tuple[int, ...]) -> np.ndarray:
    """uint8 [letters, 20, 28, 28]. A letter's pixels depend on its code point alone, not on the other letters."""
    words = raw_words(0, "train", code_points, INSTANCES * _WORDS, stream=Stream.GLYPHS)
    maps = _maps(2.0 * uniform(words).reshape(len(code_points), INSTANCES, _WORDS) - 1.0)
    return np.stack([_draw_letter(c, letter_maps) for c, letter_maps in zip(code_points, maps, strict=True)])


def _cache_key(code_points: tuple[int, ...]) -> str:
    """Everything that the pixels depend on."""
    fonts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in face_paths()]
    return f"{_VERSION} pillow {PIL.__version__} freetype {features.version('freetype2')} {fonts} {code_points}"


def _maps(noise: np.ndarray) -> np.ndarray:
    """[..., 56] uniform in -1..1 to [..., 5, 5, 2]: where in the letter each vertex of the picture's grid looks.

    Both sides are in units of half their width, around the centre, as (x, y).
    """
    angle, shear = _ROTATION * noise[..., 0], _SHEAR * noise[..., 1]
    scale = np.exp(_LOG_SCALE * noise[..., 2:4])
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    one, zero = np.ones_like(shear), np.zeros_like(shear)
    slant = np.stack([np.stack([one, shear], -1), np.stack([zero, one], -1)], -2)
    affine = (scale[..., :, None] * rotation) @ slant

    ticks = np.linspace(-1.0, 1.0, _CELLS + 1)
    grid = np.stack(np.meshgrid(ticks, ticks), -1).reshape(_VERTICES, 2)
    bent = grid + _SHIFT * noise[..., None, 4:6] + _ELASTIC * noise[..., 6:].reshape(*noise.shape[:-1], _VERTICES, 2)
    looks = bent @ np.swapaxes(affine, -1, -2)
    return looks.reshape(*noise.shape[:-1], _CELLS + 1, _CELLS + 1, 2)


def _draw_letter(code_point: int, maps: np.ndarray) -> np.ndarray:
    """maps [20, 5, 5, 2] to uint8 [20, 28, 28]: the faces that hold the letter take turns."""
    faces = faces_of(code_point)
    if not faces:
        raise DataError(f"glyphs: no font of matplotlib's holds U+{code_point:04X}; is it DejaVu 2.37?")
    stamps = [ink(code_point, load_face(face, _POINTS), margin=2) for face in faces]
    return np.stack([_bend(stamps[i % len(stamps)], one) for i, one in enumerate(maps)])


def _bend(stamp: Image.Image, looks: np.ndarray) -> np.ndarray:
    """One letter through one map: uint8 [28, 28]."""
    half = stamp.width / 2.0
    corners = half + looks * (half / _FILL)
    # Pillow wants each cell's corners in the order NW, SW, SE, NE.
    quads = np.concatenate([corners[:-1, :-1], corners[1:, :-1], corners[1:, 1:], corners[:-1, 1:]], -1)
    mesh = list(zip(_boxes(), quads.reshape(-1, 8).tolist(), strict=True))
    fine = stamp.transform((_FINE, _FINE), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
    return np.asarray(fine.reduce(_FINE // SIDE))


@functools.cache
def _boxes() -> tuple[tuple[int, int, int, int], ...]:
    """The cells of the picture, row by row, as (left, top, right, bottom)."""
    step = _FINE // _CELLS
    starts = range(0, _FINE, step)
    return tuple((x, y, x + step, y + step) for y in starts for x in starts)
