"""Members whose inner loop is gradient descent on the support loss and whose objective is the query loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from metaft import inner, inner_optim
from metaft import inner_augment as inner_augments
from metaft.algorithms.base import Algorithm, moments_for
from metaft.algorithms.query import query_loss
from metaft.errors import MetaftError, check_ways
from metaft.inner_augment import Augment
from metaft.inner_optim import InnerOptimizer
from metaft.models import Model
from metaft.models.dropout import use_dropout
from metaft.types import Fast, Loss, Norm, Params


def by_gradient(
    name: str,
    model: Model,
    *,
    loss: Loss,
    inner_lr: float,
    inner_steps: int,
    inner_optimizer: str | InnerOptimizer = "sgd",
    inner_augment: str | Augment = "none",
    first_order: bool,
    norm: Norm,
    adapted: Sequence[str],
    learned: Params | None = None,
    begin: Callable[[Params, Tensor, Tensor, int], Params] | None = None,
    rates: Callable[[Params], inner.Rates] | None = None,
    at: Callable[[Params, int], Params] | None = None,
    weights: Callable[[Params], Params] = lambda params: params,
    loss_on: Callable[[Params, Tensor, Tensor], Callable[[Params], Tensor] | None] = lambda meta, x, y: None,
    penalty: Callable[[Params, Params], Tensor] | None = None,
    halvings: int = 0,
    any_ways: bool = False,
) -> Algorithm:
    """MAML, up to which parameters move, from where, and how fast.

    `adapted` names the parameters that the inner loop moves; the others keep their learned values. What a member may
    have of its own: `learned`, the first `meta`, where that is not the model's parameters; `begin(meta, support_x,
    support_y, ways)`, the weights before the first step, through which the meta-gradient runs; `rates(meta)` in the
    place of `inner_lr`, what each direction of `inner_optimizer` is multiplied by (see `metaft.inner.Rates`);
    `at(meta, step)`, parameters that do not move but are others in inner step 0, 1, ... and in predictions after it;
    `weights(params)`, the model's parameters, where what the inner loop works on are others; `loss_on(meta, support_x,
    support_y)`, the support loss as a function of those, where all steps share part of the work (None: they do not);
    `penalty(meta, params)`, what it minimises besides; and `halvings`, how often a step may be halved until that falls.

    Dropout acts in the support loss of each step, and `inner_augment` on its images, in training and at test; masks and
    shifts follow from the task's key and the step. Prototypes, moments and predictions see neither.

    Raises MetaftError for a model that tells no classes apart under cross-entropy, an inner_lr or inner_steps below 0,
    or an unknown optimiser or augmentation.
    """
    check_ways("ways", model.outputs, loss)
    if not 0 <= inner_lr < math.inf:
        raise MetaftError(f"inner_lr must be at least 0 and finite, got {inner_lr}")
    if inner_steps < 0:
        raise MetaftError(f"inner_steps must be at least 0, got {inner_steps}")
    optimizer, augment = inner_optim.make(inner_optimizer), inner_augments.named(inner_augment)
    first = model.params if learned is None else learned

    def init(key: int) -> tuple[Params, Params]:
        return {k: p.clone() for k, p in first.items()}, {}

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
        def at_step(params: Params, step: int) -> Params:
            return params if at is None else {**params, **at(meta, step)}

        prepared = loss_on(meta, support_x, support_y) if steps else None

        def support_loss(params: Params, step: int) -> Tensor:
            at_weights = weights(at_step(params, step))
            if prepared is not None:
                value = prepared(at_weights)
            else:
                x = augment(support_x, key, step)
                with use_dropout(key, step):
                    value, _ = model.loss(at_weights, x, support_y, loss, curvature=not first_order)
            return value if penalty is None else value + penalty(meta, params)

        def finish(params: Params) -> Fast:
            fast = weights(params)
            return Fast(fast, model.measure(fast, support_x) if moments else (), {})

        start = meta if begin is None else begin(meta, support_x, support_y, ways)
        lr = inner_lr if rates is None else rates(meta)
        states = inner.descend(
            support_loss, start, steps=steps, lr=lr, first_order=first_order, adapt=adapted, optimizer=optimizer,
            halvings=halvings,
        )  # fmt: skip
        return inner.collect((at_step(p, max(s - 1, 0)) for s, p in enumerate(states)), finish, trajectory)

    def predict(fast: Fast, x: Tensor, norm: Norm) -> Tensor:
        return model.apply(fast.params, x, moments_for(norm, fast))

    return Algorithm(
        name=name,
        init=init,
        adapt=adapt,
        predict=predict,
        inner_steps=inner_steps,
        loss=loss,
        norm=norm,
        task_loss=query_loss(
            adapt,
            predict,
            ways=None if any_ways else model.outputs,
            steps=inner_steps,
            loss=loss,
            norm=norm,
            loss_of=model.loss,
        ),
        curvature=not first_order,
        any_ways=any_ways,
        adapts_head=not set(model.head).isdisjoint(adapted),
    )
