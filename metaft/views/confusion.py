"""Which classes are taken for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metaft.plots.confusion import confusion_figure
from metaft.views.base import Cell, Column, Missing, Of, Table, View
from metaft.views.images import chart
from metaft.views.subject import Subject


def confusion(subject: Subject) -> View | Missing:
    if subject.command != "adapt":
        return Missing("classes are taken for each other by a classifier, and metaft.adapt makes one")
    result = subject.result
    names = result["classes"]
    if not names:
        return Missing("labels are numbers")
    first = result["starts"][0]
    pairs = mixed_up(first["confusion"], names)
    said = "A row is a true class, a column what it was taken for."
    if pairs:
        worst = ", ".join(f"{a} for {b} ({n} of {of})" for a, b, n, of in pairs[:3])
        said += f" Most often mixed up: {worst}."
    else:
        said += " No test image was labelled wrong."
    of = Of(f"{result['test_images']} test images", "each image by itself", subject.kept)
    figure = confusion_figure(first["confusion"], names)
    columns = [Column("class"), Column("test images"), *(Column(name, ".1%") for name in ("precision", "recall", "F1"))]
    columns += [Column("most often taken for")]
    taken = {a: f"{b} ({n})" for a, b, n, _ in reversed(pairs)}
    rows: list[list[Cell]] = [_row(row, taken) for row in first["per_class"]]
    return View(said, [chart("Confusion matrix", figure, said, of), Table("Classes", columns, rows)])


def _row(row: Mapping[str, Any], taken: Mapping[str, str]) -> list[Cell]:
    figures = [row[key] for key in ("test_images", "precision", "recall", "f1")]
    return [row["class"], *figures, taken.get(row["class"], "")]


def mixed_up(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """(true class, taken for, how many, of how many) for each cell off the diagonal that is not 0, the most first.

    >>> mixed_up([[3, 1], [2, 4]], ["ant", "bee"])
    [('bee', 'ant', 2, 6), ('ant', 'bee', 1, 4)]
    """
    cells = [
        (names[true], names[other], n, sum(row))
        for true, row in enumerate(matrix)
        for other, n in enumerate(row)
        if n and other != true
    ]
    return sorted(cells, key=lambda cell: -cell[2])
