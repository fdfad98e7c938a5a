"""ANIL's features, computed once: when that is, and that nothing else changes, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import scenarios
import torch
from torch import Tensor, nn

from metaft import algorithms, engines, inner_augment, models, outer
from metaft.algorithms import Algorithm
from metaft.algorithms.gradient import by_gradient
from metaft.models import Model
from metaft.models.precision import in_bf16
from metaft.types import NORMS, Episode, Norm, Params

PASSES: list[int] = []
"""Sizes of the batches that any `Net` has seen; a module's copies have nothing else in common."""


class Net(nn.Module):
    """A body, a head, and what may come after it."""

    def __init__(self, end: str = "head") -> None:
        super().__init__()
        if end == "first and tied":
            self.head = nn.Linear(6, 6)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(256, 6), nn.Tanh(), nn.BatchNorm1d(6))
        self.same = nn.Linear(6, 6)
        if end != "first and tied":
            self.head = nn.Linear(6, 6, bias=end != "no bias")
        self.end = end
        if "tied" in end:
            self.same.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        PASSES.append(len(x))
        features = self.same(self.body(x)).relu()
        if self.end == "parts":
            return self.head(features.unflatten(1, (1, 6))).mean(1)
        if self.end == "twice":
            return self.head(self.head(features))
        logits = self.head(input=features) if self.end == "keyword" else self.head(features)
        if self.end == "scaled":
            return logits / 2
        if self.end == "in place":
            logits += 1 + logits.mean(1, keepdim=True)
        return logits


ENDS_IN_ITS_HEAD = ["head", "no bias", "keyword"]
GOES_ON = ["parts", "twice", "scaled", "in place", "tied"]


def test_a_head_whose_name_is_the_first_of_shared_weights() -> None:
    model, data = net("first and tied"), scenarios.episodes(tasks=3, ways=6)
    assert model.of_head(model.params, data.support_x[0]) is None
    hyper: dict[str, Any] = {"inner_lr": 0.3, "inner_steps": 3}
    found, expected = (gradient(member(model, **hyper), data) for member in (algorithms.anil, plainly))
    assert scenarios.relative_error(found, expected) < 1e-12


def test_a_module_whose_result_is_another_layers_is_no_head() -> None:
    """Also where the head comes last of all."""
    layers = nn.ModuleDict({"body": nn.Linear(4, 4), "used": nn.Linear(4, 3), "head": nn.Linear(4, 3)}).double()

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            features = self.layers["body"](x)
            result = self.layers["used"](features)
            self.layers["head"](features)
            return result

    model = models.functional(Beside(), head="layers.head")
    assert model.of_head(model.params, torch.ones(2, 4, dtype=torch.float64)) is None


def net(end: str = "head") -> Model:
    return models.functional(models.initialise(Net(end).double(), 3), head="head")


def plainly(model: Model, **hyper: Any) -> Algorithm:
    """MAML of the head alone: each inner step is taken on the whole model's loss."""
    settings: dict[str, Any] = {"loss": "cross_entropy", "first_order": False, "norm": "transductive", **hyper}
    return by_gradient("plain", model, adapted=model.head, **settings)


def gradient(algorithm: Algorithm, data: Episode, engine: str = "threads") -> Params:
    with engines.engine(engine, threads=1) as mapped:
        return outer.meta_gradient(mapped, algorithm, *algorithm.init(0), data).grads


def passes(member: Algorithm, task: Episode, steps: int) -> int:
    meta, state = member.init(0)
    PASSES.clear()
    member.adapt(meta, state, task.support_x, task.support_y, task.key, ways=6, steps=steps, moments=False)
    assert set(PASSES) == {len(task.support_x)}
    return len(PASSES)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_body_is_run_once_however_many_the_steps(steps: int, first_order: bool) -> None:
    task = scenarios.one(scenarios.episodes(ways=6))
    hyper: dict[str, Any] = {"inner_lr": 0.3, "first_order": first_order}
    assert passes(algorithms.anil(net(), **hyper), task, steps) == 1
    assert passes(plainly(net(), inner_steps=1, **hyper), task, steps) == steps
    for augment in ("shift", inner_augment.shift):
        assert passes(algorithms.anil(net(), inner_augment=augment, **hyper), task, steps) == steps
    PASSES.clear()
    gradient(algorithms.anil(net(), inner_steps=steps, **hyper), scenarios.episodes(tasks=1, ways=6))
    assert PASSES == [12, 18], "a pass over the support set, and one over the queries"


