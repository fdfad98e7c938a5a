"""What a run is computed on: what its exact bits depend on, and what a result says of it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from metaft.engines import PARALLEL, Engine


def environment(engine: Engine, device: str) -> dict[str, str]:
    """What the exact bits of a run depend on besides its settings."""
    return {
        "engine": engine.name,
        "chunk": str(getattr(engine, "chunk", None)),
        # Processes and threads give the same bits whatever their number.
        "threads": str(getattr(engine, "threads", None)) if engine.name not in PARALLEL else "any",
        **machine(device),
    }


def machine(device: str) -> dict[str, str]:
    """The part of `environment` that no setting decides."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "device": name, "machine": platform.machine(), "processor": processor()}


def processor() -> str:
    """The CPU's name, or what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def where_measured(device: str, threads: int) -> dict[str, Any]:
    """What a result says of the machine and the processes, threads or intra-op threads that it comes from."""
    return {**machine(device), "cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": threads}


def say_what_changed(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """A line on stderr where a resumed run cannot go on with the same bits. What an older run did not note is no
    change."""
    changed = [f"{k} {before[k]} -> {now[k]}" for k in now if k in before and before[k] != now[k]]
    if changed:
        print(
            f"note: {', '.join(changed)}: the run goes on to rounding (1e-6), not with the same bits", file=sys.stderr
        )
