"""Checks and measures the GPU path in one go, within a time budget (see benchmarks/gpu.sh).

    python -m benchmarks.gpu --out runs/gpu --omniglot omniglot.npz
    python -m benchmarks.gpu --tiny --device cpu --seconds 60      # the script itself, anywhere, in seconds
    python -m benchmarks.gpu --pack omniglot.npz                   # Omniglot (from METAFT_DATA) as one file

Each section ends with its figures in OUT/gpu.json, or with the reason why it has none; what takes the place of a figure
that was not measured is never a guess.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.workloads import PUBLISHED, WORKLOADS, Workload
from metaft import algorithms, engines, models
from metaft.config import MetaTrainConfig, Settled
from metaft.dist.ranks import ALONE
from metaft.errors import Interrupted, MetaftError
from metaft.inputs import ImageInputs
from metaft.models import convolution
from metaft.models.functional import plain_operations
from metaft.models.precision import in_bf16, matrix_units
from metaft.models.recomputed import recomputed
from metaft.outer.static import StaticSteps, recorded
from metaft.runs.folder import read_rows
from metaft.runs.snapshot import Position, Snapshot
from metaft.runs.training import Eager
from metaft.support.output import of_command
from metaft.tasks.pool import ClassPool
from metaft.types import SPLITS

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = ("fp32", "tf32", "bf16")


class Skipped(Exception):
    """Why a section has no figures."""


class Bench:
    """What the sections share: the device, the time that is left, and the file of figures."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.device = given, given.device
        self.end = time.monotonic() + given.seconds
        self.figures: dict[str, Any] = {"device": self._device(), "torch": torch.__version__}

    def _device(self) -> str:
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def section(self, name: str, measure: Callable[[Bench], Any], *, needs: float) -> None:
        """Run one section if `needs` seconds are left, and write all figures so far."""
        start = time.monotonic()

        def in_time() -> Any:
            if needs and self.left < needs:
                raise Skipped(f"{self.left:.0f} s were left, it needs {needs:.0f}")
            return measure(self)

        found = self.figures[name] = attempt(in_time)
        self.figures.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        out = Path(self.given.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(found)[:400]}", flush=True)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def checks(bench: Bench) -> Any:
    """The tests that need a GPU: recorded steps against the CPU in float64, changing inputs, resume.

    Their files alone, so that nothing else that tests import has to be there, and without plugins of that machine.
    """
    if bench.device != "cuda":
        raise Skipped("no GPU")
    files = [str(f) for f in sorted((ROOT / "tests").glob("test_*.py")) if "@pytest.mark.gpu" in f.read_text("utf-8")]
    words = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", *files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=min(150, bench.left), env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    return {"passed": done.returncode == 0, "tail": (done.stdout + done.stderr).splitlines()[-12:]}


def ceilings(bench: Bench) -> Any:
    """What the device reaches: GB/s of a copy, read and written, and TFLOP/s of a matrix product."""
    side = 256 if bench.given.tiny else 8192
    a = torch.randn(side, side, device=bench.device)
    wide = torch.randn(side, side * (1 if bench.given.tiny else 16), device=bench.device)
    into = torch.empty_like(wide)
    found = {"copy_gb_s": 2 * wide.nbytes / _seconds(bench, lambda: into.copy_(wide)) / 1e9}
    for precision in PRECISIONS:
        b = a.bfloat16() if precision == "bf16" else a
        with matrix_units(precision):
            found[f"{precision}_tflop_s"] = 2 * side**3 / _seconds(bench, lambda b=b: b @ b) / 1e12
    return found


