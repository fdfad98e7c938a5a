"""Small stand-ins for the hard members of the family: what the contract must carry before anything is built on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaft import inner
from metaft.algorithms.base import Algorithm, moments_for
from metaft.algorithms.query import query_loss
from metaft.metrics import figure
from metaft.models import Model
from metaft.types import Episode, Fast, Norm, Params

STEPS = 3


def _support_loss(model: Model, x: Tensor, y: Tensor) -> Any:
    return lambda params: F.cross_entropy(model.apply(params, x, None), y)


def _predict(model: Model) -> Any:
    def predict(fast: Fast, x: Tensor, norm: Norm) -> Tensor:
        return model.apply(fast.params, x, moments_for(norm, fast))

    return predict


def _metrics(loss: Tensor, logits: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"loss": loss.detach(), "accuracy": figure("cross_entropy", logits.detach(), y)}


def _descend(model: Model, lr: float = 0.1) -> Any:
    def adapt(
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
            return Fast(params, model.measure(params, support_x) if moments else (), {})

        start = {k: meta[k] for k in model.params}
        loss = _support_loss(model, support_x, support_y)
        states = inner.descend(lambda params, step: loss(params), start, steps=steps, lr=lr)
        return inner.collect(states, finish, trajectory)

    return adapt


def multi_step(model: Model, norm: Norm) -> Algorithm:
    """The loss after every inner step counts, with weights that change during training."""
    adapt, predict = _descend(model), _predict(model)

    def task_loss(meta: Params, state: Params, knobs: Params, task: Episode) -> Any:
        every = adapt(meta, state, *task[:2], task.key, ways=model.outputs, steps=STEPS, trajectory=True)
        logits = [predict(inner.at_step(every, s), task.query_x, norm) for s in range(1, STEPS + 1)]
        losses = torch.stack([F.cross_entropy(z, task.query_y) for z in logits])
        loss = (knobs["weights"].to(losses.dtype) * losses).sum()
        return loss, ({}, _metrics(loss, logits[-1], task.query_y))

    def schedule(step: int) -> Params:
        late = min(1.0, step / 10)
        return {"weights": torch.tensor([(1 - late) / STEPS] * (STEPS - 1) + [late + (1 - late) / STEPS])}

    return Algorithm(
        "toy-multi-step",
        lambda key: (dict(model.params), {}),
        adapt,
        predict,
        STEPS,
        "cross_entropy",
        norm,
        task_loss=task_loss,
        schedule=schedule,
    )


def with_state(model: Model, norm: Norm) -> Algorithm:
    """A running mean of the query loss, kept in `state` and subtracted from the loss it is made of."""
    adapt, predict = _descend(model), _predict(model)
    plain = query_loss(adapt, predict, ways=model.outputs, steps=1, loss="cross_entropy", norm=norm)

    def task_loss(meta: Params, state: Params, knobs: Params, task: Episode) -> Any:
        loss, (_, metrics) = plain(meta, state, knobs, task)
        delta = {"mean": 0.1 * (loss.detach() - state["mean"]), "tasks": torch.ones_like(state["tasks"])}
        return (loss - state["mean"].to(loss.dtype)).square(), (delta, metrics)

    def init(key: int) -> tuple[Params, Params]:
        dtype = next(iter(model.params.values())).dtype
        return dict(model.params), {"mean": torch.zeros((), dtype=dtype), "tasks": torch.zeros((), dtype=dtype)}

    return Algorithm("toy-state", init, adapt, predict, 1, "cross_entropy", norm, task_loss=task_loss)
