"""MAML and first-order MAML."""

from __future__ import annotations

import functools

from torch import Tensor

from metaft import inner
from metaft.algorithms.base import Algorithm, moments_for
from metaft.algorithms.query import query_loss
from metaft.errors import MetaftError
from metaft.models import Model
from metaft.types import Fast, Loss, Norm, Params


def maml(
    model: Model,
    *,
    loss: Loss = "cross_entropy",
    inner_lr: float = 0.4,
    inner_steps: int = 1,
    first_order: bool = False,
    adapt_norm: bool = True,
    norm: Norm = "transductive",
) -> Algorithm:
    """Model-Agnostic Meta-Learning: an initialisation from which a few gradient steps solve a new task.

    Finn, Abbeel and Levine 2017, https://arxiv.org/abs/1703.03400. Equation 1: fast = meta - inner_lr * grad of the
    support loss, repeated `inner_steps` times; the meta-objective (equations 2-4) is the query loss at fast, mean over
    the meta-batch (the paper writes a sum). `first_order` is the paper's section 5.2 approximation: the inner gradient
    counts as a constant, so the meta-gradient is the query gradient at fast.

    `adapt_norm=False` leaves scales and shifts of normalisation layers out of the inner loop, as the paper's code does;
    they are meta-learned all the same. With `norm="inductive"` training queries are normalised with the support set's
    moments at the fast weights, and the gradient runs through those too.

    Raises MetaftError for an inner_lr or inner_steps below 0.
    """
    if not inner_lr >= 0:
        raise MetaftError(f"inner_lr must be at least 0, got {inner_lr}")
    if inner_steps < 0:
        raise MetaftError(f"inner_steps must be at least 0, got {inner_steps}")
    adapted = [name for name in model.params if adapt_norm or name not in model.norm]

    def init(key: int) -> tuple[Params, Params]:
        return {name: p.clone() for name, p in model.params.items()}, {}

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
        def support_loss(params: Params) -> Tensor:
            return model.loss(params, support_x, support_y, loss, curvature=not first_order)[0]

        def finish(params: Params) -> Fast:
            return Fast(params, model.measure(params, support_x) if moments else (), {})

        states = inner.descend(support_loss, meta, steps=steps, lr=inner_lr, first_order=first_order, adapt=adapted)
        return inner.collect(states, finish, trajectory)

    def predict(fast: Fast, x: Tensor, norm: Norm) -> Tensor:
        return model.apply(fast.params, x, moments_for(norm, fast))

    return Algorithm(
        name="fomaml" if first_order else "maml",
        init=init,
        adapt=adapt,
        predict=predict,
        inner_steps=inner_steps,
        loss=loss,
        norm=norm,
        task_loss=query_loss(
            adapt, predict, ways=model.outputs, steps=inner_steps, loss=loss, norm=norm, loss_of=model.loss
        ),
    )


fomaml = functools.partial(maml, first_order=True)
"""First-order MAML: `maml` with every inner gradient taken as a constant."""
