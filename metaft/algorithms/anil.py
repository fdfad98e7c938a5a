"""ANIL: almost no inner loop."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from metaft.algorithms.base import Algorithm
from metaft.algorithms.gradient import Hooks, by_gradient
from metaft.errors import MetaftError
from metaft.inner_augment import Augment
from metaft.inner_optim import InnerOptimizer
from metaft.metrics import loss_value
from metaft.models import Model
from metaft.types import Loss, Norm, Params


def anil(
    model: Model,
    *,
    loss: Loss = "cross_entropy",
    inner_lr: float = 0.4,
    inner_steps: int = 1,
    inner_optimizer: str | InnerOptimizer = "sgd",
    inner_augment: str | Augment = "none",
    first_order: bool = False,
    norm: Norm = "transductive",
) -> Algorithm:
    """MAML in whose inner loop, in training and at test, only the head moves: the features are the learned ones.

    Raghu, Raghu, Bengio and Vinyals 2020, https://arxiv.org/abs/1909.09157, the section on the ANIL algorithm:
    of the layers 1..d only the last takes fast_d = meta_d - inner_lr * grad of the support loss, `inner_steps` times.
    The outer loop learns all of them, and its gradient runs through the inner steps of the head into the body.

    The support features are computed once for all inner steps, which then cost next to nothing. With dropout,
    `inner_augment`, or a module that `Model.of_head` is None for, each step runs the whole model instead.

    Not the paper's: the meta-gradient's mean over the meta-batch, `first_order` (as in `maml`), and `norm="inductive"`.

    Raises MetaftError for an inner_lr or inner_steps below 0, an unknown optimiser, or a head that is frozen.
    """
    if not model.head:
        raise MetaftError("anil adapts the head alone, and this module's is frozen (requires_grad=False)")
    same_features = not model.drops and inner_augment == "none"
    return by_gradient(
        "anil",
        model,
        loss=loss,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        inner_augment=inner_augment,
        first_order=first_order,
        norm=norm,
        adapted=model.head,
        hooks=Hooks(loss_on=functools.partial(_loss_of_head, model, loss, first_order)) if same_features else Hooks(),
    )


def _loss_of_head(
    model: Model, loss: Loss, first_order: bool, meta: Params, x: Tensor, y: Tensor
) -> Callable[[Params], Tensor] | None:
    # Of the first order nothing goes back into the body: no need to keep its activations.
    logits = model.of_head({k: p.detach() for k, p in meta.items()} if first_order else meta, x)
    return None if logits is None else lambda params: loss_value(loss, logits(params), y)
