"""Low-rank adaptation (Hu et al. 2022, https://arxiv.org/abs/2106.09685, equation 3): the backbone's weights stay, and
to each is added a product of two small matrices, which train with the head and are added for good at the end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from metaft.errors import MetaftError
from metaft.finetune.strategies.base import Groups, Strategy, every
from metaft.sampler import Stream, raw_words, uniform

PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Weights of nn.MultiheadAttention, which it reads without calling any layer: with one bias, queries, keys and values
are one matrix [3 E, E], and here share one A."""


class Place(NamedTuple):
    """A weight [out, in / groups, ...] to which a product is added, one for each group of channels."""

    layer: nn.Module
    name: str
    weight: nn.Parameter
    groups: int = 1

    @property
    def sides(self) -> tuple[int, int]:
        """(outputs, inputs) of a group: what its weight is a matrix of."""
        return len(self.weight) // self.groups, math.prod(self.weight.shape[1:])


class Product(NamedTuple):
    """A [groups, rank, inputs] and B [groups, outputs, rank], of which scale B A is added to a weight."""

    a: Tensor
    b: Tensor
    scale: float


def added(weight: Tensor, product: Product) -> Tensor:
    return weight + product.scale * (product.b @ product.a).reshape(weight.shape)


class LowRank(nn.Module):
    """W + scale B A, with A [groups, rank, inputs] and B [groups, outputs, rank], which is 0 at first."""

    def __init__(self, a: Tensor, outputs: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(a.new_zeros(len(a), outputs, a.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        return added(weight, self.product)

    @property
    def product(self) -> Product:
        return Product(self.A, self.B, self.scale)


def rates(groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
    return every(groups)  # no other parameters are left to train


def places(body: nn.Module) -> list[Place]:
    """The weights that can train of linear layers, of convolutions that are not depthwise, and of attention. A weight
    that several layers share stays: what is added to it in one of them would be missing in the others."""
    uses = Counter(id(p) for _, p in body.named_parameters(remove_duplicate=False))
    layers = Counter(id(layer) for _, layer in body.named_modules(remove_duplicate=False))
    return [
        place
        for layer in body.modules()
        for place in _of_layer(layer)
        if place.weight.requires_grad and uses[id(place.weight)] == layers[id(layer)]
    ]


def _of_layer(layer: nn.Module) -> Iterator[Place]:
    own = dict(layer.named_parameters(recurse=False))  # a weight that is computed from others is none of them
    if isinstance(layer, nn.MultiheadAttention):
        yield from (Place(layer, name, own[name]) for name in PACKED if name in own)
    elif isinstance(layer, nn.Linear) and "weight" in own:
        yield Place(layer, "weight", own["weight"])
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and "weight" in own and not is_depthwise(layer):
        yield Place(layer, "weight", own["weight"], layer.groups)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each output of a convolution sees one channel alone: its weight is of rank 1 as it is."""
    return isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and 1 < layer.groups == layer.in_channels


def stays(body: nn.Module) -> list[str]:
    """Names of the weights (of two axes or more) that could train and to which nothing is added."""
    taken = {id(place.weight) for place in places(body)}
    depthwise = {f"{path}.weight" for path, layer in body.named_modules() if is_depthwise(layer)}
    names = [n for n, p in body.named_parameters() if p.requires_grad and p.dim() > 1 and id(p) not in taken]
    return [f"{name} (depthwise)" if name in depthwise else name for name in names]


def with_products(rank: int, alpha: float, model: nn.Module, seed: int) -> nn.Module:
    """The model, of whose body nothing trains but the products. A is drawn from U(-1, 1) / sqrt(inputs), as in the
    authors' code. Raises MetaftError for a backbone that has no weight to add any to."""
    body = model.get_submodule("body")
    where = places(body)
    if not where:
        raise MetaftError(
            "strategy: lora adds to weights of linear layers, convolutions and attention, and the backbone has none "
            "that could train"
        )
    for p in body.parameters():
        p.requires_grad_(False)
    ranks = [min(rank, *place.sides) for place in where]  # a product of more is of no higher rank
    sizes = [place.groups * r * place.sides[1] for place, r in zip(where, ranks, strict=True)]
    drawn = torch.from_numpy(uniform(raw_words(seed, "train", [0], sum(sizes), stream=Stream.LOW_RANK)[0]))
    for place, r, numbers in zip(where, ranks, drawn.split(sizes), strict=True):
        outputs, inputs = place.sides
        a = ((2 * numbers - 1) / math.sqrt(inputs)).view(place.groups, r, inputs).to(place.weight)
        product = LowRank(a, outputs, alpha / rank)
        parametrize.register_parametrization(place.layer, place.name, product, unsafe=True)  # spares a trial of it
    return model


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """The model with its products added to its weights, in the layers that it had before."""
    for layer in list(model.modules()):
        for name in _products(layer):
            value = getattr(layer, name)
            parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
            layer.get_parameter(name).copy_(value)  # in the weight's own layout
    return model


def products_of(body: nn.Module) -> dict[str, Product]:
    """Copies of those that are not added yet, by the names that their weights have in the body without them."""
    found = {}
    for path, layer in body.named_modules():
        for name in _products(layer):
            kinds: Any = layer.parametrizations
            a, b, scale = kinds[name][0].product
            found[f"{path}.{name}" if path else name] = Product(a.detach().clone(), b.detach().clone(), scale)
    return found


def _products(layer: nn.Module) -> list[str]:
    if not parametrize.is_parametrized(layer):
        return []
    kinds: nn.ModuleDict = layer.parametrizations  # pyright: ignore[reportAssignmentType]
    return [name for name, parts in kinds.items() if isinstance(next(parts.children(), None), LowRank)]


def lora(*, rank: int = 8, alpha: float = 8.0) -> Strategy:
    """The head trains whole, and W + `alpha`/`rank` B A in the place of each weight W of the backbone that `places`
    finds; a grouped convolution has a product for each group. What has fewer rows or columns than `rank` gets that
    many."""
    if rank < 1:
        raise MetaftError(f"strategy: rank must be at least 1, got {rank}")
    if not 0 < alpha < math.inf:
        raise MetaftError(f"strategy: alpha must be above 0, got {alpha}")
    return Strategy(rates, partial(with_products, rank, alpha), merged, few=True, stays=stays)
