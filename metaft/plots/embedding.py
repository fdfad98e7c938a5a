"""Features in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from metaft.plots.grid import drawable
from metaft.plots.style import GREY, LOOKS, decorate
from metaft.plots.text import fitted


def embedding_figure(points: np.ndarray, labels: np.ndarray, names: Sequence[str], axes_are: tuple[str, str]) -> Figure:
    """Points [n, 2] of labels [n]: the classes with the most of them in a look of their own, all others grey."""
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    axes = figure.subplots()
    counts = np.bincount(labels, minlength=len(names))
    looked = sorted(np.argsort(-counts, kind="stable")[: len(LOOKS)].tolist())
    rest = ~np.isin(labels, looked)
    if rest.any():
        axes.scatter(*points[rest].T, s=8, color=GREY, marker=".", label="other classes", alpha=0.6)
    for label, (colour, _, marker) in zip(map(int, looked), LOOKS, strict=False):
        own = points[labels == label]
        name = fitted([drawable(names[label], label)], 1.2, 8)[0]
        axes.scatter(*own.T, s=14, color=colour, marker=marker, label=name.replace("$", r"\$"), alpha=0.75, lw=0.4)
    decorate(axes, *axes_are, legend=False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure
