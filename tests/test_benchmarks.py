"""The benchmark against other libraries: what it refuses to time, what it names, and what it writes."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import os
import runpy
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import one_thread, write_folder
from safetensors.numpy import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import evaluation, ranked, scaling, throughput, throughput_report
from benchmarks.peers import child, metaft_end_to_end, meters, plain_loop, process
from benchmarks.peers.process import SystemFailure
from benchmarks.peers.workloads import (
    PUBLISHED,
    WORKLOADS,
    Options,
    Params,
    System,
    Tasks,
    Workload,
    draw_params,
    draw_tasks,
    plain_module,
)
from metaft import models
from metaft.errors import MetaftError

Make = Callable[[Workload, Params, Tasks, Options], System]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def shrunk(name: str, **changes: Any) -> Workload:
    """A published workload with the same form, in milliseconds."""
    workload = WORKLOADS[name]
    small = {"width": 4, "meta_batch": 2, "inner_steps": min(workload.inner_steps, 2), "query_shots": 2}
    return dataclasses.replace(workload, **{**small, "shape": (workload.shape[0], 16, 16), **changes})


def arrays(params: Params) -> dict[str, np.ndarray]:
    return {name: p.numpy() for name, p in params.items()}


class Here:
    """Stands for a process: a system in this one, asked in the same words."""

    def __init__(self, system: str) -> None:
        self.worker = child.Worker(system)
        self.ended = False

    def ask(self, **request: Any) -> dict[str, Any]:
        answer = self.worker.respond(json.loads(json.dumps(request)))
        if "error" in answer:
            raise SystemFailure(answer["error"], missing=answer["missing"])
        return answer

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        if self.worker.system is not None:
            self.worker.system.close()


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput.Settings, "start", lambda self, system, allocator="default": Here(system))


def plant(patch: pytest.MonkeyPatch, library: str, make: Make) -> None:
    """Let this stand for a library."""
    patch.setattr(f"benchmarks.peers.{library}_maml.make", make)


def fails(*_: object) -> System:
    raise RuntimeError("it does not\nbuild")


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_metaft_and_the_plain_loop_agree(name: str, first_order: bool) -> None:
    options = Options(first_order=first_order)
    loop, ours = (child.meta_gradient(system, shrunk(name), options) for system in ("plain", "metaft"))
    assert throughput.difference(arrays(ours), arrays(loop)) < 1e-12


def test_the_check_would_see_a_wrong_order_or_rate() -> None:
    workload = shrunk("omniglot-5w1s-q15")
    right = arrays(child.meta_gradient("plain", workload, Options()))
    wrong = [
        child.meta_gradient("plain", workload, Options(first_order=True)),
        child.meta_gradient("plain", dataclasses.replace(workload, inner_lr=workload.inner_lr * (1 + 1e-6)), Options()),
    ]
    for gradient in wrong:
        assert throughput.difference(arrays(gradient), right) > throughput.TOLERANCE


def test_difference_is_over_the_whole_norm() -> None:
    a = {"x": np.array([3.0, 0.0]), "y": np.array([4.0])}
    assert throughput.difference({"x": np.array([3.0, 1.0]), "y": np.array([4.0])}, a) == pytest.approx(0.2)
    assert throughput.difference({"x": a["x"]}, a) == float("inf")


@pytest.mark.parametrize("name", ["tiny", "tiny-pool"])
def test_peers_get_metafts_architecture(name: str) -> None:
    workload = WORKLOADS[name]
    params, x = draw_params(workload), draw_tasks(workload).support_x[0]
    model = models.build(
        "conv4" if workload.form == "stride" else "conv4-pool",
        ways=workload.ways, shape=workload.shape, width=workload.width, seed=0,
    )  # fmt: skip
    out = model.apply(params, x, None)
    assert torch.equal(plain_module(workload, params)(x), out)
    assert torch.equal(plain_loop.forward(workload, params, x), out)


def test_every_system_draws_the_same_values_in_both_precisions() -> None:
    workload = WORKLOADS["tiny"]
    for draw in (lambda dtype: draw_tasks(workload, dtype=dtype)._asdict(), lambda d: draw_params(workload, dtype=d)):
        single, double = draw(torch.float32), draw(torch.float64)
        assert single.keys() == double.keys()
        assert all(torch.equal(single[k].double(), double[k].double()) for k in single)
    y = draw_tasks(workload).query_y
    assert y.sort(1).values.tolist() == [[0, 0, 1, 1, 2, 2]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("library", throughput.LIBRARIES)
def test_installed_libraries_agree(library: str, tmp_path: Path) -> None:
    path = [str(throughput.SITE), *sys.path]
    if importlib.machinery.PathFinder.find_spec(library, path) is None:
        pytest.skip(f"{library} is not installed: benchmarks/peers/install.sh")
    settings = throughput.Settings((WORKLOADS["tiny"], WORKLOADS["tiny-pool"]), orders=("second", "first"))
    with settings.start(library) as running:
        for case in settings.cases():
            running.ask(do="gradient", out=str(tmp_path / "g"), **settings.request(case))
            options = Options(first_order=case.order == "first")
            expected = arrays(child.meta_gradient("plain", case.workload, options))
            assert throughput.difference(load_file(tmp_path / "g"), expected) < throughput.TOLERANCE


@pytest.mark.usefixtures("_here")
def test_a_system_that_differs_stops_the_timing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nearly(workload: Workload, params: Params, tasks: Tasks, options: Options) -> System:
        return plain_loop.make(
            dataclasses.replace(workload, inner_lr=workload.inner_lr * 1.001), params, tasks, options
        )

    plant(monkeypatch, "learn2learn", nearly)
    plant(monkeypatch, "higher", plain_loop.make)
    out = tmp_path / "speed.json"
    argv = ["--workload", "tiny", "--peers", "learn2learn", "higher", "--threads", "1", "--out", str(out)]
    assert throughput.main(argv) == 1
    said = capsys.readouterr()
    assert "nothing was timed" in said.err and "learn2learn by 0.0" in said.err and "tiny, second order" in said.err
    assert "higher by" not in said.err and "metaft by" not in said.err
    assert said.out == "" and not out.exists()


@pytest.mark.usefixtures("_here")
def test_what_is_timed_must_be_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy(workload: Workload, params: Params, tasks: Tasks, options: Options) -> System:
        made = plain_loop.make(workload, params, tasks, options)
        double = tasks.support_x.dtype == torch.float64
        return made if double else System(lambda: {name: torch.zeros_like(p) for name, p in params.items()})

    plant(monkeypatch, "higher", lazy)
    settings = throughput.Settings((WORKLOADS["tiny"],), peers=("higher",), seconds=0.01)
    with pytest.raises(throughput.Disagreement, match=r"float32 meta-gradient of higher .* off by 1 of its"):
        throughput.run(settings, tmp_path / "speed.json")


@pytest.mark.usefixtures("_here")
@pytest.mark.slow
def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plant(monkeypatch, "learn2learn", plain_loop.make)
    monkeypatch.setitem(sys.modules, "higher", None)  # importing it then fails as if it were not there
    plant(monkeypatch, "torchopt", fails)
    out = tmp_path / "new" / "speed.json"
    argv = ["--workload", "tiny", "--order", "second", "first", "--allocator", "tuned", "--threads", "1"]
    assert throughput.main([*argv, "--bf16", "--seconds", "0.1", "--rounds", "2", "--out", str(out)]) == 0

    results = json.loads(out.read_text(encoding="utf-8"))
    assert results["machine"]["torch"] == torch.__version__ and results["machine"]["cores"] >= 1
    assert results["machine"]["cpu"] and "commit" in results and results["settings"]["rounds"] == 2
    rows = results["rows"]
    assert [(row["workload"], row["order"], row["allocator"]) for row in rows] == [
        ("tiny", "second", "tuned"), ("tiny", "first", "tuned"),
    ]  # fmt: skip
    assert results["ratio_to_best_peer"] == min(row["ratio_to_best_peer"] for row in rows)
    for row in rows:
        systems = row["systems"]
        assert list(systems) == ["metaft", "learn2learn", "higher", "torchopt", "plain", "metaft-bf16"]
        for name in ("metaft", "learn2learn", "plain"):
            timed = systems[name]
            assert timed["ms"]["q1"] <= timed["ms"]["median"] <= timed["ms"]["q3"] and timed["n"] >= 2
            assert timed["tasks_per_second"] == pytest.approx(3000 / timed["ms"]["median"])
            assert timed["float64_difference"] < 1e-12
            # What second derivatives and kinks leave of float32's digits; two functions are 1 apart and more.
            assert 0 <= timed["float32_difference"] < 0.1
            assert timed["in_flight"] == (3 if name == "metaft" else 1)
            assert timed["growth_mib_per_task"] < timed["peak_mib"]
        short = systems["metaft-bf16"]
        assert "float64_difference" not in short and short["n"] >= 2
        assert 1e-3 < short["float32_difference"] < 1, "it is off by what bfloat16 is, and does compute this gradient"
        assert systems["higher"]["status"] == "not installed"
        assert systems["torchopt"] == {"status": "failed", "reason": "RuntimeError: it does not build"}
        # The loop by hand is no library, however fast
        assert row["best_peer"] == "learn2learn"
        medians = [systems[name]["ms"]["median"] for name in ("learn2learn", "metaft")]
        assert row["ratio_to_best_peer"] == pytest.approx(medians[0] / medians[1])
    said = capsys.readouterr().out
    assert "higher              not installed" in said and "failed: RuntimeError: it does not build" in said
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.skipif(os.environ.get("METAFT_FAULTS") != "full", reason="takes half a minute: make test-faults")
@pytest.mark.slow
def test_run_as_a_command(in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes, from another folder."""
    words = ["--workload", "tiny", "--peers", "--allocator", "default", "--threads", "1", "--seconds", "0.1"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *words, "--out", "speed.json"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(process.ROOT / "benchmarks/throughput.py"), run_name="__main__")
    assert done.value.code == 0
    results = json.loads(Path("speed.json").read_text(encoding="utf-8"))
    assert results["rows"][0]["systems"]["metaft"]["status"] == "timed"
    assert results["ratio_to_best_peer"] is None and "no other library was timed" in capsys.readouterr().out


