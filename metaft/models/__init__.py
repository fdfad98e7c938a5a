"""Backbones, and the way from a module to pure functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from metaft.errors import MetaftError, no_such
from metaft.models.conv4 import Conv4
from metaft.models.drawn import initialise, own_generator, undrawn
from metaft.models.dropout import EpisodeDropBlock, EpisodeDropout, use_dropout
from metaft.models.functional import Model, check_repeats, functional
from metaft.models.handed import class_of, taken, with_constants, wrappers
from metaft.models.mlp import MLP
from metaft.models.norm import EpisodeNorm, episode_norms
from metaft.models.resnet12 import ResNet12
from metaft.support.modes import in_usual_modes

__all__ = [
    "MLP",
    "MODELS",
    "Conv4",
    "EpisodeDropBlock",
    "EpisodeDropout",
    "EpisodeNorm",
    "Model",
    "ResNet12",
    "build",
    "check_repeats",
    "class_of",
    "episode_norms",
    "functional",
    "initialise",
    "is_ours",
    "skeleton",
    "taken",
    "undrawn",
    "use_dropout",
    "with_constants",
    "wrappers",
]

MODELS: dict[str, Callable[[int, tuple[int, ...], int, float], nn.Module]] = {
    "conv4": lambda ways, shape, width, dropout: Conv4(ways, shape, width, "stride", dropout),
    "conv4-pool": lambda ways, shape, width, dropout: Conv4(ways, shape, width, "pool", dropout),
    "resnet12": lambda ways, shape, width, dropout: ResNet12(ways, shape, width, dropout),
    "mlp": lambda ways, shape, width, dropout: MLP(ways, shape, width, dropout=dropout),
}
_OF_IMAGES = ("conv4", "conv4-pool", "resnet12")
_OURS = dict(MODELS)


def is_ours(name: str) -> bool:
    """Whether a named architecture is metaft's own, and not one that the user registered."""
    return MODELS.get(name) is not None and MODELS.get(name) is _OURS.get(name)


@in_usual_modes
def build(
    name: str,
    *,
    ways: int,
    shape: tuple[int, ...],
    width: int,
    seed: int,
    dropout: float = 0.0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A named architecture with parameters drawn from `seed` (on the CPU, so that every device starts alike).

    `dropout` is that of the features before the head, in inner steps. Raises MetaftError for an unknown name, or an
    input shape, width or dropout that the architecture cannot take.
    """
    if name in _OF_IMAGES and len(shape) != 3:
        raise MetaftError(f"model: {name!r} takes images [C, H, W], but the data set's inputs are {list(shape)}")
    if width < 1:
        raise MetaftError(f"width must be at least 1, got {width}")
    architecture: dict[str, object] = {"name": name, "ways": ways, "shape": list(shape), "width": width}
    if dropout:
        architecture["dropout"] = dropout
    module = initialise(skeleton(architecture).to(dtype), seed).to(device)
    return functional(module, architecture=architecture)


@in_usual_modes
def skeleton(architecture: Mapping[str, Any]) -> nn.Module:
    """The module that a named architecture describes (see `Model.architecture`), its parameters not yet filled in.

    One that the user registered is built as it is: its constructor may have buffers to fill. Raises MetaftError for an
    unknown name.
    """
    a, name = architecture, architecture["name"]
    if name not in MODELS:
        raise no_such("model", name, sorted(MODELS))
    build = functools.partial(MODELS[name], a["ways"], tuple(a["shape"]), a["width"], a.get("dropout", 0.0))
    if not is_ours(name):
        with own_generator(0):
            return taken(build())
    return undrawn(build)
