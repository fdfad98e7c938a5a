"""Trees of tensors that lead with a task axis, taken apart and added up in task order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from metaft.errors import MetaftError

Tree = TypeVar("Tree")
Out = TypeVar("Out")


def length(tasks: Any) -> int:
    count = pytree.tree_leaves(tasks)[0].shape[0]
    if not count:
        raise MetaftError("meta_batch must be at least 1, got an empty batch of tasks")
    return count


def chunks(tasks: Tree, size: int | None) -> list[Tree]:
    leaves, spec = pytree.tree_flatten(tasks)
    count = length(tasks)
    parts = [leaf.split(size or count) for leaf in leaves]
    return [pytree.tree_unflatten(list(part), spec) for part in zip(*parts, strict=True)]


def summed(results: Out) -> Out:
    return pytree.tree_map(lambda leaf: leaf[0] if len(leaf) == 1 else leaf.sum(0), results)


def added(results: Iterable[Out]) -> Out:
    total: list[Tensor] = []
    spec: pytree.TreeSpec | None = None
    for result in results:
        leaves, spec = pytree.tree_flatten(result)
        if not total:
            total = [leaf.clone() for leaf in leaves]
        else:
            for sum_, leaf in zip(total, leaves, strict=True):
                sum_ += leaf
    assert spec is not None
    return pytree.tree_unflatten(total, spec)


def unstacked(results: Out) -> list[Out]:
    leaves, spec = pytree.tree_flatten(results)
    return [pytree.tree_unflatten([leaf[i] for leaf in leaves], spec) for i in range(leaves[0].shape[0])]
