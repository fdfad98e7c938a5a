"""The objective that most members share: adapt on the support set, be judged on the query set."""

from __future__ import annotations

from torch import Tensor

from metaft.algorithms.base import Adapt, Predict, TaskLoss
from metaft.metrics import FIGURES, LOSSES, figure
from metaft.models.functional import LossOf
from metaft.types import Episode, Loss, Norm, Params


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
        if loss_of is not None and norm == "transductive":
            value, prediction = loss_of(fast.params, episode.query_x, episode.query_y, loss)
        else:
            prediction = predict(fast, episode.query_x, norm)
            value = LOSSES[loss](prediction, episode.query_y)
        metrics = {"loss": value.detach()}
        metrics[FIGURES[loss]] = figure(loss, prediction.detach(), episode.query_y)
        return value, ({}, metrics)

    return task_loss
