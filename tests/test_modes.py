"""What a caller did to PyTorch before it calls metaft changes no result, and is as it was afterwards."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import images, pool, sinusoid, write_target
from torch.utils import _pytree as pytree

import metaft
from metaft import adapt, algorithms, evaluate, meta_train, models, origin
from metaft.algorithms import ALGORITHMS
from metaft.config import AdaptConfig, MetaTrainConfig
from metaft.errors import MetaftError
from metaft.runs import assemble
from metaft.tasks import Sinusoid


@contextlib.contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def all_at_once() -> Iterator[None]:
    with float64(), torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "float64": float64,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "meta device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
}


def state() -> tuple[Any, ...]:
    """All of PyTorch's and the generators' that a caller could miss."""
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002
    )


def same(found: Any, expected: Any) -> bool:
    """Bit by bit, types too; no tensor is one of inference mode, with which a caller could not go on."""
    ours, theirs = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    if ours[1] != theirs[1]:
        return False
    for a, b in zip(ours[0], theirs[0], strict=True):
        if isinstance(a, torch.Tensor):
            if a.dtype != b.dtype or a.device != b.device or a.is_inference() or not torch.equal(a.cpu(), b.cpu()):
                return False
        elif a != b and not (a != a and b != b):
            return False
    return True


def under(mode: str, function: Callable[[], Any]) -> Any:
    with {**MODES, **WHOLE}[mode]():
        before = state()
        result = function()
        assert state() == before, "metaft left a mode of its own behind"
    return result


every_mode = pytest.mark.parametrize("mode", sorted(MODES))

WHOLE = {"no_grad": torch.no_grad, "all at once": all_at_once}
"""For what takes long; each mode by itself is tried with what does not."""


def in_python(name: str = "maml", model: str = "conv4", engine: str = "threads") -> Any:
    """All of a small program: source, model, member, meta-gradient and meta-test."""
    source = (Sinusoid() if model == "mlp" else pool()).source(ways=1 if model == "mlp" else 3, shots=2, query_shots=2)
    made = models.build(model, ways=source.ways, shape=source.shape, width=4, seed=0)
    member = algorithms.build(name, made, {"loss": source.loss})
    meta, rest = member.init(0)
    draw = source.episodes if member.data == "episodes" else lambda *a: source.batches(*a, size=6)
    tasks = draw(0, "train", range(2))
    with metaft.engine(engine, threads=1) as mapped:
        gradient = metaft.meta_gradient(mapped, member, meta, rest, tasks)
        test = metaft.meta_test(mapped, member, meta, rest, source, split="test", seed=0, episodes=2, steps=1)
    return meta, rest, tuple(tasks), tuple(gradient), test


@pytest.mark.filterwarnings("ignore::metaft.MetaftWarning")  # iMAML's, of small models' curvature
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_member_is_the_same_in_any_mode(name: str) -> None:
    expected = in_python(name)
    for mode in MODES if name == "maml" else WHOLE:
        assert same(under(mode, lambda: in_python(name)), expected), mode


@pytest.mark.parametrize("engine", ["vmap", "processes"])
@pytest.mark.slow
def test_every_engine_is_the_same_in_any_mode(engine: str) -> None:
    expected = in_python("maml", "mlp", engine)
    for mode in WHOLE:
        assert same(under(mode, lambda: in_python("maml", "mlp", engine)), expected), mode


@every_mode
def test_one_task_adapts_the_same_in_any_mode(mode: str) -> None:
    source = pool().source(ways=3, shots=2, query_shots=2)
    task = metaft.Episode(*(t[0] for t in source.episodes(0, "train", range(1))))

    def adapted() -> Any:
        made = metaft.functional(models.initialise(models.skeleton(made_of), 0))
        maml = algorithms.maml(made, inner_steps=2)
        meta, rest = maml.init(0)
        fast = maml.adapt(meta, rest, task.support_x, task.support_y, task.key, ways=3, steps=2)
        return dict(fast.params), maml.predict(fast, task.query_x, "transductive").detach()

    made_of = {"name": "conv4", "ways": 3, "shape": [1, 8, 8], "width": 4}
    (params, logits), (found, predicted) = adapted(), under(mode, adapted)
    assert same(found, params)
    # Without a graph Conv-4 predicts in one pass, which adds up in another order.
    torch.testing.assert_close(predicted, logits, rtol=1e-5, atol=1e-5)


@every_mode
def test_what_was_drawn_in_a_mode_can_be_trained_on_outside(mode: str) -> None:
    source = pool().source(ways=3, shots=2, query_shots=2)
    with MODES[mode]():
        tasks = source.episodes(0, "train", range(2))
        member = algorithms.maml(models.build("conv4", ways=3, shape=source.shape, width=4, seed=0))
        meta, rest = member.init(0)
    with metaft.engine("vmap") as mapped:
        grads = metaft.meta_gradient(mapped, member, meta, rest, tasks).grads
        found = torch.optim.SGD(meta.values(), lr=0.1)
        for name, p in meta.items():
            p.grad = grads[name]
        found.step()
        assert all(p.isfinite().all() for p in meta.values())


@every_mode
def test_tensors_of_the_callers_own_inference_mode_are_taken(mode: str) -> None:
    source = pool().source(ways=3, shots=2, query_shots=2)
    member = algorithms.maml(models.build("conv4", ways=3, shape=source.shape, width=4, seed=0))
    meta, rest = member.init(0)
    tasks = source.episodes(0, "train", range(2))
    with torch.inference_mode():
        copies = type(tasks)(*(t.clone() for t in tasks))
        theirs = {name: p.clone() for name, p in meta.items()}
    with metaft.engine("threads", threads=1, chunk=1) as mapped, MODES[mode]():
        expected = metaft.meta_gradient(mapped, member, meta, rest, tasks)
        assert same(tuple(metaft.meta_gradient(mapped, member, theirs, rest, copies)), tuple(expected))


def run_of(result: dict[str, Any]) -> dict[str, Any]:
    timed = ("seconds", "tasks_per_second", "run", "init")
    return {k: v for k, v in result.items() if k not in timed}


@pytest.mark.parametrize("mode", sorted(WHOLE))
@pytest.mark.slow
def test_training_and_evaluation_are_the_same_in_any_mode(mode: str, tmp_path: Path) -> None:
    def both(out: Path) -> Any:
        trained = run_of(meta_train.run(sinusoid(out)))
        meta_train.resume_run(out, sinusoid(iterations=9))
        return trained, run_of(evaluate.run(out)), (out / "metrics.jsonl").read_bytes()

    expected = both(tmp_path / "plain")
    assert under(mode, lambda: both(tmp_path / "other")) == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    meta_train.run(images(path, iterations=2, engine="vmap"), dataset=pool())
    return path


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"), {"train": 4, "test": 3})


@pytest.mark.parametrize("mode", sorted(WHOLE))
@pytest.mark.parametrize(("method", "head"), [("finetune", "cosine"), ("inner", None)])
@pytest.mark.slow
def test_adapting_and_predicting_are_the_same_in_any_mode(
    mode: str, method: Any, head: Any, tmp_path: Path, target: Path, trained: Path
) -> None:
    files = sorted((target / "test").rglob("*.png"))

    def both(out: Path) -> Any:
        epochs = 2 if method == "finetune" else None
        adapt.run(
            AdaptConfig(
                init=str(trained), data=f"folder:{target}", method=method, head=head, epochs=epochs,
                device="cpu", out=str(out),
            )
        )  # fmt: skip
        classifier = metaft.load(out)
        pictures = torch.cat([classifier.read(file) for file in files])
        return dict(classifier.state_dict()), classifier.label(files), classifier.probabilities(pictures)

    expected = both(tmp_path / "plain")
    assert same(under(mode, lambda: both(tmp_path / "other")), expected)
    assert same(under(mode, lambda: metaft.load(tmp_path / "plain").label(files)), expected[1])


@pytest.mark.parametrize("on", [True, False])
def test_a_run_begins_without_garbage_collection_and_what_the_caller_had_is_back(
    on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def looked(*args: Any, **kwargs: Any) -> Any:
        seen.append(gc.isenabled())
        raise MetaftError("enough")

    monkeypatch.setattr(origin, "parse", looked)
    monkeypatch.setattr(assemble, "in_full", looked)
    begins = (
        lambda: origin.settings(meta_train.Arguments, MetaTrainConfig, [], prog="it"),
        lambda: assemble.assemble(MetaTrainConfig()),
    )
    try:
        (gc.enable if on else gc.disable)()
        for begin in begins:
            with pytest.raises(MetaftError, match="enough"):
                begin()
            assert gc.isenabled() == on
    finally:
        gc.enable()
    assert seen == [False, False]
