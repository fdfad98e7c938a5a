"""Which engine is the fastest, by trial."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from typing import Any

import torch

from metaft.algorithms.base import Algorithm
from metaft.engines import PARALLEL, engine, workers
from metaft.engines.batching import CannotBatch
from metaft.engines.trees import length
from metaft.outer import meta_gradient
from metaft.types import Params


def tune(
    algorithm: Algorithm,
    meta: Params,
    state: Params,
    tasks: Any,
    *,
    convolutional: bool,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    seconds: float = 1.0,
) -> dict[tuple[str, int | None], float]:
    """Seconds per meta-step of each engine and chunk worth trying, fastest first; each is timed for `seconds`.

    Not `compiled` on a CPU, where compiling alone takes minutes. On a GPU what is timed is not a recorded step, but
    the meta-gradient by itself.
    """
    on_cpu = torch.device(device).type == "cpu"
    total = length(tasks)
    count = threads or torch.get_num_threads()
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= -(-total // count)]
    candidates: list[tuple[str, int | None]] = [("vmap", None)] if on_cpu else [("graph", None), ("compiled", None)]
    if on_cpu:
        parallel = [name for name in PARALLEL if name == "threads" or workers.available()]
        candidates += [(name, size) for name in parallel for size in sizes]
    medians: dict[tuple[str, int | None], float] = {}
    for name, chunk in candidates:
        with (
            contextlib.suppress(CannotBatch),  # the others can do without
            engine(name, convolutional=convolutional, device=device, threads=threads, chunk=chunk) as mapped,
        ):
            times: list[float] = []
            end = math.inf  # the first step prepares, and is not counted
            while not times or time.perf_counter() < end:
                start = time.perf_counter()
                meta_gradient(mapped, algorithm, meta, state, tasks)
                if end == math.inf:
                    end = time.perf_counter() + seconds
                else:
                    times.append(time.perf_counter() - start)
            medians[name, chunk] = statistics.median(times)
    return dict(sorted(medians.items(), key=lambda item: item[1]))
