"""Digits of the float32 meta-gradient: Conv-4's fused loss beside the composed one, task by task against float64.

    python benchmarks/precision.py --out runs/precision.json
    python benchmarks/precision.py --cases glyphs-20w1s --tasks 16 --threads 1 --chunks 1 --orders second

The error of one task is the norm of the difference to its float64 meta-gradient over that gradient's norm, each over
all parameters together. The reference is composed of PyTorch's own operations in float64; the fused loss has to agree
with it to 1e-9 there, or nothing is measured. Float32 tasks go through the engine `vmap`, `--chunks` of them at once,
with so many intra-op `--threads`. A gradient jumps where an activation changes the side of its ReLU, so that single
tasks tell little: shown are the median over tasks, and the share of tasks whose error is above 1e-4.

A row passes where the fused median is at most 3 times the composed one (or 1e-5), and its share at most 10 points
above the composed path's. Cases that end in `-trained` start from a run of 1,000 meta-steps, made first where
`--trained` is not there yet; `mini-5w1s` has pictures of METAFT_DATA/mini_imagenet, and noise without it.

Beside them stands the largest error of the moments by which the fused loss normalises, and of PyTorch's kernel on
contiguous maps: of the mean in deviations of its channel, of the variance in itself. Written are the JSON with every
task's error, and beside it (.md) the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, too

from benchmarks.throughput import Order, provenance, say
from metaft import MetaTrainConfig, algorithms, engines, meta_train, models, outer, tasks
from metaft.errors import MetaftError
from metaft.models import fused
from metaft.models.functional import plain_operations
from metaft.models.precision import in_bf16
from metaft.runs import checkpoint
from metaft.types import Episode, Params

Path_ = Literal["fused", "composed"]

TIMES, FLOOR = 3.0, 1e-5
"""A fused median may be so many times the composed one, or the floor."""
FAR, POINTS = 1e-4, 0.10
"""The share of tasks above FAR may be so much above the composed one."""
AGREE = 1e-9
"""How far the two may be apart in float64."""
MAPS = ((75, 64, 14, 14), (75, 64, 2, 2), (400, 64, 7, 7), (75, 32, 84, 84), (5, 32, 21, 21))
"""Images, channels, height and width of the maps whose moments are compared."""


@dataclasses.dataclass(frozen=True)
class Case:
    """64 tasks of one kind, and the step that MAML takes on them."""

    data: Literal["glyphs", "mini", "shifted"]
    form: Literal["conv4", "conv4-pool"]
    ways: int
    steps: int
    inner_lr: float
    trained: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, 84, 84) if self.data == "mini" else (1, 28, 28)

    @property
    def width(self) -> int:
        return 32 if self.form == "conv4-pool" else 64


CASES = {
    "glyphs-5w1s": Case("glyphs", "conv4", 5, 1, 0.4),
    "glyphs-5w1s-trained": Case("glyphs", "conv4", 5, 1, 0.4, trained=True),
    "glyphs-5w1s-5-steps": Case("glyphs", "conv4", 5, 5, 0.4),
    "glyphs-5w1s-5-steps-trained": Case("glyphs", "conv4", 5, 5, 0.4, trained=True),
    "glyphs-20w1s": Case("glyphs", "conv4", 20, 5, 0.1),
    "mini-5w1s": Case("mini", "conv4-pool", 5, 5, 0.01),
    "shifted-5w1s": Case("shifted", "conv4", 5, 1, 0.4),
    "shifted-pool-5w1s": Case("shifted", "conv4-pool", 5, 5, 0.01),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    cases: tuple[str, ...]
    tasks: int
    orders: tuple[Order, ...]
    threads: tuple[int, ...]
    chunks: tuple[int, ...]
    trained: Path
    bf16: bool = False

    def __post_init__(self) -> None:
        for field in ("tasks", "threads", "chunks"):
            if not min([getattr(self, field)] if field == "tasks" else getattr(self, field)) > 0:
                raise MetaftError(f"{field} must be above 0, got {getattr(self, field)}")


def query_shots(case: Case) -> int:
    """15 per class; 20-way tasks have one as in MAML's paper."""
    return 1 if case.ways == 20 else 15


def episodes(case: Case, count: int) -> Episode:
    """Float32 tasks number 0, 1, ...: real images where there are some, or noise of mean 10 and deviation 1."""
    if case.data == "glyphs":
        dataset = tasks.load("glyphs")
    elif case.data == "mini" and (root := os.environ.get("METAFT_DATA")):
        dataset = tasks.load(f"folder:{root}/mini_imagenet", image_size=84)
    else:
        return _noise(case, count, mean=10.0 if case.data == "shifted" else 0.0)
    source = dataset.source(ways=case.ways, shots=1, query_shots=query_shots(case))
    return source.episodes(0, "train", range(count))


