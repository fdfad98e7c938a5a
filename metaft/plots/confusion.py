"""A confusion matrix, from 2 to more than 100 classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from metaft.names import short_names
from metaft.plots.grid import drawable
from metaft.plots.style import FONT, save

_COUNTED = 25  # up to so many classes the counts are written into the cells
_LETTERS = 22  # of a class name that are shown


def confusion(path: Path, matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> None:
    """Counts [true class][predicted class]; a cell is the darker, the larger its share of the true class.

    Raises ValueError where the matrix is not square or has another size than the names.
    """
    save(confusion_figure(matrix, class_names), path)


def confusion_figure(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    counts = np.asarray(matrix)
    n = len(class_names)
    if counts.shape != (n, n):
        raise ValueError(f"the confusion matrix must be [{n}, {n}] for {n} names, got {list(counts.shape)}")
    total, right = int(counts.sum()), int(counts.trace())
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    cell = 0.34 if n <= _COUNTED else 0.17 if n <= 60 else 0.1
    side = max(cell * n, 2.4)
    names = [_cut(name, i) for i, name in enumerate(short_names(class_names))]
    margin = 0.75 + 0.065 * max(map(len, names))
    figure = Figure(figsize=(side + margin + 1.0, side + margin + 0.5), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(share, cmap="Greys", norm=Normalize(0, 1), interpolation="nearest")
    size = 8.0 if n <= _COUNTED else 6.5 if n <= 60 else 4.5
    axes.set_xticks(range(n), names, rotation=90, fontsize=size, family=FONT, parse_math=False)
    axes.set_yticks(range(n), names, fontsize=size, family=FONT, parse_math=False)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    percent = f"{100 * right / total:.1f} %" if total else "none"
    axes.set_title(f"{right} of {total} test images right ({percent})", fontsize=10, loc="left")
    if n <= _COUNTED:
        for true, predicted in np.argwhere(counts > 0):
            axes.text(
                predicted, true, str(counts[true, predicted]), ha="center", va="center", fontsize=7,
                color="white" if share[true, predicted] > 0.55 else "black", family=FONT,
            )  # fmt: skip
    figure.colorbar(shown, ax=axes, shrink=min(1.0, 1.6 / side + 0.3), label="share of the true class")
    return figure


def _cut(name: str, number: int) -> str:
    name = drawable(name, number)
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"
