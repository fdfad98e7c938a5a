"""Every engine gives the same numbers; processes give the bits of threads, and leave nothing behind."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import scenarios
import torch
from torch import Tensor

from metaft import algorithms, engines, outer
from metaft.engines import batching, workers
from metaft.errors import MetaftError
from metaft.outer import tuning
from metaft.types import Params

FULL = os.environ.get("METAFT_FAULTS") == "full"
"""Whether what takes minutes is run too (`make test-faults`)."""

needs_fork = pytest.mark.skipif(not workers.available(), reason="this system cannot fork")

ENGINES = [
    ("threads", 2, 1),
    ("threads", 2, 3),
    ("threads", 1, None),
    ("processes", 2, 1),
    ("processes", 2, 3),
    ("processes", 3, None),
    ("vmap", 1, None),
    ("vmap", 1, 3),
]
# What differs between members does not hang on the chunk: one with a remainder is enough for all but one of them.
CASES = [
    pytest.param(
        name, spec, id=f"{name}-{'-'.join(map(str, spec))}", marks=needs_fork if spec[0] == "processes" else ()
    )
    for name in sorted(algorithms.ALGORITHMS)
    for spec in ENGINES
    if name == "maml" or spec[2] == 3
]


def close(found: Params, expected: Params) -> bool:
    scale = max(float(v.abs().max()) for v in expected.values())
    return all(float((found[k] - v).abs().max()) < 1e-10 * scale for k, v in expected.items())


def looped(algorithm: algorithms.Algorithm, meta: Params, data: Any) -> Params:
    """The mean of gradients that plain autograd takes, one task at a time."""
    _, state = algorithm.init(0)
    knobs = algorithm.schedule(0)
    each = [outer.task_grad(algorithm, meta, state, knobs, type(data)(*[v[i] for v in data])).grads for i in range(5)]
    return {k: torch.stack([g[k] for g in each]).mean(0) for k in meta}


@functools.lru_cache(maxsize=4)  # each is asked for by several tests in a row
def looped_once(name: str, model: str, norm: str) -> tuple[algorithms.Algorithm, Any, Params]:
    """A member, its data, and their meta-gradient."""
    algorithm = algorithms.build(name, scenarios.model(model), {"norm": norm})
    data = scenarios.data_for(algorithm, tasks=5)
    return algorithm, data, looped(algorithm, algorithm.init(0)[0], data)


@pytest.mark.parametrize(
    ("model", "norm"),
    [("conv4", "transductive"), ("conv4", "inductive"), ("conv4-pool", "inductive"), ("mlp", "inductive")],
)
@pytest.mark.filterwarnings("ignore::metaft.MetaftWarning")  # iMAML's, of small models' curvature
@pytest.mark.parametrize(("name", "spec"), CASES)
@pytest.mark.slow
def test_engines_agree_in_float64(name: str, model: str, norm: str, spec: tuple[str, int, int | None]) -> None:
    algorithm, data, expected = looped_once(name, model, norm)
    engine_name, threads, chunk = spec
    with engines.engine(engine_name, threads=threads, chunk=chunk) as engine:
        found = outer.meta_gradient(engine, algorithm, *algorithm.init(0), data)
    assert close(found.grads, expected)


@pytest.mark.filterwarnings("ignore::metaft.MetaftWarning")  # iMAML's, of small models' curvature
@pytest.mark.parametrize("name", sorted(algorithms.ALGORITHMS))
@pytest.mark.slow
def test_what_is_traced_to_be_compiled_agrees_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every member's function survives the tracing, which is ours; what is compiled of it is the compiler's."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    agrees_compiled(name, inner_steps=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler itself imports
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["maml", "protonet"] if FULL else ["protonet"])  # maml's takes a minute to compile
def test_compiled_agrees_in_float64(name: str) -> None:
    """With one inner step, which a second derivative goes through already: each more is as long to compile again."""
    agrees_compiled(name, inner_steps=1)


def agrees_compiled(name: str, inner_steps: int) -> None:
    few = {"inner_steps": inner_steps} if "inner_steps" in algorithms.hyper_parameters(name) else {}
    algorithm = algorithms.build(name, scenarios.model("mlp"), few)
    meta, state = algorithm.init(0)
    data = scenarios.data_for(algorithm, tasks=5)
    with engines.engine("compiled") as engine:
        for scale in (1.0, 0.5):  # the second time with other numbers in the compiled function
            scaled = {k: v * scale for k, v in meta.items()}
            found = outer.meta_gradient(engine, algorithm, scaled, state, data)
            assert close(found.grads, looped(algorithm, scaled, data))


SPOILED: list[tuple[Callable[[Tensor], Tensor], set[str]]] = [
    (lambda g: g * (1 + 1e-6), set()),
    (lambda g: g * 1.1, {"float64"}),
    (torch.zeros_like, {"float64", "float32"}),
    (lambda g: -g, {"float64", "float32"}),
    (lambda g: g * 1e3, {"float64", "float32", "coarse"}),
    (lambda g: torch.full_like(g, min(1e288, torch.finfo(g.dtype).max)), {"float64", "float32", "coarse"}),  # seen
    (lambda g: g * math.nan, {"float64", "float32", "coarse"}),
]
"""What befalls a gradient, and in which precision that is no rounding."""


def in_precision(precision: str) -> Any:
    """A toy's gradient, of tensors of which the second has a fifth of the norm, and the last one none."""

    def grad(meta: Params, state: Params, knobs: Params, task: Tensor) -> algorithms.TaskGrad:
        w = (meta["w"] * task).to(torch.bfloat16 if precision == "coarse" else meta["w"].dtype).to(meta["w"].dtype)
        return algorithms.TaskGrad({"w": w, "v": w / 5, "zero": w - w}, {}, {"accuracy": w.sum() - w.sum()})

    return grad


