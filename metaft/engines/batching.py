"""One task's function on several tasks: by vmap, or one by one, and why the one may not be."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from metaft.engines.trees import chunks, length, summed, unstacked
from metaft.errors import MetaftError, class_and_words, words_of
from metaft.models.derivatives import first_sentence, without_derivative
from metaft.support.foreign import in_our_words, ran_out

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
    if (batched := _batched(fn, shared, tasks)) is not None:
        return batched
    results = [pytree.tree_flatten(_single(fn, shared, task)) for task in unstacked(tasks)]
    stacked = [torch.stack(row) for row in zip(*(result for result, _ in results), strict=True)]
    return pytree.tree_unflatten(stacked, results[0][1])


def each(fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree, count: int) -> list[Out]:
    """`fn(shared, task)` of the first `count` tasks: of all of them by vmap, or of those one by one where that cannot
    be. One by one they need not be trees of tensors that can be stacked."""
    if (batched := _batched(fn, shared, tasks)) is not None:
        return unstacked(batched)[:count]
    return [_single(fn, shared, task) for task in unstacked(tasks)[:count]]


def _batched(fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out | None:
    """By vmap, where there are several tasks and it can."""
    if length(tasks) == 1 or fn in _one_by_one:
        return None
    try:
        return vmapped(fn, shared, tasks)
    except CannotBatch:
        _one_by_one.add(fn)
        return None


def make_ready(chunk: int) -> None:
    """Import torch._dynamo, as torch.func does at its first derivative, which chunks of several tasks take: before a
    fork, or each process would import it for itself, for two seconds."""
    if chunk > 1:
        importlib.import_module("torch._dynamo")


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
        if ran_out(error):
            raise
        said = words_of(error)
        if "random operation" in said:
            raise MetaftError(
                "model: it draws from torch's global generator, so that tasks could not be reproduced; "
                "nn.Dropout layers may drop, by masks that follow from the task"
            ) from error
        _single(fn, shared, pytree.tree_map(lambda leaf: leaf[0], tasks))  # or raises what is wrong with any task
        raise CannotBatch(
            f"engine: vmap cannot batch an operation of this model ({first_sentence(said)}); "
            "use --engine processes or threads"
        ) from error


def _single(fn: TaskFunction[Shared, Tree, Out], shared: Shared, task: Tree) -> Out:
    try:
        with torch.no_grad():  # grad mode is thread-local: a worker starts with its own, whatever the caller's is
            return fn(shared, task)
    except RuntimeError as error:
        refusal = without_derivative(str(error))
        if refusal is None:
            raise
        raise MetaftError(refusal) from error


def sum_of(fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
    return summed(rows(fn, shared, tasks))


def why_not_mapped(fn: TaskFunction[Shared, Tree, Any], shared: Shared, tasks: Tree, what: str) -> str:
    """Why vmap cannot take two tasks by this function, "" where it can. One intra-op thread, for a fork may follow.

    Raises MetaftError, of `what`, where not even one task by itself can be taken.
    """
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, *_ = chunks(tasks, 1)
        with in_our_words(f"{what} do not go together"):
            rows(fn, shared, first)
        try:
            vmapped(fn, shared, tasks)
        except CannotBatch as error:
            return class_and_words(error.__cause__ or error)
        return ""
    finally:
        torch.set_num_threads(intra_op)
