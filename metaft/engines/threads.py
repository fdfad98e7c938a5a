"""Tasks over threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from metaft.engines import workers
from metaft.engines.batching import Out, Shared, TaskFunction, Tree, rows, sum_of
from metaft.engines.parallel import Parallel
from metaft.engines.trees import added, chunks, unstacked


class Threads(Parallel):
    """Tasks side by side in threads of one intra-op thread each; sums take `chunk` tasks at once per thread, by vmap.

    With the same `chunk` bits do not depend on how many threads there are, since each chunk runs whole on one of them,
    alone; what `chunk=None` stands for does. Right for convolutions on a CPU, most of which are too small to be shared
    out among cores, where processes cannot be had: Python runs one thread at a time, so that threads wait for each
    other (see docs/performance.md).
    """

    def __init__(self, threads: int, chunk: int | None = None) -> None:
        super().__init__("threads", threads, chunk)
        self._pool = ThreadPoolExecutor(threads, workers.OWN_THREADS, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Iterator[Out]:
        parts = self._pool.map(lambda chunk: rows(fn, shared, chunk), chunks(tasks, 1))
        return (row for part in parts for row in unstacked(part))

    def sum(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
        return added(self._pool.map(lambda chunk: sum_of(fn, shared, chunk), chunks(tasks, self.chunk_of(tasks))))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        super().close()
