"""UNICORN-MAML: all classes begin with one shared row of the head."""

from __future__ import annotations

import functools

from torch import Tensor

from metaft.algorithms.base import Algorithm
from metaft.algorithms.gradient import Hooks, by_gradient
from metaft.inner_augment import Augment
from metaft.inner_optim import InnerOptimizer
from metaft.models import Model
from metaft.types import Loss, Norm, Params


def unicorn_maml(
    model: Model,
    *,
    loss: Loss = "cross_entropy",
    inner_lr: float = 0.4,
    inner_steps: int = 5,
    inner_optimizer: str | InnerOptimizer = "sgd",
    inner_augment: str | Augment = "none",
    first_order: bool = False,
    adapt_norm: bool = True,
    norm: Norm = "transductive",
) -> Algorithm:
    """MAML whose learned head is one row (weight and bias), which each class of a task begins with a copy of.

    Ye and Chao 2022, https://arxiv.org/abs/2106.16245, "UNICORN-MAML": the result does not depend on how classes are
    numbered, a task may have any number of them, and the gradient of the shared row is the sum of the gradients that
    MAML has in each row.

    With cross-entropy that sum is 0: the same vector added to every row adds the same number to all logits of an image,
    which the loss does not see, in the inner loop as little as after it. So what is learned is the body, under a head
    whose rows begin alike. The shared row's gradient is nothing but rounding, of which an outer Adam makes steps of the
    size of any other: it drifts (an entry by 0.03 in 60 meta-steps), and no prediction changes by that. For the same
    reason the first inner step moves the head alone: from equal rows, what the classes send back into the body cancels.
    Hence more than one step.

    Not the paper's: second order by default (its code is first-order, `first_order=True` here), no division of the
    query logits by a temperature, no supervised pre-training of the body, fewer steps (there 15 and more), and the
    meta-gradient's mean over the meta-batch. `adapt_norm` is that of `maml`.

    Raises MetaftError for an inner_lr or inner_steps below 0, or an unknown optimiser.
    """
    model.check_head("unicorn-maml")
    return by_gradient(
        "unicorn-maml",
        model,
        loss=loss,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        inner_augment=inner_augment,
        first_order=first_order,
        norm=norm,
        adapted=[name for name in model.params if adapt_norm or name not in model.norm],
        learned={k: p[:1] if k in model.head else p for k, p in model.params.items()},
        hooks=Hooks(begin=functools.partial(_copies_of_the_row, model, loss)),
        any_ways=loss == "cross_entropy",
    )


def _copies_of_the_row(model: Model, loss: Loss, meta: Params, x: Tensor, y: Tensor, ways: int) -> Params:
    outputs = ways if loss == "cross_entropy" else model.outputs
    return {k: p.expand(outputs, *p.shape[1:]) if k in model.head else p for k, p in meta.items()}
