"""One regression task: the curve, its support points, and predictions on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from metaft.plots.style import BLACK, BLUE, PURPLE, SKY, VERMILLION, YELLOW, decorate, save

_PREDICTION_LOOKS = ((SKY, "--"), (VERMILLION, "-"), (BLUE, "-."), (PURPLE, ":"))


def regression_episode(
    path: Path,
    support_x: Tensor,
    support_y: Tensor,
    grid_x: Tensor,
    true_y: Tensor,
    predictions: Mapping[str, Tensor],
) -> None:
    """One regression task: the true curve, the support points, and each named prediction over `grid_x`.

    Give the predictions in the order of adaptation ("before", "after 1 step", ...). All tensors are [n] or [n, 1].
    """
    save(regression_figure(support_x, support_y, grid_x, true_y, predictions), path)


def regression_figure(
    support_x: Tensor, support_y: Tensor, grid_x: Tensor, true_y: Tensor, predictions: Mapping[str, Tensor]
) -> Figure:
    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    axes = figure.subplots()
    x = _flat(grid_x)
    order = np.argsort(x, kind="stable")
    axes.plot(x[order], _flat(true_y)[order], color=BLACK, lw=1.4, label="truth")
    for i, (name, y) in enumerate(predictions.items()):
        colour, style = _PREDICTION_LOOKS[i % len(_PREDICTION_LOOKS)]
        axes.plot(x[order], _flat(y)[order], color=colour, ls=style, lw=1.8, label=name)
    axes.plot(
        _flat(support_x), _flat(support_y), ls="", marker="o", ms=7, mfc=YELLOW, mec=BLACK, mew=0.9, zorder=5,
        label="support points",
    )  # fmt: skip
    decorate(axes, "x", "y", legend=False)
    # A sine leaves no corner free: the legend stands outside the axes.
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _flat(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().flatten().numpy()
