"""Many tasks as one operation, by torch.func.vmap."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch

from metaft.engines.base import at_least_1
from metaft.engines.batching import Out, Shared, TaskFunction, Tree, vmapped
from metaft.engines.trees import added, chunks, length, summed, unstacked
from metaft.errors import MetaftError, MetaftWarning


class Vmap:
    """All tasks, or `chunk` of them, at once through torch.func.vmap: for small dense models, and for GPUs.

    On a CPU each operation gets `threads` intra-op threads until close. One is the default: small operations gain
    nothing from two, wait long for a busy core, and give bits that depend on the count.
    """

    name = "vmap"
    whole_steps = False

    def __init__(self, chunk: int | None = None, threads: int = 1) -> None:
        self.chunk = None if chunk is None else at_least_1("task_chunk", chunk)
        self.threads = at_least_1("threads", threads)
        self._intra_op = torch.get_num_threads()
        torch.set_num_threads(threads)

    def map(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Iterator[Out]:
        def results(chunks: list[Tree]) -> list[Out]:
            return [row for chunk in chunks for row in unstacked(vmapped(fn, shared, chunk))]

        return iter(self._fitting(results, tasks))

    def together(self, values: int) -> int:
        return 1

    def sum(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
        return self._fitting(lambda chunks: added(self._sum_of(fn, shared, chunk) for chunk in chunks), tasks)

    def _sum_of(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
        return summed(vmapped(fn, shared, tasks))

    def _fitting(self, run: Callable[[list[Tree]], Out], tasks: Tree) -> Out:
        """`run` on chunks of tasks: of `chunk` each, or, where a device's memory is too small, on smaller ones.

        What fits is remembered; one MetaftWarning says so. Raises MetaftError where not even one task does.
        """
        count = length(tasks)
        size = first = min(self.chunk or count, count)
        while True:
            try:
                result = run(chunks(tasks, size))
                break
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise MetaftError(
                        "engine: not even one task fits into the device's memory "
                        f"({' '.join(str(error).split('. ')[0].split())}); try --inner-checkpoint"
                    ) from None
            size = -(-size // 2)  # here, and not above, where the error still holds all that is to be freed
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if size < first:
            self.chunk = size
            text = f"{first} tasks at once do not fit into the device's memory; {size} do"
            warnings.warn(text, MetaftWarning, stacklevel=3)
        return result

    def close(self) -> None:
        torch.set_num_threads(self._intra_op)


class Graph(Vmap):
    """As `Vmap`; training records a whole meta-step once and replays it (see `metaft.outer.static`)."""

    name = "graph"
    whole_steps = True