@pytest.mark.parametrize("precision", ["float64", "float32", "coarse"])
@pytest.mark.parametrize(("spoil", "refused"), SPOILED)
@pytest.mark.parametrize("which", [0, 1])
def test_kernels_that_compute_anything_are_refused_and_their_folder_named(
    precision: str, spoil: Any, refused: set[str], which: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As those of another processor do; rounding in the gradient, and anything in a figure, is none of it."""

    def compile(graph: Any, **_: object) -> Any:
        def compiled(*inputs: Tensor) -> list[Tensor]:
            *grads, last, accuracy = graph(*inputs)
            return [*(spoil(g) if i == which else g for i, g in enumerate(grads)), last + 1e-8, accuracy + 1]

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    dtype = torch.float64 if precision == "float64" else torch.float32

    def gradient(scale: float = 1.0) -> None:
        with engines.engine("compiled") as engine:
            tasks = torch.arange(1.0, 4.0, dtype=dtype)[:, None] * scale
            outer.meta_gradient(engine, toy(in_precision(precision)), {"w": torch.ones(4, dtype=dtype)}, {}, tasks)

    if precision in refused:
        with pytest.raises(MetaftError, match=r"^engine: what torch\.compile made is wrong, ") as raised:
            gradient()
        assert f"; empty {tmp_path / 'kernels'}, or set TORCHINDUCTOR_CACHE_DIR to " in str(raised.value)
        assert "\n" not in str(raised.value) and raised.value.status == 2
    else:
        gradient()
    gradient(math.inf)  # that is not finite without compiling either, which the training says in its own words


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("seconds", "waits"), [(60.0, True), (0.05, False)])
def test_a_fork_waits_for_threads_at_work_but_not_for_ever(seconds: float, waits: bool) -> None:
    def at_work() -> bool:
        return any(id_ == thread.native_id and state == "R" for id_, state in workers._threads())

    # Without Python's lock, as matrix products are; a second or so.
    thread = threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"", b"", 2_000_000))
    thread.start()
    while not at_work():
        pass
    assert workers.wait_for_threads(seconds) == waits
    assert at_work() != waits
    thread.join()


@needs_fork
def test_every_fork_waits_for_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(workers, "wait_for_threads", asked.append)
    algorithm = algorithms.maml(scenarios.model(), inner_lr=0.1, inner_steps=1)
    with engines.engine("processes", threads=1) as engine:
        outer.meta_gradient(engine, algorithm, *algorithm.init(0), scenarios.episodes(tasks=2))
    assert len(asked) == 1, "once for all workers"
    assert min(asked) > 0


def test_what_cannot_be_compiled_is_an_error_and_no_traceback() -> None:
    def grad(meta: Params, state: Params, knobs: Params, task: Tensor) -> algorithms.TaskGrad:
        if float(task) > 0:  # depends on the data
            return algorithms.TaskGrad({"w": task}, {}, {})
        return algorithms.TaskGrad({"w": -task}, {}, {})

    with engines.engine("compiled") as engine, pytest.raises(MetaftError, match=r"engine: torch\.compile failed"):
        outer.meta_gradient(engine, toy(grad), {"w": torch.ones(1)}, {}, torch.ones(3, 1))


def toy(grad: Any) -> algorithms.Algorithm:
    return algorithms.Algorithm(
        "toy", lambda key: ({}, {}), None, None, 0, "mse", "transductive", task_grad=grad  # type: ignore[arg-type]
    )  # fmt: skip


@needs_fork
@pytest.mark.parametrize("chunk", [1, 4])
def test_processes_give_the_bits_of_threads_whatever_their_number(chunk: int) -> None:
    algorithm = algorithms.maml(scenarios.model(dtype=torch.float32), inner_lr=0.1, inner_steps=2)
    meta, state = algorithm.init(0)
    data = scenarios.episodes(tasks=10, dtype=torch.float32)
    with engines.engine("threads", threads=1, chunk=chunk) as engine:
        expected = outer.meta_gradient(engine, algorithm, meta, state, data)
    for count in (1, 2, 3):
        with engines.engine("processes", threads=count, chunk=chunk) as engine:
            for _ in range(2):
                found = outer.meta_gradient(engine, algorithm, meta, state, data)
                assert found.metrics == expected.metrics
                assert all(torch.equal(found.grads[k], v) for k, v in expected.grads.items())


@pytest.fixture
def processes() -> Iterator[engines.Processes]:
    if not workers.available():
        pytest.skip("this system cannot fork")
    with engines.engine("processes", threads=2, chunk=2) as engine:
        assert isinstance(engine, engines.Processes)
        yield engine


def scaled(shared: Tensor, task: Tensor) -> Tensor:
    return shared * task


def test_results_of_processes_are_their_own(processes: engines.Processes) -> None:
    """They come out of memory that the next call writes to."""
    tasks = torch.arange(6.0)[:, None]
    first = list(processes.map(scaled, torch.tensor(2.0), tasks))
    total = processes.sum(scaled, torch.tensor(2.0), tasks)
    second = list(processes.map(scaled, torch.tensor(-1.0), tasks[:3]))  # fewer tasks, other numbers
    processes.sum(scaled, torch.tensor(-1.0), tasks)
    assert [float(v) for v in first] == [0, 2, 4, 6, 8, 10]
    assert [float(v) for v in second] == [0, -1, -2]
    assert float(total) == 30
    assert [float(v) for v in processes.map(scaled, torch.tensor(1.0), torch.ones(9, 1))] == [1.0] * 9  # and more


@needs_fork
@pytest.mark.slow
def test_what_derivatives_of_chunks_import_is_there_before_a_fork() -> None:
    """Or each worker would import it for itself. One task at a time goes without."""
    code = """
import sys, torch
from metaft import engines
def known(shared, task):
    return shared + float("torch._dynamo" in sys.modules)
for chunk in (1, 2):
    with engines.engine("processes", threads=2, chunk=chunk) as engine:
        print(float(engine.sum(known, torch.zeros(()), torch.zeros(4))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.0", "4.0"], done.stderr


def test_an_error_in_a_process_reaches_the_caller_and_work_goes_on(processes: engines.Processes) -> None:
    def fail(shared: Tensor, task: Tensor) -> Tensor:
        if int(task) in (3, 5):
            raise MetaftError(f"task {int(task)}")
        return task

    assert len(list(processes.map(fail, torch.zeros(()), torch.zeros(6)))) == 6
    with pytest.raises(MetaftError, match="task 3"):
        list(processes.map(fail, torch.zeros(()), torch.arange(6)))
    assert len(list(processes.map(fail, torch.zeros(()), torch.zeros(6)))) == 6


def test_an_error_in_the_first_call_reaches_the_caller(processes: engines.Processes) -> None:
    class Odd(Exception):
        """Local, so it cannot be pickled."""

    def fail(shared: Tensor, task: Tensor) -> Tensor:
        raise Odd("first")

    with pytest.raises(RuntimeError, match="Odd: first"):
        processes.sum(fail, torch.zeros(()), torch.zeros(4))


def test_a_first_call_computes_each_part_once(processes: engines.Processes, tmp_path: Path) -> None:
    """Nobody computes a part beforehand to learn what results look like."""

    def noted(shared: Tensor, task: Tensor) -> Tensor:
        with open(tmp_path / "log", "a", encoding="utf-8") as log:
            log.write(f"{task.tolist()}\n")
        return torch.cat([task, task]).to(torch.float16)

    ones = torch.ones(4, 3)
    for found in processes.map(noted, torch.zeros(()), ones):
        assert torch.equal(found, torch.ones(6, dtype=torch.float16))
    assert (tmp_path / "log").read_text().splitlines() == ["[1.0, 1.0, 1.0]"] * 4


@pytest.mark.parametrize("bad", [0, 1])
def test_the_first_part_that_fails_in_a_first_call_is_the_one_that_is_said(
    processes: engines.Processes, bad: int
) -> None:
    """Whether it is the work of the first worker, which tells what results look like, or of the other."""

    def fail(shared: Tensor, task: Tensor) -> Tensor:
        if int(task) >= bad:
            raise MetaftError(f"task {int(task)}")
        return task

    with pytest.raises(MetaftError, match=f"task {bad}"):
        list(processes.map(fail, torch.zeros(()), torch.arange(4)))


def test_results_without_a_value_and_of_several_types(processes: engines.Processes) -> None:
    """Each has a place of its own in the memory that they share."""

    def several(shared: Tensor, task: Tensor) -> dict[str, Tensor]:
        return {
            "a": task.to(torch.bool), "b": task.to(torch.bfloat16) / 3, "c": torch.empty(0), "d": task.double() / 3,
        }  # fmt: skip

    tasks = torch.arange(5)
    for _ in range(2):
        for i, found in enumerate(processes.map(several, torch.zeros(()), tasks)):
            expected = several(torch.zeros(()), tasks[i])
            assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in expected.items())


@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)])
def test_a_worker_that_dies_in_a_first_call_is_named(processes: engines.Processes, victims: tuple[int, ...]) -> None:
    """The other one waits to be told where to write; and it ends too."""

    def die(shared: Tensor, task: Tensor) -> Tensor:
        if int(task) in victims:
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    with pytest.raises(MetaftError, match=r"engine: a worker process ended \(signal 9\)"):
        list(processes.map(die, torch.zeros(()), torch.arange(4)))
    assert not multiprocessing.active_children()


