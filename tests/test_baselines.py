"""Matching networks and the two baselines against their formulas, written again, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scenarios
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft import algorithms, outer
from metaft.algorithms.baseline import CLASSES, fit
from metaft.types import NORMS, Episode, Norm, Params


def adapted(algorithm: algorithms.Algorithm, task: Episode, steps: int) -> Any:
    meta, state = algorithm.init(0)
    ways = task.class_ids.shape[-1]
    return algorithm.adapt(meta, state, task.support_x, task.support_y, task.key, ways=ways, steps=steps)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_matching_nets_probabilities_are_the_attention_on_each_class(scale: float) -> None:
    model = scenarios.model("mlp")
    task = scenarios.one(scenarios.episodes(shots=3))
    member = algorithms.matching_net(model, scale=scale)
    logits = member.predict(adapted(member, task, 0), task.query_x, "transductive").numpy()
    support, query = (model.features(model.params, x, None).numpy() for x in (task.support_x, task.query_x))
    for q, row in zip(query, logits, strict=True):
        weights = [math.exp(scale * (q @ s) / (np.linalg.norm(q) * np.linalg.norm(s))) for s in support]
        for n in range(3):
            mine = sum(w for w, y in zip(weights, task.support_y.tolist(), strict=True) if y == n)
            assert row[n] == pytest.approx(math.log(mine / sum(weights)), rel=1e-12)


def test_matching_nets_attention_survives_a_scale_at_which_probabilities_vanish() -> None:
    """exp(-2000) is 0, and the logarithm of 0 would end the training."""
    member = algorithms.matching_net(scenarios.model(dtype=torch.float32), scale=2000.0)
    data = scenarios.episodes(dtype=torch.float32)
    meta, state = member.init(0)
    with outer.engine("vmap") as engine:
        found = outer.meta_gradient(engine, member, meta, state, data)
    assert math.isfinite(found.metrics["loss"])
    assert all(bool(g.isfinite().all()) for g in found.grads.values())


def pretrained_logits(name: str, meta: Params, features: Tensor) -> Tensor:
    weight = meta[f"head.weight{CLASSES}"]
    if name == "baseline":
        return F.linear(features, weight, meta[f"head.bias{CLASSES}"])
    scale = 2 if len(weight) <= 200 else 10
    return scale * F.cosine_similarity(features.unsqueeze(1), weight.unsqueeze(0), dim=-1)


@pytest.mark.parametrize("classes", [12, 250])
@pytest.mark.parametrize("name", ["baseline", "baseline++"])
def test_pre_training_is_the_cross_entropy_of_all_classes(name: str, classes: int) -> None:
    model, data = scenarios.model(), scenarios.batches()
    member = algorithms.ALGORITHMS[name](model, classes=classes)
    meta, state = member.init(0)
    assert meta[f"head.weight{CLASSES}"].shape == (classes, 4)
    assert {k for k in meta if not k.endswith(CLASSES)} == set(model.params) - {"head.weight", "head.bias"}
    leaves = {k: v.clone().requires_grad_() for k, v in meta.items()}
    eye = {"head.weight": torch.eye(4).double(), "head.bias": torch.zeros(4).double()}
    losses, right = [], []
    for x, y, _ in zip(*data, strict=True):
        logits = pretrained_logits(name, leaves, scenarios.conv4_reference({**leaves, **eye}, x))
        losses.append(F.cross_entropy(logits, y))
        right.append((logits.argmax(1) == y).double().mean())
    torch.stack(losses).mean().backward()
    with outer.engine("threads", threads=1) as engine:
        found = outer.meta_gradient(engine, member, meta, state, data)
    expected = {k: v.grad for k, v in leaves.items() if v.grad is not None}
    assert scenarios.relative_error(found.grads, expected) < 1e-12
    assert found.metrics["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-12)
    assert found.metrics["accuracy"] == pytest.approx(float(torch.stack(right).mean()), rel=1e-12)


class CosineHead(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.cosine_similarity(x.unsqueeze(1), self.weight.unsqueeze(0), dim=-1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["baseline", "baseline++"])
def test_a_tasks_head_is_fitted_by_torchs_sgd_on_features_that_stay(name: str, norm: Norm) -> None:
    model, task = scenarios.model(), scenarios.one(scenarios.episodes())
    recipe = {"inner_lr": 0.3, "momentum": 0.8, "dampening": 0.7, "weight_decay": 0.02}
    member = algorithms.ALGORITHMS[name](model, **recipe)
    fast = adapted(member, task, 7)
    features = model.features(model.params, task.support_x, None)
    head: nn.Module
    if name == "baseline":
        head = nn.Linear(4, 3).double()
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    else:
        mean = features.mean(0)
        head = CosineHead((mean / mean.norm()).repeat(3, 1))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3, momentum=0.8, dampening=0.7, weight_decay=0.02)
    for _ in range(7):
        optimizer.zero_grad()
        F.cross_entropy(head(features), task.support_y).backward()
        optimizer.step()
    for part, expected in head.named_parameters():
        torch.testing.assert_close(fast.params[f"head.{part}"], expected.detach(), rtol=1e-12, atol=1e-14)
    assert all(torch.equal(fast.params[k], model.params[k]) for k in model.params if k not in model.head)
    moments = None if norm == "transductive" else model.measure(model.params, task.support_x)
    expected = head(model.features(model.params, task.query_x, moments)).detach()
    torch.testing.assert_close(member.predict(fast, task.query_x, norm), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dampening", [0.0, 0.9])
def test_the_first_step_is_not_dampened(dampening: float) -> None:
    start = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    *_, once = fit(
        lambda p: (p["w"].square().sum() / 2, ()), start,
        steps=1, lr=0.1, momentum=0.9, dampening=dampening, weight_decay=0.0,
    )  # fmt: skip
    torch.testing.assert_close(once["w"], 0.9 * start["w"])


def test_the_baselines_learn_a_task() -> None:
    """From a random backbone already: the recipe's hundred steps separate classes that have templates."""
    for name in ("baseline", "baseline++"):
        member = algorithms.ALGORITHMS[name](scenarios.model(width=16))
        data = scenarios.episodes(tasks=8, shots=5)
        scores = []
        for i in range(8):
            task = scenarios.one(data, i)
            logits = member.predict(adapted(member, task, 100), task.query_x, "inductive")
            scores.append(float((logits.argmax(1) == task.query_y).double().mean()))
        assert sum(scores) / 8 > 0.6, name


def test_pre_trained_heads_share_no_random_numbers_with_the_backbone() -> None:
    member = algorithms.baseline(scenarios.model(), classes=12)
    first, again, other = (member.init(key)[0][f"head.weight{CLASSES}"] for key in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    plain = torch.empty(12, 4, dtype=torch.float64)
    nn.init.xavier_uniform_(plain, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(first, plain)
