"""How a classifier was made smaller: what each step left of its time and its accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metaft.config import CompressConfig, read_toml
from metaft.options import from_mapping
from metaft.plots.smaller import smaller_figure
from metaft.views.base import Column, Missing, Of, Table, View
from metaft.views.images import chart
from metaft.views.subject import Subject

_COLUMNS = [
    Column("network"), Column("channels left", ".0%"), Column("parameters"), Column("FLOPs"), Column("bytes"),
    Column("of its time", ".2f"), Column("validation", ".1%"), Column("points lost", ".1f"), Column("test", ".1%"),
    Column("same label as the original", ".1%"),
]  # fmt: skip


def smaller(subject: Subject) -> View | Missing:
    made = subject.result.get("compressed")
    if subject.folder is None or made is None:
        return Missing("it is of a classifier that metaft.compress made smaller")
    asked = from_mapping(CompressConfig, read_toml(subject.folder.compress), origin=str(subject.folder.compress))
    steps, kept = made["steps"], made["kept"]
    rows = [
        [
            step["model"], step["share"], step["parameters"], step["flops"], step["bytes"], step["latency"],
            step["validation"]["accuracy"], step["validation"]["points"], step.get("accuracy"), step["agreement"],
        ]
        for step in steps
    ]  # fmt: skip
    judges = judges_of(subject.result)
    said = f"Asked for were {asked.latency:g} of the original's time and at most {asked.points:g} points of its "
    said += f"accuracy on {judges}; the network with {kept} is kept. "
    said += " ".join(f"Not reached: {line}." for line in made["unmet"]) or "Both are reached."
    of = Of(judges, "each image by itself", f"the original and {len(steps) - 1} smaller ones")
    alt = "; ".join(
        f"{s['model']}: {s['latency']:.2f} of the time, {100 * s['validation']['accuracy']:.1f} %" for s in steps
    )
    picture = chart("Accuracy over time", smaller_figure(steps, kept, asked.latency, asked.points), alt, of)
    return View(said, [picture, Table("All networks", _COLUMNS, rows)])


def judges_of(result: Mapping[str, Any]) -> str:
    """Which images the networks were judged by."""
    held = result["compressed"]["steps"][0]["validation"]["held"]
    if result["val_images"] and result["folds"] == 1:
        return f"{held} validation images"
    return f"{held} training images, each held back once in cross-validation"
