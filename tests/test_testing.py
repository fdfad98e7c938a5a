"""Meta-test: the figures mean what they say."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenarios
import torch
from helpers import Convolutions, pool
from torch import Tensor, nn

from metaft import algorithms, engines, models, testing
from metaft.config import EvaluateConfig, MetaTrainConfig
from metaft.engines import parallel
from metaft.errors import MetaftError
from metaft.metrics import better, figure, mean_ci95, nearest_neighbour
from metaft.testing import meta_test, score_episodes, summarise, task_scores
from metaft.types import NORMS, Fast, Norm


def test_interval_is_the_papers_formula() -> None:
    values = torch.tensor([0.2, 0.4, 0.9, 0.5])
    mean, half = mean_ci95(values)
    assert float(mean) == pytest.approx(0.5)
    assert float(half) == pytest.approx(1.96 * np.std([0.2, 0.4, 0.9, 0.5], ddof=1) / math.sqrt(4))
    assert math.isnan(float(mean_ci95(values[:1])[1]))


def test_by_default_an_interval_is_over_600_tasks_or_more() -> None:
    assert MetaTrainConfig().test.test_episodes >= 600
    assert EvaluateConfig().episode.episodes is None, "as many as the run's own meta-test"


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(600, 2000, generator=generator)
    mean, half = mean_ci95(draws)
    assert 0.93 < float(((mean - 0.5).abs() < half).double().mean()) < 0.97


def test_accuracy_and_its_order() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [5.0, 4.0]])
    assert float(figure("cross_entropy", logits, torch.tensor([0, 1, 1, 0]))) == 0.75
    assert better("cross_entropy", 0.9, 0.8)
    assert not better("cross_entropy", 0.8, 0.8)
    assert better("mse", 0.1, 0.2)
    assert not better("mse", math.nan, 0.2)
    assert better("mse", 0.1, math.nan)


def test_nearest_neighbour_in_pixels() -> None:
    support = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]])
    query = torch.tensor([[[0.1, 0.0]], [[0.9, 1.2]], [[0.2, 0.3]], [[0.0, 0.4]]])
    accuracy = nearest_neighbour(support, torch.tensor([1, 0]), query, torch.tensor([1, 0, 0, 1]))
    assert float(accuracy) == 0.75


@pytest.mark.parametrize("name", ["maml", "protonet"])
@pytest.mark.slow
def test_noise_scores_one_over_ways_in_both_modes(name: str) -> None:
    """A leak of query labels into the adaptation would show as more than chance."""
    source = scenarios.noise_pool().source(ways=4, shots=1, query_shots=4)
    hyper = {"inner_lr": 0.1, "inner_steps": 2} if name == "maml" else {}
    algorithm = algorithms.build(name, scenarios.model(ways=4, dtype=torch.float32), hyper)
    meta, state = algorithm.init(0)
    with engines.engine("threads") as engine:
        result = meta_test(engine, algorithm, meta, state, source, split="test", seed=1, episodes=400, steps=2)
    for mode in ("transductive", "inductive"):
        assert abs(result[mode]["accuracy"] - 0.25) < 1.5 * result[mode]["ci95"], mode
        assert 0 < result[mode]["ci95"] < 0.02
    floor = result["pixel_nearest_neighbour"]
    assert abs(floor["accuracy"] - 0.25) < 1.5 * floor["ci95"]


@pytest.mark.usefixtures("float64_runs")  # so that no logits are as near to each other as their rounding
def test_scores_are_per_task_and_do_not_depend_on_chunks_or_engine() -> None:
    source = scenarios.noise_pool().source(ways=3, shots=1, query_shots=4)
    algorithm = algorithms.maml(scenarios.model(ways=3), inner_lr=0.1)
    meta, state = algorithm.init(0)
    scores = []
    for name, at_once in (("threads", None), ("threads", 5), ("vmap", 32)):
        with engines.engine(name) as engine:
            scores.append(
                score_episodes(
                    engine, algorithm, meta, state, source, split="val", seed=3, episodes=19, steps=3, at_once=at_once
                )
            )
    assert scores[0].shape == (19, 2, 4)
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    for i in (7, 18):
        task = scenarios.one(source.episodes(3, "val", [i]))
        alone = task_scores(algorithm, meta, state, task, ways=3, steps=3)
        assert torch.equal(alone.double(), scores[0][i])


def tanh_model() -> models.Model:
    torch.manual_seed(0)
    shape = math.prod(scenarios.SHAPE)
    return models.functional(nn.Sequential(nn.Flatten(), nn.Linear(shape, 37), nn.Tanh(), nn.Linear(37, 3)))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *[(name, "conv4") for name in ("maml", "maml++", "anil", "protonet", "imaml", "baseline", "unicorn-maml")],
        ("maml", "tanh"),
    ],
)
@pytest.mark.parametrize("size", [8, 5])
def test_bits_of_a_task_do_not_depend_on_how_many_there_are(
    name: str, model: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on threads and chunks. In float32, and by the outputs themselves: accuracies would hide what is lost."""
    monkeypatch.setattr(testing, "figure", lambda loss, outputs, y: outputs.double().square().sum())
    monkeypatch.setattr(parallel, "GROUP", size)
    source = scenarios.noise_pool().source(ways=3, shots=1, query_shots=4)
    made = tanh_model() if model == "tanh" else scenarios.model(ways=3, width=16, dtype=torch.float32)
    algorithm = algorithms.build(name, made, {})
    meta, state = algorithm.init(0)
    found = []
    for threads, at_once, episodes in ((2, None, 21), (1, 7, 21), (3, None, 2), (1, 17, 18)):
        how: Any = {"split": "val", "seed": 3, "episodes": episodes, "steps": 2 if algorithm.inner_steps else 0}
        with engines.engine("threads", threads=threads) as engine:
            assert engine.together(3 * 5 * math.prod(source.shape)) == size
            found.append(score_episodes(engine, algorithm, meta, state, source, at_once=at_once, **how))
    for scores in found[1:]:
        assert torch.equal(scores, found[0][: len(scores)])


