"""What a meta-step of metaft costs as the meta-batch, inner steps, ways, queries or threads grow, beside its floor.

    python benchmarks/scaling.py --base omniglot-5w1s-q15 --seconds 2 --out runs/scaling.json
    python benchmarks/scaling.py --ranks 2 --seconds 10     # processes of one thread each, started by torchrun
    python benchmarks/scaling.py --cost-model               # many GPUs on paper: docs/performance.md

One setting is varied at a time. The floor is the arithmetic of the step's convolutions and matrix products, counted by
torch's flop counter on metaft's own step, over the rate of one large convolution that is measured in the same run with
the same number of threads: no step can be faster on this machine, unless it computes less.

Written are a table, the JSON with every figure, and a picture beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, too

from benchmarks import ranked
from benchmarks.peers import metaft_maml
from benchmarks.peers.workloads import WORKLOADS, Options, Workload, draw_params, draw_tasks
from benchmarks.throughput import provenance
from metaft.errors import MetaftError
from metaft.outer import task_grad
from metaft.plots.style import BLUE, GREY, decorate, save
from metaft.support.allocator import keep_freed_memory
from metaft.support.output import of_command
from metaft.types import Episode

AXES: dict[str, tuple[int, ...]] = {
    "meta_batch": (2, 4, 8, 16, 32, 64),
    "inner_steps": (1, 2, 5, 10),
    "ways": (2, 5, 10, 20),
    "query_shots": (1, 5, 10, 15),
    "threads": (1, 2, 4, 8, 16, 32, 64),
    "ranks": (1, 2, 4, 8, 16, 32, 64),
}
"""Values tried; threads and ranks only up to the number that is asked for."""

ROUNDS = 3
"""Turns that numbers of ranks take, so that what else the machine does meets all of them."""


@dataclasses.dataclass(frozen=True)
class Settings:
    base: Workload
    axes: tuple[str, ...]
    threads: int
    seconds: float
    engine: str
    ranks: int = 1

    def __post_init__(self) -> None:
        for field in ("seconds", "threads", "ranks"):
            if not getattr(self, field) > 0:
                raise MetaftError(f"{field} must be above 0, got {getattr(self, field)}")


def gflop(workload: Workload) -> float:
    """Floating-point operations of one meta-step, in 10^9: multiplications and additions count one each."""
    tasks = draw_tasks(dataclasses.replace(workload, meta_batch=1))
    model = metaft_maml.model_for(workload, tasks.support_x)
    algorithm = metaft_maml.algorithm_for(workload, model, Options())
    task = Episode(*tasks.one(0), torch.arange(workload.ways), torch.tensor(0))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        task_grad(algorithm, draw_params(workload), {}, {}, task)
    return workload.meta_batch * counter.get_total_flops() / 1e9


def rate(threads: int, seconds: float) -> float:
    """GFLOP/s of a large 3x3 convolution from 64 to 64 channels in channels_last: the best of its runs."""
    torch.set_num_threads(threads)
    x = torch.randn(64 * threads, 64, 28, 28).contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3)
    work = 2 * x.numel() * 64 * 9 / 1e9
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        F.conv2d(x, w, padding=1)
        best = min(best, time.perf_counter() - start)
    return work / best


def point(workload: Workload, threads: int, settings: Settings, peak: float) -> dict[str, Any]:
    """Milliseconds of meta-steps, and their floor."""
    system = metaft_maml.make(
        workload, draw_params(workload), draw_tasks(workload), Options(threads=threads, engine=settings.engine)
    )
    times: list[float] = []
    try:
        system.step()
        system.step()  # the first one starts the workers, the second one fills their caches
        end = time.perf_counter() + settings.seconds
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            system.step()
            times.append(1000 * (time.perf_counter() - start))
    finally:
        system.close()
    return summary(workload, times, peak)


def ranked_points(workload: Workload, counts: Sequence[int], settings: Settings, peaks: dict[int, float]) -> Any:
    """(ranks, the same for so many) for each number, with the speed-up over one rank."""
    times: dict[int, list[float]] = {ranks: [] for ranks in counts}
    for _ in range(ROUNDS):
        for ranks, found in times.items():
            found += ranked.times(workload, ranks, seconds=settings.seconds / ROUNDS, engine=settings.engine)
    for ranks, found in times.items():
        speedup = statistics.median(times[counts[0]]) / statistics.median(found)
        yield ranks, {**summary(workload, found, peaks[ranks]), "speedup": speedup}


def summary(workload: Workload, times: list[float], peak: float) -> dict[str, Any]:
    """Milliseconds of meta-steps in figures, and their floor at `peak` GFLOP/s."""
    q1, median, q3 = statistics.quantiles(times, n=4)
    work = gflop(workload)
    return {
        "ms": {"median": median, "q1": q1, "q3": q3},
        "n": len(times),
        "gflop": work,
        "floor_ms": 1000 * work / peak,
        "tasks_per_second": 1000 * workload.meta_batch / median,
    }


def run(settings: Settings, out: Path) -> dict[str, Any]:
    """Measure every axis; the JSON is written after each, so that a stop loses only the one under way."""
    keep_freed_memory()
    values = {axis: AXES[axis] for axis in settings.axes}
    for axis, most in (("threads", settings.threads), ("ranks", settings.ranks)):
        if axis in values:
            values[axis] = tuple(count for count in values[axis] if count <= most)
    counts = {settings.threads, *values.get("threads", ()), *values.get("ranks", ())}
    peaks = {threads: rate(threads, min(1.0, settings.seconds)) for threads in sorted(counts)}
    results: dict[str, Any] = {
        **provenance("scaling"),
        "settings": {**dataclasses.asdict(settings), "base": dataclasses.asdict(settings.base)},
        "convolution_gflop_per_second": peaks,
        "axes": {},
    }
    for axis in settings.axes:
        rows = results["axes"][axis] = []
        print(f"\n{settings.base.name}, {axis}\n  {axis:>12}  ms/step  tasks/s  floor ms  of floor", flush=True)
        for value, found in _points(axis, values[axis], settings, peaks):
            rows.append({axis: value, **found})
            ms, floor = found["ms"]["median"], found["floor_ms"]
            faster = f"   {found['speedup']:.2f} times one rank" if "speedup" in found else ""
            line = f"  {value:>12}{ms:>9.1f}{found['tasks_per_second']:>9.1f}{floor:>10.1f}{ms / floor:>9.1f}x"
            print(line + faster, flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    save(figure(results), out.with_suffix(".png"))
    return results


def _points(axis: str, values: Sequence[int], settings: Settings, peaks: dict[int, float]) -> Any:
    """(value, its figures) for each value of an axis, as they are found."""
    if axis == "ranks":
        yield from ranked_points(settings.base, values, settings, peaks)
        return
    for value in values:
        threads = value if axis == "threads" else settings.threads
        workload = settings.base if axis == "threads" else dataclasses.replace(settings.base, **{axis: value})
        yield value, point(workload, threads, settings, peaks[threads])


def figure(results: dict[str, Any]) -> Figure:
    """One panel per axis: the median with its quartiles, and the floor."""
    axes = results["axes"]
    drawn = Figure(figsize=(3.4 * len(axes), 3.2), layout="constrained")
    for panel, (axis, rows) in zip(drawn.subplots(1, len(axes), squeeze=False)[0], axes.items(), strict=True):
        x = [row[axis] for row in rows]
        panel.plot(x, [row["ms"]["median"] for row in rows], marker="o", color=BLUE, label="metaft")
        panel.fill_between(
            x, [row["ms"]["q1"] for row in rows], [row["ms"]["q3"] for row in rows], color=BLUE, alpha=0.2
        )
        panel.plot(x, [row["floor_ms"] for row in rows], linestyle="--", color=GREY, label="floor")
        panel.set_ylim(bottom=0)
        decorate(panel, axis.replace("_", " "), "ms per meta-step")
    machine, base = results["machine"], results["settings"]["base"]
    drawn.suptitle(f"{base['name']}: {machine['cpu']}, torch {machine['torch']}", fontsize=9)
    return drawn


def cost_model(workload: Workload) -> str:
    """What many GPUs would make of a workload, on paper."""
    numbers = sum(p.numel() for p in draw_params(workload).values()) + 4  # loss, accuracy, tasks, request to stop
    return (
        f"{workload.name}: {numbers} numbers, {4 * numbers} bytes per all-reduce\n\n"
        f"{ranked.cost_table(4 * numbers, workload.meta_batch)}"
    )


def parse(argv: Sequence[str] | None) -> tuple[Settings, Path]:
    """Settings and where to write. Raises MetaftError, or SystemExit as argparse does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", choices=WORKLOADS, default="omniglot-5w1s-q15", metavar="NAME", help=" ".join(WORKLOADS))
    add("--axis", nargs="+", choices=AXES, metavar="NAME", help=f"{' '.join(AXES)} (auto: all but ranks)")
    add("--ranks", type=int, metavar="N", help="the axis ranks alone, up to so many processes of one thread each")
    add("--cost-model", action="store_true", help="print what many GPUs would make of the base, on paper, and end")
    add("--threads", type=int, help="processes or threads (auto: torch's own choice)")
    add("--seconds", type=float, default=2.0, help="timed per point")
    add("--engine", default="auto")
    add("--out", type=Path, default=Path("runs/scaling.json"), metavar="FILE.json", help="the picture goes beside it")
    given = parser.parse_args(argv)
    if given.out.suffix != ".json":
        raise MetaftError(f"out must end in .json, got {given.out}")
    threads = torch.get_num_threads() if given.threads is None else given.threads
    base = WORKLOADS[given.base]
    if given.cost_model:
        print(cost_model(base))
        raise SystemExit(0)
    if given.ranks is not None:
        return Settings(base, ("ranks",), 1, given.seconds, given.engine, given.ranks), given.out
    axes = tuple(dict.fromkeys(given.axis or [axis for axis in AXES if axis != "ranks"]))
    return Settings(base, axes, threads, given.seconds, given.engine), given.out


@of_command()
def main(argv: Sequence[str] | None = None) -> int:
    try:
        settings, out = parse(argv)
        run(settings, out)
    except MetaftError as error:
        print(f"scaling: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("scaling: stopped", file=sys.stderr)
        return 130
    print(f"\nfigures: {out}, picture: {out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
