"""A loss on a plane of the parameters, and the paths of training through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metaft.plots.style import BLACK, GREY, LOOKS, decorate
from metaft.plots.text import fitted

_LEVELS = 12


def landscape_figure(
    xs: np.ndarray,
    ys: np.ndarray,
    losses: np.ndarray,
    axes_are: tuple[str, str],
    paths: Mapping[str, np.ndarray],
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Contours of losses [len(ys), len(xs)], and paths [n, 2], each in a look of its own, with a small mark for each
    point and a large one for its end. `marks` are points by name."""
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    shown = np.ma.masked_invalid(losses)
    levels = levels_of(losses)
    if levels:
        axes.contourf(xs, ys, shown, levels=levels, cmap="Greys", alpha=0.35, extend="both")
        lines = axes.contour(xs, ys, shown, levels=levels, colors=GREY, linewidths=0.7)
        axes.clabel(lines, levels[::2], fontsize=7, fmt="%.3g", inline=True)
    legend: list[Line2D] = []
    names = fitted([*paths], 1.5, 8)
    for name, points, (colour, style, marker) in zip(names, paths.values(), LOOKS, strict=False):
        axes.plot(*points.T, color=colour, ls=style, lw=1.6, marker=marker, ms=3.2, zorder=4)
        axes.plot(*points[-1], color=colour, marker=marker, ms=9, mec=BLACK, mew=0.8, zorder=5)
        look = {"color": colour, "ls": style, "marker": marker, "ms": 5}
        legend.append(Line2D([], [], label=name.replace("$", r"\$"), **look))
    for (name, (x, y)), marker in zip((marks or {}).items(), ("X", "*", "d"), strict=False):
        axes.plot([x], [y], color=BLACK, marker=marker, ms=9, ls="", mfc="white", zorder=6)
        legend.append(Line2D([], [], label=name, color=BLACK, marker=marker, ms=7, ls="", mfc="white"))
    axes.set_xlim(xs[0], xs[-1])
    axes.set_ylim(ys[0], ys[-1])
    decorate(axes, *axes_are, legend=False)
    axes.grid(False)
    if legend:
        figure.legend(handles=legend, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def levels_of(losses: np.ndarray) -> Sequence[float]:
    """Levels between the lowest and the highest loss, closer together where it is low; none where it is flat.

    >>> [round(level, 3) for level in levels_of(np.array([[1.0, 2.0]]))[:3]], levels_of(np.array([[1.0, 1.0, np.nan]]))
    ([1.006, 1.024, 1.053], [])
    """
    finite = losses[np.isfinite(losses)]
    if not finite.size or finite.max() - finite.min() <= 1e-9 * max(1.0, abs(finite.max())):
        return []
    low, high = float(finite.min()), float(finite.max())
    if low > 0 and high > 30 * low:
        return np.geomspace(low, high, _LEVELS + 2)[1:-1].tolist()
    return [low + (high - low) * (i / (_LEVELS + 1)) ** 2 for i in range(1, _LEVELS + 1)]
