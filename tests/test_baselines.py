"""Matching networks and the two baselines against their formulas, written again, in float64."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenarios
import torch
import torch.nn.functional as F
from helpers import images, pool
from torch import Tensor, nn

from metaft import algorithms, engines, evaluate, meta_train, outer
from metaft.algorithms.baseline import CLASSES, fit
from metaft.config import EvaluateConfig, MetaTrainConfig, read_toml
from metaft.defaults import resolve
from metaft.errors import MetaftError
from metaft.runs.folder import read_rows
from metaft.runs.snapshot import load_snapshot
from metaft.types import NORMS, Episode, Norm, Params


def adapted(algorithm: algorithms.Algorithm, task: Episode, steps: int) -> Any:
    meta, state = algorithm.init(0)
    ways = task.class_ids.shape[-1]
    return algorithm.adapt(meta, state, task.support_x, task.support_y, task.key, ways=ways, steps=steps)


@pytest.mark.parametrize("scale", [1.0, 10.0, 300.0])
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


def test_classes_of_different_sizes_count_by_their_own_number_of_images() -> None:
    model, task = scenarios.model("mlp"), scenarios.one(scenarios.episodes())
    y = torch.tensor([0, 0, 0, 1, 1, 2])
    task = task._replace(support_y=y)
    support, query = (model.features(model.params, x, None) for x in (task.support_x, task.query_x))
    means = torch.stack([support[:3].sum(0) / 3, support[3:5].sum(0) / 2, support[5]])
    expected = {"prototypes": torch.log_softmax(-torch.cdist(query, means).square(), -1)}
    votes = torch.softmax(F.normalize(query, dim=-1) @ F.normalize(support, dim=-1).T, -1)
    expected["votes"] = torch.stack([votes[:, :3].sum(1), votes[:, 3:5].sum(1), votes[:, 5]], -1).log()
    for member, kind in (
        (algorithms.protonet(model), "prototypes"),
        (algorithms.proto_maml(model), "prototypes"),
        (algorithms.matching_net(model), "votes"),
    ):
        logits = member.predict(adapted(member, task, 0), task.query_x, "transductive")
        torch.testing.assert_close(torch.log_softmax(logits, -1), expected[kind], rtol=0, atol=1e-10)


def test_matching_nets_attention_survives_a_scale_at_which_probabilities_vanish() -> None:
    """exp(-2000) is 0, and the logarithm of 0 would end the training."""
    member = algorithms.matching_net(scenarios.model(dtype=torch.float32), scale=2000.0)
    data = scenarios.episodes(dtype=torch.float32)
    meta, state = member.init(0)
    with engines.engine("vmap") as engine:
        found = outer.meta_gradient(engine, member, meta, state, data)
    assert math.isfinite(found.metrics["loss"])
    assert all(bool(g.isfinite().all()) for g in found.grads.values())


def pretrained_logits(name: str, meta: Params, features: Tensor) -> Tensor:
    weight = meta[f"head.weight{CLASSES}"]
    if name == "baseline":
        return F.linear(features, weight, meta[f"head.bias{CLASSES}"])
    scale = 2 if len(weight) <= 200 else 10
    return scale * F.cosine_similarity(features.unsqueeze(1), weight.unsqueeze(0), dim=-1)


@pytest.mark.parametrize("classes", [12, 200, 201])
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
    with engines.engine("threads", threads=1) as engine:
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


@pytest.mark.parametrize("name", ["baseline", "baseline++"])
def test_pre_trained_heads_share_no_random_numbers_with_the_backbone(name: str) -> None:
    member = algorithms.ALGORITHMS[name](scenarios.model(), classes=12)
    first, again, other = (member.init(key)[0][f"head.weight{CLASSES}"] for key in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    plain = torch.empty(12, 4, dtype=torch.float64)
    nn.init.xavier_uniform_(plain, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(first, plain)


# ---- as runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])


def test_defaults_of_the_baselines() -> None:
    settled = resolve(MetaTrainConfig(algorithm="baseline++"), pool())
    assert (
        settled.outer.outer_lr,
        settled.test.test_inner_steps,
        settled.inner.inner_lr,
        settled.inner.inner_steps,
    ) == (
        1e-3,
        100,
        0.01,
        None,
    )
    assert settled.inner.hyper == ("classes=6",)
    own = MetaTrainConfig(algorithm="baseline", hyper=("momentum=0.5",), test_inner_steps=7)
    settled = resolve(own, pool())
    assert (settled.inner.hyper, settled.test.test_inner_steps) == (("momentum=0.5", "classes=6"), 7)


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("name", ["baseline", "baseline++"])
def test_a_run_knows_its_number_of_classes_wherever_it_goes_on(name: str, tmp_path: Path) -> None:
    path, squares = tmp_path / "run", pool()
    own = {"algorithm": name, "hyper": ("momentum=0.5",), "test_inner_steps": 3}
    whole = meta_train.run(images(tmp_path / "whole", **own), dataset=squares)
    short = images(path, iterations=2, outer_schedule="constant", **own)
    meta_train.run(short, dataset=squares)
    assert read_toml(path / "config.toml")["hyper"] == ["momentum=0.5", "classes=6"]
    more = dataclasses.replace(short, iterations=5)
    resumed = meta_train.resume_run(path, more, dataset=squares)
    assert load_snapshot(path / "checkpoints/last.safetensors").meta[f"head.weight{CLASSES}"].shape == (6, 4)
    assert (resumed["iterations"], len(resumed["test"]["inductive"]["accuracy_per_step"])) == (5, 4)
    rows = [row for row in read_rows(tmp_path / "whole/metrics.jsonl") if row["kind"] == "train"]
    assert all(0 <= row["accuracy"] <= 1 and row["loss"] > 0 for row in rows)
    again = evaluate.run(tmp_path / "whole", dataset=squares)
    assert again["test"]["inductive"] == whole["test"]["inductive"]
    with pytest.raises(MetaftError, match="hyper: a resumed run keeps its settings"):
        meta_train.resume_run(path, dataclasses.replace(more, hyper=("momentum=0.6",)), dataset=squares)
    # Another data set has another number of classes to train on, and a task may have any number.
    splits = {"train": np.arange(2), "val": np.arange(2, 4), "test": np.arange(4, 14)}
    other = dataclasses.replace(squares, splits=splits, name="others")
    config = EvaluateConfig(dataset="others", ways=7, inner_steps=5, out=str(tmp_path / "e.json"))
    evaluate.run(path, config, dataset=other)
    test = json.loads((tmp_path / "e.json").read_text())["test"]
    assert (test["ways"], test["inner_steps"]) == (7, 5)


def test_fewer_outputs_than_classes_are_refused(tmp_path: Path) -> None:
    config = images(tmp_path / "run", algorithm="baseline", hyper=("classes=5",))
    with pytest.raises(MetaftError, match=r"hyper: classes=5 are fewer than the 6 that squares-8 has to train on"):
        meta_train.run(config, dataset=pool())
    assert not (tmp_path / "run").exists()
