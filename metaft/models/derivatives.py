"""Operations that PyTorch cannot differentiate, or not twice: what to say of them, and how attention is computed."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaft.errors import MetaftError

_INSTEAD = "use --algorithm fomaml, or another one with --hyper first_order=true"


def without_derivative(said: str) -> str | None:
    """What to say of an operation that cannot be differentiated (again); None for any other error."""
    if match := re.search(r"derivative for '?(?:\w+::)?(\w+)'? is not implemented", said):
        name = match[1]
        if not name.endswith("backward"):
            return f"torch has no derivative of {name}, which training needs"
        return f"torch has no second derivative of {name.removesuffix('_backward').lstrip('_')}; {_INSTEAD}"
    if re.search("(?i)double[ -]backward", said):
        return f"{first_sentence(said)}; {_INSTEAD}"
    return None


_ONCE = once_differentiable(lambda ctx: None).__code__
"""The code of every backward that is marked so; which one it marks lies in its closure."""


def check_twice_differentiable(value: Tensor) -> None:
    """Raises MetaftError where the gradient of `value` could be differentiated, but wrongly: for what is marked
    @once_differentiable torch's own error is lost on the way to named parameters, and the derivative is 0 without it.
    """
    node = value.grad_fn
    nodes, seen = [node], {node}
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if node.name() == "WeightNormInterfaceBackward0":  # wrong by tens of percent in torch 2.13
            raise MetaftError(f"torch's second derivative of weight_norm is wrong; {_INSTEAD}")
        if (function := getattr(type(node), "_forward_cls", None)) and _once(function):
            name = function.__name__.replace("Generated", "")
            raise MetaftError(f"{name} is marked once_differentiable, without a second derivative; {_INSTEAD}")
        following = [each for each, _ in node.next_functions if each not in seen]
        seen.update(following)
        nodes += following


def _once(function: type) -> bool:
    backward = getattr(function, "backward", None)
    if getattr(backward, "__code__", None) is _ONCE:
        return True
    cells = [cell.cell_contents for cell in getattr(backward, "__closure__", None) or ()]  # torch.func wraps functions
    return any(_once(each) for each in cells if isinstance(each, type) and issubclass(each, torch.autograd.Function))


def first_sentence(said: str) -> str:
    return " ".join(said.split()).split(". ")[0].rstrip(".")[:200]


_lock = threading.Lock()
_inside = 0
_kernel = contextlib.ExitStack()


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """Inside, attention is computed by PyTorch's "math" kernel, the only one with a second derivative.

    The choice is the process's, so that the first thread to come makes it and the last one to go takes it back.
    """
    global _inside
    with _lock:
        if not _inside:
            _kernel.enter_context(sdpa_kernel(SDPBackend.MATH))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _kernel.close()
