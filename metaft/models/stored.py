"""From episode normalisation to stored moments: what makes a prediction independent of its neighbours in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.models.handed import copied
from metaft.models.norm import EpisodeNorm
from metaft.types import Moments


class StoredNorm(nn.Module):
    """Normalises [batch, C, ...] with moments that it holds: (x - mean) / sqrt(var + eps) * weight + bias."""

    mean: Tensor
    var: Tensor

    def __init__(self, norm: EpisodeNorm, mean: Tensor, var: Tensor) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("var", var.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.weight, self.bias, self.mean, self.var, False, 0.0, self.eps, torch.backends.cudnn.enabled
        )


def with_stored_moments(
    module: nn.Module, images: Tensor, moments: Moments | None = None, *, at_once: int = 1024
) -> nn.Module:
    """A copy of `module` whose EpisodeNorm layers are StoredNorm.

    The moments are those of `images` [n, ...] as one batch, or `moments`, in the order in which the forward pass over
    `images` meets the layers. More than `at_once` images are passed through in parts, once for each layer, since a
    layer's moments depend on those of the layers before it. Raises MetaftError for a layer that one forward pass meets
    twice, since it cannot hold two pairs of moments.
    """
    module = copied(module)
    parts = images.split(at_once)
    met = _moments_of(module, parts[0])
    pairs = [(mean, var) for _, mean, var in met] if moments is None else list(moments)
    for (path, _, _), (mean, var) in zip(met, pairs, strict=True):
        layer = module.get_submodule(path)
        assert isinstance(layer, EpisodeNorm)
        if moments is None and len(parts) > 1:
            mean, var = _pooled([(len(part), *_moments_of(module, part)[0][1:]) for part in parts])
        module.set_submodule(path, StoredNorm(layer, mean, var))
    return module


def _moments_of(module: nn.Module, images: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """(path, mean, biased variance) at each EpisodeNorm, in the order in which a forward pass meets them."""
    met: list[tuple[str, Tensor, Tensor]] = []

    def watch(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if any(path == earlier for earlier, _, _ in met):
                raise MetaftError(f"layer {path!r} is used twice in one forward pass; its moments cannot be stored")
            x = inputs[0].detach()
            axes = [0, *range(2, x.dim())]
            met.append((path, x.mean(axes), x.var(axes, correction=0)))

        return hook

    handles = [layer.register_forward_pre_hook(watch(path)) for path, layer in _episode_norms(module)]
    try:
        with torch.no_grad():
            module(images)
    finally:
        for handle in handles:
            handle.remove()
    return met


def _pooled(parts: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a whole, from (size, mean, biased variance) of its parts."""
    n = sum(size for size, _, _ in parts)
    mean = sum(size / n * m.double() for size, m, _ in parts)
    assert isinstance(mean, Tensor)
    var = sum(size / n * (v.double() + (m.double() - mean).square()) for size, m, v in parts)
    assert isinstance(var, Tensor)
    return mean.to(parts[0][1]), var.to(parts[0][2])


def empty_stored(module: nn.Module) -> nn.Module:
    """The same structure with zero moments, in place, to be filled by `load_state_dict`."""
    like = next(module.parameters(), torch.empty(0))  # load_state_dict would round to the type that it finds
    for path, layer in list(_episode_norms(module)):
        zeros = torch.zeros(layer.features, device=like.device, dtype=like.dtype)
        module.set_submodule(path, StoredNorm(layer, zeros, zeros))
    return module


def _episode_norms(module: nn.Module) -> Iterator[tuple[str, EpisodeNorm]]:
    return ((path, layer) for path, layer in module.named_modules() if isinstance(layer, EpisodeNorm))
