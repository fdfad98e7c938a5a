"""A long run takes as much memory at its end as after its first steps."""

from __future__ import annotations

import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from helpers import IMAGES, SINUSOID, options
from victims import DONE, FULL, Plan, Victim

STEPS, TIMES = (2000, 100) if FULL else (160, 20)
FLAT = 1.02

LONG = {"iterations": STEPS, "eval_every": STEPS // TIMES, "eval_episodes": 8, "checkpoint_every": 50}
SHORT = {"query_shots": 1, "test_query_shots": 1, "test_inner_steps": 1, "eval_episodes": 2}
RUNS: dict[str, dict[str, Any]] = {
    "mlp": {**SINUSOID, **LONG, "width": 16},
    "conv4": {**IMAGES, **LONG, "image_size": 8, "outer_lr": 0.001, **SHORT},
}
"""Conv-4 takes the fused operation of CPUs, on the engines that are meant for it."""

ENGINES = {"mlp": ["vmap"], "conv4": ["processes"]}
if FULL:
    ENGINES = {"mlp": ["processes", "threads", "vmap", "graph", "compiled"], "conv4": ["processes", "threads"]}
ROWS = [(model, engine) for model, engines in ENGINES.items() for engine in engines]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(("model", "engine"), ROWS)
def test_memory_stays_flat(model: str, engine: str, squares: Path, tmp_path: Path) -> None:
    """Resident memory of the run and its workers after each validation; the first quarter of them warms up."""
    if engine == "compiled" and shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    log = tmp_path / "memory"
    how: dict[str, Any] = {"engine": engine, "out": tmp_path / "r"}
    if engine in ("processes", "threads"):
        how |= {"task_chunk": 1, "threads": 2}
    if model == "conv4":
        how["dataset"] = f"folder:{squares}"
    victim = Victim("meta_train", options(RUNS[model], **how), Plan(weigh=log), fresh=True)
    assert victim.status(550) == 0, victim.said
    weights = [int(line) for line in log.read_text().split()]
    assert len(weights) == TIMES
    later = weights[TIMES // 4 :]
    growth = (statistics.mean(weights[-TIMES // 4 :]) - statistics.mean(later[: TIMES // 4])) / (STEPS / 2)
    print(f"{model}, {engine}: {later[0] / 1e6:.1f} MB, at most {max(later) / 1e6:.1f} MB, {growth:.0f} bytes per step")
    assert max(later) <= FLAT * later[0]
    DONE[f"runs of {STEPS} steps weighed"] += 1
