"""Starts ranked for a target: how often simple classifiers on their features are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from metaft.plots.style import BLUE, VERMILLION, decorate, save


def ranking(path: Path, rows: Sequence[Mapping[str, Any]], images: int) -> None:
    """A line per start, the best on top: the probe with its 95 % interval, the nearest neighbour, and LogME at the
    edge. `rows` are those of `metaft.finetune.ranking`, of so many images."""
    save(figure(rows, images), path)


def figure(rows: Sequence[Mapping[str, Any]], images: int) -> Figure:
    drawn = Figure(figsize=(7.0, 1.4 + 0.42 * len(rows)), layout="constrained")
    axes = drawn.subplots()
    heights = range(len(rows), 0, -1)
    for height, row in zip(heights, rows, strict=True):
        if row["probe"] is not None:
            axes.errorbar(row["probe"], height, xerr=row["probe_ci95"], fmt="o", color=BLUE, capsize=3, ms=6)
            axes.plot(row["nearest"], height, "s", color=VERMILLION, ms=5, mfc="none")
        axes.text(
            1.01, height, f"{row['logme']:.3f}", transform=axes.get_yaxis_transform(), va="center", fontsize=8
        )  # fmt: skip
    axes.text(1.01, len(rows) + 0.7, "LogME", transform=axes.get_yaxis_transform(), fontsize=8)
    axes.plot([], [], "o", color=BLUE, label="probe, 95 % interval")
    axes.plot([], [], "s", color=VERMILLION, mfc="none", label="nearest neighbour")
    axes.set_yticks([*heights], [row["shown"] for row in rows])
    axes.set_ylim(0.4, len(rows) + 0.6)
    axes.set_xlim(0, 1.02)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
    decorate(axes, f"right in 5-fold cross-validation of the {images} training images", "")
    axes.grid(axis="x", color="#DDDDDD", lw=0.6)
    return drawn
