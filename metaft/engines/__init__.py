"""Engines: ways of running one task's function on every task of a batch. All else is written for one task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from metaft.engines import workers
from metaft.engines.base import Engine
from metaft.engines.compiled import Compiled
from metaft.engines.processes import Processes
from metaft.engines.sizes import task_chunk
from metaft.engines.threads import Threads
from metaft.engines.vmap import Graph, Vmap
from metaft.errors import MetaftError, no_such

__all__ = [
    "ENGINES",
    "PARALLEL",
    "Compiled",
    "Engine",
    "Graph",
    "Processes",
    "Threads",
    "Vmap",
    "engine",
    "settled_name",
    "task_chunk",
]

ENGINES: dict[str, Callable[..., Engine]] = {
    "processes": Processes,
    "threads": Threads,
    "vmap": Vmap,
    "graph": Graph,
    "compiled": Compiled,
}
"""Each takes `threads` and `chunk`."""

PARALLEL = ("processes", "threads")
"""Engines that give the same bits for the same chunk."""


def settled_name(name: str, *, convolutional: bool, device: str | torch.device) -> str:
    """The engine that `auto` stands for: a fixed rule on model and device."""
    if name != "auto":
        return name
    if torch.device(device).type != "cpu":
        return "graph"
    if not convolutional:
        return "vmap"
    return "processes" if workers.available() else "threads"


@contextlib.contextmanager
def engine(
    name: str = "auto",
    *,
    convolutional: bool = True,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    chunk: int | None = None,
) -> Iterator[Engine]:
    """An engine by name, closed on leaving.

    `auto`: for convolutions on a CPU processes, or threads where a system cannot fork; on a GPU graph; vmap for
    all else. `threads=None` uses as many processes or threads as torch would threads, and one for the other engines.
    `chunk=None` is what `task_chunk` says for processes and threads, and all for the others. Raises MetaftError for an
    unknown name.
    """
    on_cpu = torch.device(device).type == "cpu"
    name = settled_name(name, convolutional=convolutional, device=device)
    if name not in ENGINES:
        raise no_such("engine", name, ["auto", *ENGINES])
    if name == "processes" and not on_cpu:
        raise MetaftError(f"engine: processes are for the CPU, not for {device}; use vmap")
    if threads is None:
        threads = torch.get_num_threads() if name in PARALLEL else 1
    mapped = ENGINES[name](threads=threads, chunk=chunk)
    if name == "compiled":
        mapped.whole_steps = not on_cpu
    try:
        yield mapped
    finally:
        mapped.close()
