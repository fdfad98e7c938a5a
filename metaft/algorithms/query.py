"""The objective that most members share: adapt on the support set, be judged on the query set."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from metaft.algorithms.base import Adapt, Predict, TaskLoss
from metaft.errors import check_ways
from metaft.metrics import figure, figure_name, loss_value
from metaft.models.functional import LossOf
from metaft.types import Episode, Fast, Loss, Norm, Params

Judge = Callable[[Fast, Episode], tuple[Tensor, dict[str, Tensor]]]
"""(fast weights, one task) -> (loss of its queries, metrics)"""


def judge(predict: Predict, *, loss: Loss, norm: Norm, loss_of: LossOf | None = None) -> Judge:
    """The loss of a task's queries, and what is reported of it.

    `loss_of` is the model's own `loss`, for members whose `predict` applies the model at the fast weights: it may be
    faster where the queries are normalised with their own moments.
    """
    return functools.partial(_judged, predict, loss, norm, loss_of)


def _judged(
    predict: Predict, loss: Loss, norm: Norm, loss_of: LossOf | None, fast: Fast, episode: Episode
) -> tuple[Tensor, dict[str, Tensor]]:
    if loss_of is not None and norm == "transductive":
        value, prediction = loss_of(fast.params, episode.query_x, episode.query_y, loss)
    else:
        prediction = predict(fast, episode.query_x, norm)
        value = loss_value(loss, prediction, episode.query_y)
    shown = figure(loss, prediction.detach(), episode.query_y)
    return value, {"loss": value.detach(), figure_name(loss): shown}


def query_loss(
    adapt: Adapt,
    predict: Predict,
    *,
    ways: int | None,
    steps: int,
    loss: Loss,
    norm: Norm,
    loss_of: LossOf | None = None,
) -> TaskLoss:
    """Loss of one task's queries after `steps` inner steps. `ways=None` reads them off each episode's class_ids.

    `loss_of` is as in `judge`.
    """
    judged = judge(predict, loss=loss, norm=norm, loss_of=loss_of)
    return functools.partial(_query_loss, adapt, judged, ways, steps, loss, norm)


def _query_loss(
    adapt: Adapt,
    judged: Judge,
    ways: int | None,
    steps: int,
    loss: Loss,
    norm: Norm,
    meta: Params,
    state: Params,
    knobs: Params,
    episode: Episode,
) -> tuple[Tensor, tuple[Params, dict[str, Tensor]]]:
    classes = episode.class_ids.shape[-1] if ways is None else ways
    check_ways("ways", classes, loss)
    fast = adapt(
        meta,
        state,
        episode.support_x,
        episode.support_y,
        episode.key,
        ways=classes,
        steps=steps,
        moments=norm == "inductive",  # transductive prediction has no use for them
    )
    value, metrics = judged(fast, episode)
    return value, ({}, metrics)
