"""A long run takes as much memory at its end as after its first steps."""

from __future__ import annotations

import os
import shutil
import statistics
from pathlib import Path

import pytest
from helpers import SINUSOID, options
from victims import FULL, Plan, Victim

STEPS, TIMES = (2000, 100) if FULL else (240, 40)
FLAT = 1.02

LONG = {"iterations": STEPS, "eval_every": STEPS // TIMES, "eval_episodes": 8, "checkpoint_every": 50, "width": 16}

ENGINES = ["processes", "threads", "vmap", *(["compiled"] if FULL else [])]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("engine", ENGINES)
def test_memory_stays_flat(engine: str, tmp_path: Path) -> None:
    """Resident memory of the run and its workers after each validation; the first quarter of them warms up."""
    if engine == "compiled" and shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    log = tmp_path / "memory"
    how = {"engine": engine, **({} if engine == "compiled" else {"task_chunk": 1, "threads": 2})}
    argv = options({**SINUSOID, **LONG, **how}, out=tmp_path / "r")
    victim = Victim("meta_train", argv, Plan(weigh=log), fresh=True)
    assert victim.status(550) == 0, victim.said
    weights = [int(line) for line in log.read_text().split()]
    assert len(weights) == TIMES
    later = weights[TIMES // 4 :]
    growth = (statistics.mean(weights[-TIMES // 4 :]) - statistics.mean(later[: TIMES // 4])) / (STEPS / 2)
    print(f"{engine}: {later[0] / 1e6:.1f} MB, at most {max(later) / 1e6:.1f} MB, {growth:.0f} bytes per step")
    assert max(later) <= FLAT * later[0]