def test_stray_prints_and_deaths_of_a_library(tmp_path: Path) -> None:
    (tmp_path / "higher.py").write_text(
        "import os, signal, torch\n"
        "print('{\"ms\": [0.0]}', flush=True)\n"
        "os.write(1, b'from C\\n')\n"
        "if hasattr(torch, 'seen'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.seen = True\n"
        "raise ImportError('too old')\n",
        encoding="utf-8",
    )
    settings = throughput.Settings((WORKLOADS["tiny"],), site=tmp_path)
    request = settings.request(next(iter(settings.cases())))
    with settings.start("higher") as running:
        with pytest.raises(SystemFailure, match=r"^ImportError: too old$") as failure:
            running.ask(do="gradient", out=str(tmp_path / "g"), **request)
        assert not failure.value.missing
        for _ in range(2):  # a dead process says so, however often it is asked
            with pytest.raises(SystemFailure, match="ended by signal 9: from C"):
                running.ask(do="gradient", out=str(tmp_path / "g"), **request)
        assert running.ended


def test_medians_and_quartiles() -> None:
    ms = [5.0, 1.0, 9.0, 2.0, 40.0, 3.0]
    found = throughput.summary(ms, meta_batch=8)
    q1, median, q3 = statistics.quantiles(ms, n=4, method="inclusive")
    assert found["ms"] == pytest.approx({"q1": q1, "median": median, "q3": q3})
    assert np.median(ms) == found["ms"]["median"]
    assert found["n"] == 6 and found["tasks_per_second"] == pytest.approx(8000 / median)
    assert throughput.summary([2.0], meta_batch=1)["ms"] == {"q1": 2.0, "median": 2.0, "q3": 2.0}