@pytest.mark.usefixtures("float64_runs")
@pytest.mark.parametrize("name", ["maml", "reptile"])
def test_tasks_that_adapt_together_have_their_own_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which masks, shifts and orders are drawn."""
    monkeypatch.setattr(testing, "figure", lambda loss, outputs, y: outputs.square().sum())
    source = scenarios.noise_pool().source(ways=3, shots=2, query_shots=2)
    given = {"inner_augment": "shift"} if name == "maml" else {}
    algorithm = algorithms.build(name, scenarios.model(ways=3, dropout=0.5), given)
    meta, state = algorithm.init(0)
    with engines.engine("threads") as engine:
        scores = score_episodes(engine, algorithm, meta, state, source, split="val", seed=3, episodes=9, steps=2)
    for i in range(9):
        task = scenarios.one(source.episodes(3, "val", [i]))
        alone = task_scores(algorithm, meta, state, task, ways=3, steps=2)
        assert torch.allclose(alone, scores[i], rtol=1e-10)


@pytest.mark.usefixtures("float64_runs")
@pytest.mark.parametrize("episodes", [1, 9])
@pytest.mark.parametrize("chunk", [1, None])
def test_steps_of_a_test_are_of_first_order(episodes: int, chunk: int | None) -> None:
    """One by one, and together."""
    model, asked = scenarios.model(ways=3), []

    def loss(*arguments: Any, curvature: bool = False) -> tuple[Tensor, Tensor]:
        asked.append(curvature)
        return model.loss(*arguments, curvature=curvature)

    algorithm = algorithms.maml(dataclasses.replace(model, loss=loss), inner_lr=0.1)
    source = scenarios.noise_pool().source(ways=3, shots=1, query_shots=2)
    meta, state = algorithm.init(0)
    with engines.engine("threads", threads=1, chunk=chunk) as engine:
        score_episodes(engine, algorithm, meta, state, source, split="val", seed=3, episodes=episodes, steps=2)
    assert asked and not any(asked)


@pytest.mark.usefixtures("float64_runs")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in forward mode
def test_forward_mode_sees_the_second_order() -> None:
    """Inside torch.func.jvp gradients are off, and a derivative is taken all the same."""
    algorithm = algorithms.maml(scenarios.model("mlp"), inner_lr=0.3, inner_steps=2)
    task = scenarios.one(scenarios.noise_pool().source(ways=3, shots=1, query_shots=2).episodes(0, "test", [0]))
    meta, state = algorithm.init(0)
    generator = torch.Generator().manual_seed(0)
    way = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in meta.items()}
    assert algorithm.task_loss is not None
    of: Any = algorithm.task_loss

    def value(params: Any) -> Tensor:
        return of(params, state, {}, task)[0]

    grads = torch.func.grad(value)(meta)
    with torch.no_grad():
        both: Any = torch.func.jvp(value, (meta,), (way,))
    assert float(both[1]) == pytest.approx(float(sum((grads[k] * way[k]).sum() for k in meta)), rel=1e-9)


@pytest.mark.usefixtures("float64_runs")
def test_what_an_adaptation_leaves_need_not_be_a_tensor() -> None:
    """A plugin's own member may keep a number, which vmap cannot give back."""
    source = scenarios.noise_pool().source(ways=3, shots=1, query_shots=4)
    algorithm = algorithms.maml(scenarios.model(ways=3), inner_lr=0.1)
    meta, state = algorithm.init(0)

    def adapt(*arguments: Any, **options: Any) -> Fast:
        return algorithm.adapt(*arguments, **options)._replace(extra={"temperature": 2.0})

    def predict(fast: Fast, x: Tensor, norm: Norm) -> Tensor:
        return algorithm.predict(fast, x, norm) / fast.extra["temperature"]

    own = dataclasses.replace(algorithm, adapt=adapt, predict=predict)
    how: Any = {"split": "val", "seed": 3, "episodes": 10, "steps": 2, "each_step": False}
    with engines.engine("threads") as engine:
        found = [score_episodes(engine, member, meta, state, source, **how) for member in (own, algorithm)]
    assert torch.equal(*found)


