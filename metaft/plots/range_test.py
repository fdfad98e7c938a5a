"""The loss of a range test over the learning rate, and the rate that it led to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from metaft.plots.style import BLACK, BLUE, GREY, decorate, save


def range_test(path: Path, test: Mapping[str, Any]) -> None:
    """`test` is "range_test" of result.json, see `metaft.finetune.range_test`."""
    save(range_test_figure(test), path)


def range_test_figure(test: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(test["rates"], test["losses"], color=GREY, alpha=0.6, lw=0.9, label="loss before each step")
    axes.plot(test["rates"], test["smoothed"], color=BLACK, lw=1.6, label="mean around each")
    axes.axvline(test["rate"], color=BLUE, ls="--", lw=1.4, label=f"nine tenths of the fall: {test['rate']:.2g}")
    axes.set_xscale("log")
    # What comes after the rise is of no interest, and would press the rest flat.
    low, first = min(test["smoothed"]), test["losses"][0]
    axes.set_ylim(low - 0.1 * (first - low), first + 0.6 * (first - low))
    decorate(axes, "learning rate", "training loss")
    return figure