def test_the_ratio_is_to_the_fastest_library() -> None:
    def timed(median: float) -> dict[str, Any]:
        return {"status": "timed", "ms": {"median": median}}

    systems = {"metaft": timed(2.0), "learn2learn": timed(7.0), "higher": timed(5.0), "plain": timed(1.0)}
    assert throughput.ratio(systems) == {"ratio_to_best_peer": 2.5, "best_peer": "higher"}
    assert throughput.ratio({"metaft": timed(2.0), "plain": timed(1.0)})["ratio_to_best_peer"] is None


def test_both_sides_start_with_the_same_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "5")
    default = process.environment(threads=3, allocator="default", site=None)
    assert default["OMP_NUM_THREADS"] == "3" and not any(name.startswith("MALLOC_") for name in default)
    tuned = process.environment(threads=3, allocator="tuned", site=None)
    thresholds = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}
    assert {name for name in tuned if name not in default} == thresholds
    assert all(int(tuned[name]) >= 32 << 20 for name in thresholds)
    peer = process.environment(threads=3, allocator="default", site=tmp_path)
    assert {name for name in peer if peer[name] != default.get(name)} == {"PYTHONPATH"}
    assert str(tmp_path) in peer["PYTHONPATH"].split(os.pathsep)


def test_end_to_end_draws_real_episodes_and_moves_the_parameters(tmp_path: Path) -> None:
    workload = shrunk("omniglot-5w1s-q1", shape=(1, 8, 8))
    params = draw_params(workload)
    options = Options(dataset=f"folder:{write_folder(tmp_path)}")
    made = metaft_end_to_end.make(workload, params, draw_tasks(workload), options)
    try:
        grads = [made.step() for _ in range(3)]
    finally:
        made.close()
    assert not torch.equal(grads[0]["head.bias"], grads[1]["head.bias"])
    assert 0 < made.report()["share_of_sampling"] < 1
    with pytest.raises(MetaftError, match=r"sinusoid has inputs of \(1,\), omniglot-5w1s-q1 takes \(1, 8, 8\)"):
        metaft_end_to_end.make(workload, params, draw_tasks(workload), Options(dataset="sinusoid"))


