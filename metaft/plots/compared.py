"""Runs over one another: what was validated while they trained."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metaft.plots.style import LOOKS, decorate, percent, save

Row = Mapping[str, Any]


def compared(path: Path, runs: Mapping[str, Sequence[Row]], *, x: str, y: str, measure: str) -> None:
    """A line for each run, by its label. Rows hold "x", "y" and perhaps "ci95", which is drawn as a band; `x` and `y`
    name the axes, and `measure` "accuracy" is a share."""
    save(figure(runs, x, y, measure), path)


def figure(runs: Mapping[str, Sequence[Row]], x: str, y: str, measure: str) -> Figure:
    drawn = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = drawn.subplots()
    for (label, rows), (colour, style, marker) in zip(runs.items(), itertools.cycle(LOOKS), strict=False):
        at, values = [row["x"] for row in rows], [row["y"] for row in rows]
        axes.plot(
            at, values, color=colour, ls=style, lw=1.6, marker=marker, ms=4, markevery=max(1, len(rows) // 10),
            label=label if rows else f"{label} (not kept)",
        )  # fmt: skip
        if rows and all(row.get("ci95") is not None for row in rows):
            low, high = ([row["y"] + sign * row["ci95"] for row in rows] for sign in (-1, 1))
            axes.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
    if measure == "accuracy" and any(runs.values()):
        percent(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    decorate(axes, x, y)
    return drawn
