"""benchmarks/gpu.py runs from end to end where there is no GPU, at toy sizes, and says what it did not measure."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu
from metaft.inputs import ImageInputs
from metaft.tasks.pool import ClassPool
from metaft.types import SPLITS


def toy_omniglot() -> ClassPool:
    return ClassPool(
        name="omniglot",
        images=torch.from_numpy(np.random.default_rng(0).integers(0, 256, (18 * 20, 1, 28, 28), dtype=np.uint8)),
        class_names=tuple(f"a/{c}" for c in range(18)),
        starts=np.arange(18) * 20,
        counts=np.full(18, 20),
        splits={name: np.arange(6 * i, 6 * i + 6) for i, name in enumerate(SPLITS)},
        inputs=ImageInputs(1, 28, 28, polarity="bright-on-black"),
    )


# What metaft or its tests have here and a machine with a GPU may not: neither there with torch nor carried along.
ALONE = """
import importlib.machinery, runpy, sys

class Fewer(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = {"sklearn", "scipy", "joblib", "hypothesis", "tomli", "learn2learn", "pandas"}
        return None if name.partition(".")[0] in missing else super().find_spec(name, path, target)

sys.meta_path[:] = [Fewer if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
sys.argv[:] = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def without(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A module run as there."""
    env = {**os.environ, "PYTHONPATH": str(gpu.ROOT), "METAFT_PEERS": "/nowhere", **variables}
    command = [sys.executable, "-c", ALONE, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=gpu.ROOT, env=env)


@pytest.mark.skipif(os.environ.get("METAFT_FAULTS") != "full", reason="takes half a minute: make test-faults")
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_script_runs_at_toy_sizes_with_nothing_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = toy_omniglot()
    monkeypatch.setattr("metaft.tasks.load", lambda name: pool)
    packed = tmp_path / "omniglot.npz"
    gpu.pack(packed)
    again = gpu.unpack(packed)
    assert torch.equal(again.images, pool.images) and again.split_hash == pool.split_hash
    assert again.inputs == pool.inputs
    words = ["--tiny", "--device", "cpu", "--seconds", "300", "--out", str(tmp_path / "out"), "--omniglot", str(packed)]
    done = without("benchmarks.gpu", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    assert {k: v["skipped"] for k, v in found.items() if "skipped" in v} == {
        "checks": "no GPU",
        "memory": "counts a GPU's memory; tests/test_precision.py has the CPU's",
        "peers": "METAFT_PEERS names no folder of libraries",
    }
    parts = (*found.values(), *found["throughput"].values(), *found["convolutions"].values())
    assert not [v for v in parts if "failed" in v]
    entry = found["throughput"]["tiny graph bf16"]
    assert entry["ms"] > 0 and entry["of_copies"] > 0
    assert entry["of_matrix_products"] == pytest.approx(entry["tflop_s"] / found["ceilings"]["bf16_tflop_s"])
    run = found["omniglot"]
    assert run["accuracy"] > 0 and [v["step"] for v in run["validations"]] == [2, 4]
    assert 0 < run["validations"][0]["seconds"] < run["validations"][1]["seconds"] == run["seconds"]


@pytest.mark.slow
def test_the_tests_that_need_a_gpu_can_be_collected_there() -> None:
    files = [f for f in sorted((gpu.ROOT / "tests").glob("test_*.py")) if "@pytest.mark.gpu" in f.read_text("utf-8")]
    assert len(files) >= 2
    words = ["-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    done = without("pytest", *words, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "test_recorded_steps_are_the_cpus_in_float64" in done.stdout


def bench_of(tmp_path: Path, seconds: float = 300) -> gpu.Bench:
    return gpu.Bench(argparse.Namespace(device="cpu", seconds=seconds, tiny=True, out=str(tmp_path), omniglot=None))


def test_a_step_of_many_tasks_counts_as_many_times_a_step_of_one(tmp_path: Path) -> None:
    """By hand, for the tiny workload's two strided 3x3 convolutions of 16x16 and its other two: 2 flop a product."""
    small = gpu.WORKLOADS["tiny"]
    three, six = (gpu.work(bench_of(tmp_path), dataclasses.replace(small, meta_batch=b)) for b in (3, 6))
    assert six["flop"] == 2 * three["flop"]
    assert 1.5 * three["bytes"] < six["bytes"] < 2 * three["bytes"], "the outer update is that of one"
    forward = 2 * 9 * (64 * 1 * 4 + 16 * 4 * 4 + 4 * 4 * 4 + 1 * 4 * 4) + 2 * 4 * 3  # of one image
    images = small.inner_steps * small.ways * small.shots + small.ways * small.query_shots
    # at least a forward pass and twice that for its gradient, at most ten times that for the gradient's own
    assert 2.5 < three["flop"] / (3 * images * forward) < 12


def test_each_layer_shape_is_timed_in_both_forms_and_the_faster_one_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(tmp_path)
    monkeypatch.setattr(gpu.convolution, "seconds", lambda shape, form, *_, **__: {"grouped": 2.0, "im2col": 1.0}[form])
    found = gpu.layers(bench, "tiny", "fp32", time.monotonic() + 60)
    steps = gpu.WORKLOADS["tiny"].inner_steps
    assert len(found) == 4 * (2 if steps == 1 else 3), "the first inner step's weights are shared, the query's are not"
    assert all(row == {"grouped": 2000.0, "im2col": 1000.0, "chosen": "im2col"} for row in found.values())
    with pytest.raises(gpu.Skipped, match="out of time"):
        gpu.layers(bench, "tiny", "fp32", 0.0)
    bench.figures["convolutions"] = {"tiny fp32": found}
    used: list[str] = []
    monkeypatch.setattr(gpu, "timed", lambda *_: (used.append(in_use(found)), (1.0, 1))[1])
    gpu.speed(bench, "tiny", "graph", "fp32", {})
    gpu.speed(bench, "tiny", "graph", "bf16", {})
    assert used == ["im2col", "none"]


def in_use(rows: dict[str, Any]) -> str:
    """The form in which a layer of these would be computed here."""
    form_of = gpu.convolution.in_use()
    return "none" if form_of is None else form_of(gpu.convolution.Shape(*json.loads(next(iter(rows)))))


def test_bytes_are_those_of_arguments_and_results_but_not_of_views() -> None:
    x = torch.zeros(3, 4)
    with gpu.Bytes() as moved:
        x.view(12).unsqueeze(0).add(1.0)
    assert moved.total == 2 * 4 * 12


def test_how_many_times_as_fast_is_against_the_fastest_library() -> None:
    systems = {"higher": {"ms": {"median": 30.0}}, "learn2learn": {"ms": {"median": 20.0}}}
    rows = [
        {"workload": "a", "best_peer": "learn2learn", "systems": systems},
        {"workload": "b", "best_peer": None, "systems": {}},
    ]
    mine = {"a graph fp32": {"ms": 0.5}, "a graph tf32": {"failed": "x"}, "b graph fp32": {"ms": 1.0}}
    assert gpu.ratios(rows, mine) == {"a fp32": {"best_peer": "learn2learn", "ratio": 40.0}}


def test_the_time_to_an_accuracy_is_that_of_the_first_validation_there(tmp_path: Path) -> None:
    rows = [
        {"kind": "val", "step": 10 * i, "transductive": {"accuracy": a}} for i, a in ((1, 0.9), (2, 0.99), (3, 0.98))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    timing = [{"step": 5 * i, "seconds": 2.0} for i in range(1, 7)]
    (tmp_path / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timing))
    found = gpu.course(tmp_path)
    assert (found["seconds"], found["seconds_to_98.7"]) == (12.0, 8.0)
    assert gpu.course(tmp_path, 0.999)["seconds_to_99.9"] is None


@pytest.mark.slow
def test_a_run_that_takes_too_long_is_stopped_and_says_how_far_it_came(tmp_path: Path) -> None:
    packed = tmp_path / "omniglot.npz"
    pool = toy_omniglot()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.tasks.load", lambda name: pool)
        gpu.pack(packed)
    bench = bench_of(tmp_path, seconds=64)
    bench.given.tiny, bench.given.omniglot = False, str(packed)
    found = gpu.omniglot(bench)
    assert "stopped; a checkpoint is in" in found["stopped"]
    assert found["seconds_to_98.7"] is None and "accuracy" not in found


def test_a_section_that_fails_or_has_no_time_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu, "checks", lambda bench: 1 / 0)
    assert gpu.main() == 0, "nothing failed that was tried"
    found = json.loads((tmp_path / "gpu.json").read_text())
    sections = ("checks", "ceilings", "convolutions", "throughput", "omniglot", "memory", "peers")
    assert all("0 s were left, it needs" in found[name]["skipped"] for name in sections)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", "--seconds", "0.001", "--out", str(tmp_path)])
    for name in sections[1:]:
        monkeypatch.setattr(gpu, name, lambda bench: {})
    assert gpu.main() == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["checks"] == {"failed": "ZeroDivisionError: division by zero"} and found["peers"] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "there is no GPU here" in capsys.readouterr().err
