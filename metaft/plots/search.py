"""Trials of a search: the best so far, and each setting against the figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metaft.plots.style import BLACK, BLUE, GREY, VERMILLION, YELLOW, decorate, log_ticks, percent, save

Row = Mapping[str, Any]

COLUMNS = 3


def history(path: Path, rows: Sequence[Row], measure: str, *, higher: bool) -> None:
    """The figure of each trial, and the best so far as a line, over trials and over seconds. `rows` are in the order in
    which trials ended: "number", "value" (None where it failed), "at" (seconds since the search began)."""
    save(history_figure(rows, measure, higher=higher), path)


def history_figure(rows: Sequence[Row], measure: str, *, higher: bool) -> Figure:
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    for axes, (at, label) in zip(figure.subplots(1, 2), (_over_trials(rows), _over_time(rows)), strict=True):
        done = [(x, row["value"]) for x, row in zip(at, rows, strict=True) if row["value"] is not None]
        failed = [x for x, row in zip(at, rows, strict=True) if row["value"] is None]
        axes.plot([x for x, _ in done], [y for _, y in done], "o", color=BLUE, alpha=0.6, ms=5, label="a trial")
        best = list(itertools.accumulate((y for _, y in done), max if higher else min))
        axes.step([x for x, _ in done], best, where="post", color=VERMILLION, lw=1.8, label="best so far")
        if failed:
            axes.plot(
                failed, [0.02] * len(failed), "x", color=GREY, transform=axes.get_xaxis_transform(), label="failed"
            )  # fmt: skip
        if measure == "accuracy" and done:
            percent(axes)
        decorate(axes, label, f"validation {measure}")
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.suptitle(f"{len(rows)} trials", fontsize=10)
    return figure


def _over_trials(rows: Sequence[Row]) -> tuple[list[float], str]:
    return list(range(1, len(rows) + 1)), "trials"


def _over_time(rows: Sequence[Row]) -> tuple[list[float], str]:
    seconds = [row["at"] for row in rows]
    unit, name = (60.0, "minutes") if max(seconds, default=0.0) > 300 else (1.0, "seconds")
    return [at / unit for at in seconds], name


def settings(path: Path, rows: Sequence[Row], measure: str, logs: Mapping[str, bool], *, best: int) -> None:
    """A panel for each searched setting against the figure, and a star for the trial `best`. `rows` have "values",
    numbers or words, by the names in `logs`, which says whose scale is logarithmic."""
    save(settings_figure(rows, measure, logs, best=best), path)


def settings_figure(rows: Sequence[Row], measure: str, logs: Mapping[str, bool], *, best: int) -> Figure:
    columns = min(COLUMNS, len(logs))
    lines = math.ceil(len(logs) / columns)
    figure = Figure(figsize=(0.6 + 3.3 * columns, 3.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    done = [row for row in rows if row["value"] is not None]
    for number, (axes, (name, log)) in enumerate(zip(panels, logs.items(), strict=False)):
        _panel(axes, name, done, log, best)
        if measure == "accuracy" and done:
            percent(axes)
        decorate(axes, name, "" if number % columns else f"validation {measure}", legend=False)
    for axes in panels[len(logs) :]:
        axes.remove()
    figure.suptitle(f"{len(done)} trials; the star is the best one", fontsize=10)
    return figure


def _panel(axes: Axes, name: str, rows: Sequence[Row], log: bool, best: int) -> None:
    values = [row["values"][name] for row in rows]
    words = sorted({value for value in values if isinstance(value, str)})
    at = [words.index(value) if words else value for value in values]
    axes.plot(at, [row["value"] for row in rows], "o", color=BLUE, alpha=0.6, ms=5)
    for x, row in zip(at, rows, strict=True):
        if row["number"] == best:
            axes.plot([x], [row["value"]], ls="", marker="*", ms=13, mfc=YELLOW, mec=BLACK, mew=0.8, zorder=5)
    if words:
        axes.set_xticks(range(len(words)), [word[-24:] for word in words], rotation=30, ha="right")
        axes.set_xlim(-0.5, len(words) - 0.5)
    elif log:
        axes.set_xscale("log")
        log_ticks(axes.xaxis, at, (1, 3))
    elif all(isinstance(value, int) for value in at):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
