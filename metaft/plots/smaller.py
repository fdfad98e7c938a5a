"""What a classifier keeps of its accuracy as it gets faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from metaft.plots.style import LOOKS


def smaller_figure(steps: Sequence[Mapping[str, Any]], kept: str, latency: float, points: float) -> Figure:
    """Of rows as `metaft.after.shrunk.steps_of` gives them, the accuracy on validation images over the share of the
    time; what was asked for is the corner of `latency` (a share) and of `points` lost (in hundredths), in grey."""
    figure = Figure(figsize=(5.0, 4.0), layout="constrained")
    axes = figure.subplots()
    colour, style, marker = LOOKS[0]
    x, y = [step["latency"] for step in steps], [100 * step["validation"]["accuracy"] for step in steps]
    axes.axvspan(0, latency, ymin=0, color="0.92")
    axes.axhline(y[0] - points, color="0.6", lw=1, ls=":")
    axes.plot(x, y, color=colour, ls=style, marker=marker)
    at = next(i for i, step in enumerate(steps) if step["model"] == kept)
    axes.plot(x[at], y[at], ls="", marker="o", ms=12, mfc="none", mec=LOOKS[1][0], label=f"kept: {kept}")
    axes.set(xlim=(0, max(*x, 1.0) * 1.05), xlabel="share of the original's time for one image")
    axes.set(ylim=(-2, 102), ylabel="validation images that are right, %")
    axes.legend(fontsize=8, loc="lower right")
    return figure
