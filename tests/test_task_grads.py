"""Members whose update is not the derivative of a loss: Reptile and iMAML, in float64 against plain autograd."""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
import torch.nn.functional as F
from helpers import images, pool
from torch import Tensor, nn

from metaft import algorithms, engines, models, outer
from metaft.algorithms import Algorithm
from metaft.algorithms.imaml import CURVATURE, conjugate_gradients
from metaft.algorithms.reptile import COUNT
from metaft.errors import MetaftWarning
from metaft.inner import hessian_product, value_and_grad
from metaft.keyed import minibatches
from metaft.meta_train import run
from metaft.models import Model
from metaft.runs.folder import read_rows
from metaft.types import NORMS, Episode, Norm, Params

every_norm = pytest.mark.parametrize("norm", NORMS)


def result(algorithm: Algorithm, data: Episode, state: Params | None = None) -> outer.MetaGradient:
    meta, first = algorithm.init(0)
    with engines.engine("threads", threads=1) as engine:
        return outer.meta_gradient(engine, algorithm, meta, first if state is None else state, data)


def single(data: Episode, i: int = 0) -> Episode:
    """A meta-batch of one task."""
    return Episode(*(t[i : i + 1] for t in data))


# ---- Reptile ------------------------------------------------------------------------------------------------------


def test_reptile_with_one_step_on_everything_has_the_gradient_of_the_data() -> None:
    model, data = scenarios.model(), scenarios.episodes()
    member = algorithms.reptile(model, inner_lr=0.07, inner_steps=1, inner_optimizer="sgd", batch_size=10**6)
    grads = result(member, data).grads
    expected = {k: torch.zeros_like(p) for k, p in model.params.items()}
    for i in range(len(data.key)):
        task = scenarios.one(data, i)
        x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
        g = torch.func.grad(lambda p, x=x, y=y: F.cross_entropy(scenarios.conv4_reference(p, x), y))(model.params)
        expected = {k: expected[k] + g[k] / len(data.key) for k in g}
    assert scenarios.relative_error({k: g / 0.07 for k, g in grads.items()}, expected) < 1e-12


