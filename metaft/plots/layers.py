"""A figure of each layer along steps, as colours: rows are layers, from the input to the head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from metaft.plots.style import log_ticks

_TICKS = 6
"""Steps that are named, at most."""


def limits_of(values: np.ndarray, *, log: bool) -> tuple[float, float] | None:
    """The least and the largest that can be drawn; None where there is none."""
    drawn = values[np.isfinite(values) & (values > 0 if log else True)]
    return (float(drawn.min()), float(drawn.max())) if drawn.size else None


def layers_figure(
    names: Sequence[str],
    steps: Sequence[int],
    values: np.ndarray,
    label: str,
    *,
    x_label: str,
    log: bool = False,
    share: bool = False,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """`values` [layers, steps], NaN where there is none, which is left white. `limits` are those of the colours (None:
    of the values), so that two figures can be compared."""
    figure = Figure(figsize=(4.6, 1.5 + 0.2 * len(names)), layout="constrained")
    axes = figure.subplots()
    low, high = limits or limits_of(values, log=log) or (1.0, 1.0)
    if high <= low:  # one colour
        low, high = (low / 2, 2 * high) if log else (low - 0.5, high + 0.5)
    norm = LogNorm(low, high, clip=True) if log else Normalize(low, high)
    colours = colormaps["cividis"].with_extremes(bad="#FFFFFF")
    shown = np.ma.masked_invalid(np.where(values == 0, low, values) if log else values)
    image = axes.imshow(shown, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    at = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(_TICKS, len(steps)))})
    axes.set_xticks(at, [f"{steps[i]:,}" for i in at], fontsize=8)
    axes.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=8)
    axes.set_xlabel(x_label, fontsize=9)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, location="top", aspect=40, pad=0.02)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8, which="both")
    if log:
        log_ticks(bar.ax.xaxis, [low, high])
    if share:
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 26 else f"…{name[-25:]}"
