"""How far inner steps move each layer on one task, before and after meta-training."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from metaft import updates
from metaft.algorithms.base import Algorithm
from metaft.errors import CheckpointError, MetaftError
from metaft.plots.layers import layers_figure, limits_of
from metaft.runs.assemble import fill
from metaft.runs.snapshot import load_snapshot
from metaft.types import Episode, Params
from metaft.views.base import Missing, Of, Part, View
from metaft.views.images import chart
from metaft.views.subject import Subject
from metaft.views.updates import MOST, percent

Paths = dict[str, tuple[list[float], list[float]]]
"""By layer (norm of the update of inner steps 1 to K over the norm of the weights before it, distance from the start
after steps 0 to K over the norm of the start's weights)."""


def inner_updates(subject: Subject) -> View | Missing:
    if subject.command != "meta_train":
        return Missing("it is of meta-training, whose tasks take inner steps")
    try:
        parts, best = subject.assembled
        [task] = subject.tasks("val", 1)
    except MetaftError:
        return Missing("the run's data, or what else it was made with, are not at hand")
    c = parts.config
    steps = c.test.test_inner_steps
    if steps == 0:
        return Missing("its tasks take no inner steps")
    assert subject.folder is not None
    stages = {"after": best}
    with contextlib.suppress(CheckpointError):  # of an earlier version, as the caption says
        stages = {"before": fill(parts, load_snapshot(subject.folder.first)), **stages}
    paths = {
        stage: inner_paths(parts.algorithm, s.meta, s.state, task, ways=c.test.test_ways, steps=steps)
        for stage, s in stages.items()
    }
    if not any(paths.values()):
        return Missing("its inner steps move no learned parameter")
    shown: list[Part] = []
    for number, (title, log) in enumerate((("Update over weights", True), ("Distance over weights", False))):
        drawn = {stage: _values(own, number) for stage, own in paths.items() if own}
        limits = limits_of(np.concatenate([values.ravel() for _, values in drawn.values()]), log=log)
        for stage, (names, values) in drawn.items():
            at = list(range(1 - number, steps + 1))
            of = Of("1 validation task", c.learner.batch_norm, f"{_when(stage, best.position.step)}, each inner step")
            head = f"{title}, {stage} meta-training"
            figure = layers_figure(names, at, values, title, x_label="inner step", log=log, share=True, limits=limits)
            ends = f"{percent(np.nanmin(values))} to {percent(np.nanmax(values))}"
            shown.append(chart(head, figure, f"{head}: {len(names)} layers in {steps} inner steps, {ends}", of))
    return View(_meaning(paths, steps), shown)


@torch.no_grad()
def inner_paths(algorithm: Algorithm, meta: Params, state: Params, task: Episode, *, ways: int, steps: int) -> Paths:
    """Of those layers that the inner loop moves, on one task."""
    fast = algorithm.adapt(
        meta, state, task.support_x, task.support_y, task.key, ways=ways, steps=steps, trajectory=True, moments=False
    )
    moved: dict[str, list[torch.Tensor]] = {}
    for name, values in fast.params.items():
        if name in meta and not torch.equal(values[0], values[-1]):
            moved.setdefault(updates.layer_of(name), []).append(values.double().flatten(1))
    return {layer: _path(torch.cat(values, 1)) for layer, values in moved.items()}


def _path(w: torch.Tensor) -> tuple[list[float], list[float]]:
    """`w` [steps + 1, numbers]."""
    norms = torch.linalg.vector_norm(w, dim=1)
    by_step = torch.linalg.vector_norm(w[1:] - w[:-1], dim=1) / norms[:-1]
    far = torch.linalg.vector_norm(w - w[0], dim=1) / norms[0]
    return by_step.tolist(), far.tolist()


def _values(paths: Paths, number: int) -> tuple[list[str], np.ndarray]:
    """(names, values [layers, steps]) of a picture; of too many layers the first and last ones."""
    names = list(paths)
    names = names if len(names) <= MOST else [*names[: MOST // 2], *names[-(MOST // 2) :]]
    values = np.array([paths[name][number] for name in names])
    return names, np.where(np.isfinite(values), values, np.nan)


def _when(stage: str, step: int) -> str:
    return "meta-step 0" if stage == "before" else f"meta-step {step:,}"


def _meaning(paths: dict[str, Paths], steps: int) -> str:
    said = (
        f"The first validation task: how far each of {steps} inner steps moves each layer, and how far it is then from "
        "where the task began, as shares of its weights. Colours mean the same before and after meta-training."
    )
    for stage, own in paths.items():
        if own:
            far = max(own, key=lambda layer: own[layer][1][-1])
            said += f" {stage.capitalize()} it, {far} goes the farthest, by {percent(own[far][1][-1])}"
            said += f", of {len(own)} layers that move." if len(own) > 1 else ", the one layer that moves."
        else:
            said += f" {stage.capitalize()} it no layer moves."
    return said if "before" in paths else f"{said} What the run began with was not kept, so there is nothing before."
