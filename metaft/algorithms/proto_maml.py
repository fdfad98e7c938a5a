"""Proto-MAML: MAML from a head that is made of prototypes."""

from __future__ import annotations

import functools

from torch import Tensor

from metaft.algorithms.base import Algorithm
from metaft.algorithms.gradient import Hooks, by_gradient
from metaft.errors import MetaftError
from metaft.inner_augment import Augment
from metaft.inner_optim import InnerOptimizer
from metaft.metrics import label
from metaft.models import Model
from metaft.models.head import class_means
from metaft.types import Loss, Norm, Params


def proto_maml(
    model: Model,
    *,
    loss: Loss = "cross_entropy",
    inner_lr: float = 0.1,
    inner_steps: int = 1,
    inner_optimizer: str | InnerOptimizer = "sgd",
    inner_augment: str | Augment = "none",
    first_order: bool = False,
    adapt_norm: bool = True,
    norm: Norm = "transductive",
) -> Algorithm:
    """MAML whose head is not learned: each task's begins as the linear layer that ProtoNet amounts to.

    Triantafillou et al. 2020 (Meta-Dataset), https://arxiv.org/abs/1903.03096, the paragraph "Proto-MAML". With c the
    mean feature of a class's support images,

        -|f - c|^2 = 2 c . f - |c|^2 - |f|^2,

    whose last term is the same for all classes: row 2 c and bias -|c|^2 have ProtoNet's probabilities. From there head
    and body take `inner_steps` steps on the support loss, and the meta-gradient runs through the prototypes too. `meta`
    is the model without its head, so a task may have any number of classes.

    Not the paper's: its figures are those of `first_order=True` (fo-Proto-MAML), which here too keeps the gradient
    through the prototypes; and the meta-batch, of which it has none. Its batch normalisation is `norm="inductive"`.
    `adapt_norm` is that of `maml`.

    Raises MetaftError for a regression loss, a head without bias, an inner_lr or inner_steps below 0, or an unknown
    optimiser.
    """
    if loss == "mse":
        raise MetaftError(f"proto-maml classifies; it cannot learn a data set whose loss is {loss!r}")
    model.check_head("proto-maml")
    head = {name.rpartition(".")[2]: name for name in model.head}
    if head.keys() != {"weight", "bias"}:
        raise MetaftError(f"proto-maml needs a head with weight and bias, and this one has {', '.join(sorted(head))}")
    return by_gradient(
        "proto-maml",
        model,
        loss=loss,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        inner_augment=inner_augment,
        first_order=first_order,
        norm=norm,
        adapted=[name for name in model.params if adapt_norm or name not in model.norm],
        learned={name: p for name, p in model.params.items() if name not in model.head},
        hooks=Hooks(begin=functools.partial(_prototypes, model, loss, head["weight"], head["bias"])),
        any_ways=True,
    )


def _prototypes(
    model: Model, loss: Loss, weight: str, bias: str, meta: Params, x: Tensor, y: Tensor, ways: int
) -> Params:
    if y.is_floating_point():
        raise MetaftError(f"proto-maml classifies; it cannot learn targets of type {y.dtype} (loss {label(loss)!r})")
    c = class_means(model.features(meta, x, None), y, ways)
    return {**meta, weight: 2 * c, bias: -c.square().sum(-1)}
