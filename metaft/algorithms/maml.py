"""MAML and first-order MAML."""

from __future__ import annotations

import functools

from metaft.algorithms.base import Algorithm
from metaft.algorithms.gradient import by_gradient
from metaft.inner_augment import Augment
from metaft.inner_optim import InnerOptimizer
from metaft.models import Model
from metaft.types import Loss, Norm


def maml(
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
    """Model-Agnostic Meta-Learning: an initialisation from which a few gradient steps solve a new task.

    Finn, Abbeel and Levine 2017, https://arxiv.org/abs/1703.03400. Equation 1: fast = meta - inner_lr * grad of the
    support loss, repeated `inner_steps` times; the meta-objective (equations 2-4) is the query loss at fast, mean over
    the meta-batch (the paper writes a sum). `first_order` is the paper's section 5.2 approximation: the inner gradient
    counts as a constant, so the meta-gradient is the query gradient at fast.

    `adapt_norm=False` leaves scales and shifts of normalisation layers out of the inner loop, as the paper's code does;
    they are meta-learned all the same. With `norm="inductive"` training queries are normalised with the support set's
    moments at the fast weights, and the gradient runs through those too.

    Raises MetaftError for an inner_lr or inner_steps below 0, or an unknown optimiser.
    """
    return by_gradient(
        "fomaml" if first_order else "maml",
        model,
        loss=loss,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        inner_augment=inner_augment,
        first_order=first_order,
        norm=norm,
        adapted=[name for name in model.params if adapt_norm or name not in model.norm],
    )


fomaml = functools.partial(maml, first_order=True)
"""First-order MAML: `maml` with every inner gradient taken as a constant."""