@pytest.mark.skipif(meters.resident_mib() is None, reason="no /proc here")
@pytest.mark.slow
def test_meters() -> None:
    """In a process of its own: this one has memory from other tests to give out again."""
    code = (
        "import torch; from benchmarks.peers import meters\n"
        "meters.forget_peak()\n"
        "before, elsewhere = meters.resident_mib(), meters.Elsewhere()\n"
        "block = torch.ones(16 << 20)\n"  # 64 MiB, above what an allocator keeps
        "during = meters.resident_mib()\n"
        "del block\n"
        "print(during[0] - before[0], meters.resident_mib()[1] - before[0], elsewhere.cores())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=process.ROOT, check=True)
    growth, peak, cores = done.stdout.split()
    assert 60 < float(growth) < 80 and 60 < float(peak) < 80
    assert cores == "None" or float(cores) >= 0


def test_a_busy_machine_is_named() -> None:
    timed = {**throughput.summary([1.0], 2), "status": "timed", "peak_mib": None, "growth_mib_per_task": None}
    row = {
        "workload": "tiny", "order": "second", "allocator": "default", "protocol": {"meta_batch": 2},
        "ratio_to_best_peer": None, "best_peer": None, "cores_busy_elsewhere": 0.5, "systems": {"metaft": timed},
    }  # fmt: skip
    assert "NOT QUIET: other work kept 0.5 cores busy" in throughput_report.table(row, 1)
    assert "NOT QUIET" not in throughput_report.table({**row, "cores_busy_elsewhere": 0.05}, 1)


def test_a_row_that_lost_digits_is_marked() -> None:
    def system(error: float) -> dict[str, Any]:
        figures = {"status": "timed", "peak_mib": None, "growth_mib_per_task": None, "float64_difference": 1e-15}
        return {**throughput.summary([1.0], 2), **figures, "float32_difference": error}

    def said(metaft: float) -> str:
        systems = {"metaft": system(metaft), **{name: system(e) for name, e in errors.items()}}
        return throughput_report.table({**row, "systems": systems}, 1)

    row = {
        "workload": "tiny", "order": "second", "allocator": "default", "protocol": {"meta_batch": 2},
        "ratio_to_best_peer": None, "best_peer": None, "cores_busy_elsewhere": 0.0,
    }  # fmt: skip
    errors = {"learn2learn": 1e-6, "higher": 2e-6, "plain": 9e-5}
    assert "FEWER DIGITS: metaft's float32 error is 4.0 times the others'" in said(8e-6)
    assert "FEWER DIGITS" in said(float("nan")) and "FEWER DIGITS" not in said(5.9e-6)
    (of_metaft,) = (line for line in said(5.9e-6).splitlines() if line.startswith("  metaft "))
    assert "1.0e-15" in of_metaft and "5.9e-06" in of_metaft


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seconds", "0"], "seconds must be above 0, got 0.0"),
        (["--rounds", "-1"], "rounds must be above 0, got -1"),
        (["--threads", "0"], "threads must be above 0, got 0"),
        (["--out", "speed.txt"], "out must end in .json, got speed.txt"),
    ],
)
def test_bad_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(argv) == 2
    assert capsys.readouterr().err == f"throughput: {message}\n"


def test_a_parameter_without_gradient_is_an_error() -> None:
    workload = WORKLOADS["tiny"]
    params = draw_params(workload)
    module = plain_module(workload, params)
    assert isinstance(module.head, nn.Linear)
    with pytest.raises(RuntimeError, match=r"no gradient for head\.bias"):
        child.whole({name: p for name, p in params.items() if name != "head.bias"}, workload, Options())


