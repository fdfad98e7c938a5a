"""Sine waves from 5 and 10 points: the error after each inner step, for every member with an inner loop.

    python benchmarks/sinusoid.py --out runs/sinusoid.json                        # hours on two cores
    python benchmarks/sinusoid.py --members maml anil pre-training --iterations 500 --out runs/short.json

The settings are those of the MAML paper (https://arxiv.org/abs/1703.03400, section 5.1): two hidden layers of 40 units,
an inner rate of 0.01 (with which learned rates begin), one inner step in training, 25 tasks per meta-step with as many
query points as shots, Adam at 0.001; outer settings that a member has of its own go before those. What stands beside
is `pre-training`: the same network trained on the points of all tasks at once, then gradient descent at that rate of
RATES which is best on validation tasks.

Written are the JSON with every figure, and beside it a table (.md) and a picture (.png). What the JSON already holds is
not measured again, and a member that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, too

from benchmarks.throughput import cpu_model, git
from metaft import algorithms, meta_train, models, outer
from metaft.algorithms import ALGORITHMS, Algorithm, hyper_parameters
from metaft.checkpoint import write_atomically
from metaft.config import MetaTrainConfig
from metaft.defaults import MEMBERS
from metaft.errors import MetaftError
from metaft.metrics import mean_ci95
from metaft.plots.style import BLACK, BLUE, GREEN, GREY, PURPLE, SKY, VERMILLION, decorate, save
from metaft.tasks import Sinusoid
from metaft.testing import score_episodes
from metaft.training import draw
from metaft.types import Batch, Params

PRE_TRAINING = "pre-training"
RATES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
STEPS = 10
WIDTH, META_BATCH, INNER_LR, OUTER_LR = 40, 25, 0.01, 1e-3
EVAL_SEED = 1234

Row = dict[str, Any]


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
    fit, others = [], {}
    model = models.build("mlp", ways=1, shape=(1,), width=WIDTH, seed=0)
    for name in ALGORITHMS:
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


def meta_learned(name: str, shots: int, settings: Settings, folder: Path) -> Row:
    """Train and meta-test a member by the command; a run that was begun goes on."""
    own = MEMBERS.get(name, {})
    config = MetaTrainConfig(
        dataset="sinusoid", algorithm=name, shots=shots, query_shots=shots, meta_batch=META_BATCH, width=WIDTH,
        inner_lr=INNER_LR, iterations=settings.iterations, seed=settings.seed, eval_seed=EVAL_SEED,
        outer_lr=None if "outer_lr" in own else OUTER_LR,
        outer_schedule=None if "outer_schedule" in own else "constant",
        test_inner_steps=STEPS, test_episodes=settings.episodes, device="cpu", engine="vmap",
        out=str(folder / f"{name}-{shots}"),
    )  # fmt: skip
    path = Path(str(config.out))
    result = meta_train.resume_run(path, config) if (path / "config.toml").exists() else meta_train.run(config)
    test = result["test"]["transductive"]
    return {"mse": test["mse_per_step"], "ci95": test["ci95_per_step"], "seconds": result["seconds"]}


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
    with outer.engine("vmap") as engine:
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


def run(settings: Settings, names: Iterable[str], shots: Sequence[int], out: Path) -> dict[str, Any]:
    """Measure what the JSON has not; it is written after each row. Raises MetaftError where it has other settings."""
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"rows": []}
    plain = dataclasses.asdict(settings)
    if results.get("settings", plain) != plain:
        raise MetaftError(f"out: {out} holds figures of {results['settings']}, not of {plain}")
    results |= {
        "benchmark": "sinusoid",
        "settings": plain,
        "machine": {"cpu": cpu_model(), "torch": torch.__version__},
        "skipped": members()[1],
    }
    done = {(row["member"], row["shots"]) for row in results["rows"]}
    for name in names:
        for k in shots:
            if (name, k) in done:
                continue
            found = pre_trained(k, settings) if name == PRE_TRAINING else meta_learned(name, k, settings, out.parent)
            row = {"member": name, "shots": k, "commit": git("rev-parse", "HEAD"), **found}
            results["rows"].append(row)
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out, (json.dumps(results, indent=2) + "\n").encode())
    out.with_suffix(".md").write_text(table(results), encoding="utf-8")
    save(figure(results["rows"]), out.with_suffix(".png"))
    return results


def table(results: dict[str, Any]) -> str:
    """Markdown: a row per member and number of points."""
    settings, shown = results["settings"], (0, 1, 2, 3, 5, STEPS)
    about = f"{settings['iterations']} meta-steps, seed {settings['seed']}; ± 95 % interval"
    lines = [
        f"Mean squared error over {settings['episodes']} test tasks of 100 points each; {about}.",
        "",
        "| member | points | " + " | ".join(f"{s} steps" if s != 1 else "1 step" for s in shown) + " |",
        "|---" * (len(shown) + 2) + "|",
    ]
    for row in sorted(results["rows"], key=lambda row: row["shots"]):
        name = f"`{row['member']}`" + (f", rate {row['inner_lr']}" if "inner_lr" in row else "")
        cells = [f"{row['mse'][s]:.3f} ± {row['ci95'][s]:.3f}" for s in shown]
        lines.append(f"| {name} | {row['shots']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(rows: Sequence[Row]) -> Figure:
    """A panel for each number of points, a line for each member."""
    shots = sorted({row["shots"] for row in rows})
    names = list(dict.fromkeys(row["member"] for row in rows))
    colours = (BLUE, VERMILLION, GREEN, PURPLE, SKY, BLACK)
    looks = {n: (colours[i % 6], ("-", "--", ":", "-.")[i // 6 % 4], "osD^vP*X"[i % 8]) for i, n in enumerate(names)}
    looks[PRE_TRAINING] = (GREY, "--", "")
    drawn = Figure(figsize=(5.0 * len(shots), 4.2), layout="constrained")
    for panel, k in zip(drawn.subplots(1, len(shots), squeeze=False)[0], shots, strict=True):
        for row in (row for row in rows if row["shots"] == k):
            colour, line, marker = looks[row["member"]]
            panel.errorbar(
                range(len(row["mse"])), row["mse"], row["ci95"],
                color=colour, ls=line, marker=marker, ms=4, lw=1.2, elinewidth=0.6, label=row["member"],
            )  # fmt: skip
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"{k} points", fontsize=10)
        decorate(panel, "inner steps at test", "mean squared error", legend=k == shots[0])
    return drawn


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
    add("--out", type=Path, default=Path("runs/sinusoid/sinusoid.json"), metavar="FILE.json", help="runs go beside it")
    given = parser.parse_args(argv)
    try:
        if given.out.suffix != ".json":
            raise MetaftError(f"out must end in .json, got {given.out}")
        settings = Settings(given.iterations, given.episodes, given.seed)
        results = run(settings, dict.fromkeys(given.members), given.shots, given.out)
    except MetaftError as error:
        print(f"sinusoid: {error}", file=sys.stderr)
        return error.status
    print("\n" + table(results))
    print(f"figures: {given.out}, table: {given.out.with_suffix('.md')}, picture: {given.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
