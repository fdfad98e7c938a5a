"""The objective that most members share: adapt on the support set, be judged on the query set."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from metaft.algorithms.base import Adapt, Predict, TaskLoss
from metaft.metrics import FIGURES, LOSSES, figure
from metaft.models.functional import LossOf
from metaft.types import Episode, Fast, Loss, Norm, Params


def loss_at(
    predict: Predict, *, loss: Loss, norm: Norm, loss_of: LossOf | None = None
) -> Callable[[Fast, Episode], tuple[Tensor, Tensor]]:
    """(fast, one task) -> the loss of its queries, and their prediction; `loss_of` as in `query_loss`."""

    def value_and_prediction(fast: Fast, episode: Episode) -> tuple[Tensor, Tensor]:
        if loss_of is not None and norm == "transductive":
            return loss_of(fast.params, episode.query_x, episode.query_y, loss)
        prediction = predict(fast, episode.query_x, norm)
        return LOSSES[loss](prediction, episode.query_y), prediction

    return value_and_prediction


def metrics_of(loss: Loss, value: Tensor, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What a task logs: its loss, and its figure of merit."""
    return {"loss": value.detach(), FIGURES[loss]: figure(loss, prediction.detach(), target)}


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

    `loss_of` is the model's own `loss`, for members whose `predict` applies the model at the fast weights: it may be
    faster where the queries are normalised with their own moments.
    """
    judge = loss_at(predict, loss=loss, norm=norm, loss_of=loss_of)

    def task_loss(
        meta: Params, state: Params, knobs: Params, episode: Episode
    ) -> tuple[Tensor, tuple[Params, dict[str, Tensor]]]:
        fast = adapt(
            meta,
            state,
            episode.support_x,
            episode.support_y,
            episode.key,
            ways=episode.class_ids.shape[-1] if ways is None else ways,
            steps=steps,
            moments=norm == "inductive",  # transductive prediction has no use for them
        )
        value, prediction = judge(fast, episode)
        return value, ({}, metrics_of(loss, value, prediction, episode.query_y))

    return task_loss
