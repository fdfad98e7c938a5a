"""A confusion matrix, from 2 to more than 100 classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from metaft.plots.grid import drawable
from metaft.plots.style import FONT, save
from metaft.plots.text import fitted, width
from metaft.support.names import short_names

_COUNTED = 25  # up to so many classes the counts are written into the cells
_NAME = 1.8  # inches of a class name that are shown
_SMALLEST = 4.5  # points, of a name that can be read

# One image of 20 is a share of 5 %, which has to stand out from none at all: the first grey is not white.
_GREYS = ListedColormap(matplotlib.colormaps["Greys"](np.linspace(0.22, 1.0, 256))).with_extremes(bad="white")
_EVEN = 0.46  # the grey on which black and white letters have the same contrast


def confusion(path: Path, matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> None:
    """Counts [true class][predicted class]; a cell is the darker, the larger its share of the true class.

    Raises ValueError where the matrix is not square or has another size than the names.
    """
    save(confusion_figure(matrix, class_names), path)


class _Layout(NamedTuple):
    """What follows from the number of classes. Inches, and points for the size of the names."""

    side: float
    cell: float
    size: float
    every: int
    """Every how manieth class is named."""

    @staticmethod
    def of(classes: int) -> _Layout:
        """Cells large enough for numbers while there is room, then for names; past that, not all are named."""
        side = min(max(2.4, 0.34 * classes), max(10.0, 0.1 * classes), 13.0)
        cell = side / classes
        room = 0.8 * 72 * cell
        return _Layout(side, cell, min(8.0, max(room, _SMALLEST)), math.ceil(_SMALLEST / room))


def confusion_figure(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    counts = np.asarray(matrix)
    n = len(class_names)
    if counts.shape != (n, n):
        raise ValueError(f"the confusion matrix must be [{n}, {n}] for {n} names, got {list(counts.shape)}")
    layout = _Layout.of(n)
    names = fitted([drawable(name, i) for i, name in enumerate(short_names(class_names))], _NAME, layout.size)
    margin = 0.5 + max(width(name, layout.size) for name in names)
    figure = Figure(figsize=(layout.side + margin + 1.2, layout.side + margin + 0.4), layout="constrained")
    axes = figure.subplots()
    share = np.ma.masked_equal(counts / np.maximum(counts.sum(1, keepdims=True), 1), 0)
    shown = axes.imshow(share, cmap=_GREYS, norm=Normalize(0, 1), interpolation="nearest")
    _name_axes(axes, names, layout)
    axes.set_title(_title(counts), fontsize=10, loc="left")
    if n <= _COUNTED:
        _write_counts(axes, counts, share, layout)
    bar = axes.inset_axes((1 + 0.15 / layout.side, 0, 0.15 / layout.side, min(1.0, 2.4 / layout.side)))
    figure.colorbar(shown, cax=bar, format=PercentFormatter(1.0), label="share of the true class")
    bar.tick_params(labelsize=8)
    return figure


def _title(counts: np.ndarray) -> str:
    total, right, empty = int(counts.sum()), int(counts.trace()), int((counts.sum(1) == 0).sum())
    percent = f"{100 * right / total:.1f} %" if total else "none"
    title = f"{right} of {total} test images right ({percent})"
    return f"{title}\nblank rows: no test images ({empty} of {len(counts)} classes)" if empty else title


def _name_axes(axes: Axes, names: Sequence[str], layout: _Layout) -> None:
    """Names, and light lines between the cells, which lead the eye from a cell to them."""
    at = range(0, len(names), layout.every)
    named = [names[i] for i in at]
    axes.set_xticks(at, named, rotation=90, fontsize=layout.size, family=FONT, parse_math=False)
    axes.set_yticks(at, named, fontsize=layout.size, family=FONT, parse_math=False)
    between = np.arange(1, len(names)) - 0.5
    axes.set_xticks(between, minor=True)
    axes.set_yticks(between, minor=True)
    axes.grid(which="minor", color="#DDDDDD", lw=min(0.6, 3 * layout.cell))
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")


def _write_counts(axes: Axes, counts: np.ndarray, share: np.ndarray, layout: _Layout) -> None:
    size = min(8.0, 0.85 * layout.cell / width(str(counts.max()), 1.0))
    for true, predicted in np.argwhere(counts > 0):
        dark = _GREYS(share[true, predicted])[0] < _EVEN
        axes.text(
            predicted, true, str(counts[true, predicted]), ha="center", va="center", fontsize=size,
            color="white" if dark else "black", family=FONT,
        )  # fmt: skip