def torch_walk(
    model: Model, task: Episode, make: Callable[[list[Tensor]], Any], *, size: int, steps: int
) -> tuple[Params, list[float], list[float]]:
    """Weights after training with an optimiser of torch's, and each batch's loss and accuracy before its step."""
    x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
    leaves = {k: p.clone().requires_grad_() for k, p in model.params.items()}
    optimizer = make(list(leaves.values()))
    losses, accuracies = [], []
    for rows in minibatches(task.key, len(y), size, steps):
        logits = scenarios.conv4_reference(leaves, x[rows])
        loss = F.cross_entropy(logits, y[rows])
        losses.append(float(loss.detach()))
        accuracies.append(float((logits.argmax(1) == y[rows]).double().mean()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {k: p.detach() for k, p in leaves.items()}, losses, accuracies


@pytest.mark.parametrize("name", ["adam:beta1=0", "sgd", "nesterov"])
def test_reptile_ends_where_torch_does(name: str) -> None:
    model, data = scenarios.model(), single(scenarios.episodes(), 2)
    make: dict[str, Callable[[list[Tensor]], Any]] = {
        "adam:beta1=0": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.999)),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
        "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    }
    fast, losses, accuracies = torch_walk(model, scenarios.one(data), make[name], size=4, steps=6)
    member = algorithms.reptile(model, inner_lr=0.01, inner_steps=6, batch_size=4, inner_optimizer=name)
    found = result(member, data)
    assert scenarios.relative_error(found.grads, {k: p - fast[k] for k, p in model.params.items()}) < 1e-10
    # 15 images are three whole batches of 4; what comes after them has been trained on before.
    assert found.metrics["loss"] == pytest.approx(sum(losses[:3]) / 3, rel=1e-10)
    assert found.metrics["accuracy"] == pytest.approx(sum(accuracies[:3]) / 3, rel=1e-10)


def test_reptile_hands_its_moments_on() -> None:
    """After one task they are torch's; the next one begins with them, and their bias is corrected for all steps."""
    model, data = scenarios.model(), scenarios.episodes()
    member = algorithms.reptile(model, inner_lr=0.01, inner_steps=3, batch_size=5, keep_moments=True)
    state = result(member, single(data)).state
    made: list[torch.optim.Adam] = []

    def adam(leaves: list[Tensor]) -> torch.optim.Adam:
        made.append(torch.optim.Adam(leaves, lr=0.01, betas=(0.0, 0.999)))
        if len(made) > 1:
            for p, old in zip(leaves, made[0].param_groups[0]["params"], strict=True):
                made[-1].state[p] = {k: v.clone() for k, v in made[0].state[old].items()}
        return made[-1]

    torch_walk(model, scenarios.one(data), adam, size=5, steps=3)
    for name, p in zip(model.params, made[0].param_groups[0]["params"], strict=True):
        torch.testing.assert_close(state[f"{name}.v"], made[0].state[p]["exp_avg_sq"], rtol=1e-10, atol=1e-16)
    assert float(state[COUNT]) == 3
    second = single(data, 1)
    fast, _, _ = torch_walk(model, scenarios.one(second), adam, size=5, steps=3)
    found = result(member, second, state)
    assert scenarios.relative_error(found.grads, {k: p - fast[k] for k, p in model.params.items()}) < 1e-10
    fresh = result(member, second).grads
    assert scenarios.relative_error(fresh, found.grads) > 1e-2
    task = scenarios.one(second)  # a test begins with them too, on the support images alone
    alone = task._replace(query_x=task.query_x[:0], query_y=task.query_y[:0])
    fast, _, _ = torch_walk(model, alone, adam, size=5, steps=3)
    args = (task.support_x, task.support_y, task.key)
    kept, new = (member.adapt(model.params, at, *args, ways=3, steps=3).params for at in (state, member.init(0)[1]))
    assert scenarios.relative_error(kept, fast) < 1e-10
    assert scenarios.relative_error(new, fast) > 1e-3
    both = result(member, Episode(*(t[:2] for t in data))).state
    other = result(member, second).state
    for name in both:  # a meta-batch keeps the mean
        torch.testing.assert_close(both[name], (state[name] + other[name]) / 2, rtol=1e-10, atol=1e-16)


def test_reptile_trains_on_the_support_images_alone_at_test() -> None:
    model, task = scenarios.model(), scenarios.one(scenarios.episodes())
    member = algorithms.reptile(model, inner_lr=0.01, inner_optimizer="sgd", batch_size=4)
    meta, state = member.init(0)
    fast = member.adapt(meta, state, task.support_x, task.support_y, task.key, ways=3, steps=4).params
    expected = dict(meta)
    for rows in minibatches(task.key, 6, 4, 4):
        x, y = task.support_x[rows], task.support_y[rows]
        g = torch.func.grad(lambda p, x=x, y=y: F.cross_entropy(scenarios.conv4_reference(p, x), y))(expected)
        expected = {k: p - 0.01 * g[k] for k, p in expected.items()}
    assert scenarios.relative_error(fast, expected) < 1e-12
    other = member.adapt(meta, state, task.support_x, task.support_y, task.key + 1, ways=3, steps=1).params
    first = member.adapt(meta, state, task.support_x, task.support_y, task.key, ways=3, steps=1).params
    assert any(not torch.equal(other[k], first[k]) for k in first), "the key decides about the order"


# ---- iMAML --------------------------------------------------------------------------------------------------------


def tiny() -> tuple[Model, Episode]:
    """98 parameters, so that a Hessian can be written down, and data of the size that they take."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    data = scenarios.episodes(tasks=2)
    small = data._replace(support_x=data.support_x[..., :3, :3], query_x=data.query_x[..., :3, :3])
    return models.functional(models.initialise(module.double(), 3)), small


def flat(params: Params) -> Tensor:
    return torch.cat([p.flatten() for p in params.values()])


def unflat(vector: Tensor, like: Params) -> Params:
    parts = vector.split([p.numel() for p in like.values()])
    return {k: part.view_as(p) for (k, p), part in zip(like.items(), parts, strict=True)}


def hessian(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.func.jacrev(torch.func.grad(loss))  # forward mode makes torch warn of something of its own


def support_loss(model: Model, task: Episode) -> Callable[[Tensor], Tensor]:
    return lambda v: F.cross_entropy(model.apply(unflat(v, model.params), task.support_x, None), task.support_y)


def query_gradient(model: Model, task: Episode, at: Tensor) -> Tensor:
    return torch.func.grad(
        lambda v: F.cross_entropy(model.apply(unflat(v, model.params), task.query_x, None), task.query_y)
    )(at)


def implicit_reference(
    model: Model, data: Episode, *, lr: float, steps: int, strength: float, damping: float = 0.0
) -> tuple[Params, float]:
    """The mean of (I + H / (strength + damping))^-1 grad by a solve, and the smallest eigenvalue of those matrices."""
    start = flat(model.params)
    total, smallest = torch.zeros_like(start), float("inf")
    for i in range(len(data.key)):
        task = scenarios.one(data, i)
        loss = support_loss(model, task)
        fast = start
        for _ in range(steps):
            fast = fast - lr * (torch.func.grad(loss)(fast) + strength * (fast - start))
        matrix = torch.eye(len(start), dtype=start.dtype) + hessian(loss)(fast) / (strength + damping)
        smallest = min(smallest, float(torch.linalg.eigvalsh(matrix)[0]))
        total = total + torch.linalg.solve(matrix, query_gradient(model, task, fast)) / len(data.key)
    return unflat(total, model.params), smallest


@pytest.mark.parametrize("engine", ["threads", "vmap"])
@pytest.mark.parametrize(("strength", "damping"), [(5.0, 0.0), (4.0, 3.0)])
def test_imaml_has_the_explicit_solves_gradient(strength: float, damping: float, engine: str) -> None:
    model, data = tiny()
    hyper: dict[str, Any] = {"strength": strength, "damping": damping}
    expected, smallest = implicit_reference(model, data, lr=0.1, steps=7, **hyper)
    assert 0.3 < smallest < 0.99, "positive definite, and not the identity"
    member = algorithms.imaml(model, inner_lr=0.1, inner_steps=7, cg_steps=60, **hyper)
    meta, state = member.init(0)
    with engines.engine(engine, threads=1) as made:
        found = outer.meta_gradient(made, member, meta, state, data)
    assert scenarios.relative_error(found.grads, expected) < 1e-9
    assert found.metrics[CURVATURE] == 0


def test_imaml_of_more_conjugate_gradients_comes_nearer() -> None:
    model, data = tiny()
    expected, _ = implicit_reference(model, data, lr=0.1, steps=7, strength=5.0)
    errors = [
        scenarios.relative_error(
            result(
                algorithms.imaml(model, inner_lr=0.1, inner_steps=7, strength=5.0, damping=0.0, cg_steps=n), data
            ).grads,
            expected,
        )
        for n in (1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


def test_imamls_distance_to_the_query_gradient_falls_as_one_over_strength() -> None:
    model, data = tiny()
    data = single(data)
    task, start = scenarios.one(data), flat(model.params)
    smooth = float(torch.linalg.eigvalsh(hessian(support_loss(model, task))(start)).abs().max())
    plain = query_gradient(model, task, start)
    distances = []
    for strength in (1e2, 1e3, 1e4, 1e5):
        member = algorithms.imaml(
            model, inner_lr=1 / (strength + smooth), inner_steps=5, strength=strength, damping=0.0, cg_steps=10
        )
        distances.append(float((flat(result(member, data).grads) - plain).norm()))
    for before, after in itertools.pairwise(distances):
        assert before / after == pytest.approx(10, rel=0.1)


@every_norm
def test_imaml_that_cannot_move_has_the_query_gradient_through_the_moments_too(norm: Norm) -> None:
    model, data = scenarios.model(), scenarios.episodes()
    found = result(algorithms.imaml(model, inner_lr=0.0, strength=1e9, norm=norm), data)
    expected = result(algorithms.maml(model, inner_lr=0.0, norm=norm), data)
    assert scenarios.relative_error(found.grads, expected.grads) < 1e-6
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-12)


def test_imaml_says_where_its_problem_has_no_minimum() -> None:
    """Of I + H / strength, also where damping makes what is solved positive definite."""
    model, data = tiny()
    make = functools.partial(algorithms.imaml, model, inner_lr=0.1, inner_steps=3, strength=0.02, cg_steps=60)
    reference = functools.partial(implicit_reference, model, data, lr=0.1, steps=3, strength=0.02)
    assert reference()[1] < 0
    words = r"^imaml: I \+ H / strength is not positive .* more than strength 0.02 .* --hyper strength=0.1 damping=50$"
    with pytest.warns(MetaftWarning, match=words):
        found = result(make(), data)
    assert 0 < found.metrics[CURVATURE] <= 1
    assert all(bool(g.isfinite().all()) for g in found.grads.values())
    expected, smallest = reference(damping=10.0)
    assert smallest > 0
    with pytest.warns(MetaftWarning, match="and damping 10 brings their meta-gradient near the query gradient"):
        damped = result(make(damping=10.0), data)
    assert 0 < damped.metrics[CURVATURE] <= 1
    assert scenarios.relative_error(damped.grads, expected) < 1e-9


def test_imamls_defaults_are_its_papers() -> None:
    """At which batch normalisation is too sharply curved, so that a first run says what to do."""
    known = algorithms.hyper_parameters("imaml")
    assert (known["strength"], known["damping"], known["cg_steps"], known["inner_steps"]) == (2.0, 0.0, 5, 16)
    with pytest.warns(MetaftWarning, match="--hyper strength=0.1 damping=50"):
        result(algorithms.imaml(scenarios.model(), inner_lr=0.01), scenarios.episodes())


@pytest.mark.filterwarnings("ignore:imaml. I . H:metaft.MetaftWarning")
def test_the_share_of_tasks_without_a_minimum_is_in_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whole steps as by eager ones; a row is the mean of its steps."""
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    found: dict[str, list[float]] = {}
    for name, engine, every in (("each", "vmap", 1), ("three", "vmap", 3), ("whole", "graph", 3)):
        hyper = ("strength=0.001", "damping=0")
        run(images(tmp_path / name, algorithm="imaml", hyper=hyper, inner_lr=0.01, inner_steps=2, model="mlp",
                   iterations=6, log_every=every, eval_every=6, engine=engine), dataset=pool())  # fmt: skip
        rows = [row for row in read_rows(tmp_path / name / "metrics.jsonl") if row["kind"] == "train"]
        found[name] = [row[CURVATURE] for row in rows]
    assert all(share in (0, 0.5, 1) for share in found["each"]), "of two tasks"
    assert 0 < sum(found["each"]) < 6, "a scenario in which the steps are not all alike"
    assert found["three"] == [math.fsum(found["each"][i : i + 3]) / 3 for i in (0, 3)]
    assert found["whole"] == found["three"]


def solve(matrix: Tensor, b: list[float], steps: int, damping: float = 0.0) -> tuple[list[float], float]:
    """With I + H of strength 1 as the matrix."""
    h = matrix - torch.eye(len(b), dtype=matrix.dtype)
    x, negative = conjugate_gradients(
        lambda v: {"x": h @ v["x"]}, {"x": torch.tensor(b).double()}, steps, strength=1.0, damping=damping
    )
    return x["x"].tolist(), float(negative)


def test_conjugate_gradients_stop_before_negative_curvature() -> None:
    # The first direction is b = (1, 1), with b.b = 2 and b.Ab = 1 - c.
    matrix = torch.diag(torch.tensor([1.0, -0.5])).double()
    x, negative = solve(matrix, [1.0, 1.0], 5)
    assert negative == 1
    assert x == pytest.approx([4.0, 4.0])  # one step of rr / along = 2 / 0.5
    assert solve(torch.diag(torch.tensor([1.0, -2.0])).double(), [1.0, 1.0], 5) == ([1.0, 1.0], 1)
    positive = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    x, negative = solve(positive, [3.0, 4.0], 9)  # long after the end
    assert (x, negative) == (pytest.approx([1.0, 1.0]), 0)
    assert solve(positive, [0.0, 0.0], 3) == ([0.0, 0.0], 0)
    # Damped by 2, diag(1, -0.5) is diag(1, 0.5), and what was not positive is still said.
    assert solve(matrix, [1.0, 1.0], 9, damping=2.0) == (pytest.approx([1.0, 2.0]), 1)
    assert solve(positive, [3.0, 4.0], 9, damping=2.0)[1] == 0


@pytest.mark.parametrize("name", ["conv4", "mlp"])
def test_products_with_the_hessian(name: str) -> None:
    model, task = scenarios.model(name), scenarios.one(scenarios.episodes())

    def loss(params: Params) -> Tensor:
        return model.loss(params, task.support_x, task.support_y, "cross_entropy", curvature=True)[0]

    g = torch.Generator().manual_seed(1)
    v = {k: torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in model.params.items()}
    product = hessian_product(loss, model.params)
    h = 1e-6
    up, down = (
        value_and_grad(lambda p: (loss(p), ()), {k: p + s * v[k] for k, p in model.params.items()}, create_graph=False)[
            2
        ]
        for s in (h, -h)
    )
    assert scenarios.relative_error(product(v), {k: (up[k] - down[k]) / (2 * h) for k in v}) < 1e-5
    inside = torch.func.vmap(lambda v: hessian_product(loss, model.params)(v))({k: t[None] for k, t in v.items()})
    assert scenarios.relative_error({k: t[0] for k, t in inside.items()}, product(v)) < 1e-12


def test_products_with_the_hessian_of_a_linear_loss_are_zero() -> None:
    params = {"a": torch.ones(3), "b": torch.ones(2)}
    product = hessian_product(lambda p: p["a"].sum() + p["b"].square().sum(), params)(params)
    assert product["a"].tolist() == [0, 0, 0]
    assert product["b"].tolist() == [2, 2]


class Live:
    """Bytes that autograd holds for its backward passes, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        size = tensor.numel() * tensor.element_size()
        held = type("Held", (), {"tensor": tensor.detach()})()
        weakref.finalize(held, self._free, size)
        self.now += size
        self.most = max(self.most, self.now)
        return held

    def _free(self, size: int) -> None:
        self.now -= size


def peak(algorithm: Algorithm, task: Episode) -> int:
    meta, state = algorithm.init(0)
    live = Live()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(live.pack, lambda held: held.tensor):
        outer.task_grad(algorithm, meta, state, {}, task)
    return live.most


@pytest.mark.parametrize("name", ["conv4", "mlp"])
def test_imamls_memory_does_not_grow_with_its_steps(name: str) -> None:
    model, task = scenarios.model(name), scenarios.one(scenarios.episodes())
    few, many = (peak(algorithms.imaml(model, inner_lr=1e-3, strength=300.0, inner_steps=n), task) for n in (5, 50))
    assert few == many > 0
    few, many = (peak(algorithms.maml(model, inner_lr=1e-3, inner_steps=n), task) for n in (5, 50))
    assert many > 8 * few, "a way of measuring that sees memory grow"
