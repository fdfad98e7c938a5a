"""From episode normalisation to stored moments: what makes a prediction independent of its neighbours in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metaft.errors import MetaftError
from metaft.models.handed import copied
from metaft.models.norm import EpisodeNorm, in_transform, normalised, then_of
from metaft.types import Moments

PASSES = 4
"""Over all examples, at most, to store moments: exact for as many layers one behind the other as Conv-4 has."""


class StoredNorm(nn.Module):
    """Normalises [batch, C, ...] with moments that it holds: (x - mean) / sqrt(var + eps) * weight + bias."""

    mean: Tensor
    var: Tensor

    def __init__(self, norm: EpisodeNorm | _BatchNorm, mean: Tensor, var: Tensor) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.then = norm.then if isinstance(norm, EpisodeNorm) else then_of(norm)
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("var", var.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if in_transform():  # the fused kernel's second derivatives are not to be trusted there
            out = normalised(x, self.mean, self.var, self.eps, self.weight, self.bias)
        else:
            out = torch.batch_norm(
                x, self.weight, self.bias, self.mean, self.var, False, 0.0, self.eps, torch.backends.cudnn.enabled
            )
        return out if self.then is None else self.then(out)


def with_stored_moments(
    module: nn.Module, x: Tensor | Iterable[Tensor], moments: Moments | None = None, *, at_once: int = 1024
) -> nn.Module:
    """A copy of `module` whose EpisodeNorm layers are StoredNorm.

    The moments are those of x [n, ...] as one batch, or `moments`, in the order in which the forward pass over x meets
    the layers. More than `at_once` examples are passed through in parts; so they are where x is an iterable of parts,
    and no iterator: it is gone through several times, and may make each part as it is asked for.

    A layer's moments depend on those of the layers before it, so of several parts each pass settles the layers whose
    predecessors are settled: as many passes as the longest chain has layers give the moments of one batch. At most
    `PASSES` are made. The layers that are left then get moments for which every part was normalised with its own
    beyond the settled layers (Wu & Johnson 2021, https://arxiv.org/abs/2105.07576, section 3.1).

    Raises MetaftError for a layer that one forward pass meets twice, since it cannot hold two pairs of moments.
    """
    module = copied(module)
    if moments is None and next(_episode_norms(module), None) is None:
        return module  # without a pass through it
    parts = x.split(at_once) if isinstance(x, Tensor) else x
    some = iter(parts)
    first = next(some)
    met = _moments_of(module, first)
    if moments is not None or next(some, None) is None:
        pairs = [(mean, var) for _, mean, var in met] if moments is None else moments
        for (path, _, _), (mean, var) in zip(met, pairs, strict=True):
            _settle(module, path, mean, var)
        return module
    levels = _levels(module, first[:2], [path for path, _, _ in met])
    passes = min(PASSES, 1 + max(levels.values(), default=-1))
    for done in range(passes):
        measured = [(len(part), _moments_of(module, part)) for part in parts]
        for i, (path, _, _) in enumerate(measured[0][1]):
            if levels[path] <= done or done == passes - 1:
                _settle(module, path, *_pooled([(n, *of_part[i][1:]) for n, of_part in measured]))
    return module


def _settle(module: nn.Module, path: str, mean: Tensor, var: Tensor) -> None:
    layer = module.get_submodule(path)
    assert isinstance(layer, EpisodeNorm)
    _put(module, layer, StoredNorm(layer, mean, var))


def _put(module: nn.Module, layer: nn.Module, new: nn.Module) -> None:
    """Put a layer in another's place, wherever it stands: it may have several names."""
    for path, part in list(module.named_modules(remove_duplicate=False)):
        if part is layer:
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, new)


def _levels(module: nn.Module, x: Tensor, paths: Sequence[str]) -> dict[str, int]:
    """How many EpisodeNorm layers lie before each on the longest way from the input, by path.

    Each layer's output is multiplied by a 1 of its own; autograd knows which of those an input was made with. Where it
    cannot see (no_grad, detach, what it does not differentiate) a layer counts as behind all that were met before it;
    `paths` has them in that order.
    """
    ones: dict[str, Tensor] = {}
    levels: dict[str, int] = {}

    def hook_of(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            given, before = inputs[0], list(ones)
            if given.requires_grad and ones:
                made_with = torch.autograd.grad(given.sum(), [*ones.values()], retain_graph=True, allow_unused=True)
                before = [name for name, gradient in zip(ones, made_with, strict=True) if gradient is not None]
            levels[path] = 1 + max((levels[name] for name in before), default=-1)
            ones[path] = torch.ones((), dtype=output.dtype, device=output.device, requires_grad=True)
            return output * ones[path]

        return hook

    handles = [layer.register_forward_hook(hook_of(path)) for path, layer in _episode_norms(module)]
    in_a_row = {path: i for i, path in enumerate(paths)}
    try:
        with torch.enable_grad():
            module(x.detach().requires_grad_() * 1 if x.is_floating_point() else x)
    except RuntimeError:  # what is done in place, say
        return in_a_row
    finally:
        for handle in handles:
            handle.remove()
    return {**in_a_row, **levels}


def kept_statistics(module: nn.Module, *, unseen: bool = False) -> nn.Module:
    """Batch normalisation layers that have seen data, in place, as StoredNorm with their running statistics; returns
    the module. Those that have seen none are left, but not with `unseen`: their statistics are to be filled in."""
    for path, layer in list(module.named_modules()):
        if path and (has_statistics(layer) or (unseen and _keeps_statistics(layer))):
            assert isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
            _put(module, layer, StoredNorm(layer, layer.running_mean, layer.running_var))
    return module


def has_statistics(layer: nn.Module) -> bool:
    """Whether it is a batch normalisation layer whose running statistics are not those that it was made with."""
    if not _keeps_statistics(layer):
        return False
    assert isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
    return bool((layer.running_mean != 0).any() or (layer.running_var != 1).any())


def _keeps_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None


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
    for _, layer in list(_episode_norms(module)):
        zeros = torch.zeros(layer.features, device=like.device, dtype=like.dtype)
        _put(module, layer, StoredNorm(layer, zeros, zeros))
    return module


def _episode_norms(module: nn.Module) -> Iterator[tuple[str, EpisodeNorm]]:
    return ((path, layer) for path, layer in module.named_modules() if isinstance(layer, EpisodeNorm))
