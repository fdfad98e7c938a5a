"""Backbones, and the way from a module to pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from metaft.errors import MetaftError, suggest
from metaft.models.conv4 import Conv4
from metaft.models.dropout import EpisodeDropout, use_dropout
from metaft.models.functional import Model, check_repeats, functional
from metaft.models.mlp import MLP
from metaft.models.norm import EpisodeNorm, episode_norms
from metaft.modes import in_usual_modes

__all__ = [
    "MLP",
    "MODELS",
    "Conv4",
    "EpisodeDropout",
    "EpisodeNorm",
    "Model",
    "build",
    "check_repeats",
    "episode_norms",
    "functional",
    "initialise",
    "skeleton",
    "use_dropout",
]

MODELS: dict[str, Callable[[int, tuple[int, ...], int, float], nn.Module]] = {
    "conv4": lambda ways, shape, width, dropout: Conv4(ways, shape, width, "stride", dropout),
    "conv4-pool": lambda ways, shape, width, dropout: Conv4(ways, shape, width, "pool", dropout),
    "mlp": lambda ways, shape, width, dropout: MLP(ways, shape, width, dropout=dropout),
}


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
    if name.startswith("conv4") and len(shape) != 3:
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

    Raises MetaftError for an unknown name.
    """
    a, name = architecture, architecture["name"]
    if name not in MODELS:
        raise MetaftError(f"model: no {name!r}, known are {sorted(MODELS)}{suggest(name, MODELS)}")
    with torch.device("meta"):  # constructors would draw from the global generator
        module = MODELS[name](a["ways"], tuple(a["shape"]), a["width"], a.get("dropout", 0.0))
    return module.to_empty(device="cpu")


@in_usual_modes
def initialise(module: nn.Module, seed: int) -> nn.Module:
    """Glorot-uniform weights and zero biases for linear and convolution layers, unit scales, from `seed` alone."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.modules.conv._ConvNd)):
            nn.init.xavier_uniform_(part.weight, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, EpisodeNorm) and part.weight is not None and part.bias is not None:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    return module