OTHER_RESULTS = {
    "type": lambda i: torch.zeros(3, dtype=torch.float64 if i else torch.float32),
    "shape": lambda i: torch.zeros(3 if i else 100_000),
    "one that would spread": lambda i: torch.zeros(1 if i else 3),
    "number": lambda i: [torch.zeros(3)] * (2 if i else 1),
    "name": lambda i: {"a" if i else "b": torch.zeros(3)},
}


@pytest.mark.parametrize("at", [1, 2, None])
@pytest.mark.parametrize("what", OTHER_RESULTS)
def test_results_that_look_different_are_refused(processes: engines.Processes, what: str, at: int | None) -> None:
    """Those of the first worker and of the other, of one worker one after the other, or of the first call and the
    second."""

    def other(shared: Tensor, task: Tensor) -> Any:
        return OTHER_RESULTS[what](int(task))

    tasks = torch.ones(4)
    if at is None:
        list(processes.map(other, torch.zeros(()), torch.zeros(4)))
    else:
        tasks = (torch.arange(4) == at).float()
    with pytest.raises(MetaftError, match=r"engine: results of tasks look different: torch\.float"):
        list(processes.map(other, torch.zeros(()), tasks))


def test_results_that_no_process_can_hand_over_are_named(processes: engines.Processes) -> None:
    class Local(NamedTuple):
        """Which pickle does not find."""

        x: Tensor

    def local(shared: Tensor, task: Tensor) -> Local:
        return Local(task)

    with pytest.raises(MetaftError, match=r"engine: processes cannot hand over such results \(.*Local.*use threads"):
        list(processes.map(local, torch.zeros(()), torch.zeros(4)))