def _noise(case: Case, count: int, mean: float) -> Episode:
    generator = torch.Generator().manual_seed(0)

    def images(per_class: int) -> Tensor:
        return mean + torch.randn(count, case.ways * per_class, *case.shape, generator=generator)

    def labels(per_class: int) -> Tensor:
        return (torch.arange(case.ways * per_class) % case.ways).expand(count, -1).contiguous()

    q = query_shots(case)
    ids = torch.arange(case.ways).expand(count, -1)
    return Episode(images(1), labels(1), images(q), labels(q), ids, torch.arange(count))


def in_dtype(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def start(case: Case, run: Path) -> Params:
    """Float32 parameters: of the seed, or of a run of 1,000 meta-steps, which is made where it is not there yet."""
    if not case.trained:
        shape = {"ways": case.ways, "shape": case.shape, "width": case.width}
        return models.build(case.form, **shape, seed=0).params
    config = MetaTrainConfig(ways=5, shots=1, iterations=1000, eval_every=1000, out=str(run))
    last = run / "checkpoints/last.safetensors"
    if not last.exists():
        say(f"train: {run}")
        meta_train.run(config)
    return checkpoint.under(checkpoint.load(last)[0], "meta")


def gradients(
    case: Case, params: Params, data: Episode, *, path: Path_, order: Order, threads: int, chunk: int,
    bf16: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Each task's meta-gradient as one vector, in the type of `params` and `data` or as `--precision bf16` has it."""
    dtype = next(iter(params.values())).dtype
    model = models.build(case.form, ways=case.ways, shape=case.shape, width=case.width, seed=0, dtype=dtype)
    model = in_bf16(model) if bf16 else model
    algorithm = algorithms.maml(model, inner_lr=case.inner_lr, inner_steps=case.steps, first_order=order == "first")
    _, state = algorithm.init(0)
    with engines.engine("vmap", threads=threads, chunk=chunk) as engine:
        function = outer.task_grad_of(algorithm)

        def results() -> Iterator[Any]:
            return engine.map(function, (params, state, algorithm.schedule(0)), data)

        if path == "fused":
            rows = list(results())
        else:
            with plain_operations():
                rows = list(results())
    return [torch.cat([row.grads[name].flatten() for name in params]) for row in rows]


def errors(rows: Sequence[Tensor], references: Sequence[Tensor]) -> list[float]:
    """Norm of the difference over the reference's norm, task by task."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(rows, references, strict=True)]


def measure(settings: Settings, name: str, order: Order) -> list[dict[str, Any]]:
    """A row per number of threads and chunk. Raises MetaftError where the two paths differ in float64."""
    case = CASES[name]
    params, data = start(case, settings.trained), episodes(case, settings.tasks)
    wide = in_dtype(params, torch.float64), in_dtype(data, torch.float64)
    say(f"float64: {name}, {order} order")
    threads = max(settings.threads)
    reference = gradients(case, *wide, path="composed", order=order, threads=threads, chunk=1)
    again = gradients(
        case, wide[0], Episode(*(t[:2] for t in wide[1])), path="fused", order=order, threads=threads, chunk=1
    )
    apart = max(errors(again, reference[: len(again)]))
    if not apart <= AGREE:
        raise MetaftError(f"{name}: in float64 the fused gradient is off by {apart:.2g}, more than {AGREE:g}")
    rows = []
    for threads in settings.threads:
        for chunk in settings.chunks:
            row: dict[str, Any] = {"case": name, "order": order, "threads": threads, "chunk": chunk}
            for path in ("fused", "composed"):
                say(f"float32: {name}, {order} order, {threads} threads, chunks of {chunk}, {path}")
                of_path = gradients(case, params, data, path=path, order=order, threads=threads, chunk=chunk)
                row[path] = summary(errors(of_path, reference))
            rows.append({**row, "passes": passes(row["fused"], row["composed"])})
            print(line(rows[-1]), flush=True)
        if settings.bf16:
            for path in ("fused", "composed"):
                say(f"bf16: {name}, {order} order, {threads} threads, {path}")
                short = gradients(case, params, data, path=path, order=order, threads=threads, chunk=1, bf16=True)
                rows[-1].setdefault("bf16", {})[path] = summary(errors(short, reference))
    return rows


def summary(found: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(found),
        "above": sum(not e <= FAR for e in found) / len(found),  # NaN too
        "errors": list(found),
    }


def passes(fused_: dict[str, Any], composed: dict[str, Any]) -> bool:
    return fused_["median"] <= max(TIMES * composed["median"], FLOOR) and fused_["above"] <= composed["above"] + POINTS


def moments(threads: int) -> list[dict[str, Any]]:
    """Largest error of mean and variance over the channels, of the fused loss and of PyTorch on contiguous maps."""
    rows = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for shape in MAPS:
        for mean in (0.3, 10.0):
            generator = torch.Generator().manual_seed(1)
            z = mean + torch.randn(shape, generator=generator)
            true = z.double().mean((0, 2, 3)), z.double().var((0, 2, 3), correction=0)
            contiguous = torch.ops.aten.batch_norm_update_stats(z, None, None, 0.0)
            ours = [m[0] for m in fused.moments(z.permute(0, 2, 3, 1).reshape(1, -1, shape[1]))]
            row: dict[str, Any] = {"maps": list(shape), "mean": mean, "threads": threads}
            for path, (m, v) in (("fused", ours), ("composed", contiguous)):
                of_mean = (m.double() - true[0]).abs() / true[1].sqrt()
                row[path] = [float(of_mean.max()), float(((v.double() - true[1]).abs() / true[1]).max())]
            rows.append(row)
    torch.set_num_threads(before)
    return rows


def line(row: dict[str, Any]) -> str:
    a, b = row["fused"], row["composed"]
    return (
        f"| `{row['case']}` | {row['order']} | {row['threads']} | {row['chunk']} | {a['median']:.1e} | "
        f"{b['median']:.1e} | {100 * a['above']:.0f} % | {100 * b['above']:.0f} % | "
        f"{'yes' if row['passes'] else 'NO'} |"
    )


def table(results: dict[str, Any]) -> str:
    """Markdown: the gradients, then the moments."""
    lines = [
        f"{results['settings']['tasks']} tasks a row, {results['machine']['cpu']}, torch {results['machine']['torch']}",
        "",
        "| case | order | threads | tasks at once | median, fused | composed | above 1e-4, fused | composed | passes |",
        "|---|---|---|---|---|---|---|---|---|",
        *(line(row) for row in results["rows"]),
        "",
        *_of_bf16(results["rows"]),
        "| maps | mean of the inputs | threads | mean, fused | contiguous | variance, fused | contiguous |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["moments"]:
        (mean, var), (mean_, var_) = row["fused"], row["composed"]
        size = "x".join(str(side) for side in row["maps"])
        lines.append(
            f"| {size} | {row['mean']:g} | {row['threads']} | {mean:.1e} | {mean_:.1e} | {var:.1e} | {var_:.1e} |"
        )
    return "\n".join(lines) + "\n"


def _of_bf16(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Nothing where it was not measured."""
    lines = [
        f"| `{row['case']}` | {row['order']} | {row['threads']} | {row['bf16']['fused']['median']:.2f} | "
        f"{row['bf16']['composed']['median']:.2f} |"
        for row in rows
        if "bf16" in row
    ]
    heading = ["| case | order | threads | median in bf16, fused | composed |", "|---|---|---|---|---|"]
    return [*heading, *lines, ""] if lines else []


def run(settings: Settings, out: Path) -> dict[str, Any]:
    """Measure, writing the JSON after each case, so that a stop loses only the one under way."""
    results = {
        **provenance("precision"),
        "settings": {**dataclasses.asdict(settings), "trained": str(settings.trained)},
        "moments": [row for threads in settings.threads for row in moments(threads)],
        "rows": [],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in settings.cases:
        for order in settings.orders:
            results["rows"] += measure(settings, name, order)
            out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            out.with_suffix(".md").write_text(table(results), encoding="utf-8")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=" ".join(CASES))
    add("--tasks", type=int, default=64, help="of each case")
    add("--orders", nargs="+", choices=["second", "first"], default=["second", "first"], help="of the meta-gradient")
    add("--threads", nargs="+", type=int, default=[1, 2], help="within an operation")
    add("--chunks", nargs="+", type=int, default=[1, 16], help="tasks at once")
    add("--trained", type=Path, default=Path("runs/precision-trained"), metavar="RUN", help="made if it is not there")
    add("--bf16", action="store_true", help="errors of --precision bf16 too, one task at once")
    add("--out", type=Path, default=Path("runs/precision.json"), metavar="FILE.json", help="the tables go beside it")
    given = parser.parse_args(argv)
    try:
        if given.out.suffix != ".json":
            raise MetaftError(f"out must end in .json, got {given.out}")
        settings = Settings(
            tuple(given.cases),
            given.tasks,
            tuple(given.orders),
            tuple(given.threads),
            tuple(given.chunks),
            given.trained,
            given.bf16,
        )
        results = run(settings, given.out)
    except MetaftError as error:
        print(f"precision: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("precision: stopped", file=sys.stderr)
        return 130
    print("\n" + table(results))
    print(f"figures: {given.out}, tables: {given.out.with_suffix('.md')}")
    return 0 if all(row["passes"] for row in results["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