@pytest.mark.usefixtures("float64_runs")
def test_a_module_that_cannot_be_batched_is_tested_task_by_task() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(math.prod(scenarios.SHAPE), 3)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.head(x.flatten(1))
            return logits if float(logits.detach().sum()) > 0 else 2 * logits

    source = scenarios.noise_pool().source(ways=3, shots=1, query_shots=4)
    algorithm = algorithms.maml(models.functional(Branching().double()), inner_lr=0.1)
    meta, state = algorithm.init(0)
    with engines.engine("threads") as engine:
        scores = score_episodes(engine, algorithm, meta, state, source, split="val", seed=3, episodes=18, steps=2)
    for i in (0, 17):
        task = scenarios.one(source.episodes(3, "val", [i]))
        assert torch.equal(task_scores(algorithm, meta, state, task, ways=3, steps=2).double(), scores[i])


@pytest.mark.parametrize("ways", [2, 4])
def test_tasks_of_other_ways_than_the_head_has_outputs_are_refused(ways: int) -> None:
    data = pool()
    model = models.build("conv4", ways=3, shape=data.shape, width=4, seed=0)
    how: Any = {"split": "test", "seed": 0, "episodes": 2, "steps": 1}
    for name in sorted(algorithms.ALGORITHMS):
        member = algorithms.build(name, model, {"loss": "cross_entropy"})
        start, source = member.init(0), data.source(ways=ways, shots=1, query_shots=1)
        if member.any_ways:
            assert score_episodes(engines.Vmap(), member, *start, source, **how).shape[0] == 2
            continue
        said = f"^ways: {re.escape(name)} learned a head with 3 outputs, and tasks of squares-8 have {ways} classes$"
        with pytest.raises(MetaftError, match=said):
            score_episodes(engines.Vmap(), member, *start, source, **how)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
    ],
)
def test_counts_of_a_test_are_checked(given: dict[str, Any], said: str) -> None:
    data = pool()
    model = models.build("conv4", ways=3, shape=data.shape, width=4, seed=0)
    how: Any = {"split": "test", "seed": 0, "episodes": 2, "steps": 1, **given}
    member, source = algorithms.maml(model), data.source(ways=3, shots=1, query_shots=1)
    with pytest.raises(MetaftError, match=f"^{said}$"):
        meta_test(engines.Vmap(), member, *member.init(0), source, **how)


