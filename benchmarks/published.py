"""Published few-shot figures as named rows, and how each is measured again: the frame of omniglot.py, mini_imagenet.py.

A row is the settings of `metaft.meta_train` by which a figure was published, as far as metaft has them, and the figure.
Running it trains, in a run folder that a later call goes on with, and tests the best checkpoint on 1,000 fixed
episodes in both normalisation modes. What comes of it is appended to a file of JSON lines, of which `table.py` makes
the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks.throughput import git, say
from metaft.config import MetaTrainConfig, to_toml
from metaft.errors import MetaftError, no_such
from metaft.options import flat
from metaft.runs.folder import RunFolder, read_rows
from metaft.runs.machine import processor
from metaft.types import Norm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "published.jsonl"

EPISODES = 1000
EVAL_SEED = 1234
"""Of the test episodes, which are the same for every row of a data set with the same ways, shots and queries."""

GRACE = 300.0
"""Seconds that a run gets for its last checkpoint when its time is up."""

Family = Literal["paper", "best", "short"]


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure in %, with its 95 % half-width where one was given."""

    accuracy: float
    ci95: float | None
    source: str
    mode: Norm = "transductive"
    """What of ours it is held beside: how the paper normalises queries, or what is nearest to it."""
    iterations: int | None = None
    """Meta-steps of its training, where they are known."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell of the table."""

    name: str
    published: Published
    config: MetaTrainConfig
    checkpoint: Literal["best", "ensemble"] = "best"
    """Which is tested; a row that differs in this alone shares the run of the other by `run`."""
    run: str = ""
    """Name of the row whose run it is, where that is another."""
    start: Row | None = None
    """The row whose run this one begins with."""
    family: Family = "paper"
    """Settings of the "paper"; the "best" single checkpoint that we know how to train in the same model; or a "short"
    training, which shows how far a member comes with little."""
    note: str = ""
    """In what the settings are not the paper's."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one call may spend on a row, and where."""

    minutes: float | None = None
    iterations: int | None = None
    device: str = "auto"
    data_root: str | None = None
    seed: int = 0
    runs: Path = Path("runs/published")

    def __post_init__(self) -> None:
        for field in ("minutes", "iterations"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise MetaftError(f"budget-{field} must be above 0, got {value}")


def settled(row: Row, budget: Budget) -> MetaTrainConfig:
    """What is trained: the row's settings with the budget's. A schedule ends with the iterations that there are."""
    changes: dict[str, Any] = {
        "seed": budget.seed, "device": budget.device, "data_root": budget.data_root,
        "test_episodes": EPISODES, "eval_seed": EVAL_SEED,
    }  # fmt: skip
    if row.start is not None:
        changes["init"] = str(folder_of(row.start, budget))
    if budget.iterations is not None:
        changes["iterations"] = budget.iterations
        every = row.config.test.eval_every
        changes["eval_every"] = min(every, budget.iterations) if every else None
    return dataclasses.replace(row.config, **changes)


def folder_of(row: Row, budget: Budget) -> Path:
    """Where its run is; another number of iterations, or another seed, is another run."""
    short = "" if budget.iterations is None else f"-{budget.iterations}"
    return budget.runs / f"{row.config.data.dataset.replace(':', '-')}-{row.run or row.name}{short}-{budget.seed}"


def measure(row: Row, budget: Budget) -> dict[str, Any] | None:
    """Train as far as the budget goes, and test; one line for the file. None where not even one validation was done.

    Raises MetaftError where a command fails.
    """
    path = folder_of(row, budget)
    if row.start is not None and not (start := folder_of(row.start, budget) / "result.json").exists():
        raise MetaftError(f"{row.name} begins with the run of {row.start.name}, which is not finished: no {start}")
    config = path.with_suffix(".toml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(to_toml(settled(row, budget)), encoding="utf-8")
    words = ["metaft.meta_train", "--config", str(config), "--out", str(path), "--auto-resume"]
    words.append("--no-report")  # `metaft.look` makes the page of a run that is wanted
    if command(words, budget.minutes) not in (0, 128 + signal.SIGTERM):  # of a finished run it says what came out
        raise MetaftError(f"{row.name}: training failed, see above")
    run = RunFolder(path)
    if not run.best.exists():
        return None
    out = path / f"published-{row.checkpoint}.json"
    data = ["--device", budget.device, *(() if budget.data_root is None else ("--data-root", budget.data_root))]
    if command(["metaft.evaluate", str(path), "--checkpoint", row.checkpoint, "--out", str(out), *data]):
        raise MetaftError(f"{row.name}: its meta-test failed, see above")
    return line_of(row, budget, run, json.loads(out.read_text(encoding="utf-8")))


def command(words: Sequence[str], minutes: float | None = None) -> int:
    """The exit status of `python -m WORDS`, which is asked to stop after so many minutes."""
    process = subprocess.Popen([sys.executable, "-m", *words])
    try:
        return process.wait(None if minutes is None else 60 * minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        return _end_of(process)
    except BaseException:  # Ctrl-C is the command's too: it writes a checkpoint
        _end_of(process)
        raise


def _end_of(process: subprocess.Popen[bytes]) -> int:
    """The exit status of what was asked to stop; it is killed where it does not."""
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def line_of(row: Row, budget: Budget, run: RunFolder, test: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a measurement."""
    steps = max((int(row["step"]) for row in read_rows(run.metrics)), default=0)
    figures = test["test"]
    return {
        "row": row.name,
        "family": row.family,
        "dataset": row.config.data.dataset,
        "algorithm": row.config.learner.algorithm,
        "ways": figures["ways"],
        "shots": figures["shots"],
        "seed": budget.seed,
        "iterations": steps,
        "of_iterations": settled(row, budget).outer.iterations,
        "checkpoint": row.checkpoint,
        "checkpoint_step": test.get("ensemble_of_steps", test["step"]),
        "seconds": round(seconds_of(run), 1),
        "transductive": shown(figures["transductive"]),
        "inductive": shown(figures["inductive"]),
        "episodes": figures["transductive"]["episodes"],
        "query_shots": figures["query_shots"],
        "inner_steps": figures["inner_steps"],
        "published": dataclasses.asdict(row.published),
        "settings": {k: v for k, v in flat(row.config).items() if v not in (None, (), False)},
        "note": row.note,
        "sha256": _digest([run.best] if row.checkpoint == "best" else list(run.all_kept().values())),
        "commit": git("rev-parse", "HEAD"),
        "changed_since_commit": bool(git("status", "--porcelain", "--untracked-files=no")),
        "machine": {"cpu": processor(), **test["environment"]},
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _digest(files: Sequence[Path]) -> str:
    """Of one file; of several, of their digests."""
    each = [hashlib.sha256(file.read_bytes()) for file in files]
    return each[0].hexdigest() if len(each) == 1 else hashlib.sha256(b"".join(d.digest() for d in each)).hexdigest()


def shown(figures: Mapping[str, Any]) -> dict[str, float]:
    return {"accuracy": round(100 * figures["accuracy"], 3), "ci95": round(100 * figures["ci95"], 3)}


def seconds_of(run: RunFolder) -> float:
    """Seconds of training and validation, over all commands that went on with the run."""
    return sum(row["seconds"] for row in read_rows(run.timing, ["seconds"]))


def main(rows: Sequence[Row], doc: str, argv: Sequence[str] | None = None) -> int:
    """The command of a data set. Exit status 2 for bad input."""
    by_name = {row.name: row for row in rows}
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", metavar="NAME", help=f"which (default: all): {', '.join(by_name)}")
    add("--family", choices=get_args(Family), help="only rows of it (default: all)")
    add("--budget-minutes", type=float, metavar="M", help="stop a row's training then; a second call goes on with it")
    add("--budget-iterations", type=int, metavar="N", help="train so many meta-steps in the place of the row's own")
    add("--device", default="auto")
    add("--data-root", metavar="FOLDER", help="where the data are (default: the variable METAFT_DATA)")
    add("--seed", type=int, default=0)
    add("--runs", type=Path, default=Budget.runs, metavar="FOLDER", help=f"of run folders (default: {Budget.runs})")
    add("--out", type=Path, default=RESULTS, metavar="FILE", help="JSON lines, appended to (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        for name in args.rows or ():
            if name not in by_name:
                raise no_such("row", name, by_name)
        budget = Budget(args.budget_minutes, args.budget_iterations, args.device, args.data_root, args.seed, args.runs)
        for name in args.rows or by_name:
            if args.family in (None, by_name[name].family):
                append(by_name[name], budget, args.out)
    except MetaftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def append(row: Row, budget: Budget, out: Path) -> None:
    say(f"--- {row.name}")
    try:  # before the work
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()
    except OSError as error:
        raise MetaftError(f"out: {out} cannot be written ({error.strerror})") from None
    line = measure(row, budget)
    if line is None:
        say(f"{row.name}: not measured: its time was up before the first validation")
        return
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    ours, theirs = line[row.published.mode], row.published
    of_paper = f"{theirs.accuracy} ({theirs.source})" + (f" after {theirs.iterations:,}" if theirs.iterations else "")
    say(
        f"{row.name}: {ours['accuracy']:.2f} ± {ours['ci95']:.2f} {theirs.mode} after {line['iterations']:,} "
        f"meta-steps; published {of_paper}"
    )
