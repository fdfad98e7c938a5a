"""Small stand-ins for the hard members of the family: what the contract must carry before anything is built on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaft import inner
from metaft.algorithms.base import Algorithm, TaskGrad, moments_for
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


def reptile(model: Model, norm: Norm) -> Algorithm:
    """Mini-batches, an Adam of its own (beta1 = 0) whose moments outlive the task, an update that is no gradient."""
    lr, beta, eps = 0.01, 0.99, 1e-8

    def init(key: int) -> tuple[Params, Params]:
        zeros = {f"v.{k}": torch.zeros_like(p) for k, p in model.params.items()}
        return dict(model.params), {**zeros, "t": torch.zeros((), dtype=torch.float64)}

    def walk(meta: Params, state: Params, x: Tensor, y: Tensor, steps: int) -> Any:
        params, moments = meta, dict(state)
        yield params, moments
        for step in range(steps):
            rows = slice(step % 2, None, 2)
            _, _, grads = inner.value_and_grad(
                lambda p, rows=rows: (_support_loss(model, x[rows], y[rows])(p), ()), params, create_graph=False
            )
            t = moments["t"] + 1
            v = {k: beta * moments[f"v.{k}"] + (1 - beta) * g.square() for k, g in grads.items()}
            hat = {k: (m / (1 - beta**t)).sqrt() + eps for k, m in v.items()}
            params = {k: p - lr * grads[k] / hat[k].to(p.dtype) for k, p in params.items()}
            moments = {**{f"v.{k}": m.to(grads[k].dtype) for k, m in v.items()}, "t": t}
            yield params, moments

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

        states = (params for params, _ in walk(meta, state, support_x, support_y, steps))
        return inner.collect(states, finish, trajectory)

    predict = _predict(model)

    def task_grad(meta: Params, state: Params, knobs: Params, task: Episode) -> TaskGrad:
        x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
        *_, (params, moments) = walk(meta, state, x, y, STEPS)
        fast = Fast(params, model.measure(params, x), {})
        logits = predict(fast, task.query_x, norm)
        return TaskGrad(
            {k: meta[k] - params[k] for k in meta},
            {k: moments[k] - state[k] for k in state},
            _metrics(F.cross_entropy(logits, task.query_y), logits, task.query_y),
        )

    return Algorithm("toy-reptile", init, adapt, predict, STEPS, "cross_entropy", norm, task_grad=task_grad)


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


def imaml(model: Model, norm: Norm) -> Algorithm:
    """Conjugate gradients at the end of the inner loop instead of a derivative through it."""
    adapt, predict, strength = _descend(model), _predict(model), 10.0

    def task_grad(meta: Params, state: Params, knobs: Params, task: Episode) -> TaskGrad:
        fast = adapt(meta, state, *task[:2], task.key, ways=model.outputs, steps=STEPS, moments=norm == "inductive")
        logits: list[Tensor] = []

        def query(params: Params) -> tuple[Tensor, Tensor]:
            z = predict(Fast(params, fast.moments, {}), task.query_x, norm)
            return F.cross_entropy(z, task.query_y), z

        loss, z, b = inner.value_and_grad(query, fast.params, create_graph=False)
        logits.append(z)

        def product(v: Params) -> Params:
            def along(params: Params) -> tuple[Tensor, tuple[()]]:
                _, _, g = inner.value_and_grad(
                    lambda p: (_support_loss(model, *task[:2])(p), ()), params, create_graph=True
                )
                return torch.stack([(g[k] * v[k]).sum() for k in g]).sum(), ()

            _, _, hv = inner.value_and_grad(along, fast.params, create_graph=False)
            return {k: v[k] + hv[k] / strength for k in v}

        x = {k: torch.zeros_like(t) for k, t in b.items()}
        r, p = dict(b), dict(b)
        rr = torch.stack([t.square().sum() for t in r.values()]).sum()
        for _ in range(3):
            ap = product(p)
            alpha = rr / torch.stack([(p[k] * ap[k]).sum() for k in p]).sum()
            x = {k: x[k] + alpha * p[k] for k in x}
            r = {k: r[k] - alpha * ap[k] for k in r}
            new = torch.stack([t.square().sum() for t in r.values()]).sum()
            p = {k: r[k] + new / rr * p[k] for k in p}
            rr = new
        return TaskGrad(x, {}, _metrics(loss, logits[0], task.query_y))

    return Algorithm(
        "toy-imaml",
        lambda key: (dict(model.params), {}),
        adapt,
        predict,
        STEPS,
        "cross_entropy",
        norm,
        task_grad=task_grad,
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
