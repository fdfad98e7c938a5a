"""What a meta-step of each member costs beside MAML's: milliseconds and memory, on one workload, in one run.

    python benchmarks/family.py --seconds 10 --out runs/family.json
    python benchmarks/family.py --members maml anil protonet --threads 1 --engine threads

Each member runs in a process of its own, on the same images (of the size of Omniglot's, 5-way 1-shot, 5 queries per
class, 32 tasks), with its defaults; those that train on batches of all classes get as many images. A member whose
default is another number of inner steps than `--inner-steps` (1) is measured twice, with its own number and with that
one. They take turns, so that what else the machine does meets all alike. Timed is the mean meta-gradient; the outer
step is left out, as is drawing the episodes. Memory is what a task under way adds to the process at its peak.

Written are the JSON with every figure, and beside it (.md) a table of them and the two columns of docs/algorithms.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, too

from benchmarks.peers.meters import Elsewhere
from benchmarks.peers.process import Process, SystemFailure, environment
from benchmarks.peers.workloads import WORKLOADS, Options, Workload
from benchmarks.throughput import git, say, summary
from benchmarks.throughput_report import QUIET
from metaft.algorithms import ALGORITHMS, hyper_parameters
from metaft.errors import MetaftError
from metaft.runs.machine import processor
from metaft.support.output import of_command

REFERENCE = "maml"

BASE = dataclasses.replace(WORKLOADS["omniglot-5w1s-q15"], name="omniglot-5w1s-q5", query_shots=5)

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    members: tuple[str, ...]
    workload: Workload
    threads: int
    engine: str
    allocator: str
    seconds: float
    rounds: int

    def __post_init__(self) -> None:
        for field in ("seconds", "rounds", "threads"):
            if not getattr(self, field) > 0:
                raise MetaftError(f"{field} must be above 0, got {getattr(self, field)}")

    def cases(self) -> dict[str, tuple[str, int | None, bool]]:
        """Name in the results -> (member, its inner steps, whether they are its own number)."""
        found: dict[str, tuple[str, int | None, bool]] = {}
        for member in self.members:
            own, equal = hyper_parameters(member).get("inner_steps"), self.workload.inner_steps
            found[member] = (member, None if own is None else equal, False)
            if isinstance(own, int) and own != equal:
                found[f"{member}, {own} steps"] = (member, own, True)
        return found

    def request(self, member: str, own_steps: bool) -> Figures:
        options = Options(threads=self.threads, engine=self.engine, algorithm=member, own_steps=own_steps)
        return {
            "workload": dataclasses.asdict(self.workload), "options": dataclasses.asdict(options), "device": "cpu",
        }  # fmt: skip


def measure(settings: Settings) -> dict[str, Figures]:
    """All cases in turns. One that fails is noted with the reason, but for MAML: raises MetaftError."""
    found: dict[str, Figures] = {}
    times: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        env = environment(threads=settings.threads, allocator=settings.allocator, site=None)
        running: dict[str, Process] = {}

        def attempt(case: str, **request: Any) -> Figures:
            try:
                return running[case].ask(**request)
            except SystemFailure as failure:
                if case == REFERENCE:
                    raise MetaftError(f"{case} failed: {failure}") from None
                del running[case]
                found[case] |= {"status": "failed", "reason": str(failure)}
                return {}

        for case, (member, steps, own) in settings.cases().items():
            say(f"prepare: {case}")
            running[case] = stack.enter_context(Process("metaft-member", env))
            times[case], found[case] = [], {"status": "timed", "member": member, "inner_steps": steps}
            out = f"{scratch}/step.safetensors"
            attempt(case, do="prepare", out=out, seconds=settings.seconds / 10, **settings.request(member, own))
        for turn in range(settings.rounds):
            say(f"time: round {turn + 1} of {settings.rounds}")
            for case in list(running):
                times[case] += attempt(case, do="time", seconds=settings.seconds / settings.rounds).get("ms", [])
        for case in list(running):
            figures = attempt(case, do="finish")
            if figures:
                found[case] |= {**summary(times[case], settings.workload.meta_batch), **figures}
    for figures in found.values():
        if figures["status"] == "timed":
            figures["relative_to_maml"] = figures["ms"]["median"] / found[REFERENCE]["ms"]["median"]
    return found


def run(settings: Settings, out: Path) -> Figures:
    """Measure, and write the JSON and the rows."""
    elsewhere = Elsewhere()
    members = measure(settings)
    results = {
        "benchmark": "family",
        "commit": git("rev-parse", "HEAD"),
        "changed_since_commit": bool(git("status", "--porcelain", "--untracked-files=no")),
        "machine": {"cpu": processor(), "torch": torch.__version__},
        "settings": dataclasses.asdict(settings),
        "cores_busy_elsewhere": elsewhere.cores(),
        "members": members,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(results), encoding="utf-8")
    return results


def table(results: Figures) -> str:
    """Markdown: a row per case, then for docs/algorithms.md a row per member, at its own number of inner steps."""
    settings, busy = results["settings"], results["cores_busy_elsewhere"]
    workload, machine = settings["workload"], results["machine"]
    how = f"{settings['engine']} engine, {settings['threads']} threads, {machine['cpu']}, torch {machine['torch']}"
    lines = [f"{workload['name']}, {workload['meta_batch']} tasks, {how}"]
    if busy is None or busy > QUIET:
        lines.append(f"\nNOT QUIET: other work kept {'?' if busy is None else format(busy, '.2f')} cores busy")
    lines += [
        "",
        "| member | inner steps | ms per meta-step | quartiles | n | beside MAML | MiB per task |",
        "|---|---|---|---|---|---|---|",
    ]
    cells: dict[str, tuple[str, str]] = {}
    for own in results["members"].values():
        name, steps = own["member"], "-" if own["inner_steps"] is None else own["inner_steps"]
        if own["status"] != "timed":
            lines.append(f"| `{name}` | {steps} | {own['status']}: {own['reason']} | | | | |")
            continue
        ms, memory = own["ms"], _memory(own)
        lines.append(
            f"| `{name}` | {steps} | {ms['median']:.1f} | {ms['q1']:.1f} to {ms['q3']:.1f} | {own['n']} | "
            f"{own['relative_to_maml']:.2f} | {memory} |"
        )
        # Its own number of inner steps comes second, and goes before the equal one, which stays in brackets.
        equal = f" ({cells[name][1]})" if name in cells else ""
        cells[name] = (memory, f"{own['relative_to_maml']:.2f}{equal}")
    lines += ["", "| name | MiB per task | cost |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {memory} | {cost} |" for name, (memory, cost) in cells.items())]) + "\n"


def _memory(own: Figures) -> str:
    return "not measured" if own["growth_mib_per_task"] is None else f"{own['growth_mib_per_task']:.1f}"


@of_command()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--members", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), metavar="NAME", help=" ".join(ALGORITHMS))
    add("--inner-steps", type=int, default=1, help="of all that have them, besides their own")
    add("--threads", type=int, help="processes or threads (auto: torch's own choice)")
    add("--engine", default="auto", help="metaft's engine")
    add("--allocator", choices=["default", "tuned"], default="tuned", help="tuned: glibc keeps freed memory")
    add("--seconds", type=float, default=10.0, help="timed per member")
    add("--rounds", type=int, default=5, help="turns that the seconds are divided into")
    add("--out", type=Path, default=Path("runs/family.json"), metavar="FILE.json", help="the rows go beside it")
    given = parser.parse_args(argv)
    try:
        if given.out.suffix != ".json":
            raise MetaftError(f"out must end in .json, got {given.out}")
        members = tuple(dict.fromkeys([REFERENCE, *given.members]))
        threads = torch.get_num_threads() if given.threads is None else given.threads
        workload = dataclasses.replace(BASE, inner_steps=given.inner_steps)
        settings = Settings(
            members, workload, threads, given.engine, given.allocator, given.seconds, given.rounds
        )  # fmt: skip
        results = run(settings, given.out)
    except MetaftError as error:
        print(f"family: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("family: stopped", file=sys.stderr)
        return 130
    print("\n" + table(results))
    print(f"figures: {given.out}, rows: {given.out.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
