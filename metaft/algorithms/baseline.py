"""Baseline and Baseline++: supervised training on all classes at once, then a head for each task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.algorithms.base import Algorithm, moments_for
from metaft.errors import MetaftError, check_count, check_rate
from metaft.inner import at_step, value_and_grad
from metaft.metrics import figure, label
from metaft.models import Model
from metaft.sampler import Stream, raw_words
from metaft.types import Fast, Loss, Norm, Params

CLASSES = ".classes"
"""Ends the names of the head of pre-training: "head.weight.classes". No model has such names, as in `meta_sgd`."""


def baseline(
    model: Model,
    *,
    loss: Loss = "cross_entropy",
    classes: int = 64,
    inner_lr: float = 0.01,
    momentum: float = 0.9,
    dampening: float = 0.9,
    weight_decay: float = 0.001,
    norm: Norm = "transductive",
) -> Algorithm:
    """Learn to tell all training classes apart; for a task fit a linear head on the features, which stay as they are.

    Chen, Liu, Kira, Wang and Huang 2019, https://arxiv.org/abs/1904.04232, section 3 ("Baseline"). Training is on
    batches of all `classes` (a run takes them from its data set) and its accuracy is the share of right labels among
    all of them. The head of a task is fitted by torch.optim.SGD's steps with the given rate, `momentum`, `dampening`
    and `weight_decay`, those of the paper's code, 100 of them where a run does not say otherwise.

    Not the paper's: each of these steps is on the whole support set (there on 4 of its images at a time); the head
    begins at 0 (there at random), which makes the result independent of how the classes are numbered; training images
    are not augmented; a batch has as many images as an episode, and the gradient is the mean over a meta-batch of them.
    Training normalises a batch with its own statistics; `norm` only says on which figure a run chooses its checkpoint.

    Raises MetaftError for a regression loss, classes below 1, or another setting below 0.
    """
    model.check_head("baseline")
    rows = {name.rpartition(".")[2]: model.params[name].shape[1:] for name in model.head}
    head = _Head(rows, _products, functools.partial(_zeros, rows))
    return _pretrained(
        "baseline", model, loss, classes, norm, head,
        lr=inner_lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
    )  # fmt: skip


def baseline_plus_plus(
    model: Model,
    *,
    loss: Loss = "cross_entropy",
    classes: int = 64,
    inner_lr: float = 0.01,
    momentum: float = 0.9,
    dampening: float = 0.9,
    weight_decay: float = 0.001,
    norm: Norm = "transductive",
) -> Algorithm:
    """`baseline` with heads that compare directions: a logit is the cosine of features and class weight, times a scale.

    Chen et al. 2019, https://arxiv.org/abs/1904.04232, section 3 ("Baseline++"). The scale is that of the paper's code:
    2, and 10 for more than 200 classes, in training and for a task's head alike.

    Not the paper's, besides what `baseline` says: the weights of a task's classes all begin in the mean direction of
    its support features (there at random); the code also learns a length for each class, which the paper's text has
    not.

    Raises MetaftError as `baseline` does.
    """
    model.check_head("baseline++")
    rows = {"weight": model.params[model.head[0]].shape[1:]}
    head = _Head(rows, _cosines, _mean_direction, lambda ways: {"scale": _scale(ways)})
    return _pretrained(
        "baseline++", model, loss, classes, norm, head,
        lr=inner_lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
    )  # fmt: skip


def _products(head: Params, features: Tensor) -> Tensor:
    product = features @ head["weight"].mT
    return product + head["bias"].unsqueeze(-2) if "bias" in head else product


def _zeros(rows: Mapping[str, torch.Size], features: Tensor, ways: int) -> Params:
    return {part: features.new_zeros(ways, *shape) for part, shape in rows.items()}


def _cosines(head: Params, features: Tensor) -> Tensor:
    rows = head["weight"].shape[-2]
    return _scale(rows) * F.normalize(features, dim=-1) @ F.normalize(head["weight"], dim=-1).mT


def _mean_direction(features: Tensor, ways: int) -> Params:
    return {"weight": F.normalize(features.mean(0), dim=0).expand(ways, -1)}


def _scale(rows: int) -> float:
    return 2.0 if rows <= 200 else 10.0


class _Head(NamedTuple):
    """Tensors with one row per class, and what they make of features [n, D]."""

    rows: dict[str, torch.Size]
    """Shape of a row of each tensor."""
    logits: Callable[[Params, Tensor], Tensor]
    """Of one head, or of several along a leading axis."""
    begin: Callable[[Tensor, int], Params]
    """(support features, ways) -> a task's head before its first step."""
    constant: Callable[[int], dict[str, float]] = lambda ways: {}
    """What else a stored head needs."""


