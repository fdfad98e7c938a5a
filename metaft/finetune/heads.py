"""Classifier heads: features [n, D] to logits [n, classes]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.errors import MetaftError, no_such
from metaft.models import initialise, undrawn
from metaft.models.functional import is_plain
from metaft.models.head import class_means, matched


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


class Matching(nn.Module):
    """The vote of the support images' features [m, D] for their labels [m, classes] (Vinyals et al. 2016, eq. 1)."""

    def __init__(self, support: Tensor, labels: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.support = nn.Parameter(support.detach().clone())
        self.register_buffer("labels", labels.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return matched(x, self.support, self.get_buffer("labels"), self.get_buffer("scale"))


def _linear(features: Tensor, labels: Tensor, classes: int, seed: int) -> nn.Module:
    return initialise(undrawn(lambda: nn.Linear(features.shape[1], classes)), seed)


HEADS: dict[str, Callable[[Tensor, Tensor, int, int], nn.Module]] = {
    "linear": _linear,
    "cosine": lambda features, labels, classes, seed: Cosine(
        features.shape[1], classes, torch.Generator().manual_seed(seed)
    ),
    "prototype": lambda features, labels, classes, seed: Prototype(class_means(features, labels, classes)),
}


def kind(head: nn.Module) -> str:
    """The name of a head's kind: those of HEADS; "matching", which only an inner loop leaves; and "own" for a linear
    layer of the user's module that is more than weight and bias."""
    if isinstance(head, nn.Linear) and not is_plain(head):
        return "own"
    return {nn.Linear: "linear", Cosine: "cosine", Prototype: "prototype", Matching: "matching"}[type(head)]


def filled(name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A head of this kind that holds these tensors. Raises MetaftError where they are not such a head's."""
    like = next(iter(tensors.values()))
    if name == "prototype" and tensors.keys() == {"points"}:
        return Prototype(tensors["points"])
    if name == "matching" and tensors.keys() == {"support", "labels", "scale"}:
        return Matching(**tensors)
    if name == "cosine" and tensors.keys() == {"weight", "scale"}:
        classes, features = tensors["weight"].shape
        head: nn.Module = Cosine(features, classes, torch.Generator())
    elif name == "linear" and {"weight"} <= tensors.keys() <= {"weight", "bias"}:
        classes, features = tensors["weight"].shape
        head = undrawn(lambda: nn.Linear(features, classes, bias="bias" in tensors))
    else:
        raise MetaftError(f"head: {sorted(tensors)} are not the tensors of a {name!r} head")
    head = head.to(like)
    head.load_state_dict(dict(tensors))
    return head


def build(name: str, features: Tensor, labels: Tensor, classes: int, seed: int) -> nn.Module:
    """A fresh head, given the training images' features [n, D] and labels [n] to start from.

    `seed` is to be no backbone's, which would share its random numbers. Raises MetaftError for an unknown name.
    """
    if name not in HEADS:
        raise no_such("head", name, sorted(HEADS))
    return HEADS[name](features, labels, classes, seed).to(features)
