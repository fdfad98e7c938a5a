"""One test task step by step: its support images, and what is thought of its queries after each inner step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from metaft.algorithms.base import Algorithm
from metaft.errors import MetaftError
from metaft.inner import at_step
from metaft.plots.grid import displayable, letter
from metaft.plots.regression import regression_figure
from metaft.plots.task import task_figure
from metaft.runs.assemble import Parts
from metaft.support.names import short_names
from metaft.types import Episode as Task
from metaft.types import Norm, Params
from metaft.views.base import Episode, Missing, Of, Part, Query, View
from metaft.views.images import chart, thumbnail
from metaft.views.subject import Subject

_QUERIES, _SHOTS, _CLASSES, _STEPS = 15, 5, 8, 6
"""At most so many queries, support images of a class, columns and rows of a query's table are shown."""


def episode(subject: Subject) -> View | Missing:
    if subject.command != "meta_train":
        return Missing("it is of meta-training, whose tasks adapt step by step")
    try:
        parts, best = subject.assembled
        [task] = subject.tasks("test", 1)
    except MetaftError:
        return Missing("the run's data, or what else it was made with, are not at hand")
    c = parts.config
    steps, norm = c.test.test_inner_steps, c.learner.batch_norm
    with torch.no_grad():
        outputs = outputs_of(
            parts.algorithm, best.meta, best.state, task, ways=c.test.test_ways, steps=steps, norm=norm
        )
    of = Of(
        f"1 task, {len(task.query_y)} queries", norm, f"inner steps 0 to {steps} at meta-step {best.position.step:,}"
    )
    if task.support_y.is_floating_point():
        return _of_curve(task, outputs, of)
    if parts.algorithm.loss != "cross_entropy" or task.query_x[0].dim() != 3:
        return Missing("its tasks are of no images in classes")
    return _of_images(parts, task, outputs.softmax(-1), of)


def outputs_of(
    algorithm: Algorithm, meta: Params, state: Params, task: Task, *, ways: int, steps: int, norm: Norm
) -> Tensor:
    """[steps + 1, queries, outputs] before the first inner step and after each one."""
    fast = algorithm.adapt(
        meta, state, task.support_x, task.support_y, task.key, ways=ways, steps=steps, trajectory=True
    )
    return torch.stack([algorithm.predict(at_step(fast, step), task.query_x, norm) for step in range(steps + 1)])


def _of_images(parts: Parts, task: Task, probabilities: Tensor, of: Of) -> View:
    steps, n, ways = probabilities.shape
    own = probabilities[:, torch.arange(n), task.query_y].double().cpu().numpy()
    accuracy = (probabilities.argmax(-1) == task.query_y).double().mean(-1).cpu().numpy()
    said = (
        f"The first test task: {steps - 1} inner steps on the support images below. Its {n} queries give their own "
        f"class {100 * own[0].mean():.1f} % before the first step and {100 * own[-1].mean():.1f} % after the last; "
        f"{100 * accuracy[0]:.1f} % of them are labelled right before, {100 * accuracy[-1]:.1f} % after. "
        "It is one task of many; the meta-test above is the mean."
    )
    known = getattr(parts.dataset, "class_names", None)
    names = [""] * ways if known is None else short_names([str(known[int(i)]) for i in task.class_ids])
    shown: list[Part] = []
    if steps > 1:
        alt = f"Mean probability of the own class: {', '.join(f'{100 * p:.0f} %' for p in own.mean(1)[:11])}"
        shown.append(chart("Queries on their way", task_figure(own, accuracy), alt, of))
    support, query = displayable(task.support_x, task.query_x)
    support, query = ((255 * each).round().astype(np.uint8) for each in (support, query))
    classes = [
        (letter(k), names[k], [thumbnail(support[int(i)]) for i in (task.support_y == k).nonzero()[:_SHOTS]])
        for k in range(ways)
    ]
    rows = rows_shown(task.query_y.tolist(), ways, _QUERIES)
    at = steps_shown(steps - 1)
    queries = [_query(query[i], int(task.query_y[i]), probabilities[:, i], at) for i in rows]
    note = "" if len(rows) == n else f", of which {len(rows)} are shown"
    shown.append(
        Episode("Support images and queries, probabilities in %", classes, queries, of._replace(n=of.n + note))
    )
    return View(said, shown)


def _query(pixels: np.ndarray, label: int, probabilities: Tensor, at: Sequence[int]) -> Query:
    """`probabilities` [steps + 1, ways] of one query."""
    last = probabilities[-1]
    columns = sorted({label, *last.topk(min(_CLASSES, len(last))).indices.tolist()[: _CLASSES - 1]})
    if len(last) <= _CLASSES:
        columns = list(range(len(last)))
    rows = [(str(step), probabilities[step, columns].tolist()) for step in at]
    right = int(last.argmax()) == label
    alt = f"query of class {letter(label)}, taken for {letter(int(last.argmax()))} after the last step"
    return Query(thumbnail(pixels), alt, letter(label), right, [letter(k) for k in columns], rows)


def rows_shown(labels: Sequence[int], ways: int, most: int) -> list[int]:
    """The first queries of each class, as many of each, class by class.

    >>> rows_shown([1, 0, 1, 0, 1], 2, 4), rows_shown([2, 1, 0], 3, 2)
    ([1, 3, 0, 2], [2, 1])
    """
    each = max(1, most // ways)
    rows = [i for k in range(ways) for i in [i for i, label in enumerate(labels) if label == k][:each]]
    return rows[:most]


def steps_shown(last: int) -> list[int]:
    """At most six of 0, 1, ..., `last`, closer together where more changes.

    >>> steps_shown(0), steps_shown(3), steps_shown(5), steps_shown(100)
    ([0], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 3, 10, 32, 100])
    """
    if last < _STEPS:
        return list(range(last + 1))
    return [0, *(round(last ** (i / (_STEPS - 2))) for i in range(_STEPS - 1))]


def _of_curve(task: Task, outputs: Tensor, of: Of) -> View | Missing:
    if task.query_x[0].numel() != 1 or task.query_y[0].numel() != 1:
        return Missing("its tasks are of no images in classes, and of no curve")
    order = task.query_x.flatten().argsort()
    last = len(outputs) - 1
    lines = {
        "before" if step == 0 else f"after {step} step{'s' * (step != 1)}": outputs[step].flatten()[order]
        for step in sorted({0, min(1, last), last})
    }
    errors = ((outputs.flatten(1) - task.query_y.flatten()) ** 2).mean(1).tolist()
    figure = regression_figure(
        task.support_x.flatten(), task.support_y.flatten(), task.query_x.flatten()[order],
        task.query_y.flatten()[order], lines,
    )  # fmt: skip
    said = (
        f"The first test task: a curve of which {len(task.support_y)} points are known. The mean squared error on its "
        f"{len(task.query_y)} queries is {errors[0]:.3g} before the first inner step and {errors[-1]:.3g} after {last}."
    )
    return View(said, [chart("One task", figure, said, of)])
