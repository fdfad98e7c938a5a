"""Layers of fewer channels than their architecture gives them, as plain data: what pruning leaves of a module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metaft.models.norm import EpisodeNorm
from metaft.models.stored import StoredNorm

Widths = Mapping[str, Mapping[str, int]]
"""Path of a layer -> its sizes by the layer's own names for them."""


def sizes_of(layer: nn.Module) -> dict[str, int]:
    """By how much of what a convolution, a linear layer or a normalisation goes; empty for any other."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return {"in_channels": layer.in_channels, "out_channels": layer.out_channels, "groups": layer.groups}
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    if isinstance(layer, EpisodeNorm):
        return {"features": layer.features}
    return {"features": len(layer.mean)} if isinstance(layer, StoredNorm) else {}


def widths_of(module: nn.Module, whole: nn.Module) -> dict[str, dict[str, int]]:
    """The sizes of the layers that have others in `module` than, by the same path, in the `whole` architecture."""
    wide = {path: sizes_of(layer) for path, layer in whole.named_modules()}
    mine = {path: sizes_of(layer) for path, layer in module.named_modules()}
    return {path: sizes for path, sizes in mine.items() if sizes and sizes != wide[path]}


def narrowed(module: nn.Module, widths: Widths) -> nn.Module:
    """The module, in place, with layers of these sizes, whose values are to be filled in."""
    for path, sizes in widths.items():
        layer = module.get_submodule(path)
        for name, size in sizes.items():
            if not isinstance(layer, StoredNorm):  # which has no other record of it than its tensors
                setattr(layer, name, size)
        for name, shape in _shapes(layer, sizes).items():
            old = getattr(layer, name)
            if isinstance(old, nn.Parameter):
                setattr(layer, name, nn.Parameter(_empty(old, shape), requires_grad=old.requires_grad))
            elif old is not None:  # a layer without a bias has None in its place
                setattr(layer, name, _empty(old, shape))
    return module


def _shapes(layer: nn.Module, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Of a layer's tensors at these sizes."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        out = sizes["out_channels"]
        return {"weight": (out, sizes["in_channels"] // sizes["groups"], *layer.kernel_size), "bias": (out,)}
    if isinstance(layer, nn.Linear):
        return {"weight": (sizes["out_features"], sizes["in_features"]), "bias": (sizes["out_features"],)}
    names = ("weight", "bias", "mean", "var") if isinstance(layer, StoredNorm) else ("weight", "bias")
    return dict.fromkeys(names, (sizes["features"],))


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Of the same type, device and layout in memory."""
    tensor = torch.zeros(shape, dtype=like.dtype, device=like.device)
    pixelwise = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return tensor.to(memory_format=torch.channels_last) if pixelwise else tensor
