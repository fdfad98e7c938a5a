"""What all pictures share: colours, axes, legends, and how a figure becomes a file."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's palette, which colour-blind readers can tell apart. Nothing rests on colour alone all the same.
BLACK, SKY, GREEN, YELLOW = "#000000", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

LOOKS = (
    (BLUE, "-", "o"), (VERMILLION, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D"), (BLACK, "-", "v"),
    (SKY, "--", "P"),
)  # fmt: skip
"""(colour, line, marker) of those that a figure compares, in their order."""
GREY = "#767676"

FONT = "DejaVu Sans"
"""Comes with matplotlib, so it is the only font sure to be there."""

_DPI = 200


def decorate(axes: Axes, x: str, y: str, *, legend: bool = True) -> None:
    """Labels, a light grid behind the data, and no frame; call it when the data is drawn."""
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9, loc="best", edgecolor="none", framealpha=0.85)
    if not axes.has_data():
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=GREY)


def percent(axes: Axes, *, whole: bool = False) -> None:
    """Shares as percentages: the range drawn, or the whole from 0 % on; never much above 100 %.

    The little that is left above keeps a line at 100 % whole.
    """
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g}%"))
    low, high = axes.get_ylim()
    axes.set_ylim((0.0, 1.01) if whole else (low, min(high, 1.01)))


def log_ticks(axis: Axis, values: Sequence[float], between: Sequence[float] = (1, 2, 5)) -> None:
    """Of a logarithmic axis: up to three decades with the numbers `between` the powers of ten."""
    axis.set_minor_formatter(NullFormatter())
    if max(values) <= 1000 * min(values):
        axis.set_major_locator(LogLocator(subs=between))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def save(figure: Figure, path: Path) -> None:
    """Write beside `path` and rename, so that nobody ever sees half a picture. The format follows the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    try:
        figure.savefig(unfinished, dpi=_DPI, format=path.suffix.lstrip(".") or "png")
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
