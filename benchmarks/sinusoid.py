"""Sine waves from 5 and 10 points: the error after each inner step, for every member with an inner loop.

    python benchmarks/sinusoid.py --jobs 2                                        # hours; goes on where it was stopped
    python benchmarks/sinusoid.py --members maml anil pre-training --shots 5 --iterations 500 --out runs/short.json

The settings are those of the MAML paper (https://arxiv.org/abs/1703.03400, section 5.1): two hidden layers of 40 units,
one inner step of 0.01 in training (with which learned rates begin), 25 tasks per meta-step with as many query points as
shots, Adam at 0.001. A member that is not itself with these has others of its own in OWN, with their source; the table
says which. All are tested alike: 10 inner steps, at their own rate and by their own rule, on the support points alone.
UNICORN-MAML is left out, since of one output it is MAML. What stands beside is `pre-training`: the same network trained
on the points of all tasks at once, then gradient descent at that rate of RATES which is best on validation tasks.

Written are the JSON with every figure, and beside it a table (.md) and a picture (.png). What the JSON already holds is
not measured again, and a member that was stopped goes on from its last checkpoint. With `--jobs N` each row is a
process of its own, of one thread, N at a time; what it says is beside its run folder (.log).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, too

from benchmarks.sinusoid_report import PRE_TRAINING, STEPS, Row, figure, table
from benchmarks.throughput import git
from metaft import algorithms, engines, meta_train, models, outer
from metaft.algorithms import ALGORITHMS, Algorithm, hyper_parameters
from metaft.config import MetaTrainConfig
from metaft.errors import MetaftError
from metaft.metrics import mean_ci95
from metaft.plots.style import save
from metaft.runs.checkpoint import write_atomically
from metaft.runs.machine import processor
from metaft.runs.training import draw
from metaft.support.output import of_command
from metaft.tasks import Sinusoid
from metaft.testing import score_episodes
from metaft.types import Batch, Params

RATES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
WIDTH, META_BATCH, INNER_LR, OUTER_LR = 40, 25, 0.01, 1e-3
EVAL_SEED = 1234

OWN: dict[str, dict[str, Any]] = {
    "maml++": {
        "settings": {
            "inner_steps": 5, "outer_schedule": "cosine", "hyper": ("order_annealing=0", "learned_rates=false"),
            "clip_norm": 1.0,
        },
        "source": "its paper's 5 steps, each with a loss of its own, and cosine outer rate; of second order from the "
        "first step on, clipped, and without learned rates, since it diverges otherwise",
    },
    "reptile": {
        "settings": {
            "inner_steps": 5, "inner_lr": 0.02, "inner_optimizer": "sgd", "hyper": ("batch_size=10",),
            "outer_optimizer": "sgd", "outer_lr": 0.1, "outer_schedule": "linear",
        },
        "points": 50,
        "source": "its authors' demo of sine waves (https://openai.com/index/reptile): 50 points of a task, 10 a step",
    },
    "imaml": {
        "settings": {"inner_steps": 16, "hyper": ("strength=2", "damping=0", "line_search=2")},
        "source": "its paper's steps and strength for Omniglot, for it has no sine waves; each step is halved up to "
        "twice until the inner problem falls, since it diverges otherwise",
    },
    "cavia": {
        "settings": {"inner_lr": 1.0, "hyper": ("context=5",)},
        "source": "its authors' code for sine waves (https://github.com/lmzintgraf/cavia, regression)",
    },
}  # fmt: skip
"""What a member has of its own: fields of a config, support and query points together if other than twice the shots,
and whose numbers they are."""

SAME_AS_MAML = {"unicorn-maml": "unicorn-maml is maml where there is one output: its shared row is the whole head"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What two rows of one table must have in common."""

    iterations: int
    episodes: int
    seed: int

    def __post_init__(self) -> None:
        for field in ("iterations", "episodes"):
            if getattr(self, field) < 1:
                raise MetaftError(f"{field} must be at least 1, got {getattr(self, field)}")


def members() -> tuple[list[str], dict[str, str]]:
    """(those with an inner loop that can learn a curve, the others with the reason)."""
    fit, others = [], dict(SAME_AS_MAML)
    model = models.build("mlp", ways=1, shape=(1,), width=WIDTH, seed=0)
    for name in (name for name in ALGORITHMS if name not in others):
        try:
            algorithms.build(name, model, {"loss": "mse"})
        except MetaftError as error:
            others[name] = str(error)
            continue
        if "inner_lr" in hyper_parameters(name):
            fit.append(name)
        else:
            others[name] = f"{name} has no inner loop"
    return fit, others