def test_a_worker_keeps_no_file_open_and_its_results_begin_where_vectors_do(processes: engines.Processes) -> None:
    def looked(shared: Tensor, task: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        files = [os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")]
        return torch.zeros(3, dtype=torch.int8), torch.zeros(5), torch.tensor(sum("memfd" in file for file in files))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs Linux's /proc")
    files = [int(one[-1]) for _ in range(2) for one in processes.map(looked, torch.zeros(()), torch.zeros(4))]
    assert files == [files[0]] * 2 + [files[0] + 1] * 6, "from the first results on, that of the mapping alone"
    results = next(iter(processes._workers.values()))._out
    assert results is not None and all(result.data_ptr() % 64 == 0 for result in results)


def test_a_worker_that_dies_is_named(processes: engines.Processes) -> None:
    def die(shared: Tensor, task: Tensor) -> Tensor:
        if int(task):
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    list(processes.map(die, torch.zeros(()), torch.zeros(4)))
    with pytest.raises(MetaftError, match=r"engine: a worker process ended \(signal 9\)"):
        list(processes.map(die, torch.zeros(()), torch.ones(4)))


@pytest.mark.parametrize("victim", [0, 1])
def test_one_worker_of_two_that_dies_is_noticed(processes: engines.Processes, victim: int) -> None:
    """The other one must not keep its pipe open."""
    list(processes.map(scaled, torch.ones(()), torch.ones(4)))
    (workers_,) = processes._workers.values()
    pid = workers_._processes[victim].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(MetaftError, match=r"engine: a worker process ended \(signal 9\)"):
        list(processes.map(scaled, torch.ones(()), torch.ones(4)))
    assert [float(v) for v in processes.map(scaled, torch.ones(()), torch.ones(4))] == [1.0] * 4


def test_answers_to_an_interrupted_call_are_not_taken_for_the_next_ones(processes: engines.Processes) -> None:
    def slow(shared: Tensor, task: Tensor) -> Tensor:
        time.sleep(0.3 * float(shared > 1))
        return shared * task

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    tasks = torch.arange(4.0)
    list(processes.map(slow, torch.ones(()), tasks))
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(processes.map(slow, torch.tensor(2.0), tasks))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for factor in (1.0, -3.0, 0.5):
        assert [float(v) for v in processes.map(slow, torch.tensor(factor), tasks)] == [factor * i for i in range(4)]


def test_shared_tensors_of_another_shape_get_workers_of_their_own(processes: engines.Processes) -> None:
    def total(shared: Tensor, task: Tensor) -> Tensor:
        return shared.sum() * task

    for length in (3, 1, 5):
        assert [float(v) for v in processes.map(total, torch.ones(length), torch.ones(2))] == [length] * 2


def test_a_signal_to_all_processes_is_the_parents_to_answer(processes: engines.Processes) -> None:
    processes.sum(scaled, torch.ones(()), torch.ones(4))
    for each in processes._workers.values():
        for worker in each._processes:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
    assert float(processes.sum(scaled, torch.ones(()), torch.ones(4))) == 4


@needs_fork
@pytest.mark.slow
def test_a_program_that_forgets_to_close_ends_all_the_same() -> None:
    code = (
        "import torch; from metaft import engines\n"
        "def f(s, t): return t\n"
        "print(engines.Processes(2, 1).sum(f, torch.zeros(()), torch.ones(2)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "2." in done.stdout


def children() -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


@needs_fork
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_no_process_is_left() -> None:
    before = children()
    with engines.engine("processes", threads=2) as engine:
        engine.sum(scaled, torch.zeros(()), torch.zeros(4))
        assert len(children() - before) == 2
        for i in range(9):  # functions that come and go do not pile up

            def fresh(shared: Tensor, task: Tensor, i: int = i) -> Tensor:
                return task * i

            engine.sum(fresh, torch.zeros(()), torch.zeros(4))
        assert len(children() - before) <= 2 * 4
    assert children() == before


@needs_fork
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed() -> None:
    code = (
        "import torch, time; from metaft import engines\n"
        "def f(s, t): return t\n"
        "with engines.engine('processes', threads=2, chunk=1) as e:\n"
        "    e.sum(f, torch.zeros(()), torch.zeros(2))\n"
        "    print(*[w.pid for v in e._workers.values() for w in v._processes], flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)


def test_processes_are_refused_on_a_gpu() -> None:
    with (
        pytest.raises(MetaftError, match="engine: processes are for the CPU, not for cuda"),
        engines.engine("processes", device="cuda"),
    ):
        pass


def test_small_tasks_share_calls_and_large_ones_do_not() -> None:
    assert engines.task_chunk(7_840, 32, 2) == 16
    assert engines.task_chunk(62_720, 32, 2) == 8
    assert engines.task_chunk(1_693_440, 4, 2) == 1
    assert engines.task_chunk(7_840, 16, 8) == 2  # no process is left without work
    assert engines.task_chunk(7_840, 1, 8) == 1


def test_tune_tries_engines_and_puts_the_fastest_first() -> None:
    algorithm = algorithms.maml(scenarios.model("mlp"), inner_lr=0.1)
    meta, state = algorithm.init(0)
    found = tuning.tune(
        algorithm, meta, state, scenarios.episodes(tasks=4), convolutional=False, threads=2, seconds=0.02
    )
    assert list(found.values()) == sorted(found.values())
    names = {("threads", 1), ("threads", 2), ("vmap", None)}
    assert set(found) == names | ({("processes", 1), ("processes", 2)} if workers.available() else set())


def scarce(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """A device with memory for `most` tasks at once; returns the sizes that are tried."""
    real, tried = batching.vmapped, []

    def vmapped(fn: Any, shared: Any, tasks: Any) -> Any:
        tried.append(len(tasks.key))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More of that")
        return real(fn, shared, tasks)

    monkeypatch.setattr("metaft.engines.vmap.vmapped", vmapped)
    return tried


@pytest.mark.parametrize(("most", "fits"), [(5, [5]), (4, [3, 2]), (2, [2, 2, 1]), (1, [1, 1, 1, 1, 1])])
def test_a_batch_that_does_not_fit_is_chunked_and_gives_the_same(
    most: int, fits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = algorithms.maml(scenarios.model(), inner_lr=0.1, inner_steps=2)
    meta, state = algorithm.init(0)
    data = scenarios.episodes(tasks=5)
    tried = scarce(monkeypatch, most)
    with engines.engine("graph") as engine:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = outer.meta_gradient(engine, algorithm, meta, state, data)
        note = f"5 tasks at once do not fit into the device's memory; {fits[0]} do"
        assert [str(each.message) for each in said] == ([note] if most < 5 else [])
        assert tried[-len(fits) :] == fits
        tried.clear()
        outer.meta_gradient(engine, algorithm, meta, state, data)
        assert tried == fits, "what fits was forgotten"
        assert len(list(engine.map(lambda shared, task: task.key, (), data))) == 5
    assert close(found.grads, looped(algorithm, meta, data))


def test_a_task_that_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = algorithms.maml(scenarios.model())
    scarce(monkeypatch, 0)
    with (
        engines.engine("vmap") as engine,
        pytest.raises(MetaftError, match=r"^engine: not even one task fits .*\(CUDA out of memory\); try --inner-ch"),
    ):
        outer.meta_gradient(engine, algorithm, *algorithm.init(0), scenarios.episodes(tasks=5))