def _pretrained(name: str, model: Model, loss: Loss, classes: int, norm: Norm, head: _Head, **sgd: float) -> Algorithm:
    """Both members, up to their heads. Raises MetaftError as they do."""
    if loss != "cross_entropy":
        raise MetaftError(f"{name} classifies; it cannot learn a data set whose loss is {label(loss)!r}")
    check_count("classes", classes, 1)
    for field, value in {"inner_lr" if k == "lr" else k: v for k, v in sgd.items()}.items():
        check_rate(field, value)
    layer = model.head[0].rpartition(".")[0]
    body = [k for k in model.params if k not in model.head]
    recipe = _Recipe(model, head, layer, body, {part: f"{layer}.{part}" for part in head.rows}, sgd)
    return Algorithm(
        name=name,
        init=functools.partial(_init, recipe, classes),
        adapt=functools.partial(_adapt, recipe),
        predict=functools.partial(_predict, recipe),
        predict_steps=functools.partial(_predict_steps, recipe),
        inner_steps=0,
        loss=loss,
        norm=norm,
        task_loss=functools.partial(_task_loss, recipe),
        data="batches",
        curvature=False,
        any_ways=True,
    )


class _Recipe(NamedTuple):
    """A body that is pretrained and the head that a task fits on it."""

    model: Model
    head: _Head
    layer: str
    """Name of the model's head."""
    body: Sequence[str]
    """Names of all other parameters."""
    parts: Mapping[str, str]
    """Part of the head -> its name in the model."""
    sgd: Mapping[str, float]
    """Settings of `fit`."""


def _init(recipe: _Recipe, classes: int, key: int) -> tuple[Params, Params]:
    model = recipe.model
    # Numbers of its own: a backbone of the same seed shares none.
    generator = torch.Generator().manual_seed(int(raw_words(key, "train", [0], 1, stream=Stream.BASELINES)[0, 0] >> 1))
    like = model.params[model.head[0]]
    whole = {part: torch.zeros(classes, *shape, dtype=like.dtype) for part, shape in recipe.head.rows.items()}
    nn.init.xavier_uniform_(whole["weight"], generator=generator)
    return {
        **{k: model.params[k].clone() for k in recipe.body},
        **{recipe.parts[part] + CLASSES: value.to(like.device) for part, value in whole.items()},
    }, {}


def _task_loss(
    recipe: _Recipe, meta: Params, state: Params, knobs: Params, batch: Any
) -> tuple[Tensor, tuple[Params, Params]]:
    whole = {part: meta[k + CLASSES] for part, k in recipe.parts.items()}
    prediction = recipe.head.logits(whole, recipe.model.features(meta, batch.x, None))
    value = F.cross_entropy(prediction, batch.y)
    accuracy = figure("cross_entropy", prediction.detach(), batch.y)
    return value, ({}, {"loss": value.detach(), "accuracy": accuracy})


def _adapt(
    recipe: _Recipe,
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
    model, head, parts = recipe.model, recipe.head, recipe.parts
    features = model.features(meta, support_x, None)

    def support_loss(rows: Params) -> tuple[Tensor, tuple[()]]:
        return F.cross_entropy(head.logits(rows, features), support_y), ()

    heads = list(fit(support_loss, head.begin(features, ways), steps=steps, **recipe.sgd))
    still = {k: meta[k] for k in recipe.body}
    still |= {f"{recipe.layer}.{k}": features.new_full((), v) for k, v in head.constant(ways).items()}
    measured = model.measure(meta, support_x) if moments else ()
    if not trajectory:
        return Fast({**still, **{parts[part]: v for part, v in heads[-1].items()}}, measured, {})

    def every(t: Tensor) -> Tensor:  # a view: a hundred copies of a backbone would be much
        return t.expand(steps + 1, *t.shape)

    moving = {k: torch.stack([rows[part] for rows in heads]) for part, k in parts.items()}
    still = {k: every(v) for k, v in still.items()}
    return Fast({**still, **moving}, tuple((every(mean), every(var)) for mean, var in measured), {})


def _predict(recipe: _Recipe, fast: Fast, x: Tensor, norm: Norm) -> Tensor:
    rows = {part: fast.params[k] for part, k in recipe.parts.items()}
    return recipe.head.logits(rows, recipe.model.features(fast.params, x, moments_for(norm, fast)))


def _predict_steps(recipe: _Recipe, every: Fast, x: Tensor, norm: Norm) -> Tensor:
    first = at_step(every, 0)
    heads = {part: every.params[k] for part, k in recipe.parts.items()}
    return recipe.head.logits(heads, recipe.model.features(first.params, x, moments_for(norm, first)))


def fit(
    loss: Callable[[Params], tuple[Tensor, tuple[()]]],
    params: Params,
    *,
    steps: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
) -> Iterator[Params]:
    """Yield `params`, then the parameters after each step of torch.optim.SGD; no gradient runs through them."""
    velocity: Params | None = None
    yield params
    for _ in range(steps):
        _, _, grads = value_and_grad(loss, params, create_graph=False)
        grads = {k: g + weight_decay * params[k] for k, g in grads.items()}
        velocity = grads if velocity is None else {
            k: momentum * velocity[k] + (1 - dampening) * g for k, g in grads.items()
        }  # fmt: skip
        params = {k: p - lr * velocity[k] for k, p in params.items()}
        yield params
