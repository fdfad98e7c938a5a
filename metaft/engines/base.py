"""What an engine is to the rest of metaft."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from metaft.engines.batching import Out, Shared, TaskFunction, Tree
from metaft.errors import MetaftError


class Engine(Protocol):
    """One way of running the same function on every task of a batch."""

    name: str
    threads: int
    """Tasks at the same time, or threads within an operation."""
    whole_steps: bool
    """Whether training is to take its steps as a whole (see `metaft.outer.static`), as far as it can."""

    def map(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Iterator[Out]:
        """`fn(shared, task)` for each task of a tree whose tensors lead with a task axis; results come in task order.

        Engines may keep what they prepare for a function, so it should be the same object in each call.
        """
        ...

    def together(self, values: int) -> int:
        """How many tasks of `values` numbers each a function given to `map` should take at once itself, if it can batch
        them: 1 of an engine that batches what it maps. It does not depend on how many tasks or threads there are."""
        ...

    def sum(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
        """The sum of `fn(shared, task)` over tasks: within each chunk, then over chunks, always in task order."""
        ...

    def close(self) -> None: ...


def at_least_1(field: str, value: int) -> int:
    if value < 1:
        raise MetaftError(f"{field} must be at least 1, got {value}")
    return value