def config_of(name: str, shots: int, settings: Settings, out: Path) -> MetaTrainConfig:
    own = OWN.get(name, {})
    of_paper = MetaTrainConfig(
        dataset="sinusoid", algorithm=name, shots=shots, query_shots=own.get("points", 2 * shots) - shots,
        meta_batch=META_BATCH, width=WIDTH, inner_steps=1, inner_lr=INNER_LR,
        iterations=settings.iterations, outer_optimizer="adam", outer_lr=OUTER_LR, outer_schedule="constant",
        seed=settings.seed, eval_seed=EVAL_SEED, test_inner_steps=STEPS, test_episodes=settings.episodes,
        device="cpu", engine="vmap", out=str(out), report=False,
    )  # fmt: skip
    return dataclasses.replace(of_paper, **own.get("settings", {}))


def meta_learned(name: str, shots: int, settings: Settings, folder: Path) -> Row:
    """Train and meta-test a member by the command; a run that was begun goes on."""
    path = folder / f"{name}-{shots}"
    config = config_of(name, shots, settings, path)
    result = meta_train.resume_run(path, config) if (path / "config.toml").exists() else meta_train.run(config)
    test = result["test"]["transductive"]
    own = {"own": OWN[name]} if name in OWN else {}
    return {"mse": test["mse_per_step"], "ci95": test["ci95_per_step"], "seconds": result["seconds"], **own}


def pre_trained(shots: int, settings: Settings) -> Row:
    """Train on points of all tasks at once; test by gradient descent at the rate that is best on validation tasks."""
    start = time.perf_counter()
    source = Sinusoid().source(shots=shots, query_shots=shots)
    tasks = Sinusoid().source(shots=shots, query_shots=100)
    model = models.build("mlp", ways=1, shape=(1,), width=WIDTH, seed=settings.seed)

    def task_loss(meta: Params, state: Params, knobs: Params, batch: Batch) -> tuple[Any, Any]:
        loss, _ = model.loss(meta, batch.x, batch.y, "mse")
        return loss, ({}, {"loss": loss.detach()})

    def descent(rate: float) -> Algorithm:
        return algorithms.maml(model, loss="mse", inner_lr=rate)

    training = dataclasses.replace(descent(0.0), data="batches", task_loss=task_loss)
    meta, state = training.init(settings.seed)
    adam = torch.optim.Adam(meta.values(), lr=OUTER_LR)
    with engines.engine("vmap") as engine:
        for step in range(settings.iterations):
            batches = draw(training, source, settings.seed, range(META_BATCH * step, META_BATCH * (step + 1)))
            grads = outer.meta_gradient(engine, training, meta, state, batches, step=step).grads
            for name, p in meta.items():
                p.grad = grads[name]
            adam.step()
        on_val = {}
        for rate in RATES:
            scores = score_episodes(
                engine, descent(rate), meta, state, tasks, split="val", seed=EVAL_SEED, episodes=200, steps=STEPS
            )
            on_val[rate] = float(scores[:, 0, -1].mean())
        best = min(on_val, key=lambda rate: on_val[rate])
        scores = score_episodes(
            engine, descent(best), meta, state, tasks,
            split="test", seed=EVAL_SEED, episodes=settings.episodes, steps=STEPS,
        )  # fmt: skip
    mse, ci95 = (t.tolist() for t in mean_ci95(scores[:, 0]))
    return {"mse": mse, "ci95": ci95, "seconds": round(time.perf_counter() - start, 3), "inner_lr": best}


def run(settings: Settings, names: Sequence[str], shots: Sequence[int], out: Path, jobs: int = 1) -> dict[str, Any]:
    """Measure what the JSON has not; JSON, table and picture are written after each row.

    Raises MetaftError where the JSON has other settings, and, after all others, for rows that failed.
    """
    with _results(out, settings) as results:
        done = {(row["member"], row["shots"]) for row in results["rows"]}
    cells = [(name, k) for name in names for k in shots if (name, k) not in done]
    if jobs > 1:
        _in_processes(cells, settings, out, jobs)
    else:
        for name, k in cells:
            found = pre_trained(k, settings) if name == PRE_TRAINING else meta_learned(name, k, settings, out.parent)
            with _results(out, settings) as results:
                results["rows"].append({"member": name, "shots": k, "commit": git("rev-parse", "HEAD"), **found})
    with _results(out, settings) as results:
        return results


