"""Engines: the same numbers, the same bits, and nothing left behind."""

from __future__ import annotations

import copy
import threading

import pytest
import scenarios
import torch
from torch import Tensor

from metaft import algorithms, engines, models, outer
from metaft.engines import workers
from metaft.errors import MetaftError
from metaft.types import Params


@pytest.mark.slow
def test_64_tasks_over_two_threads_equal_serial_to_the_bit_twenty_times() -> None:
    """functional_call swaps weights inside a module while it runs: a module shared by threads gives wrong numbers."""
    module = models.Conv4(3, scenarios.SHAPE, width=4)
    before = copy.deepcopy(module.state_dict())
    algorithm = algorithms.maml(models.functional(module), inner_lr=0.1, inner_steps=2, norm="inductive")
    meta, state = algorithm.init(0)
    data = scenarios.episodes(tasks=64, dtype=torch.float32)
    with engines.engine("threads", threads=1) as serial:
        expected = outer.meta_gradient(serial, algorithm, meta, state, data)
    with engines.engine("threads", threads=2) as parallel:
        for _ in range(20):
            found = outer.meta_gradient(parallel, algorithm, meta, state, data)
            assert found.metrics == expected.metrics
            assert all(torch.equal(found.grads[k], expected.grads[k]) for k in meta)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_many_threads_on_one_task_each_see_their_own_weights() -> None:
    model = scenarios.model("mlp")
    x = torch.randn(3, *scenarios.SHAPE, dtype=torch.float64)
    expected = [model.apply({k: p * s for k, p in model.params.items()}, x, None) for s in range(8)]
    wrong: list[int] = []

    def work(s: int) -> None:
        weights = {k: p * s for k, p in model.params.items()}
        wrong.extend(s for _ in range(50) if not torch.equal(model.apply(weights, x, None), expected[s]))

    threads = [threading.Thread(target=work, args=(s,)) for s in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_results_come_in_task_order_and_mean_is_the_mean() -> None:
    def grad(meta: Params, state: Params, knobs: Params, task: Tensor) -> algorithms.TaskGrad:
        return algorithms.TaskGrad({"w": task * meta["w"]}, {"s": task}, {"loss": task.sum()})

    toy = algorithms.Algorithm(
        "toy", lambda key: ({}, {}), None, None, 0, "mse", "transductive", task_grad=grad  # type: ignore[arg-type]
    )  # fmt: skip
    tasks = torch.arange(10, dtype=torch.float64)[:, None]
    for name in ("processes", "threads", "vmap"):
        with engines.engine(name, threads=3, chunk=4) as engine:
            assert [float(t) for t in engine.map(lambda _, t: t.sum(), (), tasks)] == list(range(10))
            if name != "vmap":
                w, s = torch.tensor([2.0]).double(), torch.tensor([1.0]).double()
                result = outer.meta_gradient(engine, toy, {"w": w}, {"s": s, "fixed": s}, tasks)
                assert float(result.grads["w"]) == 9.0
                assert float(result.state["s"]) == 5.5
                assert float(result.state["fixed"]) == 1.0
                assert result.metrics == {"loss": 4.5}
                assert float(w) == 2.0
                assert float(s) == 1.0


def test_engine_puts_back_the_callers_thread_setting() -> None:
    before = torch.get_num_threads()
    with engines.engine("threads", threads=2) as engine:
        counts = engine.map(lambda _, t: torch.tensor(torch.get_num_threads()), (), torch.zeros(4, 1))
        assert [int(count) for count in counts] == [1] * 4
    assert torch.get_num_threads() == before


def test_an_error_inside_a_task_reaches_the_caller() -> None:
    def fail(_: object, task: Tensor) -> Tensor:
        raise RuntimeError(f"task {int(task)}")

    with engines.engine("threads", threads=2) as engine, pytest.raises(RuntimeError, match="task 0"):
        list(engine.map(fail, (), torch.arange(4)))


def test_auto_is_a_fixed_rule() -> None:
    with engines.engine(convolutional=True, device="cpu") as engine:
        assert engine.name == ("processes" if workers.available() else "threads")
    with engines.engine(convolutional=False, device="cpu") as engine:
        assert engine.name == "vmap"
    with engines.engine(convolutional=True, device="cuda") as engine:
        assert engine.name == "graph"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "treads"}, "did you mean 'threads'"),
        ({"name": "threads", "threads": 0}, "threads must be at least 1, got 0"),
        ({"name": "vmap", "chunk": 0}, "task_chunk must be at least 1, got 0"),
    ],
)
def test_engine_settings_are_checked(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(MetaftError, match=message), engines.engine(**kwargs):  # type: ignore[arg-type]
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("norm", ["transductive", "inductive"])
def test_gpu_meta_gradient_equals_the_cpus_in_float64(norm: str) -> None:
    model = scenarios.model()
    data = scenarios.episodes()
    found = {}
    for device in ("cpu", "cuda"):
        placed = models.build(
            "conv4", ways=3, shape=scenarios.SHAPE, width=4, seed=1, device=device, dtype=torch.float64
        )
        algorithm = algorithms.maml(placed, inner_lr=0.1, inner_steps=2, norm=norm)  # type: ignore[arg-type]
        meta = {k: p.to(device) for k, p in model.params.items()}
        there = type(data)(*(t.to(device) for t in data))
        with engines.engine("auto", convolutional=True, device=device) as engine:
            grads = outer.meta_gradient(engine, algorithm, meta, {}, there).grads
        found[device] = {k: g.cpu() for k, g in grads.items()}
    assert scenarios.relative_error(found["cuda"], found["cpu"]) < 1e-10
