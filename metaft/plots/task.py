"""One task on its way through the inner loop."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metaft.plots.style import BLUE, GREY, VERMILLION, decorate, percent


def task_figure(own: np.ndarray, accuracy: np.ndarray) -> Figure:
    """Probabilities [steps + 1, n] of each query's own class, their mean, and the accuracy [steps + 1]."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(len(own))
    axes.plot(steps, own, color=GREY, lw=0.6, alpha=0.45)
    axes.plot([], [], color=GREY, lw=0.8, label="own class, each query")
    axes.plot(steps, own.mean(1), color=BLUE, lw=2.0, marker="o", ms=4.5, label="own class, mean")
    axes.plot(steps, accuracy, color=VERMILLION, ls="--", lw=1.8, marker="s", ms=4.5, label="right labels")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    percent(axes, whole=True)
    decorate(axes, "inner step", "probability, share")
    return figure
