"""The objective that most members share: adapt on the support set, be judged on the query set."""

from __future__ import annotations

from torch import Tensor

from metaft.algorithms.base import Adapt, Predict, TaskLoss
from metaft.metrics import FIGURES, LOSSES, figure
from metaft.types import Episode, Loss, Norm, Params


def query_loss(adapt: Adapt, predict: Predict, *, ways: int | None, steps: int, loss: Loss, norm: Norm) -> TaskLoss:
    """Loss of one task's queries after `steps` inner steps. `ways=None` reads them off each episode's class_ids."""

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
        prediction = predict(fast, episode.query_x, norm)
        value = LOSSES[loss](prediction, episode.query_y)
        metrics = {"loss": value.detach()}
        metrics[FIGURES[loss]] = figure(loss, prediction.detach(), episode.query_y)
        return value, ({}, metrics)

    return task_loss