@contextlib.contextmanager
def _results(out: Path, settings: Settings) -> Iterator[dict[str, Any]]:
    """What the JSON holds, to be added to: it is written afterwards, and no other process is at it meanwhile."""
    plain = dataclasses.asdict(settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"rows": []}
        if results.get("settings", plain) != plain:
            raise MetaftError(f"out: {out} holds figures of {results['settings']}, not of {plain}")
        for row in results["rows"]:
            if row.get("own") != json.loads(json.dumps(OWN.get(row["member"]))):
                raise MetaftError(f"out: {out} holds a row of {row['member']} with other settings than it has now")
        results |= {
            "benchmark": "sinusoid",
            "settings": plain,
            "machine": {"cpu": processor(), "torch": torch.__version__},
            "skipped": members()[1],
        }
        yield results
        results["rows"].sort(key=lambda row: ([*ALGORITHMS, PRE_TRAINING].index(row["member"]), row["shots"]))
        write_atomically(out, (json.dumps(results, indent=2) + "\n").encode())
        write_atomically(out.with_suffix(".md"), table(results).encode())
        if results["rows"]:
            save(figure(results["rows"]), out.with_suffix(".png"))


def _in_processes(cells: Sequence[tuple[str, int]], settings: Settings, out: Path, jobs: int) -> None:
    """This program once per cell, `jobs` at a time. Raises MetaftError with the last words of those that failed."""
    waiting, running, failed = list(cells), {}, []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, k = waiting.pop(0)
                log = out.parent / f"{name}-{k}.log"
                print(f"start: {name}, {k} points", file=sys.stderr, flush=True)
                with open(log, "w") as said:
                    running[name, k] = log, subprocess.Popen(
                        [
                            sys.executable, str(Path(__file__).resolve()), "--members", name, "--shots", str(k),
                            "--iterations", str(settings.iterations), "--episodes", str(settings.episodes),
                            "--seed", str(settings.seed), "--out", str(out),
                        ],
                        env=env, stdout=said, stderr=said,
                    )  # fmt: skip
            time.sleep(0.2)
            for cell, (log, process) in list(running.items()):
                if process.poll() is not None:
                    del running[cell]
                    print(f"ended: {cell[0]}, {cell[1]} points", file=sys.stderr, flush=True)
                    if process.returncode:
                        last = (log.read_text(errors="replace").splitlines() or ["killed"])[-1]
                        failed.append(f"{cell[0]}-{cell[1]}: {last}")
    finally:
        for _, process in running.values():
            process.terminate()  # each leaves a checkpoint
        for _, process in running.values():
            process.wait()
    if failed:
        raise MetaftError("; ".join(failed))


@of_command()
def main(argv: Sequence[str] | None = None) -> int:
    description = (__doc__ or "").replace("%", "%%")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*members()[0], PRE_TRAINING]
    add = parser.add_argument
    add("--members", nargs="+", choices=every, default=every, metavar="NAME", help=" ".join(every))
    add("--shots", nargs="+", type=int, default=[5, 10], help="points to adapt to")
    add("--iterations", type=int, default=15000, help="meta-steps")
    add("--episodes", type=int, default=1000, help="test tasks")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=1, help="rows at a time, each in a process of one thread")
    add("--out", type=Path, default=Path("runs/sinusoid/sinusoid.json"), metavar="FILE.json", help="runs go beside it")
    given = parser.parse_args(argv)
    try:
        if given.out.suffix != ".json":
            raise MetaftError(f"out must end in .json, got {given.out}")
        if given.jobs < 1:
            raise MetaftError(f"jobs must be at least 1, got {given.jobs}")
        settings = Settings(given.iterations, given.episodes, given.seed)
        results = run(settings, list(dict.fromkeys(given.members)), given.shots, given.out, given.jobs)
    except MetaftError as error:
        print(f"sinusoid: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("sinusoid: stopped; the same command goes on", file=sys.stderr)
        return 130
    print("\n" + table(results))
    print(f"figures: {given.out}, table: {given.out.with_suffix('.md')}, picture: {given.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(main())
