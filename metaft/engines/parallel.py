"""What threads and processes share."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from metaft.engines.base import at_least_1
from metaft.engines.sizes import task_chunk, tasks_together
from metaft.engines.trees import length

GROUP = 8
"""Tasks at most that a function of `map` takes at once: with more, cores wait for each other at the end."""


class Parallel:
    """What threads and processes share: several chunks of tasks at the same time, each on one core."""

    whole_steps = False

    def __init__(self, name: str, threads: int, chunk: int | None) -> None:
        self.name = name
        self.threads = at_least_1("threads", threads)
        self.chunk = None if chunk is None else at_least_1("task_chunk", chunk)
        # Hold the caller to one intra-op thread: after each parallel operation of its own the OpenMP team would spin
        # on a core that the tasks need (measured: 1.6 times slower steps on 2 cores).
        self._intra_op = torch.get_num_threads()
        torch.set_num_threads(1)

    def chunk_of(self, tasks: Any) -> int:
        """How many of these tasks each of them takes at once."""
        if self.chunk is not None:
            return self.chunk
        count = length(tasks)
        return task_chunk(sum(leaf.numel() for leaf in pytree.tree_leaves(tasks)) // count, count, self.threads)

    def together(self, values: int) -> int:
        return 1 if self.chunk == 1 else min(GROUP, tasks_together(values))

    def close(self) -> None:
        torch.set_num_threads(self._intra_op)
