"""Speed of MAML's meta-step: metaft beside learn2learn, higher, TorchOpt and a loop by hand.

    benchmarks/peers/install.sh                # once: the libraries, in a folder of their own
    python benchmarks/throughput.py --workload omniglot-5w1s-q15 mini-5w1s --allocator both --out runs/speed.json

Every system computes the same: the mean meta-gradient of one meta-batch (forward, inner loop, backward), on the same
architecture, initial weights and task tensors, each in a process of its own with the same threads and allocator
settings. First all gradients are compared in float64, and where one differs nothing is timed. Then the systems take
turns: a stretch of metaft, one of each peer, and again, so that what else the machine does meets all of them alike.

With `--bf16` a step of `--precision bf16` takes its turns too; the column float32 tells how far it is off.

Written are a table, the JSON with every figure, and a bar chart beside it. `ratio_to_best_peer` is the median time of
the fastest library over metaft's, so above 1 metaft is faster; the loop by hand is shown, but is no library.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, too

from benchmarks import throughput_report as report
from benchmarks.peers.meters import Elsewhere
from benchmarks.peers.process import ROOT, Process, SystemFailure, environment
from benchmarks.peers.workloads import PUBLISHED, WORKLOADS, Options, Workload
from metaft.defaults import device_of
from metaft.errors import MetaftError
from metaft.runs.machine import processor
from metaft.support.output import of_command

PEERS = ("learn2learn", "higher", "torchopt", "plain")
LIBRARIES = PEERS[:-1]
"""What counts in the ratio."""

SITE = Path(os.environ.get("METAFT_PEERS") or ROOT / "benchmarks/peers/.site")
"""Where the libraries are, if not in metaft's own environment."""

TOLERANCE = 1e-9
"""Largest difference of two float64 meta-gradients over the gradient's norm; rounding alone leaves some 1e-14."""
TOLERANCE_32 = 0.5
"""The same for the float32 gradient that is timed, against the float64 one. On noise, rounding decides which side of a
ReLU or which pixel of a max-pool counts (0.04 was seen), so this finds no more than that something else is timed."""

TOLERANCE_16 = 2.0
"""In bfloat16 it may point elsewhere: single tasks of real images, after five steps, are off by 1.0. Garbage is not."""

Order = Literal["second", "first"]


class Disagreement(MetaftError):
    """A system computes another gradient, so its time would say nothing."""

    status = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    workloads: tuple[Workload, ...]
    peers: tuple[str, ...] = PEERS
    orders: tuple[Order, ...] = ("second",)
    allocators: tuple[str, ...] = ("default",)
    device: str = "cpu"
    threads: int = 1
    seconds: float = 10.0
    """Of timed steps, per system and row."""
    rounds: int = 5
    engine: str = "auto"
    end_to_end: bool = False
    bf16: bool = False
    dataset: str = "glyphs"
    site: Path = SITE

    def __post_init__(self) -> None:
        for field in ("seconds", "rounds", "threads"):
            if not getattr(self, field) > 0:
                raise MetaftError(f"{field} must be above 0, got {getattr(self, field)}")

    @property
    def systems(self) -> tuple[str, ...]:
        """In the order in which they take turns."""
        also = {"metaft-bf16": self.bf16, "metaft-end-to-end": self.end_to_end}
        return ("metaft", *self.peers, *(system for system, asked in also.items() if asked))

    def cases(self) -> Iterable[Case]:
        return (Case(workload, order) for workload in self.workloads for order in self.orders)

    def start(self, system: str, allocator: str = "default") -> Process:
        site = self.site.resolve() if system in LIBRARIES else None
        return Process(system, environment(threads=self.threads, allocator=allocator, site=site))

    def request(self, case: Case) -> dict[str, Any]:
        """What a process must know to build a case."""
        options = Options(case.order == "first", self.threads, self.engine, self.dataset)
        return {
            "workload": dataclasses.asdict(case.workload),
            "options": dataclasses.asdict(options),
            "device": self.device,
        }


class Case(NamedTuple):
    """What is computed."""

    workload: Workload
    order: Order

    def __str__(self) -> str:
        return f"{self.workload.name}, {self.order} order"


class Checked(NamedTuple):
    """What the check found, by system and case."""

    differences: dict[tuple[str, Case], float]
    failures: dict[tuple[str, Case], dict[str, Any]]
    """Entries of the JSON for systems that are missing, or failed."""
    references: dict[Case, Mapping[str, np.ndarray]]


