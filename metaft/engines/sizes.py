"""How many tasks at once are right for a core of a CPU."""

from __future__ import annotations


def tasks_together(values: int) -> int:
    """How many tasks of `values` numbers each (images and all) a core takes at once, where there are enough.

    Small tasks cost more in calls than in arithmetic, and share the calls; large ones would only push each other out
    of the cache. On Conv-4 that makes 16 with 10 images of 28x28 per task, 8 with 80 of them, 1 with 80 of 84x84.
    """
    return max(1, min(16, (1 << 19) // max(1, values)))


def task_chunk(values: int, meta_batch: int, threads: int) -> int:
    """`tasks_together` with work for each thread or process."""
    return min(tasks_together(values), max(1, -(-meta_batch // threads)))
