"""Speed of a meta-test: metaft beside learn2learn's loop, easyfsl's, and one by hand.

    benchmarks/peers/install.sh           # once: the libraries, in a folder of their own
    python benchmarks/evaluation.py --threads 2 --out runs/evaluation.json

A meta-test adapts to the support set of each episode and predicts its queries: by MAML beside learn2learn, and by
prototypes beside easyfsl, which has no inner loop. The loops do so after the last inner step in transductive mode, as
their users write it, with first-order steps and without a graph for the queries. metaft is timed at the same (`one`),
in both normalisation modes (`both`, what a meta-test without its curve would be), and in both after each step (`each`,
what `metaft evaluate` reports). First the float64 accuracies after the last step in transductive mode, which all have,
are compared episode by episode, and where one differs nothing is timed. Then the systems take turns, each in a process
of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, too

from benchmarks.peers.meters import Elsewhere
from benchmarks.peers.process import Process, SystemFailure, environment
from benchmarks.peers.workloads import WORKLOADS, Options, Workload
from benchmarks.throughput import SITE, Disagreement, entry, provenance, say, summary
from metaft.errors import MetaftError
from metaft.support.output import of_command

SYSTEMS: dict[str, dict[str, tuple[str, Any]]] = {
    "maml": {
        "metaft one": ("metaft", "one"),
        "metaft both": ("metaft", "both"),
        "metaft each": ("metaft", "each"),
        "learn2learn": ("learn2learn", "one"),
        "plain": ("plain", "one"),
    },
    "protonet": {
        "metaft one": ("metaft", "one"),
        "metaft both": ("metaft", "both"),
        "easyfsl": ("easyfsl", "one"),
        "plain": ("plain", "one"),
    },
}
"""Algorithm -> name -> (the process, what it evaluates)."""

PEERS = {"maml": "learn2learn", "protonet": "easyfsl"}
"""Algorithm -> the library that metaft is held beside; it need not be installed."""

EPISODES = {"omniglot-5w1s-q15": (3, 32), "mini-5w1s": (5, 8), "tiny": (2, 4), "tiny-pool": (2, 4)}
"""Workload -> inner steps and episodes at once, of `benchmarks/peers/workloads.py`."""


def measure(
    algorithm: str, workload: Workload, threads: int, allocator: str, seconds: float, rounds: int, site: Path
) -> dict[str, Any]:
    """One row. Raises Disagreement, and MetaftError where metaft or the loop by hand fails."""
    elsewhere, systems, times = Elsewhere(), {}, {}
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        running: dict[str, Process] = {}
        found: dict[str, np.ndarray] = {}
        for name, (system, evaluate) in SYSTEMS[algorithm].items():
            how = environment(
                threads=threads, allocator=allocator, site=site.resolve() if system == PEERS[algorithm] else None
            )
            process = stack.enter_context(Process(system, how))
            out = str(Path(scratch) / "accuracy.safetensors")
            options = Options(first_order=True, threads=threads, evaluate=evaluate, algorithm=algorithm)
            request: dict[str, Any] = {
                "workload": dataclasses.asdict(workload), "options": dataclasses.asdict(options), "device": "cpu",
                "out": out,
            }  # fmt: skip
            try:
                process.ask(do="gradient", **request)
                found[name] = load_file(out)["accuracy"]
                systems[name] = {"status": "timed", **process.ask(do="prepare", seconds=seconds / 10, **request)}
            except SystemFailure as failure:
                if system != PEERS[algorithm]:
                    raise MetaftError(f"{system} failed on {workload.name}: {failure}") from None
                systems[name] = entry(failure)
                continue
            running[name], times[name] = process, []
        check(workload, found)
        for _ in range(rounds):
            for name, process in running.items():
                times[name] += process.ask(do="time", seconds=seconds / rounds)["ms"]
                time.sleep(0.02)  # the last one's threads may still be spinning
    for name, ms in times.items():
        systems[name] |= summary(ms, workload.meta_batch)
    return {
        "workload": workload.name,
        "algorithm": algorithm,
        "protocol": dataclasses.asdict(workload),
        "cores_busy_elsewhere": elsewhere.cores(),
        "systems": systems,
    }


def check(workload: Workload, found: dict[str, np.ndarray]) -> None:
    """Raises Disagreement where an episode's accuracy after the last step, in transductive mode, is another than the
    loop's by hand."""
    for name, accuracy in found.items():
        last = accuracy if accuracy.ndim == 1 else accuracy[:, 0, -1]
        if not np.array_equal(last, found["plain"]):
            raise Disagreement(
                f"nothing was timed: on {workload.name} the accuracies of {name} differ in float64 from the plain "
                f"loop's in {int((last != found['plain']).sum())} of {len(last)} episodes"
            )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Episodes per second, and the ratio to the library's loop."""
    lines = [
        "| workload | algorithm | system | episodes per s | ms per call: median (quartiles) | n | times library |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        of_row = f"| {row['workload']} | {row['algorithm']}"
        theirs = row["systems"][PEERS[row["algorithm"]]].get("tasks_per_second")
        for name, of in row["systems"].items():
            if "ms" not in of:
                lines.append(f"{of_row} | {name} | {of['status']} | | | |")
                continue
            ms, speed = of["ms"], of["tasks_per_second"]
            against = "not measured" if theirs is None else f"{speed / theirs:.2f}"
            spread = f"{ms['median']:.0f} ({ms['q1']:.0f}-{ms['q3']:.0f})"
            lines.append(f"{of_row} | {name} | {speed:.1f} | {spread} | {of['n']} | {against} |")
    return "\n".join(lines)


@of_command()
def main(argv: Sequence[str] | None = None) -> int:
    description = (__doc__ or "").replace("%", "%%")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workload", nargs="+", choices=EPISODES, default=["omniglot-5w1s-q15", "mini-5w1s"], metavar="NAME")
    add("--algorithm", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME", help=", ".join(SYSTEMS))
    add("--threads", type=int, default=2, help="torch's threads; of metaft episodes at once")
    add("--allocator", choices=["default", "tuned"], default="tuned", help="tuned: glibc keeps freed memory, for all")
    add("--seconds", type=float, default=20.0, help="timed per system and row")
    add("--rounds", type=int, default=5, help="turns that the seconds are divided into")
    add("--site", type=Path, default=SITE, metavar="DIR", help="folder of benchmarks/peers/install.sh")
    add("--out", type=Path, default=Path("runs/evaluation.json"), metavar="FILE.json")
    given = parser.parse_args(argv)
    results: dict[str, Any] = {
        **provenance("evaluation"),
        "settings": {
            "threads": given.threads,
            "allocator": given.allocator,
            "seconds": given.seconds,
            "rounds": given.rounds,
        },
        "rows": [],
    }
    try:
        for field in ("threads", "seconds", "rounds"):
            if not getattr(given, field) > 0:
                raise MetaftError(f"{field} must be above 0, got {getattr(given, field)}")
        for name in dict.fromkeys(given.workload):
            steps, episodes = EPISODES[name]
            workload = dataclasses.replace(WORKLOADS[name], inner_steps=steps, meta_batch=episodes)
            for algorithm in dict.fromkeys(given.algorithm):
                say(f"time: {name}, {algorithm}")
                how = (given.threads, given.allocator, given.seconds, given.rounds, given.site)
                results["rows"].append(measure(algorithm, workload, *how))
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    except MetaftError as error:
        print(f"evaluation: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("evaluation: stopped", file=sys.stderr)
        return 130
    print(table(results["rows"]))
    print(f"\nfigures: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
