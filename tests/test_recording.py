"""What a GPU may not meet while it records a step, and how recording goes about it; no GPU is needed here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import scenarios
import torch
from helpers import settled
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metaft import algorithms, engines
from metaft.algorithms import Algorithm
from metaft.errors import MetaftError, MetaftWarning
from metaft.models.functional import plain_operations
from metaft.models.precision import in_bf16
from metaft.models.recomputed import recomputed as recomputing
from metaft.outer.static import StaticSteps, recorded
from metaft.runs.snapshot import Position, Snapshot

LOOKS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2", "unique_dim"}
"""Operations whose result, or its shape, the host has to wait for."""


class Watch(TorchDispatchMode):
    """Notes the operations that look at values, and those that take a tensor which no operation made.

    Such a tensor is there from before, as parameters are, or was made of numbers of the host, which a GPU would have
    to be sent (`torch.tensor`, `new_tensor`, indexing with a list). `held` keeps all of them from being reused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.looks: set[str] = set()
        self.foreign: dict[int, str] = {}
        self.held: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.__name__.partition(".")[0] in LOOKS:
            self.looks.add(str(func))
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in self.held:
                self.foreign[key] = str(func)
                self.held[key] = leaf
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.held.setdefault(leaf.untyped_storage()._cdata, leaf)
        return out


def found_in(algorithm: Algorithm, **changes: Any) -> set[str]:
    """What a GPU could not record of a member's step, once it is warm."""
    settings = {"ways": 3, "query_shots": 2, "meta_batch": 4, "iterations": 9, "clip_norm": 1.0, "clip_value": 1.0}
    data = scenarios.noise_pool(classes=30, per_class=6).source(ways=3, shots=1, query_shots=2, rotate=True)
    start = Snapshot(*algorithm.init(0), {}, Position(), {})
    with engines.engine("graph", chunk=changes.pop("chunk", None)) as engine, plain_operations():  # as on a GPU
        steps = StaticSteps(settled(**{**settings, **changes}), engine, algorithm, data, start)
        steps._send(0)
        steps._step()
        with Watch() as first:
            steps._step()
        with Watch() as second:
            steps._step()
    brought = [where for key, where in first.foreign.items() if key not in second.foreign]
    return first.looks | {f"a tensor of the host's, in {where}" for where in brought}


@pytest.mark.parametrize("norm", ["transductive", "inductive"])
@pytest.mark.parametrize("name", sorted(algorithms.ALGORITHMS))
def test_no_members_step_looks_at_a_value_or_brings_one(name: str, norm: str) -> None:
    classes = {"classes": 30} if name.startswith("baseline") else {}
    algorithm = algorithms.build(name, scenarios.model("mlp", dtype=torch.float32), {"norm": norm, **classes})
    assert algorithm.static
    assert not found_in(algorithm)


@pytest.mark.parametrize(
    ("name", "hyper", "changes"),
    [
        ("maml", {"inner_optimizer": "adam", "inner_augment": "shift", "inner_steps": 2}, {"chunk": 3}),
        ("maml++", {"step_statistics": True, "inner_steps": 2}, {"outer_optimizer": "sgd"}),
        ("reptile", {"keep_moments": True, "inner_steps": 3, "inner_optimizer": "adam"}, {"outer_schedule": "linear"}),
    ],
)
@pytest.mark.slow
def test_no_option_makes_it_do_so(name: str, hyper: Mapping[str, Any], changes: dict[str, Any]) -> None:
    assert not found_in(algorithms.build(name, scenarios.model("conv4-pool", dtype=torch.float32), hyper), **changes)


@pytest.mark.parametrize("change", [in_bf16, recomputing, lambda model: model])
def test_no_way_of_computing_makes_it_do_so(change: Callable[[Any], Any]) -> None:
    model = scenarios.model(dtype=torch.float32, dropout=0.3)
    assert not found_in(algorithms.build("maml", change(model), {"inner_steps": 2}))


def test_what_may_not_be_in_a_step_is_found() -> None:
    def seeing(look: Callable[[Tensor], Tensor]) -> set[str]:
        algorithm = algorithms.build("reptile", scenarios.model("mlp", dtype=torch.float32), {})
        real = algorithm.task_grad
        assert real is not None

        def task_grad(*given: Any) -> Any:
            found = real(*given)
            return found._replace(metrics={k: look(v) for k, v in found.metrics.items()})

        return found_in(dataclasses.replace(algorithm, task_grad=task_grad))

    assert seeing(lambda v: v * torch.tensor(2.0)) and seeing(lambda v: v + v.new_tensor(1.0))
    assert seeing(lambda v: v.expand(2)[[1]].sum())
    assert not seeing(lambda v: v * 2 + v.new_full((), 1.0))


# ---- recording, with a GPU that only takes notes ------------------------------------------------------------------


class Gpu:
    """Stands for `torch.cuda`: writes down what is asked of it, and for which device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, refuses: Exception | None = None) -> None:
        self.notes: list[str] = []
        self.on, self.refuses = torch.device("cuda:0"), refuses
        gpu = self

        class Stream:
            def __init__(self, name: str = "side") -> None:
                self.name = f"{name} of {gpu.on}"

            def wait_stream(self, other: Stream) -> None:
                gpu.notes.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self) -> None:
                gpu.notes.append("replay")

        @contextlib.contextmanager
        def device(on: torch.device) -> Iterator[None]:
            before, gpu.on = gpu.on, on
            yield
            gpu.on = before

        @contextlib.contextmanager
        def stream(taken: Stream) -> Iterator[None]:
            gpu.notes.append(f"on {taken.name}")
            yield
            gpu.notes.append("off it")

        @contextlib.contextmanager
        def graph(made: Graph) -> Iterator[None]:
            gpu.notes.append(f"capture on {gpu.on}")
            yield
            if gpu.refuses is not None:
                raise gpu.refuses

        fakes = {"Stream": Stream, "CUDAGraph": Graph, "device": device, "stream": stream, "graph": graph}
        fakes["current_stream"] = lambda: Stream("main")
        fakes["synchronize"] = lambda: gpu.notes.append(f"wait for {gpu.on}")
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def step(self) -> None:
        self.notes.append("step")


def test_a_step_is_warmed_up_beside_and_recorded_on_its_own_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = Gpu(monkeypatch)
    replay = recorded(gpu.step, torch.device("cuda:1"))
    assert gpu.on == torch.device("cuda:0")
    main, side = "main of cuda:1", "side of cuda:1"
    warm = [f"{side} waits for {main}", f"on {side}", "step", "step", "step", "off it", f"{main} waits for {side}"]
    assert gpu.notes == [*warm, "wait for cuda:1", "capture on cuda:1", "step"]
    assert "meta-step recorded" in capsys.readouterr().err
    replay()
    assert gpu.notes[-1] == "replay"


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, MetaftError])
def test_what_cannot_be_recorded_runs_as_it_is_and_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    gpu = Gpu(monkeypatch, refuses=error("operation not\tpermitted\nwhen stream is capturing"))
    message = r"^the meta-step cannot be recorded \(operation not permitted\); it runs as it is$"
    with pytest.warns(MetaftWarning, match=message):
        run = recorded(gpu.step, torch.device("cuda:0"))
    run()
    assert gpu.notes[-2:] == ["wait for cuda:0", "step"]
