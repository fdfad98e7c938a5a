"""Which letters the glyphs are made of: those that matplotlib's DejaVu fonts hold and that can be told apart.

The choice is made once, by `python -m metaft.tasks.letters > metaft/tasks/letters.tsv`, and committed as that table:
recomputed at every start, it would follow the versions of FreeType, Pillow and Unicode, and so would the class split.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from metaft.errors import DataError
from metaft.support.drawing import font_folder
from metaft.types import Split

FACES = tuple(
    f"DejaVu{family}{style}.ttf"
    for family, styles in {
        "Sans": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "Serif": ("", "-Bold", "-Italic", "-BoldItalic"),
        "SansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    }.items()
    for style in styles
)
"""Twelve font files that come with matplotlib; the first face that holds a letter is its plainest form."""

MIN_FACES = 4

SAME_SHAPE = 0.92
"""Cosine similarity of clean renderings above which two letters count as one.

Above it are accents (U with ring and U with umlaut), capitals that are large small letters, and the capitals that
Greek, Latin and Cyrillic share; around it are the first pairs that a reader would tell apart at 28x28.
"""

_Ranges = tuple[tuple[int, int], ...]

SCRIPTS: dict[str, tuple[Split, _Ranges]] = {
    "Greek": ("test", ((0x370, 0x3E1), (0x3F0, 0x3FF), (0x1F00, 0x1FFF))),
    "Georgian": ("test", ((0x10A0, 0x10FF), (0x2D00, 0x2D2F))),
    "Hebrew": ("test", ((0x5D0, 0x5F2), (0xFB1D, 0xFB4F))),
    "Lisu": ("test", ((0xA4D0, 0xA4FF),)),
    "Armenian": ("val", ((0x531, 0x587), (0xFB13, 0xFB17))),
    "Lao": ("val", ((0xE81, 0xEDF),)),
    "Old Italic": ("val", ((0x10300, 0x1031F),)),
    "Coptic": ("val", ((0x3E2, 0x3EF),)),
    "Latin": (
        "train",
        (
            (0x41, 0x5A),
            (0x61, 0x7A),
            (0xC0, 0x2AF),
            (0x1E00, 0x1EFF),
            (0x2C60, 0x2C7F),
            (0xA720, 0xA7FF),
            (0xFB00, 0xFB06),
        ),
    ),
    "Cyrillic": ("train", ((0x400, 0x52F), (0xA640, 0xA69F))),
    "Canadian": ("train", ((0x1400, 0x167F),)),
    "Arabic": ("train", ((0x620, 0x6FF), (0x750, 0x77F), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF))),
}
"""Script -> split and code points, in order of precedence: of two letters of one shape the earlier one is kept.

Test comes first, so that dropping costs the training scripts, which have letters to spare, and never the held-out ones.
"""


@functools.cache
def face_paths() -> tuple[Path, ...]:
    """The font files of `FACES`. Raises DataError where matplotlib came without one."""
    folder = font_folder()
    paths = tuple(folder / face for face in FACES)
    for path in paths:
        if not path.is_file():
            raise DataError(f"glyphs: font file {path} is missing; matplotlib's own wheel ships it")
    return paths


@functools.cache
def coverage() -> tuple[frozenset[int], ...]:
    """Code points of every face, in the order of `FACES`."""
    from fontTools.ttLib import TTFont

    covered = []
    for path in face_paths():
        with TTFont(path, lazy=True) as font:
            covered.append(frozenset(font.getBestCmap() or ()))
    return tuple(covered)


def faces_of(code_point: int) -> list[int]:
    """Numbers of the faces that hold a letter."""
    return [number for number, covered in enumerate(coverage()) if code_point in covered]


@functools.lru_cache(maxsize=64)
def load_face(number: int, points: int) -> ImageFont.FreeTypeFont:
    """A face at a size. The basic layout engine: one letter needs no shaping, and Raqm is not everywhere."""
    return ImageFont.truetype(str(face_paths()[number]), points, layout_engine=ImageFont.Layout.BASIC)


def ink(code_point: int, font: ImageFont.FreeTypeFont, *, margin: int = 0) -> Image.Image:
    """A letter, bright on black, cut to its ink and centred in a square with `margin` black pixels around."""
    # The font's own box counts the advance width, so the ink is looked for on a canvas with room on all sides.
    points = int(font.size)
    canvas = Image.new("L", (4 * points, 3 * points))
    ImageDraw.Draw(canvas).text((points, points), chr(code_point), fill=255, font=font)
    letter = canvas.crop(canvas.getbbox())
    side = max(letter.size) + 2 * margin
    image = Image.new("L", (side, side))
    image.paste(letter, ((side - letter.width) // 2, (side - letter.height) // 2))
    return image


def clean(code_points: Sequence[int]) -> np.ndarray:
    """float64 [letters, 576]: plain renderings at one size, slightly blurred, of unit length."""
    rows = []
    for code_point in code_points:
        image = ink(code_point, load_face(faces_of(code_point)[0], 96)).resize((24, 24), Image.Resampling.BOX)
        row = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), np.float64).ravel()
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


def candidates() -> Iterator[tuple[str, int]]:
    """(script, code point) of all letters in enough faces. Modifier letters are left out: cut to their ink they are
    the letters they modify."""
    for script, (_, ranges) in SCRIPTS.items():
        for code_point in (c for first, last in ranges for c in range(first, last + 1)):
            if unicodedata.category(chr(code_point)) in ("Lu", "Ll", "Lo") and len(faces_of(code_point)) >= MIN_FACES:
                yield script, code_point


def distinct() -> list[tuple[str, int]]:
    """The candidates less those too like an earlier one, of any script."""
    letters = list(candidates())
    shapes = clean([code_point for _, code_point in letters])
    similar = shapes @ shapes.T
    kept: list[int] = []
    for i in range(len(letters)):
        if not kept or similar[i, kept].max() < SAME_SHAPE:
            kept.append(i)
    return [letters[i] for i in kept]


def table() -> dict[str, list[int]]:
    """script -> code points, as committed."""
    scripts: dict[str, list[int]] = {}
    for line in resources.files("metaft.tasks").joinpath("letters.tsv").read_text("utf-8").splitlines():
        script, code_points = line.split("\t")
        scripts.setdefault(script, []).extend(int(c, 16) for c in code_points.split())
    return scripts


def main() -> None:
    """Print the table: a script and up to sixteen code points a line."""
    letters = distinct()
    for script in SCRIPTS:
        points = [f"{code_point:04X}" for s, code_point in letters if s == script]
        for start in range(0, len(points), 16):
            sys.stdout.write(f"{script}\t{' '.join(points[start : start + 16])}\n")


if __name__ == "__main__":
    main()