@pytest.mark.slow
def test_scaling_writes_every_axis_with_its_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "AXES", {"meta_batch": (2, 4), "threads": (1, 2)})
    out = tmp_path / "scaling.json"
    argv = ["--base", "tiny", "--seconds", "0.01", "--threads", "1", "--engine", "threads", "--out", str(out)]
    assert scaling.main([*argv, "--axis", "meta_batch", "threads"]) == 0
    axes = json.loads(out.read_text())["axes"]
    assert [row["meta_batch"] for row in axes["meta_batch"]] == [2, 4]
    assert [row["threads"] for row in axes["threads"]] == [1]  # not more than were asked for
    one, two = axes["meta_batch"]
    assert two["gflop"] == pytest.approx(2 * one["gflop"])
    assert all(row["floor_ms"] > 0 and row["ms"]["q1"] <= row["ms"]["median"] for row in axes["meta_batch"])
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_ranks_take_turns_and_are_compared_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    def times(workload: Workload, ranks: int, *, seconds: float, engine: str) -> list[float]:
        turns.append(ranks)
        return [60.0 / ranks] * 3

    monkeypatch.setattr(ranked, "times", times)
    out = tmp_path / "ranks.json"
    assert scaling.main(["--base", "tiny", "--seconds", "0.01", "--ranks", "2", "--out", str(out)]) == 0
    assert turns == [1, 2] * scaling.ROUNDS
    one, two = json.loads(out.read_text())["axes"]["ranks"]
    assert (one["ranks"], one["speedup"], one["n"]) == (1, 1.0, 9)
    assert (two["ranks"], two["speedup"], two["tasks_per_second"]) == (2, 2.0, 100.0)


def test_a_rank_times_its_steps(tmp_path: Path) -> None:
    workload = dataclasses.asdict(WORKLOADS["tiny"])
    ranked.work({"workload": workload, "seconds": 0.01, "engine": "threads", "out": str(tmp_path / "times")})
    assert all(ms > 0 for ms in json.loads((tmp_path / "times").read_text()))


def test_the_cost_model_is_its_formulas() -> None:
    network = ranked.Network(latency=1.0, bandwidth=10.0)
    assert [ranked.ring(p, 40.0, network) for p in (1, 2, 4)] == [0.0, 2 * (1 + 2), 6 * (1 + 1)]
    assert [ranked.tree(p, 40.0, network) for p in (1, 2, 5)] == [0.0, 2 * (1 + 4), 2 * (3 + 4)]
    found = scaling.cost_model(WORKLOADS["omniglot-5w1s-q15"])
    assert found.startswith("omniglot-5w1s-q15: 112009 numbers, 448036 bytes")
    table = found.partition("\n\n")[2]
    assert table in (process.ROOT / "docs/performance.md").read_text(encoding="utf-8")


def test_counted_work_is_that_of_the_convolutions() -> None:
    """First order, no steps: a forward pass over the queries and its two gradients, without that of the images."""
    workload = dataclasses.replace(WORKLOADS["tiny"], inner_steps=0)
    queries, width = workload.ways * workload.query_shots, workload.width
    maps, channels = [8, 4, 2, 1], [1, width, width, width]
    layers = [2 * queries * m * m * width * c * 9 for m, c in zip(maps, channels, strict=True)]
    head = 2 * queries * width * workload.ways
    expected = 3 * sum(layers) - layers[0] + 3 * head
    assert scaling.gflop(workload) == pytest.approx(workload.meta_batch * expected / 1e9)


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--out", "x.txt"], "out must end in .json"), (["--seconds", "0"], "seconds must be above 0")],
)
def test_bad_options_of_scaling(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(os.environ.get("METAFT_FAULTS") != "full", reason="takes half a minute: make test-faults")
@pytest.mark.slow
def test_evaluation_times_what_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluation.json"
    argv = ["--workload", "tiny", "--seconds", "0.02", "--rounds", "1", "--threads", "1", "--site", str(tmp_path)]
    assert evaluation.main([*argv, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["algorithm"] for row in rows] == ["maml", "protonet"]
    said = capsys.readouterr().out
    for row in rows:
        assert row["systems"].keys() == evaluation.SYSTEMS[row["algorithm"]].keys()
        for name in row["systems"].keys() - {"learn2learn", "easyfsl"}:
            assert row["systems"][name]["n"] >= 1 and f"| tiny | {row['algorithm']} | {name} |" in said
    found = {"plain": np.array([0.5, 1.0]), "metaft each": np.array([[[0.1, 0.5]], [[0.1, 0.8]]])}
    with pytest.raises(throughput.Disagreement, match="metaft each differ in float64 from the plain loop's in 1 of 2"):
        evaluation.check(WORKLOADS["tiny"], found)
    assert evaluation.main([*argv, "--rounds", "0"]) == 2
    assert "rounds must be above 0, got 0" in capsys.readouterr().err