def _seconds(bench: Bench, function: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds of one call, after three that do not count."""
    times: list[float] = []
    for i in range(3 + repeats):
        bench.wait()
        start = time.perf_counter()
        function()
        bench.wait()
        if i >= 3:
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def noise(workload: Workload, device: str) -> ClassPool:
    """A pool of images of a workload's shape; speed does not depend on what is in them."""
    classes, each = 100, workload.shots + workload.query_shots
    images = np.random.default_rng(0).integers(0, 256, (classes * each, *workload.shape), dtype=np.uint8)
    return ClassPool(
        name="noise",
        images=torch.from_numpy(images),
        class_names=tuple(map(str, range(classes))),
        starts=np.arange(classes) * each,
        counts=np.full(classes, each),
        splits={"train": np.arange(classes), "val": np.arange(0), "test": np.arange(0)},
        inputs=ImageInputs(*workload.shape),
    ).to(device)


def prepared(bench: Bench, w: Workload, precision: str, engine: Any, **more: Any) -> Any:
    """Whole meta-steps of a workload: drawing, gather, inner loops, meta-gradient and Adam."""
    name = "conv4" if w.form == "stride" else "conv4-pool"
    model = models.build(name, ways=w.ways, shape=w.shape, width=w.width, seed=0, device=bench.device)
    model = in_bf16(model) if precision == "bf16" else model
    model = recomputed(model) if more.get("checkpoint") else model
    hyper = {"inner_lr": w.inner_lr, "inner_steps": more.get("steps", w.inner_steps)}
    algorithm = algorithms.maml(model, **hyper)
    config = Settled(ways=w.ways, shots=w.shots, query_shots=w.query_shots, meta_batch=w.meta_batch,
                     outer_optimizer="adam", outer_lr=1e-3, outer_schedule="cosine", iterations=10**6,
                     eval_every=10**6, checkpoint_every=10**6, rotate=w.shape[0] == 1, model=name, width=w.width,
                     test_ways=w.ways, test_shots=w.shots, test_query_shots=w.query_shots,
                     test_inner_steps=w.inner_steps)  # fmt: skip
    source = noise(w, bench.device).source(
        ways=w.ways, shots=w.shots, query_shots=w.query_shots, rotate=w.shape[0] == 1, splits=("train",)
    )
    start = Snapshot(*algorithm.init(0), {}, Position(), {})
    if engine.whole_steps:
        return StaticSteps(config, engine, algorithm, source, start)
    return Eager(config, engine, algorithm, source, start, ALONE)


def timed(bench: Bench, steps: Any, seconds: float) -> tuple[float, int]:
    """Milliseconds per step over so many seconds, and how many steps these were; the first call is not counted."""
    at = len(steps.advance(0).window)
    bench.wait()
    first, start = at, time.perf_counter()
    while at == first or time.perf_counter() - start < seconds:
        taken = steps.advance(at)
        if taken.failure is not None:
            raise MetaftError(f"step {at}: {taken.failure}")
        at += len(taken.window)
    bench.wait()
    return 1000 * (time.perf_counter() - start) / (at - first), at - first


def convolutions(bench: Bench) -> Any:
    """Milliseconds of each form of each layer's convolution with its gradient and that one's, all tasks at once; a
    Triton kernel is to be written where it can be 1.5 times as fast as the better one."""
    end = time.monotonic() + 90
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        for name in ("tiny", "tiny-pool") if bench.given.tiny else PUBLISHED:
            found[f"{name} {precision}"] = attempt(layers, bench, name, precision, end)
    return found


def layers(bench: Bench, name: str, precision: Any, end: float) -> dict[str, Any]:
    """`convolutions` of one workload, by layer shape (`metaft.models.convolution.Shape`)."""
    if time.monotonic() > end:
        raise Skipped("out of time")
    device = torch.device(bench.device)
    record = functools.partial(recorded, device=device, said=False) if device.type == "cuda" else None
    with matrix_units(precision), plain_operations(), engines.engine("vmap", device=device) as engine:
        steps = prepared(bench, WORKLOADS[name], precision, engine)
        found: dict[str, Any] = {}
        for shape in convolution.shapes_of(lambda: steps.advance(0)):
            times = {form: convolution.seconds(shape, form, device, record=record) for form in convolution.FORMS}
            ms = {form: 1000 * each for form, each in times.items()}
            found[shape.key] = {**ms, "chosen": convolution.faster(**times)}
    return found


def throughput(bench: Bench) -> Any:
    """Milliseconds per whole meta-step for each workload, precision and engine, the share of the measured ceilings that
    its convolutions and matrix products, and what all operations read and write, come to, and peak memory."""
    found: dict[str, Any] = {}
    names = ("tiny", "tiny-pool") if bench.given.tiny else PUBLISHED
    kinds = [("graph", precision) for precision in PRECISIONS] + [("vmap", "fp32")]
    for name in names:
        counted = attempt(work, bench, WORKLOADS[name])
        for kind, precision in kinds:
            if bench.left < 60 and not bench.given.tiny:
                found[f"{name} {kind} {precision}"] = {"skipped": "out of time"}
                continue
            found[f"{name} {kind} {precision}"] = attempt(speed, bench, name, kind, precision, counted)
    return found


def attempt(measure: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Its figures, or why it has none: the other figures are worth having."""
    try:
        return measure(*given)
    except Skipped as why:
        return {"skipped": str(why)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}


def speed(bench: Bench, name: str, kind: Any, precision: Any, counted: Mapping[str, Any]) -> dict[str, Any]:
    if bench.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    rows = bench.figures.get("convolutions", {}).get(f"{name} {precision}", {})
    chosen = {key: row["chosen"] for key, row in rows.items() if "chosen" in row}
    form_of = convolution.by_key(chosen) if chosen else None
    with matrix_units(precision), engines.engine(kind, device=bench.device) as engine, convolution.forms(form_of):
        steps = prepared(bench, WORKLOADS[name], precision, engine)
        ms, count = timed(bench, steps, 0.1 if bench.given.tiny else 2.0)
        entry: dict[str, Any] = {"ms": ms, "steps": count}
        entry["tasks_at_once"] = getattr(engine, "chunk", None) or WORKLOADS[name].meta_batch
        if kind == "graph" and bench.device == "cuda":
            entry["recorded"] = getattr(steps._run, "__name__", "") == "replay"
        ceiling = bench.figures.get("ceilings", {})
        if "flop" in counted:
            entry |= {"tflop_s": counted["flop"] / ms / 1e9, "gb_s": counted["bytes"] / ms / 1e6}
        if "tflop_s" in entry and "copy_gb_s" in ceiling:
            entry["of_matrix_products"] = entry["tflop_s"] / ceiling[f"{precision}_tflop_s"]
            entry["of_copies"] = entry["gb_s"] / ceiling["copy_gb_s"]
        if bench.device == "cuda":
            entry["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            entry["busy"] = attempt(busy, bench, steps)
    return entry


def work(bench: Bench, workload: Workload) -> dict[str, Any]:
    """Operations of one meta-step in fp32: those of its convolutions and matrix products, and the bytes that all of it
    reads and writes where each operation reads its arguments and writes its result.

    PyTorch's counter takes a grouped convolution's derivative for an ungrouped one's, so that tasks side by side would
    count many times over: the operations are those of one task, times the tasks.
    """
    one = dataclasses.replace(workload, meta_batch=1)
    with engines.engine("vmap", device=bench.device) as engine:
        with FlopCounterMode(display=False) as flops:
            prepared(bench, one, "fp32", engine).advance(0)
        with Bytes() as moved:
            prepared(bench, workload, "fp32", engine).advance(0)
    return {"flop": flops.get_total_flops() * workload.meta_batch, "bytes": moved.total}


class Bytes(TorchDispatchMode):
    """Counts the bytes of the arguments and results of all operations that are not mere views."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += sum(leaf.nbytes for leaf in pytree.tree_leaves((args, kwargs, out)) if torch.is_tensor(leaf))
        return out


def busy(bench: Bench, steps: Any) -> dict[str, Any]:
    """Share of a stretch of steps in which the GPU runs a kernel: their time over the time from start to end."""
    from torch.profiler import ProfilerActivity, profile

    bench.wait()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        start = time.perf_counter()
        steps.advance(10**5)
        bench.wait()
        elapsed = time.perf_counter() - start
    return {"share": sum(event.self_device_time_total for event in seen.key_averages()) / 1e6 / elapsed}


def memory(bench: Bench) -> Any:
    """Peak memory of 100 recomputed inner steps over that of 10 plain ones, second order."""
    if bench.device != "cuda":
        raise Skipped("counts a GPU's memory; tests/test_precision.py has the CPU's")
    found: dict[str, Any] = {}
    for steps, checkpoint in ((10, False), (100, True)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with matrix_units("fp32"), engines.engine("vmap", device="cuda") as engine:
            prepared(bench, WORKLOADS["omniglot-5w1s-q1"], "fp32", engine, steps=steps, checkpoint=checkpoint).advance(
                0
            )
        found[f"{steps} {'recomputed' if checkpoint else 'plain'}"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def pack(path: Path) -> None:
    """Omniglot's pixels and classes as one file."""
    from metaft.tasks import load

    pool = load("omniglot")
    assert isinstance(pool, ClassPool)
    splits = {f"split_{name}": pool.splits[name] for name in SPLITS}
    names = np.array(pool.class_names)
    arrays: dict[str, Any] = {"images": pool.images.numpy(), "names": names, "starts": pool.starts}
    arrays |= {"counts": pool.counts, **splits}
    np.savez_compressed(path, **arrays)


def unpack(path: Path) -> ClassPool:
    """The pool that `pack` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return ClassPool(
            name="omniglot",
            images=torch.from_numpy(file["images"]),
            class_names=tuple(file["names"].tolist()),
            starts=file["starts"],
            counts=file["counts"],
            splits={name: file[f"split_{name}"] for name in SPLITS},
            inputs=ImageInputs(*file["images"].shape[1:], polarity="bright-on-black"),
        )


def omniglot(bench: Bench) -> Any:
    """5-way 1-shot as in benchmarks/README.md (a): seconds of training, and accuracy over 1,000 test episodes."""
    from metaft.meta_train import run

    path = Path(bench.given.omniglot or "omniglot.npz")
    if not path.exists():
        raise Skipped(f"{path} is not there (benchmarks/gpu.sh carry)")
    out = Path(bench.given.out) / f"omniglot-{os.getpid()}"
    tiny: dict[str, Any] = {"iterations": 4, "eval_every": 2, "eval_episodes": 4, "test_episodes": 8, "width": 4}
    whole: dict[str, Any] = {"iterations": 4800, "eval_every": 400, "eval_episodes": 400}
    config = MetaTrainConfig(
        dataset="omniglot", rotate=True, meta_batch=16, outer_lr=3e-3, test_query_shots=1, device=bench.device,
        engine="graph", out=str(out), **(tiny if bench.given.tiny else whole),
    )  # fmt: skip
    found: dict[str, Any] = {"precision": config.compute.precision}
    # A run that takes too long is stopped as Ctrl-C would, so that something is left for the peers.
    limit = threading.Timer(min(150, bench.left - 60 * (not bench.given.tiny)), os.kill, (os.getpid(), signal.SIGTERM))
    limit.start()
    try:
        result = run(config, dataset=unpack(path))
        test = result["test"]["transductive"]
        found |= {"accuracy": test["accuracy"], "ci95": test["ci95"], "tasks_per_second": result["tasks_per_second"]}
    except Interrupted as stopped:
        found["stopped"] = str(stopped)
    finally:
        limit.cancel()
    return {**found, **course(out)}


def course(run: Path, reached: float = 0.987) -> dict[str, Any]:
    """Validations of a run (step, seconds of training and validation so far, accuracy), and the seconds to the first of
    them at so much; each validation is of `eval_episodes`, so that first one is a little lucky."""
    timing = read_rows(run / "timing.jsonl", ["step", "seconds"])
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "val"]
    seen = [
        (row["step"], sum(part["seconds"] for part in timing if part["step"] <= row["step"]), row["transductive"])
        for row in rows
    ]
    validations = [{"step": step, "seconds": took, "accuracy": figure["accuracy"]} for step, took, figure in seen]
    first = next((v["seconds"] for v in validations if v["accuracy"] >= reached), None)
    return {
        "seconds": sum(part["seconds"] for part in timing),
        f"seconds_to_{100 * reached:g}": first,
        "validations": validations,
    }


def peers(bench: Bench) -> Any:
    """benchmarks/throughput.py here: the meta-gradient of one meta-batch, metaft's not recorded, and the peers'. All of
    them in PyTorch's default precision, which takes tf32 for convolutions; `ratios` has the whole recorded steps of
    `throughput` in fp32 and tf32 beside the fastest library's meta-gradient."""
    site = os.environ.get("METAFT_PEERS")
    if site is None or not Path(site).is_dir():
        raise Skipped("METAFT_PEERS names no folder of libraries")
    out = Path(bench.given.out) / "peers.json"
    out.unlink(missing_ok=True)
    words = ["--device", bench.device, "--seconds", "0.1" if bench.given.tiny else "2", "--rounds", "2"]
    words += ["--allocator", "default", "--threads", "4", "--peers", "learn2learn", "higher", "torchopt"]
    words += ["--out", str(out), "--workload", *(("tiny",) if bench.given.tiny else PUBLISHED)]
    found: dict[str, Any] = {}
    try:
        done = subprocess.run(
            [sys.executable, "benchmarks/throughput.py", *words], cwd=ROOT, capture_output=True, text=True,
            timeout=bench.left, check=False,
        )  # fmt: skip
        if done.returncode:
            found["failed"] = (done.stderr or done.stdout)[-400:]
    except subprocess.TimeoutExpired:
        found["stopped"] = "out of time; the rows so far are below"
    if out.exists():  # it is written after each row
        found |= json.loads(out.read_text(encoding="utf-8"))
    return {**found, "ratios": ratios(found.get("rows", []), bench.figures.get("throughput", {}))}


def ratios(rows: Sequence[Mapping[str, Any]], mine: Mapping[str, Any]) -> dict[str, Any]:
    """How many of metaft's recorded meta-steps the fastest library's meta-gradient takes, by workload and precision."""
    found: dict[str, Any] = {}
    for row in rows:
        for precision in PRECISIONS[:2]:
            ms = mine.get(f"{row['workload']} graph {precision}", {}).get("ms")
            if row["best_peer"] is not None and ms is not None:
                theirs = row["systems"][row["best_peer"]]["ms"]["median"]
                found[f"{row['workload']} {precision}"] = {"best_peer": row["best_peer"], "ratio": theirs / ms}
    return found


@of_command()
def main() -> int:
    """Exit status 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/gpu")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=520, help="all sections together")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script itself")
    parser.add_argument("--omniglot", help="the file that --pack wrote")
    parser.add_argument("--pack", type=Path, help="write Omniglot there, and do nothing else")
    given = parser.parse_args()
    if given.pack is not None:
        pack(given.pack)
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        print("gpu: there is no GPU here; --device cpu --tiny tries the script", file=sys.stderr)
        return 2
    bench = Bench(given)
    least = 0.0 if given.tiny else 1.0
    bench.section("checks", checks, needs=60 * least)
    bench.section("ceilings", ceilings, needs=15 * least)
    bench.section("convolutions", convolutions, needs=90 * least)
    bench.section("throughput", throughput, needs=90 * least)
    bench.section("omniglot", omniglot, needs=120 * least)
    bench.section("memory", memory, needs=20 * least)
    bench.section("peers", peers, needs=60 * least)
    return 0 if bench.figures["checks"].get("passed") or "skipped" in bench.figures["checks"] else 1


if __name__ == "__main__":
    sys.exit(main())