def difference(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """Norm of the difference of two gradients over the norm of the second, each over all parameters together.

    Single tensors may be zero in truth (a bias before a normalisation), so none is measured by itself.
    """
    if found.keys() != expected.keys():
        return float("inf")
    apart = sum(float(np.square(found[name] - expected[name]).sum()) for name in expected)
    return float(np.sqrt(apart / sum(float(np.square(value).sum()) for value in expected.values())))


def check(settings: Settings, scratch: Path) -> Checked:
    """Compare every system's float64 meta-gradient with the plain loop's.

    A library that is missing, or fails, is noted. Raises Disagreement that names all systems that differ, and
    MetaftError where metaft or the loop fails.
    """
    checked = Checked({}, {}, {})
    wrong: list[str] = []
    for system in ("plain", "metaft", *(peer for peer in settings.peers if peer != "plain")):
        say(f"check: {system}")
        with contextlib.ExitStack() as stack:
            process: Process | None = None
            for case in settings.cases():
                if process is None or process.ended:
                    process = stack.enter_context(settings.start(system))
                try:
                    out = scratch / "gradient.safetensors"
                    process.ask(do="gradient", out=str(out), **settings.request(case))
                except SystemFailure as failure:
                    if system in ("plain", "metaft"):
                        raise MetaftError(f"{system} failed on {case}: {failure}") from None
                    checked.failures[system, case] = entry(failure)
                    continue
                gradient = load_file(out)
                if system == "plain":
                    checked.references[case] = gradient
                found = checked.differences[system, case] = difference(gradient, checked.references[case])
                if not found <= TOLERANCE:  # NaN too
                    wrong.append(f"{system} by {found:.2g} on {case}")
    if wrong:
        raise Disagreement(
            f"nothing was timed: meta-gradients differ from the plain loop's in float64 by more than {TOLERANCE:g} of "
            f"its norm: {'; '.join(wrong)}"
        )
    return checked


def entry(failure: SystemFailure) -> dict[str, Any]:
    """How the JSON names a system without figures."""
    if failure.missing:
        return {"status": "not installed", "reason": "run benchmarks/peers/install.sh"}
    return {"status": "failed", "reason": str(failure)}


def measure(settings: Settings, case: Case, allocator: str, checked: Checked, scratch: Path) -> dict[str, Any]:
    """One row: all systems in turns on one case. Raises Disagreement for a timed gradient that is off."""
    say(f"time: {case}, {allocator} allocator")
    elsewhere = Elsewhere()
    systems: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        running: dict[str, Process] = {}

        def attempt(system: str, **request: Any) -> dict[str, Any] | None:
            try:
                return running[system].ask(**request)
            except SystemFailure as failure:
                if system == "metaft":
                    raise MetaftError(f"metaft failed on {case}: {failure}") from None
                systems[system] = entry(failure)
                del running[system]
                return None

        for system in settings.systems:
            if (system, case) in checked.failures:
                systems[system] = checked.failures[system, case]
                continue
            running[system] = stack.enter_context(settings.start(system, allocator))
            out = scratch / "step.safetensors"
            ready = attempt(system, do="prepare", out=str(out), seconds=settings.seconds / 10, **settings.request(case))
            if ready is not None:
                systems[system] = {"status": "timed", **ready, **agreement(system, case, checked, load_file(out))}
                times[system] = []
        for _ in range(settings.rounds):
            for system in list(running):
                answer = attempt(system, do="time", seconds=settings.seconds / settings.rounds)
                times[system] += answer["ms"] if answer is not None else []
                time.sleep(0.02)  # the last one's threads may still be spinning
        for system in list(running):
            figures = attempt(system, do="finish")
            if figures is not None:
                systems[system] |= {**summary(times[system], case.workload.meta_batch), **figures}
    systems = {system: systems[system] for system in settings.systems}
    return {
        "workload": case.workload.name,
        "order": case.order,
        "allocator": allocator,
        "protocol": dataclasses.asdict(case.workload),
        **ratio(systems),
        "cores_busy_elsewhere": elsewhere.cores(),
        "systems": systems,
    }


def agreement(system: str, case: Case, checked: Checked, gradient: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far a system is from the reference in both precisions. Raises Disagreement for the one that is timed."""
    if system == "metaft-end-to-end":  # its tasks are others
        return {}
    found = difference(gradient, checked.references[case])
    if system == "metaft-bf16":  # how far it is off is a figure of its own, and in float64 it is another computation
        if not found < TOLERANCE_16:
            off = f"off by {found:.2g} of its norm, more than {TOLERANCE_16:g}"
            raise Disagreement(f"not timed: the bf16 meta-gradient on {case} is {off}")
        return {"float32_difference": found}
    if not found <= TOLERANCE_32:
        raise Disagreement(
            f"not timed: the float32 meta-gradient of {system} on {case} is off by {found:.2g} of its norm, more than "
            f"{TOLERANCE_32:g}"
        )
    return {"float64_difference": checked.differences[system, case], "float32_difference": found}


def summary(ms: Sequence[float], meta_batch: int) -> dict[str, Any]:
    """Median and quartiles of the steps, and what they come to."""
    q1, median, q3 = (float(q) for q in np.percentile(ms, [25, 50, 75]))
    return {
        "ms": {"median": median, "q1": q1, "q3": q3},
        "n": len(ms),
        "tasks_per_second": 1000 * meta_batch / median,
    }


def ratio(systems: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The fastest library's median over metaft's, and its name; None where no library was timed."""
    medians = {name: systems[name]["ms"]["median"] for name in LIBRARIES if "ms" in systems.get(name, {})}
    if not medians:
        return {"ratio_to_best_peer": None, "best_peer": None}
    best = min(medians, key=lambda name: medians[name])
    return {"ratio_to_best_peer": medians[best] / systems["metaft"]["ms"]["median"], "best_peer": best}


def provenance(benchmark: str, device: str = "cpu") -> dict[str, Any]:
    """Commit and machine: what a figure is worth nothing without."""
    return {
        "benchmark": benchmark,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "changed_since_commit": bool(git("status", "--porcelain", "--untracked-files=no")),
        "machine": {
            "cpu": processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name(device) if device != "cpu" else None,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
    }


def environment_of(settings: Settings) -> dict[str, Any]:
    """Commit, machine and settings."""
    return {
        **provenance("throughput", settings.device),
        "settings": {
            "threads": settings.threads,
            "device": settings.device,
            "engine": settings.engine,
            "seconds": settings.seconds,
            "rounds": settings.rounds,
            "tuned_allocator": {
                name: value
                for name, value in environment(threads=settings.threads, allocator="tuned", site=None).items()
                if name.startswith("MALLOC_")
            },
        },
    }


def git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def run(settings: Settings, out: Path) -> dict[str, Any]:
    """Check, then measure row by row; the JSON is written after each, so that a stop loses only the row under way."""
    results = environment_of(settings)
    with tempfile.TemporaryDirectory() as folder:
        checked = check(settings, Path(folder))
        rows: list[dict[str, Any]] = []
        for case in settings.cases():
            for allocator in settings.allocators:
                rows.append(measure(settings, case, allocator, checked, Path(folder)))
                ratios = [row["ratio_to_best_peer"] for row in rows]
                # Over several rows the worst, so that no row can hide behind another
                worst = None if None in ratios else min(ratios)
                results |= {"ratio_to_best_peer": worst, "rows": rows}
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
                print(report.table(rows[-1], settings.threads), flush=True)
    report.chart(out.with_suffix(".png"), results)
    return results


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> tuple[Settings, Path]:
    """Settings and where to write. Raises MetaftError, or SystemExit as argparse does."""
    description = (__doc__ or "").replace("%", "%%")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workload", nargs="+", choices=WORKLOADS, default=PUBLISHED, metavar="NAME", help=" ".join(WORKLOADS))
    add("--peers", nargs="*", choices=PEERS, default=PEERS, metavar="NAME", help=" ".join(PEERS))
    add("--order", nargs="+", choices=["second", "first"], default=["second"], help="of the meta-gradient")
    add("--allocator", choices=["default", "tuned", "both"], default="both", help="tuned: glibc keeps freed memory")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, help="torch's threads; for metaft tasks at once (auto: torch's own choice)")
    add("--seconds", type=float, default=10.0, help="timed per system and row")
    add("--rounds", type=int, default=5, help="turns that the seconds are divided into")
    add("--engine", default="auto", help="metaft's engine")
    add("--end-to-end", action="store_true", help="metaft with sampling and the outer Adam step, as one more row")
    add("--bf16", action="store_true", help="metaft with convolutions in bfloat16, as one more row")
    add("--dataset", default="glyphs", help="where --end-to-end samples: glyphs, omniglot or folder:PATH")
    add("--site", type=Path, default=SITE, metavar="DIR", help="folder of benchmarks/peers/install.sh")
    add("--out", type=Path, default=Path("runs/throughput.json"), metavar="FILE.json", help="the chart goes beside it")
    given = parser.parse_args(argv)
    if given.out.suffix != ".json":
        raise MetaftError(f"out must end in .json, got {given.out}")
    settings = Settings(
        workloads=tuple(WORKLOADS[name] for name in dict.fromkeys(given.workload)),
        peers=tuple(peer for peer in PEERS if peer in given.peers),
        orders=tuple(dict.fromkeys(given.order)),
        allocators=("default", "tuned") if given.allocator == "both" else (given.allocator,),
        device=device_of(given.device),
        threads=torch.get_num_threads() if given.threads is None else given.threads,
        seconds=given.seconds,
        rounds=given.rounds,
        engine=given.engine,
        end_to_end=given.end_to_end,
        bf16=given.bf16,
        dataset=given.dataset,
        site=given.site,
    )
    return settings, given.out


@of_command()
def main(argv: Sequence[str] | None = None) -> int:
    try:
        settings, out = parse(argv)
        results = run(settings, out)
    except MetaftError as error:
        print(f"throughput: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("throughput: stopped", file=sys.stderr)
        return 130
    print(report.closing(results))
    print(f"\nfigures: {out}, chart: {out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
