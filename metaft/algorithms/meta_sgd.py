"""Meta-SGD: the rates of the inner loop are learned."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from metaft.algorithms.base import Algorithm
from metaft.algorithms.gradient import Hooks, by_gradient
from metaft.inner_augment import Augment
from metaft.inner_optim import InnerOptimizer
from metaft.models import Model
from metaft.types import Loss, Norm, Params

RATE = ".rate"
"""Ends the name of a parameter's rates. No model has such a name, since below a parameter there can be no module."""


def meta_sgd(
    model: Model,
    *,
    loss: Loss = "cross_entropy",
    inner_lr: float = 0.4,
    inner_steps: int = 1,
    inner_optimizer: str | InnerOptimizer = "sgd",
    inner_augment: str | Augment = "none",
    first_order: bool = False,
    adapt_norm: bool = True,
    norm: Norm = "transductive",
) -> Algorithm:
    """MAML with a learned rate for each entry of each parameter, which gives direction and length of a step.

    Li, Zhou, Chen and Li 2017, https://arxiv.org/abs/1707.09835, algorithm 1: fast = meta - rate * grad of the support
    loss, elementwise, and the query loss at fast is minimised in the parameters and in the rates, by the same outer
    optimiser. Rates may become negative. They stand in `meta` beside the parameters, "NAME.rate" for NAME.

    Not the paper's: all rates begin at `inner_lr` (there at random values in 0.005..0.1); `inner_steps` above 1 use the
    same rates in each step (there is one step); the meta-gradient's mean over the meta-batch; `first_order`, which
    takes the inner gradient, but not the rates, for a constant; and `norm="inductive"`. With `adapt_norm=False` scales
    and shifts of normalisation layers stay out of the inner loop, as in `maml`, and have no rates.

    Raises MetaftError for an inner_lr or inner_steps below 0, or an unknown optimiser.
    """
    adapted = [name for name in model.params if adapt_norm or name not in model.norm]
    return by_gradient(
        "meta-sgd",
        model,
        loss=loss,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        inner_augment=inner_augment,
        first_order=first_order,
        norm=norm,
        adapted=adapted,
        learned={**model.params, **{k + RATE: torch.full_like(model.params[k], inner_lr) for k in adapted}},
        hooks=Hooks(rates=functools.partial(_rates, adapted)),
    )


def _rates(adapted: Sequence[str], meta: Params) -> Params:
    return {name: meta[name + RATE] for name in adapted}
