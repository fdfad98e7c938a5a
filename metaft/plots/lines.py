"""Line charts: training and validation curves, and the metric against the inner step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metaft.objective import figure_of
from metaft.plots.style import BLACK, BLUE, GREY, LOOKS, VERMILLION, YELLOW, decorate, log_ticks, percent, save
from metaft.types import NORMS

Row = Mapping[str, Any]

_NAMES = {"accuracy": "accuracy", "mse": "mean squared error"}
_OTHER_LOOK = (VERMILLION, "--", "s")
_LOOKS = {"inductive": _OTHER_LOOK}
_USUAL_LOOK = (BLUE, "-", "o")


def curves(path: Path, train: Sequence[Row], val: Sequence[Row], metric: str, *, best_step: int | None = None) -> None:
    """Training loss, and the metric in training and validation, against the meta-step.

    `train` and `val` are rows of metrics.jsonl, in order; either may be empty. Validation rows hold {metric, "ci95"}
    for each normalisation mode, or once where there are no modes. `best_step` is the validation that the checkpoint was
    chosen on; without it, the best of the first mode is marked.
    """
    save(curves_figure(train, val, metric, best_step), path)


def steps(path: Path, test: Row) -> None:
    """The metric before the first inner step and after each one, in both modes, with 95 % intervals.

    `test` is the "test" object of result.json; whether it is a classification's or a regression's is read off its keys.
    """
    save(steps_figure(test), path)


def learning(
    path: Path, starts: Mapping[str, Sequence[Row]], *, x_label: str = "epoch", kept: Mapping[str, int] | None = None
) -> None:
    """Loss, and where there is validation its accuracy or, of numbers, RMSE, against the epoch of fine-tuning, a line
    for each start.

    Rows hold "epoch", "loss" and perhaps "val_loss" and "val_accuracy" or "val_rmse". `kept` is the epoch whose
    parameters each start's classifier has, and is marked where it was chosen on validation.
    """
    save(learning_figure(starts, x_label, kept or {}), path)


def curves_figure(train: Sequence[Row], val: Sequence[Row], metric: str, best_step: int | None = None) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_curves(left, right, train, val, metric, best_step)
    return figure


def curves_apart(
    train: Sequence[Row], val: Sequence[Row], metric: str, best_step: int | None = None
) -> tuple[Figure, Figure]:
    """The same as two figures, for where there is no room beside one another."""
    figures = _narrow(), _narrow()
    _draw_curves(figures[0].subplots(), figures[1].subplots(), train, val, metric, best_step)
    return figures


def _narrow() -> Figure:
    return Figure(figsize=(4.6, 3.4), layout="constrained")


def _draw_curves(
    left: Axes, right: Axes, train: Sequence[Row], val: Sequence[Row], metric: str, best_step: int | None
) -> None:
    _training(left, train, "loss")
    _training(right, train, metric)
    series = _series([row["step"] for row in val], val, metric)
    for one in series:
        _band(right, one)
    if series:
        _mark_best(right, series[0], metric, best_step)
    if metric == "accuracy":
        percent(right)
    for axes, label in ((left, "training loss"), (right, _NAMES.get(metric, metric))):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        decorate(axes, "meta-step", label)


_VALIDATED = {"val_accuracy": "validation accuracy", "val_rmse": "validation RMSE"}


def learning_figure(starts: Mapping[str, Sequence[Row]], x_label: str, kept: Mapping[str, int]) -> Figure:
    validated = _validated(starts)[0] != ""
    figure = Figure(figsize=(9 if validated else 5.4, 3.6), layout="constrained")
    _draw_learning(list(np.atleast_1d(figure.subplots(1, 2 if validated else 1))), starts, x_label, kept)
    return figure


def learning_apart(starts: Mapping[str, Sequence[Row]], x_label: str, kept: Mapping[str, int]) -> list[Figure]:
    """The same as one figure for the loss and, where there is validation, one for what it measures."""
    figures = [_narrow() for _ in range(1 + (_validated(starts)[0] != ""))]
    _draw_learning([figure.subplots() for figure in figures], starts, x_label, kept)
    return figures


def _validated(starts: Mapping[str, Sequence[Row]]) -> tuple[str, str]:
    """(the key of what validation measures, its name), both empty where there is none."""
    there = {key for rows in starts.values() for row in rows for key in row}
    return next(((k, v) for k, v in _VALIDATED.items() if k in there), ("", ""))


def _draw_learning(
    panels: Sequence[Axes], starts: Mapping[str, Sequence[Row]], x_label: str, kept: Mapping[str, int]
) -> None:
    figure_of, title = _validated(starts)
    validated = figure_of != ""
    for (name, rows), (colour, style, marker) in zip(starts.items(), itertools.cycle(LOOKS), strict=False):
        epochs = [row["epoch"] for row in rows]
        look = {"color": colour, "ls": style, "lw": 1.6, "marker": marker, "ms": 3.5, "label": f"{name} start"}
        look["markevery"] = max(1, len(rows) // 10)
        panels[0].plot(epochs, [_number(row["loss"]) for row in rows], **look)
        if not any(figure_of in row for row in rows):
            continue
        panels[0].plot(
            epochs, [_number(row.get("val_loss")) for row in rows], color=colour, ls=":", lw=1.2,
            marker="_" if len(rows) == 1 else "", label=f"{name} start, validation",
        )  # fmt: skip
        panels[1].plot(epochs, [_number(row.get(figure_of)) for row in rows], **look)
        chosen = [row for row in rows if row["epoch"] == kept.get(name) and figure_of in row]
        for row in chosen:
            panels[1].plot(
                [row["epoch"]], [_number(row[figure_of])], ls="none", marker="*", ms=13, color=colour,
                mec="black", label=f"kept, {name}",
            )  # fmt: skip
    losses = [_number(row.get(key)) for rows in starts.values() for row in rows for key in ("loss", "val_loss")]
    _log_scale(panels[0], [loss for loss in losses if math.isfinite(loss)])
    if figure_of == "val_accuracy":
        percent(panels[1])
    for axes, label in zip(panels, ("loss" if validated else "training loss", title), strict=False):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        decorate(axes, x_label, label)


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
    """Where they span more than a decade; up to three of them with the numbers between the powers of ten."""
    if not values or min(values) <= 0 or max(values) <= 10 * min(values):
        return
    axes.set_yscale("log")
    log_ticks(axes.yaxis, values)


def steps_figure(test: Row) -> Figure:
    first = test.get(NORMS[0], test)
    metric = figure_of(first)
    count = len(first[f"{metric}_per_step"])
    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for one in _series(list(range(count)), [_after(test, metric, step) for step in range(count)], metric):
        _band(axes, one)
    axes.set_xlim(-0.3, count - 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if metric == "accuracy":
        task = f"{test['ways']}-way {test['shots']}-shot"
        _level(axes, 1 / test["ways"], "chance")
        if pixels := test.get("pixel_nearest_neighbour"):
            _level(axes, pixels["accuracy"], "pixel nearest\nneighbour", above=True)
        percent(axes, whole=True)
    else:
        task = f"{test['shots']}-shot {'regression' if metric == 'mse' else 'tasks'}"
        if metric == "mse":
            axes.set_ylim(bottom=0.0)
    decorate(axes, "inner step", _NAMES.get(metric, metric))
    axes.set_title(f"{task}: mean of {first['episodes']:,} tasks, 95% CI", fontsize=10)
    return figure


class _Series(NamedTuple):
    """Means with the half-widths of their 95 % intervals (NaN where there is none) along an axis of steps."""

    name: str
    steps: list[int]
    mean: np.ndarray
    ci95: np.ndarray


def _series(at: list[int], rows: Sequence[Row], metric: str) -> list[_Series]:
    """One series per normalisation mode; a single one where rows have no modes, or the modes agree everywhere."""
    if not rows:
        return []

    def read(name: str, parts: Sequence[Row]) -> _Series:
        values = np.array([(_number(part[metric]), _number(part["ci95"])) for part in parts])
        return _Series(name, at, values[:, 0], values[:, 1])

    series = [read(norm, [row[norm] for row in rows]) for norm in NORMS if all(norm in row for row in rows)]
    if not series:
        return [read("validation" if "step" in rows[0] else "mean", rows)]
    if len(series) == 2 and np.array_equal(series[0].mean, series[1].mean, equal_nan=True):
        return [series[0]._replace(name="both modes (they agree)")]  # a model without normalisation layers
    return series


def _after(test: Row, metric: str, step: int) -> Row:
    """The test object as a validation row would have it: the figures after one inner step only."""

    def pick(one: Row) -> Row:
        return {metric: one[f"{metric}_per_step"][step], "ci95": one["ci95_per_step"][step]}

    return {norm: pick(test[norm]) for norm in NORMS if norm in test} or pick(test)


def _band(axes: Axes, series: _Series) -> None:
    colour, style, marker = _LOOKS.get(series.name, _USUAL_LOOK)
    low, high = series.mean - series.ci95, series.mean + series.ci95
    axes.plot(
        series.steps, series.mean, color=colour, ls=style, lw=1.8, marker=marker if len(series.steps) <= 40 else "",
        ms=4.5, label=series.name,
    )  # fmt: skip
    if len(series.steps) == 1:  # a band of no width cannot be seen
        axes.vlines(series.steps, low, high, color=colour, lw=1.8)
    axes.fill_between(series.steps, low, high, color=colour, alpha=0.2, lw=0)


def _mark_best(axes: Axes, series: _Series, metric: str, best_step: int | None) -> None:
    if best_step is not None:
        if best_step not in series.steps:
            return
        best = series.steps.index(best_step)
    elif np.isfinite(series.mean).any():
        best = int(np.nanargmax(series.mean) if metric == "accuracy" else np.nanargmin(series.mean))
    else:
        return
    value = series.mean[best]
    shown = f"{value:.1%}" if metric == "accuracy" else f"{value:.3g}"
    axes.plot(
        [series.steps[best]], [value], ls="", marker="*", ms=13, mfc=YELLOW, mec=BLACK, mew=0.8, zorder=5,
        label=f"best: {shown} at step {series.steps[best]:,}",
    )  # fmt: skip


def _level(axes: Axes, value: float, name: str, *, above: bool = False) -> None:
    """A dotted line with its name at its right end, outside the axes, where no curve can run through it."""
    axes.axhline(value, color=GREY, lw=1.0, ls=":", zorder=1)
    axes.annotate(
        f"{name} {value:.0%}", (1, value), xycoords=axes.get_yaxis_transform(), xytext=(4, -4 if above else 4),
        textcoords="offset points", va="bottom" if above else "top", fontsize=8, color=GREY,
    )  # fmt: skip


def _training(axes: Axes, rows: Sequence[Row], key: str) -> None:
    """The raw values, faint under their running mean where there are enough of them to smooth."""
    if not rows:
        return
    at = [row["step"] for row in rows]
    values = np.array([_number(row[key]) for row in rows])
    window = _window(len(rows))
    if window == 1:
        axes.plot(at, values, color=GREY, lw=1.4, marker="o" if len(rows) == 1 else "", label="training")
        return
    axes.plot(at, values, color=GREY, alpha=0.35, lw=0.8, label="training")
    axes.plot(at, _running_mean(values, window), color=BLACK, lw=1.6, label=f"training, mean of {window} rows")


def _window(rows: int) -> int:
    """An odd number of rows, about a thirtieth of them; 1, no smoothing, below 30."""
    return 1 if rows < 30 else 2 * max(1, rows // 60) + 1


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each, over those that exist at the ends: unlike an exponential mean it does
    not lag. Values that are not finite are left out.

    >>> _running_mean(np.array([3.0, 0.0, 3.0, 6.0]), 3).tolist()
    [1.5, 2.0, 3.0, 4.5]
    """
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    n = count[high] - count[low]
    return np.where(n > 0, (total[high] - total[low]) / np.maximum(n, 1), np.nan)


def _number(value: float | None) -> float:
    """JSON has no NaN: a figure that does not exist is null there."""
    return math.nan if value is None else float(value)
