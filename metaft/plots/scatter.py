"""Predicted numbers against the true ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from metaft.plots.style import GREY, LOOKS, decorate, save


def scatter(path: Path, starts: Mapping[str, tuple[Sequence[Sequence[float]], float]]) -> None:
    """A point for each test image, for each start its [label, prediction] pairs and its RMSE."""
    save(scatter_figure(starts), path)


def scatter_figure(starts: Mapping[str, tuple[Sequence[Sequence[float]], float]]) -> Figure:
    figure = Figure(figsize=(5.0, 4.6), layout="constrained")
    axes = figure.subplots()
    labels = [label for pairs, _ in starts.values() for label, _ in pairs]
    ends = [min(labels), max(labels)]
    axes.plot(ends, ends, color=GREY, lw=1, ls="--")
    for (name, (pairs, rmse)), (colour, _, marker) in zip(starts.items(), itertools.cycle(LOOKS), strict=False):
        x, y = zip(*pairs, strict=True)
        axes.scatter(x, y, s=14, color=colour, marker=marker, alpha=0.6, label=f"{name}: RMSE {rmse:.4g}")
    decorate(axes, "label", "prediction")
    return figure