@pytest.mark.parametrize("name", ["conv4", "conv4-pool", "mlp"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "adam:eps=1e-2"])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_gradient_is_that_of_steps_on_the_whole_loss(first_order: bool, optimizer: str, name: str) -> None:
    model, data = scenarios.model(name), scenarios.episodes(tasks=3)
    hyper: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 3, "inner_optimizer": optimizer}
    expected = gradient(plainly(model, **hyper, first_order=first_order), data)
    for engine in ("threads", "vmap"):
        found = gradient(algorithms.anil(model, **hyper, first_order=first_order), data, engine)
        assert scenarios.relative_error(found, expected) < 1e-12
    other = gradient(plainly(model, **hyper, first_order=not first_order), data)
    assert scenarios.relative_error(other, expected) > 1e-4


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("end", [*ENDS_IN_ITS_HEAD, *GOES_ON])
def test_what_follows_the_head_is_not_forgotten(end: str, norm: Norm) -> None:
    model, data = net(end), scenarios.episodes(tasks=3, ways=6)
    assert (model.of_head(model.params, data.support_x[0]) is None) == (end in GOES_ON)
    hyper: dict[str, Any] = {"inner_lr": 0.3, "inner_steps": 3, "norm": norm}
    anil, plain = algorithms.anil(model, **hyper), plainly(model, **hyper)
    assert scenarios.relative_error(gradient(anil, data), gradient(plain, data)) < 1e-12

    def adapted(member: Algorithm) -> Params:  # as a test does it: all steps, and no gradient
        def one(task: Episode) -> Params:
            x, y = task.support_x, task.support_y
            return member.adapt(*member.init(0), x, y, task.key, ways=6, steps=3, trajectory=True).params

        return torch.func.vmap(one)(data)

    found, expected = adapted(anil), adapted(plain)
    assert scenarios.relative_error(found, expected) < 1e-12
    assert not torch.equal(expected[model.head[0]][:, 0], expected[model.head[0]][:, -1])


def test_regression_and_plain_autograd() -> None:
    """Without torch.func, autograd sees the features as a function of the body; so must the meta-gradient."""
    model, g = scenarios.model("mlp"), torch.Generator().manual_seed(0)
    data = scenarios.episodes(tasks=1)
    support_y, query_y = (torch.randn(1, n, 3, generator=g, dtype=torch.float64) for n in (6, 9))
    data = data._replace(support_y=support_y, query_y=query_y)
    hyper: dict[str, Any] = {"loss": "mse", "inner_lr": 0.05, "inner_steps": 4}
    anil = algorithms.anil(model, **hyper)
    expected = gradient(plainly(model, **hyper), data)
    assert scenarios.relative_error(gradient(anil, data), expected) < 1e-12
    leaves = {k: p.clone().requires_grad_() for k, p in model.params.items()}
    assert anil.task_loss is not None
    value = anil.task_loss(leaves, {}, {}, scenarios.one(data))[0]
    plain = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    assert scenarios.relative_error(plain, expected) < 1e-12


def test_steps_that_drop_run_the_whole_model() -> None:
    model, data = scenarios.model(dropout=0.5), scenarios.episodes(tasks=2)
    hyper: dict[str, Any] = {"inner_lr": 0.3, "inner_steps": 3}
    found = gradient(algorithms.anil(model, **hyper), data)
    assert scenarios.relative_error(found, gradient(plainly(model, **hyper), data)) < 1e-12
    without = gradient(algorithms.anil(scenarios.model(), **hyper), data)
    assert scenarios.relative_error(found, without) > 1e-3


def test_a_head_in_bf16_rounds_as_the_model_does() -> None:
    model, x = in_bf16(scenarios.model(dtype=torch.float32)), scenarios.episodes(dtype=torch.float32).support_x[0]
    logits = model.of_head(model.params, x)
    assert logits is not None
    assert torch.equal(logits(model.params), model.apply(model.params, x, None))
    scaled = in_bf16(models.functional(Net("scaled"), head="head"))
    assert scaled.of_head(scaled.params, x) is None
