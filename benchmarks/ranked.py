"""What several processes make of a meta-step: measured on this machine, and reckoned for machines that are not here.

`scaling.py --ranks` starts this file with torchrun; every rank computes its share of the same meta-batch on one thread,
and a step ends when all have the sum.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, too

from benchmarks.peers.workloads import Options, Workload, draw_params, draw_tasks
from metaft.errors import MetaftError


def times(workload: Workload, ranks: int, *, seconds: float, engine: str) -> list[float]:
    """Milliseconds of each meta-step on so many ranks of one thread. Raises MetaftError where torchrun fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        request = {"workload": dataclasses.asdict(workload), "seconds": seconds, "engine": engine, "out": str(out)}
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [sys.executable, *launch, __file__, json.dumps(request)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise MetaftError(f"ranks: torchrun with {ranks} failed: {done.stderr.strip().splitlines()[-1:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def work(request: dict[str, Any]) -> None:
    """One rank's part of `times`; rank 0 writes them."""
    from benchmarks.peers import metaft_maml
    from metaft.dist.group import join
    from metaft.support.allocator import keep_freed_memory

    keep_freed_memory()
    ranks = join()
    workload = Workload.from_plain(request["workload"])
    options = Options(threads=1, engine=request["engine"])
    system = metaft_maml.make(workload, draw_params(workload), draw_tasks(workload), options, ranks)
    try:
        found: list[float] = []
        system.step()
        system.step()  # the first one starts the workers, the second one fills their caches

        def run(steps: int) -> None:
            for _ in range(steps):
                start = time.perf_counter()
                system.step()
                found.append(1000 * (time.perf_counter() - start))

        run(3)
        run(ranks.on_first(lambda: math.ceil(1000 * request["seconds"] / min(found))))
        if ranks.rank == 0:
            Path(request["out"]).write_text(json.dumps(found[3:]), encoding="utf-8")
    finally:
        system.close()
        ranks.close()


class Network(NamedTuple):
    """How ranks are joined."""

    latency: float
    """Seconds from one rank to the next, software included."""
    bandwidth: float
    """Bytes per second that one rank sends while it receives as many."""


ETHERNET = Network(50e-6, 10e9 / 8)
INFINIBAND = Network(6e-6, 400e9 / 8)
"""10 Gbit/s under gloo, and 400 Gbit/s per GPU under NCCL. The latencies are assumed, of the usual size."""

FIXED, TASK = 5e-3, 70e-6
"""Assumed seconds of a meta-step on a GPU: to launch a thousand kernels at 5 us, however many tasks they are for; and
per task, 1.4 GFLOP at 20 TFLOP/s."""


def ring(ranks: int, size: float, network: Network) -> float:
    """Seconds of a ring all-reduce of `size` bytes: 2 (p - 1) steps, each of which sends one p-th of them."""
    return 2 * (ranks - 1) * (network.latency + size / ranks / network.bandwidth)


def tree(ranks: int, size: float, network: Network) -> float:
    """Seconds up and down a binary tree: log2(p) latencies each way, with the bytes sent once each way."""
    return 2 * (math.ceil(math.log2(ranks)) * network.latency + size / network.bandwidth) if ranks > 1 else 0.0


def cost_table(size: float, meta_batch: int, counts: Sequence[int] = (1, 8, 64, 256, 1024)) -> str:
    """Markdown: the all-reduce of `size` bytes, and how much faster than one GPU so many are on the same tasks, and on
    as many tasks each."""
    lines = [
        f"| GPUs | ring, ms | tree, ms | speed-up, {meta_batch} tasks in all | speed-up, {meta_batch} tasks each |",
        "|---|---|---|---|---|",
    ]
    alone = FIXED + meta_batch * TASK
    for ranks in counts:
        sums = [reduce(ranks, size, INFINIBAND) for reduce in (ring, tree)]
        strong = alone / (FIXED + -(-meta_batch // ranks) * TASK + min(sums))
        weak = ranks * alone / (alone + min(sums))
        same = f"{strong:.2f}" if ranks <= meta_batch else "refused: too few"
        lines.append(f"| {ranks} | {1e3 * sums[0]:.2f} | {1e3 * sums[1]:.2f} | {same} | {weak:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
