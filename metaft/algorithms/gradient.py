"""Members whose inner loop is gradient descent on the support loss and whose objective is the query loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from metaft import inner, inner_optim
from metaft import inner_augment as inner_augments
from metaft.algorithms.base import Algorithm, apply_fast
from metaft.algorithms.query import query_loss
from metaft.errors import check_count, check_rate, check_ways
from metaft.inner_augment import Augment
from metaft.inner_optim import InnerOptimizer
from metaft.models import Model
from metaft.models.dropout import use_dropout
from metaft.models.norm import is_differentiated
from metaft.types import Fast, Loss, Norm, Params


class Hooks(NamedTuple):
    """What a member's inner loop does in another way than MAML's: pure functions of one task, each MAML's by default.

    `meta` is what is learned, `params` what the inner loop works on.
    """

    begin: Callable[[Params, Tensor, Tensor, int], Params] | None = None
    """(meta, support_x, support_y, ways) -> the weights before the first step, through which the meta-gradient runs.
    None: the model's parameters in `meta`."""
    rates: Callable[[Params], inner.Rates] | None = None
    """meta -> what each direction of the inner optimiser is multiplied by. None: `inner_lr`."""
    at: Callable[[Params, int], Params] = lambda meta, step: {}
    """(meta, step) -> parameters that do not move, but are others in inner step 0, 1, ... and in predictions after
    it."""
    weights: Callable[[Params], Params] = lambda params: params
    """params -> the model's parameters, where what the inner loop works on are others."""
    loss_on: Callable[[Params, Tensor, Tensor], Callable[[Params], Tensor] | None] = lambda meta, x, y: None
    """(meta, support_x, support_y) -> the support loss as a function of the model's parameters, where all steps share
    part of the work. None: they share none."""
    penalty: Callable[[Params, Params], Tensor] | None = None
    """(meta, params) -> a scalar that is minimised besides the support loss."""


MAML = Hooks()
"""None of its own."""


class _Descent(NamedTuple):
    """An inner loop without its task."""

    model: Model
    loss: Loss
    lr: float
    optimizer: InnerOptimizer
    augment: Augment
    first_order: bool
    adapted: Sequence[str]
    halvings: int
    hooks: Hooks


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
    hooks: Hooks = MAML,
    halvings: int = 0,
    any_ways: bool = False,
) -> Algorithm:
    """MAML, up to which parameters move, from where, and how fast.

    `adapted` names the parameters that the inner loop moves; the others keep their learned values. `learned` is the
    first `meta`, where that is not the model's parameters; `hooks` are what a member does in its own way; `halvings` is
    how often a step may be halved until the support loss falls.

    Dropout acts in the support loss of each step, and `inner_augment` on its images, in training and at test; masks and
    shifts follow from the task's key and the step. Prototypes, moments and predictions see neither.

    Raises MetaftError for a model that tells no classes apart under cross-entropy, an inner_lr or inner_steps below 0,
    or an unknown optimiser or augmentation.
    """
    check_ways("ways", model.outputs, loss)
    check_rate("inner_lr", inner_lr)
    check_count("inner_steps", inner_steps, 0)
    optimizer, augment = inner_optim.make(inner_optimizer), inner_augments.named(inner_augment)
    descent = _Descent(model, loss, inner_lr, optimizer, augment, first_order, adapted, halvings, hooks)
    adapt, predict = functools.partial(_adapt, descent), functools.partial(apply_fast, model)
    return Algorithm(
        name=name,
        init=functools.partial(_init, model.params if learned is None else learned),
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
        outputs=None if any_ways else model.outputs,
        adapts_head=not set(model.head).isdisjoint(adapted),
    )


def _init(learned: Params, key: int) -> tuple[Params, Params]:
    return {k: p.clone() for k, p in learned.items()}, {}


def _adapt(
    descent: _Descent,
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
    if not is_differentiated():  # as in a test
        descent = descent._replace(first_order=True)
    model, hooks = descent.model, descent.hooks
    of_weights = hooks.loss_on(meta, support_x, support_y) if steps else None

    def support_loss(params: Params, step: int) -> Tensor:
        weights = hooks.weights({**params, **hooks.at(meta, step)})
        if of_weights is None:
            value = _loss_in_step(descent, weights, support_x, support_y, key, step)
        else:
            value = of_weights(weights)
        return value if hooks.penalty is None else value + hooks.penalty(meta, params)

    def finish(params: Params) -> Fast:
        fast = hooks.weights(params)
        return Fast(fast, model.measure(fast, support_x) if moments else (), {})

    if hooks.begin is None:
        start = {name: meta[name] for name in model.params}
    else:
        start = hooks.begin(meta, support_x, support_y, ways)
    path = inner.descend(
        support_loss, start, steps=steps, lr=descent.lr if hooks.rates is None else hooks.rates(meta),
        first_order=descent.first_order, adapt=descent.adapted, optimizer=descent.optimizer, halvings=descent.halvings,
    )  # fmt: skip
    after = ({**params, **hooks.at(meta, max(step - 1, 0))} for step, params in enumerate(path))
    return inner.collect(after, finish, trajectory)


def _loss_in_step(descent: _Descent, weights: Params, x: Tensor, y: Tensor, key: Tensor, step: int) -> Tensor:
    x = descent.augment(x, key, step)
    with use_dropout(key, step):
        value, _ = descent.model.loss(weights, x, y, descent.loss, curvature=not descent.first_order)
    return value