def test_summary_is_a_mean_over_tasks_of_the_last_step() -> None:
    scores = torch.rand(50, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    summary = summarise(scores, "accuracy")
    assert summary["transductive"]["accuracy"] == pytest.approx(float(scores[:, 0, -1].mean()))
    assert summary["inductive"]["accuracy_per_step"] == pytest.approx(scores[:, 1].mean(0).tolist())
    assert summary["inductive"]["ci95"] == summary["inductive"]["ci95_per_step"][-1]
    assert summary["transductive"]["episodes"] == 50


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
@pytest.mark.slow
def test_evaluation_leaves_memory_flat() -> None:
    """A graph that is kept from one inner step or episode to the next would add about 1 MB per episode here."""
    source = scenarios.noise_pool().source(ways=5, shots=1, query_shots=10)
    model = models.build("conv4", ways=5, shape=scenarios.SHAPE, width=16, seed=0)
    algorithm = algorithms.maml(model, inner_lr=0.1)
    meta, state = algorithm.init(0)

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    with engines.engine("threads", threads=2) as engine:

        def run(episodes: int) -> float:
            score_episodes(engine, algorithm, meta, state, source, split="test", seed=0, episodes=episodes, steps=5)
            return resident()

        run(32)
        before = run(32)
        after = run(96)
    assert after - before < 20


def test_evaluation_keeps_no_graph() -> None:
    source = scenarios.noise_pool().source(ways=3, shots=1, query_shots=2)
    algorithm = algorithms.maml(scenarios.model(ways=3, dtype=torch.float32), inner_lr=0.1)
    meta, state = algorithm.init(0)
    task = scenarios.one(source.episodes(0, "test", [0]))
    with torch.no_grad():
        fast = algorithm.adapt(meta, state, task.support_x, task.support_y, task.key, ways=3, steps=2, trajectory=True)
    assert not any(t.requires_grad for t in fast.params.values())
    seen: list[bool] = []

    def look(fast: Fast, x: Tensor, norm: Norm) -> Tensor:
        logits = algorithm.predict(fast, x, norm)
        seen.append(logits.requires_grad or any(t.requires_grad for t in fast.params.values()))
        return logits

    looked = dataclasses.replace(algorithm, predict=look)
    meta = {name: p.requires_grad_() for name, p in meta.items()}  # as whoever trains may hand them over
    with engines.engine("threads", threads=1, chunk=1) as engine:
        scores = score_episodes(engine, looked, meta, state, source, split="test", seed=0, episodes=2, steps=2)
    assert not scores.requires_grad
    assert seen == [False] * (2 * 2 * 3), "episodes, modes, steps"


@pytest.mark.usefixtures("float64_runs")
@pytest.mark.parametrize("name", ["maml", "anil", "maml++", "protonet", "baseline"])
def test_one_mode_after_the_last_step_is_that_of_the_whole(name: str) -> None:
    source = scenarios.noise_pool().source(ways=3, shots=1, query_shots=4)
    algorithm = algorithms.build(name, scenarios.model(ways=3), {})
    meta, state = algorithm.init(0)
    how: Any = {"split": "val", "seed": 3, "episodes": 6, "steps": algorithm.inner_steps}
    with engines.engine("threads") as engine:
        whole = score_episodes(engine, algorithm, meta, state, source, **how)
        for norms in (NORMS, NORMS[:1], NORMS[1:]):
            last = score_episodes(engine, algorithm, meta, state, source, norms=norms, each_step=False, **how)
            rows = [NORMS.index(norm) for norm in norms]
            assert torch.equal(last, whole[:, rows, -1:])
            assert summarise(last, "accuracy", norms).keys() == set(norms)


@pytest.mark.parametrize("each_step", [True, False])
@pytest.mark.parametrize("name", ["maml", "protonet"])
@pytest.mark.parametrize("architecture", ["conv4", "conv4-pool"])
def test_both_modes_share_the_first_layer_and_are_what_each_is_alone(
    architecture: str, name: str, each_step: bool
) -> None:
    algorithm = algorithms.build(name, scenarios.model(architecture), {})
    task = scenarios.one(scenarios.episodes(), 0)
    convolutions, found = [], []
    for norms in (NORMS, NORMS[:1], NORMS[1:]):
        with torch.no_grad(), Convolutions() as seen:
            scores = task_scores(algorithm, *algorithm.init(0), task, norms=norms, ways=3, steps=2, each_step=each_step)
        convolutions.append(len(seen.types) // 2)
        found.append(scores)
    assert torch.equal(found[0], torch.cat(found[1:]))
    assert convolutions[0] == convolutions[2] + 3 * scores.shape[1], "three of a second mode's four, at each step"


def test_a_test_takes_no_step_that_could_be_differentiated() -> None:
    source = scenarios.noise_pool().source(ways=3, shots=1, query_shots=2)
    model = scenarios.model("conv4", ways=3, dtype=torch.float32)
    curved: list[bool] = []

    def look(*args: Any, curvature: bool = False) -> tuple[Tensor, Tensor]:
        curved.append(curvature)
        return model.loss(*args, curvature=curvature)

    algorithm = algorithms.maml(dataclasses.replace(model, loss=look), inner_lr=0.1, inner_steps=2)
    meta, state = algorithm.init(0)
    task = scenarios.one(source.episodes(0, "test", [0]))
    how: Any = {"ways": 3, "steps": 2}
    algorithm.adapt(meta, state, task.support_x, task.support_y, task.key, **how)
    assert curved == [True, True], "in training"
    with torch.no_grad():
        algorithm.adapt(meta, state, task.support_x, task.support_y, task.key, **how)
    assert curved[2:] == [False, False]


@pytest.mark.usefixtures("float64_runs")
@pytest.mark.parametrize("name", ["maml", "meta-sgd", "imaml", "proto-maml"])
@pytest.mark.parametrize("model", ["conv4", "mlp"])
def test_parameters_that_want_a_gradient_are_tested_as_any_others(name: str, model: str) -> None:
    """As whoever trains by hand has them; nothing is recorded in a test."""
    source = scenarios.noise_pool().source(ways=3, shots=1, query_shots=4)
    algorithm = algorithms.build(name, scenarios.model(model, ways=3), {})
    meta, state = algorithm.init(0)
    wanting = {k: p.clone().requires_grad_() for k, p in meta.items()}
    with engines.engine("threads") as engine:
        found = [
            score_episodes(engine, algorithm, of, state, source, split="val", seed=3, episodes=4, steps=2)
            for of in (meta, wanting)
        ]
    task = scenarios.one(source.episodes(3, "val", [0]))
    with torch.no_grad():
        plain, other = (
            algorithm.adapt(of, state, task.support_x, task.support_y, task.key, ways=3, steps=2).params
            for of in (meta, wanting)
        )
    assert torch.equal(*found)
    assert all(torch.equal(plain[k], other[k]) for k in plain)
