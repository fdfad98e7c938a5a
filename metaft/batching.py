"""One task's function on several tasks, and what to say of an operation that PyTorch cannot batch or differentiate."""

from __future__ import annotations

import contextlib
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from metaft.errors import MetaftError

Tree = TypeVar("Tree")
Shared = TypeVar("Shared")
Out = TypeVar("Out")
TaskFunction = Callable[[Shared, Tree], Out]
"""(what all tasks share, one task) -> a tree of tensors"""

_one_by_one: weakref.WeakSet[Any] = weakref.WeakSet()
"""Functions that vmap was found not to batch, so that it is not tried anew in each step."""


class CannotBatch(MetaftError):
    """What is right for one task is beyond vmap."""


def rows(fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
    """`fn(shared, task)` of each task, stacked: by vmap, or one by one where that cannot be.

    One task runs without vmap, since plain autograd is faster. Raises MetaftError for an operation without the
    derivative that is asked of it.
    """
    leaves, spec = pytree.tree_flatten(tasks)
    if len(leaves[0]) > 1 and fn not in _one_by_one:
        try:
            return vmapped(fn, shared, tasks)
        except CannotBatch:
            _one_by_one.add(fn)
    parts = zip(*(leaf.unbind() for leaf in leaves), strict=True)
    results = [pytree.tree_flatten(_single(fn, shared, pytree.tree_unflatten(list(part), spec))) for part in parts]
    stacked = [torch.stack(row) for row in zip(*(result for result, _ in results), strict=True)]
    return pytree.tree_unflatten(stacked, results[0][1])


def vmapped(fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
    """`fn(shared, task)` of each task, stacked, by vmap.

    Raises CannotBatch where one task alone would do, and MetaftError for an operation that draws from the global
    generator, or without the derivative that is asked of it.
    """
    try:
        with torch.no_grad():
            return torch.func.vmap(fn, in_dims=(None, 0), randomness="error")(shared, tasks)  # type: ignore[reportArgumentType]
    except MetaftError:
        raise
    except Exception as error:  # vmap has no class of its own for what it cannot do
        said = " ".join(str(error).split())
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search("(?i)memory|alloc", said):
            raise
        if "random operation" in said:
            raise MetaftError(
                "model: it draws from torch's global generator, so that tasks could not be reproduced; "
                "nn.Dropout layers may drop, by masks that follow from the task"
            ) from error
        _single(fn, shared, pytree.tree_map(lambda leaf: leaf[0], tasks))  # or raises what is wrong with any task
        raise CannotBatch(
            f"engine: vmap cannot batch an operation of this model ({_first_sentence(said)}); "
            "use --engine processes or threads"
        ) from error


def _single(fn: TaskFunction[Shared, Tree, Out], shared: Shared, task: Tree) -> Out:
    try:
        with torch.no_grad():  # grad mode is thread-local: a worker starts with its own, whatever the caller's is
            return fn(shared, task)
    except RuntimeError as error:
        refusal = _without_derivative(str(error))
        if refusal is None:
            raise
        raise MetaftError(refusal) from error


_INSTEAD = "use --algorithm fomaml, or another one with --hyper first_order=true"


def _without_derivative(said: str) -> str | None:
    """What to say of an operation that cannot be differentiated (again); None for any other error."""
    if match := re.search(r"derivative for '?(?:\w+::)?(\w+)'? is not implemented", said):
        name = match[1]
        if not name.endswith("backward"):
            return f"torch has no derivative of {name}, which training needs"
        return f"torch has no second derivative of {name.removesuffix('_backward').lstrip('_')}; {_INSTEAD}"
    if re.search("(?i)double[ -]backward", said):
        return f"{_first_sentence(said)}; {_INSTEAD}"
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


def _first_sentence(said: str) -> str:
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
