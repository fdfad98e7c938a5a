"""CAVIA: only a context vector adapts to a task."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import nn

from metaft.algorithms.base import Algorithm
from metaft.algorithms.gradient import Hooks, by_gradient
from metaft.errors import MetaftError, check_count
from metaft.inner_augment import Augment
from metaft.inner_optim import InnerOptimizer
from metaft.models import Model
from metaft.sampler import Stream, raw_words
from metaft.types import Loss, Norm, Params

CONTEXT = "context"
MAP = ".context"
"""Ends the name of the map from the context to a parameter. No model has such a name (see `meta_sgd.RATE`)."""


def cavia(
    model: Model,
    *,
    loss: Loss = "cross_entropy",
    inner_lr: float = 1.0,
    inner_steps: int = 2,
    inner_optimizer: str | InnerOptimizer = "sgd",
    inner_augment: str | Augment = "none",
    first_order: bool = False,
    norm: Norm = "transductive",
    context: int = 100,
    layer: str = "",
) -> Algorithm:
    """MAML whose inner loop moves nothing but `context` numbers, a further input of the model that begins at 0.

    Zintgraf, Shiarlis, Kurin, Hofmann and Whiteson 2019, https://arxiv.org/abs/1810.03642: context = 0 -
    inner_lr * grad of the support loss in the context, and the outer loop learns all the other parameters. One layer
    takes the context in; with W and V learned matrices its output h becomes

        h + W context                     of a linear or convolution layer: the same as if its input had the context
                                          beside it, as the paper has it for fully connected networks
        (1 + V context) h + W context     of a normalisation layer, per channel: the paper's FiLM for convolutions

    which is the plain model with another bias, and another scale. These are the fast weights, so what is adapted can be
    stored like any other model. `layer` names that layer: by default the first of `mlp`, and the third
    normalisation of `conv4` and `conv4-pool` (where the authors' code has it). W and V stand in `meta` beside the
    parameters, "NAME.context" for NAME.

    Not the paper's: its scale is a learned constant plus V context, which the normalisation's own scale makes
    superfluous; FiLM comes before the pooling (its code: behind it, which differs where a scale is negative); one
    default of `context` for all models (there 100 for mini-ImageNet, around 5 for sine waves); W and V that begin at
    Glorot-uniform values, as all weights here; no decay of the outer rate by steps; and the meta-gradient's mean over
    the meta-batch.

    Raises MetaftError for an inner_lr or inner_steps below 0, an unknown optimiser, a context below 1, or a model
    without such a layer.
    """
    check_count("context", context, 1)
    shift, scale = _entry(model, layer)
    maps = {k + MAP: model.params[k].new_zeros(len(model.params[k]), context) for k in (shift, scale) if k is not None}
    algorithm = by_gradient(
        "cavia",
        model,
        loss=loss,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        inner_augment=inner_augment,
        first_order=first_order,
        norm=norm,
        adapted=[CONTEXT],
        learned={**model.params, **maps},
        hooks=Hooks(
            begin=lambda meta, x, y, ways: {**meta, CONTEXT: meta[shift].new_zeros(context)},
            weights=functools.partial(_with_context, tuple(model.params), shift, scale),
        ),
    )
    return dataclasses.replace(algorithm, init=functools.partial(_init, model.params, maps))


def _with_context(names: Sequence[str], shift: str, scale: str | None, params: Params) -> Params:
    """The model's parameters under a context."""
    fast = {k: params[k] for k in names}
    if scale is not None:
        factor = 1 + params[scale + MAP] @ params[CONTEXT]
        fast |= {scale: factor * fast[scale], shift: factor * fast[shift]}
    return fast | {shift: fast[shift] + params[shift + MAP] @ params[CONTEXT]}


def _init(params: Params, maps: Params, key: int) -> tuple[Params, Params]:
    # Not the numbers that the model began with.
    seed = int(raw_words(key, "train", [0], 1, stream=Stream.CONTEXT)[0, 0]) % 2**63
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        k: nn.init.xavier_uniform_(torch.empty(v.shape, dtype=torch.float32), generator=generator)
        for k, v in maps.items()
    }
    return {k: p.clone() for k, p in params.items()} | {k: v.to(maps[k]) for k, v in drawn.items()}, {}


def _entry(model: Model, layer: str) -> tuple[str, str | None]:
    """Names of the bias that the context shifts and, of a normalisation layer, of the scale that it multiplies."""
    norms = list(dict.fromkeys(name.rpartition(".")[0] for name in model.norm))
    name = model.architecture["name"]
    if not layer and name == "mlp":
        layer = "hidden.0"
    elif not layer and name in ("conv4", "conv4-pool"):
        layer = norms[2]
    biased = [name.removesuffix(".bias") for name in model.params if name.endswith(".bias")]
    if not layer:
        raise MetaftError(f"layer: name the one that takes cavia's context into a module of your own, of {biased}")
    if layer not in biased:
        raise MetaftError(f"layer: cavia's context needs one with a bias to enter by, of {biased}; got {layer!r}")
    scale = f"{layer}.weight"
    return f"{layer}.bias", scale if layer in norms and scale in model.params else None
