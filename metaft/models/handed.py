"""A module that the user hands over: a copy of it that tasks can share, or one line that says why there is none."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from metaft.errors import MetaftError
from metaft.support.foreign import in_our_words
from metaft.types import Params

_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}
_TYPES = (torch.float32, torch.float64)
_EMPTY = (dict, OrderedDict)


def unwrapped(module: nn.Module) -> nn.Module:
    """What a compiled or parallel module computes, without what computes it: metaft brings engines of its own."""
    while True:
        if isinstance(module, (nn.DataParallel, DistributedDataParallel)):
            module = module.module
        elif _is_compiled(module):
            module = module._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return module


def wrappers(module: nn.Module) -> list[str]:
    """What `unwrapped` takes away from a module and its parts, by the names of the classes."""
    return sorted({type(part).__name__ for part in module.modules() if unwrapped(part) is not part})


def class_of(module: nn.Module) -> str:
    """The name by which a module is spoken of."""
    return type(unwrapped(module)).__qualname__


def copied(module: nn.Module) -> nn.Module:
    """A copy with nothing wrapped in it, of which each tensor is one to itself; `module` stays as it is.

    Raises MetaftError for what is no module, or cannot be copied.
    """
    if not isinstance(module, nn.Module):
        what = f"the class {module.__qualname__}" if isinstance(module, type) else f"of type {type(module).__name__}"
        raise MetaftError(f"module: must be an nn.Module, and what was handed over is {what}")
    module = unwrapped(module)
    _refuse_kinds(module)
    memo: dict[int, Any] = {}
    with in_our_words(f"module: {class_of(module)} cannot be copied"):
        for value in (value for part in module.modules() for value in vars(part).values()):
            if type(value) in _EMPTY and not value:
                # A module has a dozen for hooks, and to copy one as any object costs more than to copy a small tensor.
                memo[id(value)] = type(value)()
                continue
            for leaf in pytree.tree_leaves(value):
                # A hook of torch.nn.utils.weight_norm leaves the weight that it computed last, with its graph.
                if isinstance(leaf, Tensor) and not leaf.is_leaf:
                    memo[id(leaf)] = leaf.detach().clone()
        for part in reversed(list(module.modules())):
            bare = unwrapped(part)
            if bare is not part:
                memo[id(part)] = copy.deepcopy(bare, memo)
        return copy.deepcopy(module, memo)


def taken(module: nn.Module) -> nn.Module:
    """`copied`, for a module whose tensors are such that tasks can be trained on it. Raises MetaftError where not."""
    module = copied(module)
    name = class_of(module)
    for path, p in module.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise MetaftError(f"parameter {path!r} is lazy; run one forward pass before handing the module over")
        if p.device.type == "meta":
            raise MetaftError(f"parameter {path!r} is on the meta device: it has no values to begin with")
    parameters = dict(module.named_parameters())
    kinds: dict[torch.dtype, str] = {}
    for path, p in parameters.items():
        if p.is_floating_point() or p.is_complex():
            kinds.setdefault(p.dtype, path)
    for dtype, path in kinds.items():
        if dtype not in _TYPES:
            mend = "tasks are trained in real numbers"
            if not dtype.is_complex:
                mend = "hand over module.float() (precision='bf16' computes in a short type, parameters in float32)"
            raise MetaftError(f"module: parameter {path!r} is {_short(dtype)}; {mend}")
    if len(kinds) > 1:
        mixed = ", ".join(f"{path!r} is {_short(dtype)}" for dtype, path in kinds.items())
        raise MetaftError(f"module: its parameters are of several types ({mixed}); hand over module.float()")
    if parameters and not any(p.requires_grad for p in parameters.values()):
        raise MetaftError(f"module: all parameters of {name} are frozen (requires_grad=False); nothing can be learned")
    return module


def frozen(module: nn.Module) -> Params:
    """Parameters that the user set to stay as they are, by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}


def buffers(module: nn.Module) -> Params:
    """What else a module computes with and nothing learns, by name, as far as its state_dict has it."""
    names = module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys()
    return {name: b.detach().clone() for name, b in module.named_buffers() if name in names}


def said(module: nn.Module, *more: str) -> str:
    """What a run's first line says of a module: its class, what became of it, and what of it stays as it is."""
    parts = [class_of(module), *more]
    if taken_away := wrappers(module):
        parts.append(f"without {', '.join(taken_away)}")
    still = [name for name, p in copied(module).named_parameters() if not p.requires_grad]
    if still:
        parts.append(f"frozen: {', '.join(still[:4])}{f' and {len(still) - 4} more' if len(still) > 4 else ''}")
    return f" ({'; '.join(parts)})"


def with_constants(module: nn.Module, parameters: Params, constants: Params) -> nn.Module:
    """A copy with these values of frozen parameters and of buffers, by name. Raises MetaftError, naming the first that
    the module has not, or in another shape."""
    module = copied(module)
    there = dict(module.named_parameters()), dict(module.named_buffers())
    with torch.no_grad():
        for what, tensors, values in zip(("parameter", "buffer"), there, (parameters, constants), strict=True):
            for name, value in values.items():
                if name not in tensors or tensors[name].shape != value.shape:
                    has = list(tensors[name].shape) if name in tensors else "no such"
                    raise MetaftError(
                        f"module: {what} {name!r} has shape {list(value.shape)} in the run, and {has} in the module "
                        "that was handed over"
                    )
                tensors[name].copy_(value)
    return module


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Inside, functions that went through torch.compile run as they are written: nothing can differentiate a compiled
    one twice, and its compiler has threads and processes that a fork does not survive."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:  # then nothing can have been compiled
        yield
        return
    _stance.enter()
    try:
        yield
    finally:
        _stance.leave()


class _Stance:
    """torch.compile's is one for all threads, so that the first one in sets it, and the last one out sets it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._set: Any = None

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._set = torch.compiler.set_stance("force_eager")
                self._set.__enter__()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._set.__exit__(None, None, None)


_stance = _Stance()


def _is_compiled(module: nn.Module) -> bool:
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(module, frames.OptimizedModule)


def _refuse_kinds(module: nn.Module) -> None:
    """Raises MetaftError for parts that cannot be computed as functions of their parameters."""
    for path, part in module.named_modules():
        where = f"layer {path!r}" if path else "module"
        kind = type(part).__name__
        if isinstance(part, torch.jit.ScriptModule):
            raise MetaftError(f"{where}: {kind} is compiled by TorchScript; hand over the module that it was made of")
        if _SHARDED & {each.__name__ for each in type(part).__mro__}:
            raise MetaftError(f"{where}: {kind} shares its parameters out over processes; hand over the whole module")
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            if part.max_norm is not None:
                raise MetaftError(
                    f"{where} ({kind}, max_norm={part.max_norm}) rewrites its weights in each pass, which tasks share; "
                    "set its max_norm to None"
                )
            if part.sparse:
                raise MetaftError(f"{where} ({kind}, sparse=True) has sparse gradients; set its sparse to False")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
