"""The meta-gradient: one task's, and the mean over a meta-batch that an engine maps it over."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaft.algorithms.base import Algorithm, TaskGrad
from metaft.dist.ranks import ALONE, Ranks
from metaft.engines.base import Engine
from metaft.engines.trees import length
from metaft.errors import MetaftWarning
from metaft.inner import value_and_grad
from metaft.models.derivatives import math_attention
from metaft.support.modes import in_usual_modes_but_type
from metaft.types import Episode, Params


def task_grad(algorithm: Algorithm, meta: Params, state: Params, knobs: Params, task: Any) -> TaskGrad:
    """One task's meta-gradient: the member's own, or the gradient of its task loss in `meta`."""
    with math_attention() if algorithm.curvature else contextlib.nullcontext():
        return _task_grad(algorithm, meta, state, knobs, task)


def _task_grad(algorithm: Algorithm, meta: Params, state: Params, knobs: Params, task: Any) -> TaskGrad:
    if algorithm.task_grad is not None:
        return algorithm.task_grad(meta, state, knobs, task)
    task_loss = algorithm.task_loss
    assert task_loss is not None  # Algorithm checks that it has one of the two

    def of_meta(meta: Params) -> tuple[Tensor, tuple[Params, dict[str, Tensor]]]:
        return task_loss(meta, state, knobs, task)

    _, (state_delta, metrics), grads = value_and_grad(of_meta, meta, create_graph=False)
    return TaskGrad(grads, state_delta, metrics)


@functools.lru_cache(maxsize=16)
def task_grad_of(algorithm: Algorithm) -> Callable[[tuple[Params, Params, Params], Any], TaskGrad]:
    """`task_grad` as engines want it: one object per algorithm."""
    return lambda shared, task: task_grad(algorithm, *shared, task)


class MetaGradient(NamedTuple):
    """Mean over the meta-batch."""

    grads: Params
    state: Params
    """`state` plus the mean of the tasks' deltas."""
    metrics: dict[str, float]


@in_usual_modes_but_type
def meta_gradient(
    engine: Engine,
    algorithm: Algorithm,
    meta: Params,
    state: Params,
    tasks: Episode | Any,
    *,
    step: int = 0,
    ranks: Ranks = ALONE,
) -> MetaGradient:
    """Mean of the tasks' gradients in `meta`, summed in task order so that the bits do not depend on timing.

    `step` sets the algorithm's knobs. Of several `ranks` each gives its own tasks, at least one, and all get the mean
    over all tasks. Neither `meta` nor `state` is changed. Warns (MetaftWarning) of what the algorithm says to warn of,
    where a task met it.
    """
    # Mapping per-task gradients, not differentiating a mapped loss: the latter is silently wrong at second order for
    # batch normalisation under vmap.
    total = engine.sum(task_grad_of(algorithm), (meta, state, algorithm.schedule(step)), tasks)
    leaves, spec = pytree.tree_flatten(total)
    *leaves, count = ranks.sum_flat([*leaves, torch.tensor(float(length(tasks)), device=leaves[0].device)])
    mean: TaskGrad = pytree.tree_unflatten([leaf / int(count) for leaf in leaves], spec)
    metrics = {name: float(value) for name, value in mean.metrics.items()}
    for name, text in algorithm.cautions.items():
        if metrics[name] > 0:
            warnings.warn(text, MetaftWarning, stacklevel=2)
    return MetaGradient(
        grads=mean.grads,
        state={
            name: value + mean.state_delta[name] if name in mean.state_delta else value for name, value in state.items()
        },
        metrics=metrics,
    )
