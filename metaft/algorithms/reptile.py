"""Reptile: go towards the weights that ordinary training on a task ends with."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metaft import inner_augment as inner_augments
from metaft import inner_optim
from metaft.algorithms.base import Algorithm, TaskGrad, apply_fast
from metaft.errors import check_count, check_rate, check_ways
from metaft.inner import collect, value_and_grad
from metaft.inner_augment import Augment
from metaft.inner_optim import InnerOptimizer
from metaft.keyed import minibatches
from metaft.metrics import figure, figure_name
from metaft.models import Model
from metaft.models.dropout import use_dropout
from metaft.types import Episode, Fast, Loss, Norm, Params

COUNT = "steps"
"""In `state`: inner steps that the kept moments have seen. A parameter's moments are called NAME.SLOT."""


def reptile(
    model: Model,
    *,
    loss: Loss = "cross_entropy",
    inner_lr: float = 1e-3,
    inner_steps: int = 5,
    inner_optimizer: str | InnerOptimizer = "adam:beta1=0",
    inner_augment: str | Augment = "none",
    norm: Norm = "transductive",
    batch_size: int = 10,
    keep_moments: bool = False,
) -> Algorithm:
    """Train on a task's images, support and query alike, and move the initialisation towards where that led.

    Nichol, Achiam and Schulman 2018, https://arxiv.org/abs/1803.02999, algorithm 2 (the batched version): meta <- meta
    + outer_lr * mean over tasks of (fast - meta). fast comes from `inner_steps` steps of `inner_optimizer`, each on the
    next `batch_size` images in an order that is a function of the task's key, or on all where there are fewer. Its
    "gradient" is meta - fast, so that an outer SGD of rate `outer_lr` is the paper's update; its rate falls linearly to
    0. At test the support images alone are trained on.

    Loss and accuracy of a meta-step are those of each mini-batch before its step, over the first pass through a task's
    images: no image counts after it was trained on. They begin at chance in each task and say little about a test.

    `keep_moments` hands the moments of `inner_optimizer` from task to task, as the authors' code does (here: their mean
    over the meta-batch), in `state`, and they are what a test begins with too; otherwise each task begins with none.

    Not the paper's: Adam's state is new in each task by default. `norm` says only by which figure a checkpoint is
    chosen: mini-batches are always normalised with their own moments.

    Raises MetaftError for an inner_lr below 0, inner_steps or a batch_size below 1, or an unknown optimiser.
    """
    check_ways("ways", model.outputs, loss)
    check_rate("inner_lr", inner_lr)
    check_count("inner_steps", inner_steps, 1)
    check_count("batch_size", batch_size, 1)
    optimizer, augment = inner_optim.make(inner_optimizer), inner_augments.named(inner_augment)
    training = _Training(model, loss, inner_lr, optimizer, augment, batch_size, keep_moments)
    return Algorithm(
        name="reptile",
        init=functools.partial(_init, training),
        adapt=functools.partial(_adapt, training),
        predict=functools.partial(apply_fast, model),
        inner_steps=inner_steps,
        loss=loss,
        norm=norm,
        task_grad=functools.partial(_task_grad, training, inner_steps),
        curvature=False,
        outputs=model.outputs,
    )


class _Training(NamedTuple):
    """Ordinary training on a task, without the task."""

    model: Model
    loss: Loss
    lr: float
    optimizer: InnerOptimizer
    augment: Augment
    batch_size: int
    keep_moments: bool


def _init(training: _Training, key: int) -> tuple[Params, Params]:
    meta = {k: p.clone() for k, p in training.model.params.items()}
    probe = next(iter(meta.values()))
    return meta, {**training.optimizer.init(meta), COUNT: probe.new_zeros(())} if training.keep_moments else {}


def _walk(
    training: _Training, meta: Params, state: Params, x: Tensor, y: Tensor, key: Tensor, steps: int
) -> Iterator[tuple[Params, Params, dict[str, Tensor]]]:
    """(parameters, the optimiser's state, metrics of the batch before the step) at the start and after each step"""
    loss, optimizer = training.loss, training.optimizer
    params, seen = meta, state.get(COUNT, 0)
    moments = {k: v for k, v in state.items() if k != COUNT} if training.keep_moments else optimizer.init(meta)
    yield params, moments, {}
    for step, rows in enumerate(minibatches(key, len(y), min(training.batch_size, len(y)), steps)):
        xs, ys = training.augment(x.index_select(0, rows), key, step), y.index_select(0, rows)
        batch_loss = functools.partial(_batch_loss, training, xs, ys, key, step)
        value, prediction, grads = value_and_grad(batch_loss, params, create_graph=False)
        directions, moments = optimizer.update(grads, moments, seen + step)
        params = {k: p - training.lr * directions[k] for k, p in params.items()}
        shown = figure(loss, prediction.detach(), ys)
        yield params, moments, {"loss": value.detach(), figure_name(loss): shown}


def _batch_loss(
    training: _Training, x: Tensor, y: Tensor, key: Tensor, step: int, params: Params
) -> tuple[Tensor, Tensor]:
    with use_dropout(key, step):
        return training.model.loss(params, x, y, training.loss)


def _adapt(
    training: _Training,
    meta: Params,
    state: Params,
    support_x: Tensor,
    support_y: Tensor,
    key: Tensor,
    *,
    ways: int,
    steps: int,
    trajectory: bool = False,
    moments: bool = True,
) -> Fast:
    def finish(params: Params) -> Fast:
        return Fast(params, training.model.measure(params, support_x) if moments else (), {})

    path = (params for params, _, _ in _walk(training, meta, state, support_x, support_y, key, steps))
    return collect(path, finish, trajectory)


def _task_grad(
    training: _Training, inner_steps: int, meta: Params, state: Params, knobs: Params, task: Episode
) -> TaskGrad:
    x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
    fast, moments, shown = meta, state, []
    for fast, moments, metrics in _walk(training, meta, state, x, y, task.key, inner_steps):  # noqa: B007
        shown.append(metrics)
    fresh = shown[1 : 1 + max(1, len(y) // training.batch_size)]  # of images that were not trained on before
    seen = {COUNT: state[COUNT] + inner_steps} if training.keep_moments else {}
    return TaskGrad(
        {k: p - fast[k] for k, p in meta.items()},
        {k: v - state[k] for k, v in {**moments, **seen}.items()} if training.keep_moments else {},
        {name: torch.stack([metrics[name] for metrics in fresh]).mean() for name in fresh[0]},
    )
