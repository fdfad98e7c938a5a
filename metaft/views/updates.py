"""How far training moved each layer, step by step, and which units are dead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metaft import updates
from metaft.errors import CheckpointError
from metaft.plots.layers import layers_figure
from metaft.runs.folder import read_rows
from metaft.views.base import Cell, Column, Missing, Of, Part, Table, View
from metaft.views.images import chart
from metaft.views.subject import Subject

MOST = 24
"""Rows of a picture; more layers are taken together by the beginnings of their names."""

_FEW = 3
"""Layers that a sentence names, at most."""


def updates_of_training(subject: Subject) -> View | Missing:
    if subject.command == "start":
        return Missing("a start is not trained here")
    rows = _rows(subject)
    if not rows:
        inner = subject.command == "adapt" and subject.result["method"] == "inner"
        return Missing(
            "the run's own inner loop fine-tuned it, which the page of that run shows" if inner
            else "the run has no updates.jsonl, as those of earlier versions"
        )  # fmt: skip
    names, figures = by_layer(rows)
    steps = [row["step"] for row in rows]
    of = Of(f"{len(steps)} of its steps, each measured by itself", "as training computes", _span(steps))
    seen, mode = "one task's support images, before any inner step", "transductive"
    if subject.command == "adapt":
        seen, mode = "the last images that went through at once", "as evaluation computes"
    of_dead = Of(f"{len(steps)} of its steps, each of {seen}", mode, _span(steps))
    parts: list[Part] = []
    for key, title, log, share in _PICTURES:
        values = figures[key]
        if not np.isfinite(values).any():
            continue
        dead = key == "dead"
        shown = [i for i in range(len(names)) if np.isfinite(values[i]).any()]
        drawn = values[shown]
        figure = layers_figure(
            [names[i] for i in shown], steps, drawn, title, x_label=_step(subject), log=log, share=share,
            limits=(0.0, 1.0) if dead else None,
        )  # fmt: skip
        ends = f"{_said(np.nanmin(drawn), share)} to {_said(np.nanmax(drawn), share)}"
        parts.append(
            chart(
                title, figure, f"{title} of {len(shown)} layers in {len(steps)} steps: {ends}", of_dead if dead else of
            )
        )
    parts.append(_table(rows))
    return View(meaning(rows), parts)


_PICTURES = (
    ("update", "Update over weights", True, True),
    ("gradient", "Norm of the gradient", True, False),
    ("moved", "Distance from the start over weights", False, True),
    ("dead", "Units that are 0 for all images looked at", False, True),
)
"""(key, title, whether colours are of its logarithm, whether it is a share)."""


def _rows(subject: Subject) -> list[dict[str, Any]]:
    """Those of the run, or of the first start that was fitted. Raises CheckpointError where they are damaged."""
    assert subject.folder is not None
    file = subject.folder.updates
    rows = read_rows(file, ["step"])
    for row in rows:
        if not _is_row(row, subject.command == "adapt"):
            raise CheckpointError(f"run: {file}: a row is not one that a run writes: {str(row)[:60]}")
    if subject.command == "meta_train" or not rows:
        return rows
    first = next((s["name"] for s in subject.result["starts"] if any(r["start"] == s["name"] for r in rows)), None)
    return [row for row in rows if row["start"] == first]


def _is_row(row: Mapping[str, Any], tagged: bool) -> bool:
    layers = row.get("layers")
    if not isinstance(layers, dict) or not layers or (tagged and not isinstance(row.get("start"), str)):
        return False
    needed = ("weights", "gradient", "distance")
    return all(
        isinstance(own, dict)
        and all(isinstance(own.get(key), (int, float)) for key in needed)
        and all(isinstance(own.get(key, 0.0), (int, float, type(None))) for key in ("update", "dead"))
        and "update" in own
        for own in layers.values()
    )


def _order(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All layers, from the input to the head: as in the row that has the most, and what else there is behind."""
    return list(dict.fromkeys(name for row in sorted(rows, key=lambda r: -len(r["layers"])) for name in row["layers"]))


