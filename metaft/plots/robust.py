"""Accuracy under attack over the attack's bound."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from metaft.plots.style import LOOKS, save


def robust(path: Path, starts: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """For each start its rows of "eps" and "accuracy" (see `metaft.finetune.robust.robust_curve`)."""
    save(robust_figure(starts), path)


def robust_figure(starts: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    figure = Figure(figsize=(5.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for (name, rows), (colour, style, marker) in zip(starts.items(), itertools.cycle(LOOKS), strict=False):
        x, y = [255 * row["eps"] for row in rows], [100 * row["accuracy"] for row in rows]
        axes.plot(x, y, color=colour, ls=style, marker=marker, label=name)
    axes.set(ylim=(-2, 102), xlabel="eps, in grey levels of 255", ylabel="test images that stay right, %")
    axes.legend(fontsize=8)
    return figure
