"""The layers of a module as one forward pass meets them: shapes, parameters, operations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Layer(NamedTuple):
    """A layer that computes, or holds parameters of its own."""

    path: str
    """Its name in the module."""
    kind: str
    """Its class, with what tells it from others of it."""
    shape: tuple[int, ...] | None
    """Of its output for one input; None where the pass does not use it."""
    parameters: int
    flops: int
    """Of its convolutions and matrix products for one input, two for each product and sum; the rest is not counted."""
    names: tuple[str, ...]
    """Of its parameters in the module."""


class _Flops(TorchDispatchMode):
    """Adds up what `torch.utils.flop_counter` has formulas for. Its own mode has the same, and imports torch's compiler
    at its first operation, which takes a second."""

    total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what would be wrapped so that no compiler looks into it: nothing here is compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        self.total += 0 if formula is None else formula(*args, **kwargs, out_val=out)
        return out


class _Met:
    """What the hooks on one layer saw."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] | None = None
        self.flops = 0


def layers_of(module: nn.Module, x: Tensor) -> list[Layer]:
    """Of one forward pass over x [1, ...], in the order in which it meets them, and then those that it does not use.

    A parameter is counted once, with the innermost layer around it that the pass meets. FLOPs are those that
    `torch.utils.flop_counter` counts.
    """
    watched = {path: part for path, part in module.named_modules() if _is_layer(part)}
    met = {path: _Met() for path in watched}
    order: list[str] = []
    with _Flops() as counter, contextlib.ExitStack() as stack:
        stack.enter_context(_in_evaluation(module))
        running: list[list[int]] = []  # of each layer that is at work: operations before it, and of layers inside

        def hooks_of(path: str) -> tuple[Callable[..., None], Callable[..., None]]:
            def before(*_: Any) -> None:
                running.append([counter.total, 0])

            def after(layer: nn.Module, given: Any, output: Any) -> None:
                began, inside = running.pop()
                total = counter.total - began
                if running:
                    running[-1][1] += total
                met[path].flops += total - inside
                met[path].shape = _shape_of(output)
                if path not in order:
                    order.append(path)

            return before, after

        for path, part in watched.items():
            before, after = hooks_of(path)
            stack.callback(part.register_forward_pre_hook(before).remove)
            stack.callback(part.register_forward_hook(after).remove)
        with torch.no_grad(), without_fast_paths():
            module(x)
    owned = _owned(module, watched, set(order))
    rest = [path for path in watched if path not in order and owned.get(path)]
    return [
        Layer(
            path, kind_of(watched[path]), met[path].shape,
            sum(module.get_parameter(name).numel() for name in owned.get(path, ())),
            met[path].flops, tuple(owned.get(path, ())),
        )
        for path in (*order, *rest)
    ]  # fmt: skip


def _is_layer(part: nn.Module) -> bool:
    """Whether it has no parts, or has parameters of its own beside them."""
    return next(part.children(), None) is None or next(part.parameters(recurse=False), None) is not None


def _owned(module: nn.Module, watched: Mapping[str, nn.Module], met: set[str]) -> dict[str, list[str]]:
    """The names of the parameters of each layer. One that is not called by itself, as the projection of attention, is
    of the layer around it, but never of the whole module."""
    owned: dict[str, list[str]] = {}
    for name, _ in module.named_parameters():
        path = holder = name.rpartition(".")[0]
        while path and path not in met:
            path = path.rpartition(".")[0]
        owned.setdefault(path or holder, []).append(name)
    return {path: names for path, names in owned.items() if path in watched}


def _shape_of(output: Any) -> tuple[int, ...] | None:
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return tuple(first.shape[1:]) if isinstance(first, Tensor) else None


@contextlib.contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[None]:
    """Inside it is in evaluation mode; afterwards each part is as it was."""
    in_training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in in_training:
            part.training = True


@contextlib.contextmanager
def without_fast_paths() -> Iterator[None]:
    """Inside, attention calls its parts one by one: into one operation neither hooks nor the counter see."""
    former = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(former)


def kind_of(part: nn.Module) -> str:
    """A layer's class, with kernel, stride and groups of a convolution."""
    name = type(part).__name__.removeprefix("Task").removeprefix("Episode").removeprefix("Stored")
    if isinstance(part, nn.modules.conv._ConvNd):
        more = [f"{'×'.join(map(str, part.kernel_size))}"]
        more += [f"stride {part.stride[0]}"] if set(part.stride) != {1} else []
        more += ["depthwise"] if part.groups == part.in_channels > 1 else []
        more += [f"{part.groups} groups"] if 1 < part.groups < part.in_channels else []
        return f"{name} {', '.join(more)}"
    return name


class Block(NamedTuple):
    """Layers that follow one another and are drawn as one."""

    name: str
    shape: tuple[int, ...] | None
    """Of the output of the last of them."""
    layers: tuple[Layer, ...]

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)


def blocks_among(blocks: Sequence[Sequence[str]], head: str, layers: Sequence[Layer]) -> list[Block]:
    """The layers by the blocks of the backbone (see `metaft.models.blocks`) that their parameters are in, and the head
    by itself; a layer without parameters belongs to the one before it."""
    number = {name: i for i, names in enumerate(blocks) for name in names}
    groups: dict[int, list[Layer]] = {}
    at = 0
    for layer in layers:
        own = [number[name] for name in layer.names if name in number]
        is_head = layer.path == head or layer.path.startswith(f"{head}.")
        at = len(blocks) if is_head else own[0] if own else at
        groups.setdefault(at, []).append(layer)
    common = [_common(names) for names in blocks]
    names = [
        name if name and common.count(name) == 1 else _module(own[0]) for name, own in zip(common, blocks, strict=True)
    ]
    return [Block([*names, "head"][i], _last_shape(groups[i]), tuple(groups[i])) for i in sorted(groups)]


def _last_shape(layers: Sequence[Layer]) -> tuple[int, ...] | None:
    return next((layer.shape for layer in reversed(layers) if layer.shape is not None), None)


def _common(names: Sequence[str]) -> str:
    """The path that all of a block's parameters have in common, empty where they share none."""
    common: list[str] = []
    for steps in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    return ".".join(common)


def _module(name: str) -> str:
    """The path of the module that a parameter is in, or its own name."""
    return name.rpartition(".")[0] or name
