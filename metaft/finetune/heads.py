"""Classifier heads: features [n, D] to logits [n, classes]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.algorithms.protonet import class_means
from metaft.errors import MetaftError, suggest
from metaft.models import initialise


class Cosine(nn.Module):
    """Cosine similarity to one learned direction per class, times a learned scale (Gidaris & Komodakis 2018)."""

    def __init__(self, features: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, features), generator=generator))
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=-1).T


class Prototype(nn.Module):
    """Minus the squared distance to one point per class, which begins at the class mean (Snell et al. 2017, eq. 2)."""

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.points = nn.Parameter(points.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return -(x.unsqueeze(1) - self.points).square().sum(-1)


def _linear(features: Tensor, labels: Tensor, classes: int, seed: int) -> nn.Module:
    with torch.device("meta"):  # the constructor would draw from the global generator
        layer = nn.Linear(features.shape[1], classes)
    return initialise(layer.to_empty(device="cpu"), seed)


HEADS: dict[str, Callable[[Tensor, Tensor, int, int], nn.Module]] = {
    "linear": _linear,
    "cosine": lambda features, labels, classes, seed: Cosine(
        features.shape[1], classes, torch.Generator().manual_seed(seed)
    ),
    "prototype": lambda features, labels, classes, seed: Prototype(class_means(features, labels, classes)),
}


def build(name: str, features: Tensor, labels: Tensor, classes: int, seed: int) -> nn.Module:
    """A fresh head, given the training images' features [n, D] and labels [n] to start from.

    Raises MetaftError for an unknown name.
    """
    if name not in HEADS:
        raise MetaftError(f"head: no {name!r}, known are {sorted(HEADS)}{suggest(name, HEADS)}")
    return HEADS[name](features, labels, classes, seed).to(features)
