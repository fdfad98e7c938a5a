"""From picture files to uint8 arrays: listing, opening, fitting, polarity. What every image source shares."""

from __future__ import annotations

import hashlib
import os
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, features

from metaft.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"})

READER_VERSION = 1
"""Part of every cache key; raise it with every change to the pixels that `read` returns."""

_GREY_TOLERANCE = 4
"""Grey levels by which the channels of a colour file may differ and still count as grey: what JPEG adds."""

_CHUNK = 64  # files a thread reads at a time


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, sorted; hidden ones and archive leftovers (`.git`, `__MACOSX`) are not looked at.

    Raises DataError where the folder cannot be read, as all that list do.
    """
    names = [e.name for e in _entries(folder) if not e.name.startswith((".", "__")) and _is(e.is_dir, False)]
    return sorted(folder / name for name in names)


def list_images(folder: Path) -> list[Path]:
    """Picture files right in a folder, sorted; hidden files and other endings are ignored."""
    names = [e.name for e in _entries(folder) if not e.name.startswith(".") and _is(e.is_file, True)]
    return [folder / name for name in sorted(names) if Path(name).suffix.lower() in SUFFIXES]


def list_below(folder: Path) -> list[Path]:
    """Picture files in a folder and in all below it, and the folders that cannot be read in place of their pictures.

    A folder that links lead to again is searched once.
    """
    found: list[Path] = []
    seen: set[str] = set()

    def search(folder: Path) -> None:
        real = os.path.realpath(folder)
        if real in seen:
            return
        seen.add(real)
        try:
            images, inside = list_images(folder), subfolders(folder)
        except DataError:
            found.append(folder)
            return
        found.extend(images)
        for sub in inside:
            search(sub)

    search(folder)
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read ({error.strerror})") from None


def _is(what: Callable[[], bool], unknown: bool) -> bool:
    """Whether an entry is a file, or a folder; of a link to itself, or into a locked folder, nobody can tell."""
    try:
        return what()
    except OSError:
        return unknown


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> picture files, for a folder of class folders; names in Unicode's composed form on every system.

    Raises DataError for a class folder without pictures.
    """
    classes = {}
    for sub in subfolders(folder):
        files = list_images(sub)
        if not files:
            raise DataError(f"class folder {sub} holds no images (endings looked for: {' '.join(sorted(SUFFIXES))})")
        classes[unicodedata.normalize("NFC", sub.name)] = files
    return classes


def fingerprint(root: Path, files: Iterable[Path]) -> str:
    """Digest of the files' names, sizes, times, inodes and decoders: it changes when a picture is added, removed or
    edited, whatever times its new content claims. So does a copy to another place, which only costs a reading.

    Waits, for at most two seconds, until a change from now on would show. Raises DataError for a file that is gone.
    """
    decoders = [PIL.__version__, *(features.version(name) for name in ("jpg", "webp"))]
    digest, newest = hashlib.sha256(f"{decoders}\n".encode()), 0
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"image {path} cannot be read ({error.strerror})") from None
        name = path.relative_to(root).as_posix()
        # cp -p, rsync and touch -r set the time of modification, but nobody that of the change itself.
        marks = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        digest.update("\t".join((name, *map(str, marks), "\n")).encode("utf-8", "surrogateescape"))
        newest = max(newest, stat.st_ctime_ns)
    # A file that is written twice within a tick of its clock has the same time both times.
    tick = 2_000_000_000 if newest % 1_000_000_000 == 0 else 20_000_000
    time.sleep(max(0, min(tick, newest + tick - time.time_ns())) / 1e9)
    return digest.hexdigest()


