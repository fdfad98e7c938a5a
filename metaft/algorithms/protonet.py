"""Prototypical networks."""

from __future__ import annotations

import functools

from torch import Tensor

from metaft.algorithms.base import Algorithm, moments_for
from metaft.algorithms.query import query_loss
from metaft.errors import MetaftError
from metaft.inner import collect
from metaft.metrics import label
from metaft.models import Model
from metaft.models.head import class_means
from metaft.types import Fast, Loss, Norm, Params


def protonet(
    model: Model, *, loss: Loss = "cross_entropy", scale: float = 1.0, norm: Norm = "transductive"
) -> Algorithm:
    """Classify by the nearest class mean in a learned feature space; nothing is adapted by gradient.

    Snell, Swersky and Zemel 2017, https://arxiv.org/abs/1703.05175. Equation 1: the prototype of class n is the mean
    feature of its support images; equation 2: the logit of class n is minus the squared Euclidean distance to it.
    `meta` is the model without its head, so any number of classes can be met at test.

    Not the paper's: `scale`, which multiplies the distance (there 1), as in Oreshkin, Rodriguez and Lacoste 2018,
    https://arxiv.org/abs/1805.10123. Distances grow with the number of features: the 1,600 of Conv-4 on images of
    84x84 have first losses of 15 to 300, and learning shrinks them before it tells classes apart; 1/64 avoids that.

    Transductive here means that support and query are each normalised with their own statistics; inductive that
    queries take the support set's. (The paper's code normalises both sets in one batch.)

    Raises MetaftError for a regression loss or a scale that is not above 0.
    """
    if loss != "cross_entropy":
        raise MetaftError(f"protonet classifies; it cannot learn a data set whose loss is {label(loss)!r}")
    if not scale > 0:
        raise MetaftError(f"scale must be above 0, got {scale}")

    adapt, predict = functools.partial(_adapt, model), functools.partial(_predict, model, scale)
    return Algorithm(
        name="protonet",
        init=functools.partial(init_body, model),
        adapt=adapt,
        predict=predict,
        inner_steps=0,
        loss=loss,
        norm=norm,
        task_loss=query_loss(adapt, predict, ways=None, steps=0, loss=loss, norm=norm),
        curvature=False,
        any_ways=True,
    )


def init_body(model: Model, key: int) -> tuple[Params, Params]:
    """The first `meta` of members that learn all but the head."""
    return {name: p.clone() for name, p in model.params.items() if name not in model.head}, {}


def _adapt(
    model: Model,
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
    prototypes = class_means(model.features(meta, support_x, None), support_y, ways)
    measured = model.measure(meta, support_x) if moments else ()
    return collect(iter([meta]), lambda params: Fast(params, measured, {"prototypes": prototypes}), trajectory)


def _predict(model: Model, scale: float, fast: Fast, x: Tensor, norm: Norm) -> Tensor:
    features = model.features(fast.params, x, moments_for(norm, fast))
    # Written out rather than as a distance squared: the root in between has no derivative at 0.
    return -scale * (features.unsqueeze(1) - fast.extra["prototypes"]).square().sum(-1)
