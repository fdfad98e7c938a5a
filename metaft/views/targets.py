"""The targets of a run of several: what each comes to on the backbone that they share, and alone."""

from __future__ import annotations

from metaft.finetune.results import of_targets
from metaft.views.base import Cell, Column, Missing, Table, View
from metaft.views.subject import Subject

_COLUMNS = [
    Column("target"), Column("classes"), Column("test images"), Column("together", ".1%"), Column("± 95 %", ".1%"),
    Column("alone", ".1%"), Column("± 95 %", ".1%"), Column("gain", ".1%"), Column("± 95 %", ".1%"), Column("draws"),
    Column("classifier"),
]  # fmt: skip


def targets(subject: Subject) -> View | Missing:
    if not subject.result.get("also"):
        return Missing("it is of a run with several targets (--also)")
    each = of_targets(subject.result)
    rows: list[list[Cell]] = [
        [
            of.data, len(of.classes), of.test_images, of.together["mean"]["accuracy"],
            of.together["mean"]["ci95"], of.alone["mean"]["accuracy"], of.alone["mean"]["ci95"], of.gain["mean"],
            of.gain["ci95"], of.gain["draws"], of.file,
        ]
        for of in each
    ]  # fmt: skip
    said = (
        f"{len(each)} targets were trained on one backbone, with a head for each, beside a model of each alone. The "
        f"rest of this page, and all of its pictures, are of the first one, {each[0].data}."
    )
    return View(said, [Table("Test accuracy of each target, the mean of the draws", _COLUMNS, rows)])