def open_image(path: Path) -> Image.Image:
    """A picture file as mode "L" where its mode is grey, else "RGB": first frame, upright, without transparency.

    Raises DataError, naming the file, where it cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            file.load()
            return plain(ImageOps.exif_transpose(file))
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes a decoder raise anything: IndexError, struct.error, ...
        raise DataError(f"image {path} cannot be read: {' '.join(str(error).split())}") from error


def plain(image: Image.Image) -> Image.Image:
    """A decoded picture as mode "L" or "RGB". Raises ValueError for pixels without a fixed range."""
    if image.mode.startswith("I"):
        return _from_deep_grey(image)
    if image.mode in ("1", "L"):
        # Never resize mode "1": Pillow falls back to the nearest pixel, and two grey levels are left of many.
        return image.convert("L")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; store them as 8 or 16 bit")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _without_alpha(image)
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16 bits to 8 by scale; Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image).astype(np.float64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"integer pixels from {values.min():.0f} to {values.max():.0f} are not 16-bit grey")
    return Image.fromarray(np.round(values / 257.0).astype(np.uint8))


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


def looks_grey(files: Sequence[Path], sample: int | None = 64) -> bool:
    """Whether all of `sample` files, evenly spread, or of all files are grey by mode or by equal channels."""
    step = 1 if sample is None else max(1, len(files) // sample)
    return all(is_grey(open_image(path)) for path in files[::step])


def is_grey(image: Image.Image) -> bool:
    """Whether an opened picture is grey by mode or by equal channels."""
    return image.mode == "L" or _channels_agree(np.asarray(image))


def fit(image: Image.Image, side: int) -> Image.Image:
    """A picture as a square of `side` pixels.

    Grey ones are padded with the median of their border, so that no part of a letter is cut off; colour ones are
    cropped at the centre, so that no bars are added to a photograph. Squares are only resized.
    """
    width, height = image.size
    if image.mode == "L" and width != height:
        longest = max(width, height)
        square = Image.new("L", (longest, longest), int(np.median(border(np.asarray(image)))))
        square.paste(image, ((longest - width) // 2, (longest - height) // 2))
        image = square
    elif width != height:
        short = min(width, height)
        left, top = (width - short) // 2, (height - short) // 2
        image = image.crop((left, top, left + short, top + short))
    return image if image.width == side else image.resize((side, side), Image.Resampling.LANCZOS)


def read(path: Path, channels: int, side: int) -> np.ndarray:
    """One picture file as uint8 [channels, side, side], polarity as in the file. Raises DataError naming the file."""
    return pixels_of(open_image(path), channels, side)


def pixels_of(image: Image.Image, channels: int, side: int) -> np.ndarray:
    """An opened picture as uint8 [channels, side, side], polarity as in the file."""
    pixels = np.asarray(fit(image.convert("L" if channels == 1 else "RGB"), side))
    return pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)


def read_all(
    files: Sequence[Path], channels: int, side: int, look: Callable[[int, Image.Image], None] = lambda i, image: None
) -> np.ndarray:
    """uint8 [len(files), channels, side, side]; raises DataError for the first file in order that is broken.

    `look` is shown each file's number and its picture as it was opened, in no order.
    """
    images = np.empty((len(files), channels, side, side), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(files))):
            image = open_image(files[i])
            look(i, image)
            images[i] = pixels_of(image, channels, side)

    # Decoding and resizing release the interpreter lock, which pays for photographs.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        for _ in threads.map(fill, range(0, len(files), _CHUNK)):
            pass
    return images


def border(images: np.ndarray) -> np.ndarray:
    """[..., H, W] to [..., n]: the pixels along the four edges."""
    edges = [images[..., 0, :], images[..., -1, :], images[..., 1:-1, 0], images[..., 1:-1, -1]]
    return np.concatenate(edges, axis=-1)


def is_dark_on_bright(images: np.ndarray) -> bool:
    """Whether grey uint8 [..., H, W] must be inverted to be bright on black: by the median of all their borders."""
    return float(np.median(border(images))) > 127.5


def rows_of(files: Iterable[Sequence[Path]]) -> tuple[np.ndarray, np.ndarray]:
    """(starts, counts), int64 [classes] each, for classes laid one after the other."""
    counts = np.array([len(f) for f in files], np.int64)
    return np.cumsum(counts) - counts, counts