def by_layer(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, np.ndarray]]:
    """(names of layers, or of groups of them; each figure [layers, steps], and "moved", the distance from the start
    over the weights that a layer had when it was first measured)."""
    order = _order(rows)
    group = updates.grouped(order, MOST)
    names = list(dict.fromkeys(group[name] for name in order))
    values = {key: np.full((len(names), len(rows)), math.nan) for key in (*updates.FIGURES, "moved")}
    begun: dict[str, float] = {}  # of each layer: those of a group may begin to move one after the other
    for k, row in enumerate(rows):
        for i, name in enumerate(names):
            parts = [own for layer, own in row["layers"].items() if group[layer] == name]
            if not parts:
                continue
            found = updates.joined(parts)
            layers = [layer for layer in row["layers"] if group[layer] == name]
            for layer in layers:
                begun.setdefault(layer, row["layers"][layer]["weights"])
            weighed = math.hypot(*(begun[layer] for layer in layers))
            found["moved"] = (found["distance"] or 0.0) / weighed if weighed > 0 else None
            for key in values:
                values[key][i, k] = math.nan if (value := found[key]) is None else value
    return names, values


def meaning(rows: Sequence[Mapping[str, Any]]) -> str:
    """What to read from the rows, in a few sentences."""
    names, figures = by_layer(rows)
    moved, dead = figures["moved"], figures["dead"]
    update = np.array(
        [np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in figures["update"]]
    )
    said = (
        "Each row is a layer, from the input to the head, each column a step that was measured. A layer that moves far "
        "less than others learns little; one whose updates are a large share of its weights in each step may be shaken "
        "rather than trained."
    )
    if np.isfinite(update).any():
        high, low = int(np.nanargmax(update)), int(np.nanargmin(update))
        when = "in the median of those steps" if len(rows) > 1 else "in the one step that was measured"
        said += f" {names[high]} moved the most, by {percent(update[high])} of its weights {when}"
        said += f", and {names[low]} the least, by {percent(update[low])}." if low != high else "."
    last = [float(row[np.isfinite(row)][-1]) if np.isfinite(row).any() else -1.0 for row in moved]
    if max(last) >= 0:
        far = int(np.argmax(last))
        said += f" From where it began {names[far]} is the farthest, by {percent(last[far])} of what its weights were."
    if np.isfinite(dead).any():
        said += f" {_of_dead(names, dead)}"
    return said


def _of_dead(names: Sequence[str], dead: np.ndarray) -> str:
    last = [float(row[np.isfinite(row)][-1]) if np.isfinite(row).any() else 0.0 for row in dead]
    some = sorted((i for i in range(len(names)) if last[i] > 0), key=lambda i: -last[i])
    if not some:
        return "Behind every ReLU all units were above 0 for some example of the last batch that was measured."
    listed = ", ".join(f"{percent(last[i])} behind {names[i]}" for i in some[:_FEW])
    more = f" and less in {len(some) - _FEW} more" if len(some) > _FEW else ""
    return (
        f"Units that are 0 for all images get no gradient from them: in the last step that was measured {listed}{more}."
    )


def percent(share: float) -> str:
    """In two digits.

    >>> percent(1.5), percent(0.0123), percent(1.23e-5), percent(1e-9), percent(0.0)
    ('150 %', '1.2 %', '0.0012 %', 'under 0.001 %', '0 %')
    """
    if 0 < share < 1e-5:
        return "under 0.001 %"
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _said(value: float, share: bool) -> str:
    return percent(value) if share else f"{value:.3g}"


def _span(steps: Sequence[int]) -> str:
    return f"{steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f"{steps[0]:,}"


def _step(subject: Subject) -> str:
    return "meta-step" if subject.command == "meta_train" else "step"


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Each layer by itself, as it was when last measured, and the median of its updates."""
    columns = [
        Column("layer"), Column("weights", ".3g"), Column("update / weights, median", ".2g"), Column("last", ".2g"),
        Column("gradient", ".3g"), Column("distance", ".3g"), Column("dead", ".1%"), Column("steps"),
    ]  # fmt: skip
    cells: list[list[Cell]] = []
    for name in _order(rows):
        own = [row["layers"][name] for row in rows if name in row["layers"]]
        shares = sorted(each["update"] for each in own if each["update"] is not None)
        median = float(np.median(shares)) if shares else None
        last = own[-1]
        cells.append([
            name, last["weights"], median, last["update"], last["gradient"], last["distance"], last.get("dead"),
            len(own),
        ])  # fmt: skip
    return Table("Each layer when it was last measured", columns, cells)
