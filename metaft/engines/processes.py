"""Tasks over forked processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from metaft.engines import workers
from metaft.engines.batching import Out, Shared, TaskFunction, Tree, make_ready, rows, sum_of
from metaft.engines.parallel import Parallel
from metaft.engines.threads import Threads
from metaft.engines.trees import added, length
from metaft.errors import MetaftError, MetaftWarning


class Processes(Parallel):
    """As `Threads`, with a process for each: the same bits, and none waits for another one's Python.

    For the CPU of systems that can fork. The workers of a function are forked at its first call, and once more for
    other shapes. A fork waits until the program's other threads sleep, for a moment at most: one that multiplies
    matrices all the time may leave a lock behind in the workers.
    Where what the user handed over may wait for threads that no worker would have (`workers.others`), nothing is
    forked: tasks run in threads, and a MetaftWarning says so.
    """

    _KEPT = 4
    """Functions whose workers are kept: those of training and of a validation, and some to spare."""

    def __init__(self, threads: int, chunk: int | None = None) -> None:
        if not workers.available():
            raise MetaftError("engine: this system cannot fork processes; use threads")
        super().__init__("processes", threads, chunk)
        self._workers: dict[Any, workers.Workers] = {}
        self._instead: Threads | None = None

    def map(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Iterator[Out]:
        if (unforked := self._unforked()) is not None:
            return unforked.map(fn, shared, tasks)
        results, spec = self._run(rows, fn, shared, tasks, size=1)
        return iter([pytree.tree_unflatten([each[i].clone() for each in results], spec) for i in range(length(tasks))])

    def sum(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
        if (unforked := self._unforked()) is not None:
            return unforked.sum(fn, shared, tasks)
        results, spec = self._run(sum_of, fn, shared, tasks, size=self.chunk_of(tasks))
        return added(pytree.tree_unflatten([each[i] for each in results], spec) for i in range(len(results[0])))

    def _unforked(self) -> Threads | None:
        """What maps tasks where nothing is to be forked any more."""
        started = workers.others() if self._instead is None else []
        if started:
            self._instead = Threads(self.threads, self.chunk)
            names = ", ".join(repr(thread.name) for thread in started)
            text = f"engine processes: there are threads ({names}), which no fork survives; "
            warnings.warn(f"{text}tasks run in threads", MetaftWarning, stacklevel=4)
        return self._instead

    def _run(self, part: Any, fn: TaskFunction[Any, Any, Any], shared: Any, tasks: Any, size: int) -> Any:
        shared_leaves, spec = pytree.tree_flatten(shared)
        task_leaves, task_spec = pytree.tree_flatten(tasks)
        count = length(tasks)
        shapes = [*(leaf.shape for leaf in shared_leaves), *(leaf.shape[1:] for leaf in task_leaves)]
        key = (part, fn, size, spec, task_spec, *shapes, *(leaf.dtype for leaf in (*shared_leaves, *task_leaves)))
        team = self._workers.pop(key, None)
        if team is not None and team.capacity < count:
            team.close()
            team = None
        if team is None:
            summed = part is sum_of
            make_ready(min(size, count))

            def run(shared: Any, tasks: Any) -> Any:
                result = part(fn, shared, tasks)
                return pytree.tree_map(lambda leaf: leaf.unsqueeze(0), result) if summed else result

            team = workers.Workers(self.threads, run, shared, tasks, size=size, summed=summed)
        try:
            with torch.no_grad():
                results = team.run(shared, tasks)
        except BaseException:  # some of them may still be at work, and their answers would be taken for the next call's
            team.close()
            raise
        self._workers[key] = team  # the last one used stands last
        while len(self._workers) > self._KEPT:
            self._workers.pop(next(iter(self._workers))).close()
        return results

    def close(self) -> None:
        for each in self._workers.values():
            each.close()
        self._workers.clear()
        if self._instead is not None:
            self._instead.close()
        super().close()
