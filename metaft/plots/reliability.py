"""How often a classifier is right where it is so sure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from metaft.plots.style import LOOKS, save


def calibration(path: Path, starts: Mapping[str, tuple[Sequence[Mapping[str, float]], float]]) -> None:
    """Accuracy against confidence, a point for each bin, its size by how many images it holds; for each start its bins
    and its calibration error (see `metaft.finetune.scores.calibration`)."""
    save(calibration_figure(starts), path)


def calibration_figure(starts: Mapping[str, tuple[Sequence[Mapping[str, float]], float]]) -> Figure:
    figure = Figure(figsize=(5.0, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--")
    for (name, (bins, error)), (colour, _, marker) in zip(starts.items(), itertools.cycle(LOOKS), strict=False):
        most = max(b["images"] for b in bins)
        x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        axes.plot(x, y, color=colour, lw=0.8, alpha=0.6)
        sizes = [12 + 80 * b["images"] / most for b in bins]
        axes.scatter(x, y, s=sizes, color=colour, marker=marker, label=f"{name}: error {100 * error:.1f} %", zorder=3)
    axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="share that is right")
    axes.legend(fontsize=8, loc="upper left")
    return figure
