"""MAML's numbers against closed forms and independent implementations."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import pytest
import scenarios
import torch
from torch import nn

from metaft import algorithms, engines, models, outer
from metaft.inner import value_and_grad
from metaft.types import Episode, Params


def linear_task(steps: int, lr: float, *, first_order: bool) -> tuple[Params, Params]:
    """(metaft's meta-gradient, the closed form) of linear regression, whose support loss is a quadratic.

    With H = 2/n X'X and the support loss's gradient H w - 2/n X'y, k steps give w_k = w_0 - sum of lr times gradients
    and dw_k/dw_0 = (I - lr H)^k; so the meta-gradient is (I - lr H)^k times the query gradient at w_k.
    """
    g = torch.Generator().manual_seed(3)
    dim, n = 4, 6
    module = nn.Sequential(nn.Linear(dim, 1, bias=False)).double()
    module[0].weight.data = torch.randn(1, dim, generator=g, dtype=torch.float64)
    x, qx = (torch.randn(1, n, dim, generator=g, dtype=torch.float64) for _ in range(2))
    y, qy = (torch.randn(1, n, 1, generator=g, dtype=torch.float64) for _ in range(2))
    algorithm = algorithms.maml(
        models.functional(module), loss="mse", inner_lr=lr, inner_steps=steps, first_order=first_order
    )
    meta, state = algorithm.init(0)
    data = Episode(x, y, qx, qy, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with engines.engine("threads", threads=1) as engine:
        found = outer.meta_gradient(engine, algorithm, meta, state, data).grads

    hessian = 2 / n * x[0].T @ x[0]
    w = module[0].weight.data[0].clone()
    for _ in range(steps):
        w = w - lr * (hessian @ w - 2 / n * x[0].T @ y[0, :, 0])
    query = 2 / n * qx[0].T @ (qx[0] @ w - qy[0, :, 0])
    jacobian = torch.linalg.matrix_power(torch.eye(dim, dtype=torch.float64) - lr * hessian, steps)
    return found, {"0.weight": (query if first_order else jacobian @ query)[None]}


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
@pytest.mark.parametrize("first_order", [False, True])
def test_closed_form_of_a_quadratic(steps: int, first_order: bool) -> None:
    found, expected = linear_task(steps, 0.05, first_order=first_order)
    assert scenarios.relative_error(found, expected) < 1e-12


def test_the_closed_form_tells_first_from_second_order() -> None:
    first, _ = linear_task(2, 0.05, first_order=True)
    second, _ = linear_task(2, 0.05, first_order=False)
    assert scenarios.relative_error(first, second) > 1e-2


@pytest.mark.parametrize("engine_name", ["threads", "vmap"])
@pytest.mark.parametrize(("steps", "first_order"), [(1, False), (3, False), (3, True)])
def test_conv4_against_plain_autograd(engine_name: str, steps: int, first_order: bool) -> None:
    model = scenarios.model()
    data = scenarios.episodes()
    expected = scenarios.maml_reference(
        scenarios.conv4_reference, model.params, data, lr=0.2, steps=steps, first_order=first_order
    )
    algorithm = algorithms.maml(model, inner_lr=0.2, inner_steps=steps, first_order=first_order)
    meta, state = algorithm.init(0)
    with engines.engine(engine_name) as engine:
        found = outer.meta_gradient(engine, algorithm, meta, state, data).grads
    assert scenarios.relative_error(found, expected) < 1e-12


def test_conv4_against_learn2learn() -> None:
    import metaft.support.vision  # noqa: F401 - learn2learn imports torchvision, which this one makes importable

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies warn of their age
        l2l = pytest.importorskip("learn2learn.algorithms", reason="learn2learn is not installed")
    model = scenarios.model()
    data = scenarios.episodes()

    class Reference(nn.Module):
        """Conv-4 as a plain module with PyTorch's batch normalisation."""

        def __init__(self) -> None:
            super().__init__()
            for name, p in model.params.items():
                self.register_parameter(name.replace(".", "_"), nn.Parameter(p.clone()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return scenarios.conv4_reference({k: getattr(self, k.replace(".", "_")) for k in model.params}, x)

    module = Reference()
    maml = l2l.MAML(module, lr=0.2, first_order=False)
    for i in range(len(data.key)):
        task, learner = scenarios.one(data, i), maml.clone()
        for _ in range(2):
            learner.adapt(nn.functional.cross_entropy(learner(task.support_x), task.support_y))
        (nn.functional.cross_entropy(learner(task.query_x), task.query_y) / len(data.key)).backward()
    expected = {k: getattr(module, k.replace(".", "_")).grad for k in model.params}

    algorithm = algorithms.maml(model, inner_lr=0.2, inner_steps=2)
    meta, state = algorithm.init(0)
    with engines.engine("threads") as engine:
        found = outer.meta_gradient(engine, algorithm, meta, state, data).grads
    assert scenarios.relative_error(found, expected) < 1e-10


def test_the_gradient_of_a_mapped_loss_is_right_too() -> None:
    """metaft maps gradients, but its models are anyone's: PyTorch's own batch norm would be wrong here by 1e-3."""
    model = scenarios.model()
    data = scenarios.episodes()
    algorithm = algorithms.maml(model, inner_lr=0.2, inner_steps=2)
    meta, state = algorithm.init(0)
    task_loss = algorithm.task_loss
    assert task_loss is not None

    def mean_loss(meta: Params) -> torch.Tensor:
        return torch.func.vmap(lambda task: task_loss(meta, state, {}, task)[0])(data).mean()

    expected = scenarios.maml_reference(
        scenarios.conv4_reference, model.params, data, lr=0.2, steps=2, first_order=False
    )
    assert scenarios.relative_error(torch.func.grad(mean_loss)(meta), expected) < 1e-12


@pytest.mark.parametrize("change", [{"inner_lr": 0.0, "inner_steps": 3}, {"inner_steps": 0}])
def test_without_inner_steps_the_meta_gradient_is_the_query_gradient(change: dict[str, float]) -> None:
    model = scenarios.model()
    data = scenarios.episodes()
    expected = scenarios.maml_reference(
        scenarios.conv4_reference, model.params, data, lr=0.0, steps=0, first_order=False
    )
    algorithm = algorithms.maml(model, **{"inner_lr": 0.4, **change})  # type: ignore[arg-type]
    meta, state = algorithm.init(0)
    with engines.engine("threads") as engine:
        found = outer.meta_gradient(engine, algorithm, meta, state, data).grads
    assert scenarios.relative_error(found, expected) < 1e-12


def test_norm_parameters_stay_out_of_the_inner_loop_when_told() -> None:
    model = scenarios.model()
    task = scenarios.one(scenarios.episodes())
    for adapt_norm in (True, False):
        algorithm = algorithms.maml(model, inner_lr=0.2, adapt_norm=adapt_norm)
        meta, state = algorithm.init(0)
        fast = algorithm.adapt(meta, state, task.support_x, task.support_y, task.key, ways=3, steps=1).params
        moved = {k for k in meta if not torch.equal(fast[k], meta[k])}
        assert moved == (set(meta) if adapt_norm else set(meta) - set(model.norm))
    assert len(model.norm) == 8


def test_inductive_training_differentiates_through_the_support_moments() -> None:
    """Treating the moments as constants would change the gradient: the test that they are not."""
    model = scenarios.model()
    data = scenarios.episodes(tasks=1)
    task = scenarios.one(data)
    algorithm = algorithms.maml(model, inner_lr=0.1, inner_steps=1, norm="inductive")
    meta, state = algorithm.init(0)
    with engines.engine("threads", threads=1) as engine:
        exact = outer.meta_gradient(engine, algorithm, meta, state, data).grads

    leaves = {k: v.clone().requires_grad_() for k, v in meta.items()}
    fast = algorithm.adapt(leaves, state, task.support_x, task.support_y, task.key, ways=3, steps=1)
    frozen = fast._replace(moments=tuple((m.detach(), v.detach()) for m, v in fast.moments))
    loss = nn.functional.cross_entropy(algorithm.predict(frozen, task.query_x, "inductive"), task.query_y)
    constant = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert scenarios.relative_error(constant, exact) > 1e-2


class Noting(torch.autograd.Function):
    """x, and whether its derivative is recorded."""

    generate_vmap_rule = True
    recorded: ClassVar[list[bool]] = []

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> torch.Tensor:
        Noting.recorded.append(torch.is_grad_enabled())
        return cotangents[0]


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_derivative_is_recorded_only_where_it_is_differentiated(create_graph: bool) -> None:
    """What a recording keeps is twice what the derivative itself needs: a hundred inner steps notice."""

    def gradient(x: torch.Tensor) -> torch.Tensor:
        def loss(params: dict[str, torch.Tensor]) -> tuple[torch.Tensor, tuple[()]]:
            return Noting.apply(params["x"] ** 3).sum(), ()  # type: ignore[reportOptionalMemberAccess]

        value, _, grads = value_and_grad(loss, {"x": x, "unused": x}, create_graph=create_graph)
        return grads["x"] + value + grads["unused"]

    x = torch.rand(3, 2, dtype=torch.float64)
    Noting.recorded.clear()
    found = torch.func.vmap(gradient)(x)
    assert torch.allclose(found, 3 * x**2 + (x**3).sum(1, keepdim=True))
    assert Noting.recorded and set(Noting.recorded) == {create_graph}
