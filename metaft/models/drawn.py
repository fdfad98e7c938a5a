"""Parameters drawn anew from a seed: all that a module has, or none."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from metaft.errors import MetaftWarning
from metaft.models.handed import class_of, copied
from metaft.models.norm import EpisodeNorm
from metaft.support.foreign import in_our_words

Part = TypeVar("Part", bound=nn.Module)

_OTHERS = 0x9E3779B97F4A7C15
"""Added to a seed for what layers draw by themselves: other numbers than those of the linear and convolution layers."""

_GLOROT_INSTEAD = (nn.Linear.reset_parameters, nn.modules.conv._ConvNd.reset_parameters)


def initialise(module: nn.Module, seed: int) -> nn.Module:
    """Draw all parameters anew, in place and from `seed` alone; returns the module.

    Glorot-uniform weights and zero biases for linear and convolution layers, unit scales for EpisodeNorm; for all else
    what `reset_parameters` does, of a layer first and then of the modules that it is a part of. A layer under
    parametrizations, weight_norm or spectral_norm is drawn as the layer without them. Frozen parameters
    (requires_grad=False), buffers and the global generator stay as they are.

    A parameter that none of these draws gets normal numbers of the mean and spread of its values, and a MetaftWarning
    names it. Raises MetaftError, naming the layer, for a parametrization without inverse and for a `reset_parameters`
    that fails; the module then is as it was.
    """
    still = [name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad]
    before = {name: t.detach().clone() for name, t in _tensors(module)}
    bare = {id(part): _bare(part) for part in module.modules() if _is_under(part)}
    try:
        with torch.no_grad():
            for p in module.parameters():
                if p.requires_grad and p.is_floating_point():
                    p.fill_(math.nan)  # what still is at the end was not drawn
        generator = torch.Generator().manual_seed(seed % 2**63)
        for part in module.modules():
            _draw(bare.get(id(part), part), generator)
        with own_generator(seed + _OTHERS), torch.no_grad():
            _reset(module, bare)
            bare_ones = {name: p for name, p in module.named_parameters() if p.requires_grad and p.isnan().any()}
            for name, p in bare_ones.items():
                p.copy_(_alike(before[name]))
    except BaseException:
        _put_back(module, before, lambda t: True)
        raise
    for name in still:  # a `reset_parameters` may have put others in their place
        module.get_parameter(name).requires_grad_(False)
    _put_back(module, before, lambda t: not t.requires_grad)
    if bare_ones:
        names = ", ".join(map(repr, bare_ones))
        text = f"nothing says how to draw {names} anew: normal numbers of the mean and spread that they had are taken; "
        text += f"a reset_parameters() of {class_of(module)} would be instead"
        warnings.warn(text, MetaftWarning, stacklevel=2)
    return module


def _alike(values: Tensor) -> Tensor:
    """Normal numbers of the same mean and spread: of equal ones 2 % of them, and 0.02 where all are 0."""
    mean, spread = float(values.mean()), float(values.std(correction=0))
    return mean + (spread or 0.02 * abs(mean) or 0.02) * torch.randn(values.shape, dtype=values.dtype)


def undrawn(make: Callable[[], Part]) -> Part:
    """The module that `make` builds, on the CPU and with tensors that are not filled in, for values that are known or
    will be drawn: no constructor draws from the global generator, or takes time for it."""
    with torch.device("meta"):
        made = make()
    # Module.to_empty asks for tensors alike, which on the meta device is done by functions that import sympy: 0.7 s.
    return made._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))


@contextlib.contextmanager
def own_generator(seed: int) -> Iterator[None]:
    """Inside, the CPU's global generator is one of this seed; afterwards it is as it was."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _draw(part: nn.Module, generator: torch.Generator) -> None:
    if isinstance(part, (nn.Linear, nn.modules.conv._ConvNd)):
        nn.init.xavier_uniform_(part.weight, generator=generator)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    elif isinstance(part, EpisodeNorm) and part.weight is not None and part.bias is not None:
        nn.init.ones_(part.weight)
        nn.init.zeros_(part.bias)


def _reset(part: nn.Module, bare: dict[int, nn.Module]) -> None:
    """Parts first, so that what a module does to its parts is what counts."""
    for child in part.children():
        _reset(child, bare)
    drawn = bare.get(id(part), part)
    names = ["reset_parameters"]
    if type(drawn).__module__.startswith("torch.nn."):
        names.append("_reset_parameters")  # of attention and transformers
    reset: Any = next((name for name in names if callable(getattr(drawn, name, None))), None)
    if reset is not None and getattr(type(drawn), reset, None) not in _GLOROT_INSTEAD:
        with in_our_words(f"module: {reset}() of {class_of(drawn)} fails, so it cannot be drawn"):
            getattr(drawn, reset)()
    if drawn is not part:
        _take_over(part, drawn)


def _is_under(part: nn.Module) -> bool:
    return parametrize.is_parametrized(part) or any(_hooks(part))


def _hooks(part: nn.Module) -> Iterator[WeightNorm | SpectralNorm]:
    return (hook for hook in part._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm)))


def _bare(part: nn.Module) -> nn.Module:
    """A copy of a layer as it was before weight_norm and the like were put on it."""
    part = copied(part)
    if parametrize.is_parametrized(part):
        values = {name: getattr(part, name).detach() for name in _under(part)}
        # remove_parametrizations would change the class, which all copies of the layer share.
        part.__class__ = type(part).__bases__[0]
        del part._modules["parametrizations"]
        for name, value in values.items():
            part.register_parameter(name, nn.Parameter(value.clone()))
    for hook in list(_hooks(part)):
        (remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm)(part, hook.name)
    return part


def _under(part: nn.Module) -> list[str]:
    """Names of the tensors of a layer that are under parametrizations."""
    return list(part.parametrizations) if parametrize.is_parametrized(part) else []  # pyright: ignore[reportArgumentType]


def _take_over(part: nn.Module, drawn: nn.Module) -> None:
    """Give a layer that is under parametrizations or hooks the tensors of one that is not."""
    for name in _under(part):
        _invert(part, name, getattr(drawn, name).detach())
    under = {hook.name: hook for hook in _hooks(part)}
    for name, hook in under.items():
        value: Tensor = getattr(drawn, name)
        if isinstance(hook, WeightNorm):
            getattr(part, f"{name}_v").copy_(value)
            getattr(part, f"{name}_g").copy_(torch.norm_except_dim(value, 2, hook.dim))
        else:
            getattr(part, f"{name}_orig").copy_(value)
    for name, p in part.named_parameters(recurse=False):
        if name in dict(drawn.named_parameters(recurse=False)):
            p.copy_(drawn.get_parameter(name))


def _invert(part: nn.Module, name: str, value: Tensor) -> None:
    with in_our_words(f"module: {name!r} of {class_of(part)} cannot be drawn anew"):  # there may be no inverse
        setattr(part, name, value)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _put_back(module: nn.Module, before: dict[str, Tensor], which: Callable[[Tensor], bool]) -> None:
    with torch.no_grad():
        for name, t in _tensors(module):
            if which(t):
                t.copy_(before[name])
