"""Loss and accuracy on the way, training against validation, and what the difference means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from metaft.finetune.range_test import said_of
from metaft.finetune.words import called
from metaft.objective import figure_of
from metaft.options import flat
from metaft.plots.lines import curves_apart, learning_apart, steps_figure
from metaft.plots.range_test import range_test_figure
from metaft.types import NORMS
from metaft.views.base import Cell, Column, Missing, Of, Part, Table, View
from metaft.views.images import chart
from metaft.views.smaller import judges_of
from metaft.views.subject import Subject

_LAST = 10  # rows of training that are taken together as its end


def training(subject: Subject) -> View | Missing:
    if subject.command == "start":
        return Missing("a start is not trained here")
    if not subject.rows:
        return Missing("metrics.jsonl has no rows")
    return _of_meta_training(subject) if subject.command == "meta_train" else _of_fine_tuning(subject)


def _of_meta_training(subject: Subject) -> View | Missing:
    result, rows = subject.result, subject.rows
    train, val = ([row for row in rows if row["kind"] == kind] for kind in ("train", "val"))
    test = result["test"]
    metric = figure_of(test[NORMS[0]])
    best = result["best_step"]
    loss, figure = curves_apart(train, val, metric, best)
    mode = _mode_of(val, subject)
    tasks = f"{_whole(subject, 'meta_batch')} tasks a step, {_whole(subject, 'eval_episodes')} in validation"
    of = Of(tasks, mode, f"all {result['iterations']:,} meta-steps")
    name = {"mse": "mean squared error"}.get(metric, metric)
    said = meaning(train, val, metric, best)
    parts: list[Part] = [
        chart("Training loss", loss, f"Loss of training tasks against the meta-step. {said}", of),
        chart(
            f"{name.capitalize()} in training and validation", figure,
            f"{name} of training tasks, and of validation tasks with 95 % intervals, against the meta-step. {said}", of,
        ),
    ]  # fmt: skip
    steps = test[NORMS[0]][f"{metric}_per_step"]
    if len(steps) > 1:
        episodes = f"{test[NORMS[0]]['episodes']:,} test episodes"
        after = Of(episodes, "both, as the legend says", f"inner steps 0 to {len(steps) - 1} at meta-step {best:,}")
        alt = f"{name} on test tasks before the first inner step and after each: {_listed(steps, metric)}"
        parts.append(chart("What inner steps add", steps_figure(test), alt, after))
    parts.append(_table_of_steps(test, metric))
    return View(f"{said} Validation and test tasks are of classes that training never saw.", parts)


def _mode_of(val: Sequence[Mapping[str, Any]], subject: Subject) -> str:
    modes = [norm for norm in NORMS if val and all(norm in row for row in val)]
    return " and ".join(modes) or str(_setting(subject, "batch_norm"))


def _setting(subject: Subject, name: str) -> Any:
    return None if subject.config is None else flat(subject.config).get(name)


def _whole(subject: Subject, name: str) -> str:
    value = _setting(subject, name)
    return "?" if value is None else f"{value:,}"


def _table_of_steps(test: Mapping[str, Any], metric: str) -> Table:
    """A row for each inner step."""
    form = ".1%" if metric == "accuracy" else ".4g"
    columns = [Column("inner step"), *(Column(c, form) for norm in NORMS for c in (norm, "± 95 %"))]
    count = len(test[NORMS[0]][f"{metric}_per_step"])
    rows: list[list[Cell]] = [
        [step, *(test[norm][key][step] for norm in NORMS for key in (f"{metric}_per_step", "ci95_per_step"))]
        for step in range(count)
    ]
    return Table("Meta-test after each inner step", columns, rows)


def meaning(train: Sequence[Mapping[str, Any]], val: Sequence[Mapping[str, Any]], metric: str, best_step: int) -> str:
    """What the two curves say of each other, in a sentence or two."""
    last = [float(row[metric]) for row in train[-_LAST:] if row.get(metric) is not None]
    points = [(int(row["step"]), *_figure_of(row, metric)) for row in val]
    best = next((p for p in points if p[0] == best_step), None)
    if not last or best is None:
        return "Without a finite validation figure there is nothing to compare training with."
    share, unit = sum(last) / len(last), _unit(metric)
    over = f"the mean of its last {len(last)} rows" if len(last) > 1 else "its last row"
    said = (
        f"Training is at {unit(share)} ({over}) on the queries of its own classes; validation, on other classes, was "
        f"best at step {best_step:,} with {unit(best[1])}."
    )
    end = points[-1]
    if end[0] == best_step:
        return said + " That was the last time it was looked at, so more steps may do better yet."
    worse = (best[1] - end[1]) * (1 if metric == "accuracy" else -1)
    if worse > math.hypot(best[2], end[2]) > 0:
        return said + (
            f" It was clearly worse at the end ({unit(end[1])}): later steps fit the training classes. The best step "
            "is the one that is kept."
        )
    return said + " It did not get clearly worse afterwards, so there is no sign of fitting the training classes alone."


def _figure_of(row: Mapping[str, Any], metric: str) -> tuple[float, float]:
    part = next((row[norm] for norm in NORMS if norm in row), row)
    values = (part.get(metric), part.get("ci95"))
    mean, ci95 = (math.nan if v is None else float(v) for v in values)
    return mean, 0.0 if math.isnan(ci95) else ci95


def _unit(metric: str) -> Any:
    return (lambda v: f"{100 * v:.1f} %") if metric == "accuracy" else (lambda v: f"{v:.4g}")


def _listed(values: Sequence[float | None], metric: str) -> str:
    shown = [math.nan if v is None else v for v in values]
    return ", ".join(map(_unit(metric), shown[:: max(1, (len(shown) - 1) // 10)]))


def _of_fine_tuning(subject: Subject) -> View | Missing:
    result = subject.result
    rows = [row for row in subject.rows if row["draw"] == 0 and row.get("fold", 0) == 0]
    starts = [start for start in result["starts"] if start["name"] != "probe"]
    curves = {start["name"]: [row for row in rows if row["start"] == start["name"]] for start in starts}
    curves = {name: own for name, own in curves.items() if own}
    if not curves:
        return Missing("metrics.jsonl has no rows of the first draw")
    kept = {start["name"]: start["kept_epoch"] for start in starts}
    what = "inner step" if result["method"] == "inner" else "epoch"
    parts: list[Part] = []
    images = f"{result['train_images']} training images, {result['val_images']} to validate"
    of = Of(images, "as each fit trains", f"{what}s of the first draw")
    changed = bool(result.get("extra")) or bool(result.get("label_smoothing"))
    judges = judges_of(result) if "compressed" in result else None
    said = gap(curves, kept, what, changed=changed, judges=judges)
    for figure, title in zip(learning_apart(curves, what, kept), ("Loss", "Validation"), strict=False):
        parts.append(chart(title, figure, f"{title} of {', '.join(curves)} against the {what}. {said}", of))
    if "range_test" in result:
        parts.append(_range_test(result["range_test"], images))
    parts.append(_table_of_starts(result))
    warned = [f"{called(start)}: {warning}." for start in result["starts"] for warning in start.get("warnings", ())]
    return View(" ".join([said, *warned]), parts)


def _range_test(test: Mapping[str, Any], images: str) -> Part:
    of = Of(images, "as the fit trains", f"{len(test['rates'])} steps from the start, of a fit that is thrown away")
    said = f"Training loss against the learning rate, which grows in each step. {said_of(test)}"
    return chart("Range test of the rate", range_test_figure(test), said, of)


def gap(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    kept: Mapping[str, Any],
    what: str,
    *,
    changed: bool = False,
    judges: str | None = None,
) -> str:
    """What training and validation loss say of each other at the epoch that was kept, for the first start: nothing
    where the training loss was `changed`. `judges` are images by which whole networks were judged, and no epochs."""
    name, rows = next(iter(curves.items()))
    row = next((row for row in rows if row["epoch"] == kept[name]), rows[-1])
    loss, val = row["loss"], row.get("val_loss")
    if loss is None:
        return f"The loss of the {name} start was not finite."
    said = f"At the {what} that is kept, {row['epoch']:g}, the training loss of the {name} start is {loss:.3g}"
    if val is None and judges is not None:
        return said + f"; no {what} was chosen, the network was: by {judges}."
    if val is None:
        return said + "; no images were set aside for validation, so the test alone says how new images fare."
    if changed:
        return said + (
            f" and the validation loss {val:.3g}, which cannot be compared: extras or smoothing change the first alone."
        )
    if val > 2 * loss:
        return said + (
            f" and the validation loss {val:.3g}, {val / max(loss, 1e-12):.3g} times as much: it knows its own images "
            "better than new ones, as is usual with few."
        )
    if val > 1.25 * loss:
        return said + f" and the validation loss {val:.3g}, {val / loss:.3g} times as much: new images fare worse."
    return said + f" and the validation loss {val:.3g}: new images fare about as well as those it was trained on."


def _table_of_starts(result: Mapping[str, Any]) -> Table:
    """The test figures of each start in the first draw, and the mean of all."""
    if not result["classes"]:
        names = (("MAE", "mae"), ("RMSE", "rmse"), ("R²", "r2"))
        columns = [Column("start"), *(Column(name, ".4g") for name, _ in names), Column("epochs")]
        rows: list[list[Cell]] = [[called(s), *(s[key] for _, key in names), s["epochs"]] for s in result["starts"]]
        return Table("Test figures of the first draw", columns, rows)
    names = (
        ("accuracy", "accuracy"), ("balanced", "balanced_accuracy"), ("macro F1", "macro_f1"),
        ("calibration error", "calibration_error"),
    )  # fmt: skip
    columns = [Column("start"), *(Column(name, ".1%") for name, _ in names), Column("epochs")]
    columns += [Column("mean of draws", ".1%"), Column("± 95 %", ".1%"), Column("draws")]
    rows = [
        [
            called(s), *(s[key] for _, key in names), s["epochs"], s["mean"]["accuracy"], s["mean"]["ci95"],
            s["mean"]["draws"],
        ]
        for s in result["starts"]
    ]  # fmt: skip
    return Table("Test figures of the first draw", columns, rows)
