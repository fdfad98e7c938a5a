"""BOIL: body only update in inner loop."""

from __future__ import annotations

from metaft.algorithms.base import Algorithm
from metaft.algorithms.gradient import by_gradient
from metaft.errors import MetaftError
from metaft.inner_augment import Augment
from metaft.inner_optim import InnerOptimizer
from metaft.models import Model
from metaft.types import Loss, Norm


def boil(
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
    """MAML in whose inner loop only the body moves: features go to the rows of a head that all tasks share.

    Oh, Yoo, Kim and Yun 2021, https://arxiv.org/abs/2008.08882, the section on BOIL: MAML with a rate for the body and
    one for the head, of which the head's is 0 (in ANIL the body's is). The outer loop learns both. A task's labels are
    random, so before the first step the shared head can do no better than chance.

    `adapt_norm=False` keeps scales and shifts of normalisation layers out of the inner loop too, as in `maml`. Not the
    paper's: the meta-gradient's mean over the meta-batch, `first_order` (as in `maml`), and `norm="inductive"`.

    Raises MetaftError for an inner_lr or inner_steps below 0, an unknown optimiser, or a model that is nothing but a
    head.
    """
    adapted = [k for k in model.params if k not in model.head and (adapt_norm or k not in model.norm)]
    if not adapted:
        names = ", ".join(sorted(model.params))
        raise MetaftError(f"boil adapts all but the head, and {names} leave it nothing to adapt")
    return by_gradient(
        "boil",
        model,
        loss=loss,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        inner_augment=inner_augment,
        first_order=first_order,
        norm=norm,
        adapted=adapted,
    )
