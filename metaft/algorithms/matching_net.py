"""Matching networks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from metaft.algorithms.base import Algorithm, moments_for
from metaft.algorithms.protonet import init_body
from metaft.algorithms.query import query_loss
from metaft.errors import MetaftError
from metaft.inner import collect
from metaft.metrics import label
from metaft.models import Model
from metaft.models.head import matched
from metaft.types import Fast, Loss, Norm, Params


def matching_net(
    model: Model, *, loss: Loss = "cross_entropy", scale: float = 1.0, norm: Norm = "transductive"
) -> Algorithm:
    """Each support image votes for its label, by its likeness to the query in a learned feature space.

    Vinyals, Blundell, Lillicrap, Kavukcuoglu and Wierstra 2016, https://arxiv.org/abs/1606.04080. Equation 1: the
    probability of a label is the sum of the attention on the support images that have it; section 2.1.1: the attention
    is the softmax over the support set of the cosine of features. Logits are the logarithms of these probabilities.
    `meta` is the model without its head, so any number of classes can be met at test.

    This is the form without full context embeddings (section 2.1.2): one network embeds support and query, each image
    by itself. Not the paper's: `scale`, which multiplies the cosine (there 1; a larger one lets a single image win),
    and `norm`, as in `protonet`.

    Raises MetaftError for a regression loss or a scale that is not above 0.
    """
    if loss != "cross_entropy":
        raise MetaftError(f"matching-net classifies; it cannot learn a data set whose loss is {label(loss)!r}")
    if not scale > 0:
        raise MetaftError(f"scale must be above 0, got {scale}")

    adapt, predict = functools.partial(_adapt, model, scale), functools.partial(_predict, model)
    return Algorithm(
        name="matching-net",
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


def _adapt(
    model: Model,
    scale: float,
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
    features = model.features(meta, support_x, None)
    has = (support_y.unsqueeze(1) == torch.arange(ways, device=support_y.device)).to(features.dtype)
    extra = {"support": features, "labels": has, "scale": features.new_full((), scale)}
    measured = model.measure(meta, support_x) if moments else ()
    return collect(iter([meta]), lambda params: Fast(params, measured, extra), trajectory)


def _predict(model: Model, fast: Fast, x: Tensor, norm: Norm) -> Tensor:
    return matched(model.features(fast.params, x, moments_for(norm, fast)), **fast.extra)
