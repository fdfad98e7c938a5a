"""The inner loop's optimisers: values as torch.optim's, meta-gradients as autograd and other libraries have them."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import scenarios
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft import algorithms, engines, inner, inner_optim, models, outer
from metaft.errors import MetaftError
from metaft.types import Episode, Params

TORCH: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "nesterov:momentum=0.5": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adam:beta1=0,beta2=0.9,eps=1e-3": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.9), eps=1e-3),
}
every_optimizer = pytest.mark.parametrize("name", sorted(TORCH))
every_order = pytest.mark.parametrize("first_order", [False, True])


def dead_unit() -> nn.Sequential:
    """A network whose second hidden unit is dead for every input: its weights' gradients are exactly 0."""
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    for p in net.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    first = net[0]
    assert isinstance(first, nn.Linear)
    first.bias.data[1] = -100.0
    return net


def regression(tasks: int = 2) -> Episode:
    g = torch.Generator().manual_seed(1)
    x, qx = (torch.randn(tasks, 6, 4, generator=g, dtype=torch.float64) for _ in range(2))
    y, qy = (torch.randn(tasks, 6, 1, generator=g, dtype=torch.float64) for _ in range(2))
    return Episode(x, y, qx, qy, torch.zeros(tasks, 1, dtype=torch.int64), torch.arange(tasks))


def forward(p: Params, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, p["0.weight"], p["0.bias"]).relu(), p["2.weight"], p["2.bias"])


def meta_gradient(data: Episode, *, steps: int = 3, **hyper: Any) -> Params:
    algorithm = algorithms.maml(models.functional(dead_unit()), loss="mse", inner_lr=0.1, inner_steps=steps, **hyper)
    meta, state = algorithm.init(0)
    with engines.engine("threads", threads=1) as engine:
        return outer.meta_gradient(engine, algorithm, meta, state, data).grads


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_torch_optims_step_by_step(name: str, dtype: torch.dtype) -> None:
    net, task = dead_unit().to(dtype), scenarios.one(regression())
    x, y = task.support_x.to(dtype), task.support_y.to(dtype)
    start = {k: p.detach().clone() for k, p in net.named_parameters()}
    found = inner.descend(
        lambda p, step: F.mse_loss(forward(p, x), y), start, steps=6, lr=0.1, optimizer=inner_optim.make(name)
    )
    theirs = TORCH[name](list(net.parameters()))
    next(found)
    for params in found:
        theirs.zero_grad()
        F.mse_loss(net(x), y).backward()
        theirs.step()
        expected = {k: p.detach() for k, p in net.named_parameters()}
        assert scenarios.relative_error(params, expected) < (1e-12 if dtype == torch.float64 else 1e-5)
    assert torch.equal(params["0.weight"][1], start["0.weight"][1]), "the unit is to be dead"


def unrolled(data: Episode, *, name: str, steps: int, first_order: bool) -> Params:
    """The meta-gradient with each optimiser written out once more, over one flat vector and by plain autograd."""
    net = dead_unit()
    shapes = {k: p.shape for k, p in net.named_parameters()}
    flat = torch.cat([p.detach().flatten() for p in net.parameters()]).requires_grad_()

    def named(v: Tensor) -> Params:
        parts = v.split([s.numel() for s in shapes.values()])
        return {k: part.view(s) for (k, s), part in zip(shapes.items(), parts, strict=True)}

    def age(t: int) -> Tensor:
        return torch.arange(t - 1, -1, -1, dtype=torch.float64).unsqueeze(1)

    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(data.key)):
        task = scenarios.one(data, i)
        w, history = flat, []
        for t in range(1, steps + 1):
            loss = F.mse_loss(forward(named(w), task.support_x), task.support_y)
            (g,) = torch.autograd.grad(loss, w, create_graph=True)
            history.append(g.detach() if first_order else g)
            if name == "adam":  # the moments in closed form: weighted sums of all gradients so far
                none = torch.zeros_like(w)
                m = sum((0.1 * 0.9 ** (t - s) * h for s, h in enumerate(history, 1)), none) / (1 - 0.9**t)
                v = sum((0.001 * 0.999 ** (t - s) * h**2 for s, h in enumerate(history, 1)), none) / (1 - 0.999**t)
                alive = v.detach() > 0
                move = torch.zeros_like(w).masked_scatter(alive, m[alive] / (v[alive].sqrt() + 1e-8))
            elif name == "sgd":
                move = history[-1]
            else:
                b = (0.9 ** age(t) * torch.stack(history)).sum(0)
                move = history[-1] + 0.9 * b if name == "nesterov" else b
            w = w - 0.1 * move
        total = total + F.mse_loss(forward(named(w), task.query_x), task.query_y)
    return named(torch.autograd.grad(total / len(data.key), flat)[0])


@every_order
@pytest.mark.parametrize("name", inner_optim.OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_meta_gradient_is_that_of_plain_autograd(name: str, first_order: bool, steps: int) -> None:
    data = regression()
    found = meta_gradient(data, inner_optimizer=name, first_order=first_order, steps=steps)
    expected = unrolled(data, name=name, steps=steps, first_order=first_order)
    assert scenarios.relative_error(found, expected) < 1e-10
    if steps > 1:
        other = unrolled(data, name=name, steps=steps, first_order=not first_order)
        assert scenarios.relative_error(other, expected) > 1e-3


@every_order
def test_momentum_0_is_sgd(first_order: bool) -> None:
    data = regression()
    expected = meta_gradient(data, inner_optimizer="sgd", first_order=first_order)
    for spec in ("momentum:momentum=0", "nesterov:momentum=0"):
        found = meta_gradient(data, inner_optimizer=spec, first_order=first_order)
        assert scenarios.relative_error(found, expected) < 1e-15


def test_adams_meta_gradient_survives_a_dead_unit() -> None:
    found = meta_gradient(regression(), inner_optimizer="adam")
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert float(found["0.weight"][1].abs().max()) == 0
    assert float(found["0.weight"][0].abs().max()) > 0


def test_a_kept_state_and_a_counted_step_go_on_where_they_were() -> None:
    """What Reptile needs: the moments of one task are the next one's first ones, and the count is a tensor."""
    optimizer = inner_optim.adam(beta1=0.0)
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.ones(5))
    theirs = torch.optim.Adam([p], lr=1.0, betas=(0.0, 0.999))
    w, state, count = {"p": p.detach().clone()}, optimizer.init({"p": p}), torch.zeros((), dtype=torch.float64)
    for _ in range(4):
        p.grad = torch.randn(5, generator=g)
        directions, state = optimizer.update({"p": p.grad}, state, count)
        w, count = {"p": w["p"] - directions["p"]}, count + 1
        theirs.step()
        assert directions["p"].dtype == torch.float32
        # Four steps of a rate of 1 and about eight roundings each, of float32's 2^-24: 2e-6.
        torch.testing.assert_close(w["p"], p.detach(), rtol=1e-5, atol=1e-5)


# ---- beside other libraries, where they are installed -------------------------------------------------------------


def peer(library: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Another library, from its own folder METAFT_PEERS if there is one (benchmarks/peers/install.sh)."""
    if "METAFT_PEERS" in os.environ:
        monkeypatch.setattr(sys, "path", [*sys.path, os.environ["METAFT_PEERS"]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they warn of their age
        return pytest.importorskip(library, reason=f"{library} is not installed: benchmarks/peers/install.sh")


def alive(seed: int = 3) -> nn.Sequential:
    """A network without dead units, for libraries whose Adam gives NaN there."""
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=p.dtype)
    return net


def ours(task: Episode, name: str) -> Params:
    algorithm = algorithms.maml(
        models.functional(alive()), loss="mse", inner_lr=0.1, inner_steps=3, inner_optimizer=name
    )
    meta, state = algorithm.init(0)
    with engines.engine("threads", threads=1) as engine:
        return outer.meta_gradient(engine, algorithm, meta, state, Episode(*(t[None] for t in task))).grads


# higher adds eps to the root before its bias is corrected, and TorchOpt raises the betas to powers in float32: at these
# numbers, of which one does not count and the others are exact, all three are the same Adam.
PEERS = ["sgd", "momentum", "nesterov", "adam:beta1=0.5,beta2=0.75,eps=1e-16"]
ADAM: dict[str, Any] = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1e-16}


@pytest.mark.parametrize("name", PEERS)
def test_meta_gradient_is_that_of_higher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    higher = peer("higher", monkeypatch)
    net, task = alive(), scenarios.one(regression())
    theirs = TORCH.get(name, lambda p: torch.optim.Adam(p, **ADAM))(list(net.parameters()))
    with higher.innerloop_ctx(net, theirs, copy_initial_weights=False) as (fast, steps):
        for _ in range(3):
            steps.step(F.mse_loss(fast(task.support_x), task.support_y))
        grads = torch.autograd.grad(F.mse_loss(fast(task.query_x), task.query_y), list(net.parameters()))
    expected = dict(zip(dict(net.named_parameters()), grads, strict=True))
    assert scenarios.relative_error(ours(task, name), expected) < 1e-8


@pytest.mark.parametrize("name", PEERS)
def test_meta_gradient_is_that_of_torchopt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torchopt = peer("torchopt", monkeypatch)
    net, task = alive(), scenarios.one(regression())
    optimizer = {
        "sgd": lambda: torchopt.MetaSGD(net, lr=0.1),
        "momentum": lambda: torchopt.MetaSGD(net, lr=0.1, momentum=0.9),
        "nesterov": lambda: torchopt.MetaSGD(net, lr=0.1, momentum=0.9, nesterov=True),
        "adam": lambda: torchopt.MetaAdam(net, **ADAM),
    }[name.partition(":")[0]]()
    leaves = dict(net.named_parameters())
    for _ in range(3):
        optimizer.step(F.mse_loss(net(task.support_x), task.support_y))
    grads = torch.autograd.grad(F.mse_loss(net(task.query_x), task.query_y), list(leaves.values()))
    assert scenarios.relative_error(ours(task, name), dict(zip(leaves, grads, strict=True))) < 1e-8


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adamm", "no 'adamm', known are sgd, momentum, nesterov, adam; did you mean 'adam'"),
        (
            "adam:beta=1",
            "adam has no 'beta' (given 'adam:beta=1'); it has beta1, beta2, eps; did you mean 'beta",
        ),
        ("adam:beta1=x", "'beta1=x' must be float"),
        ("adam:", None),
        ("sgd:momentum=0.5", "sgd has no 'momentum' (given 'sgd:momentum=0.5'); it has none"),
        ("adam:beta2=1", "beta2 must be at least 0 and below 1, got 1.0"),
        ("adam:eps=0", "eps must be above 0, got 0.0"),
        ("momentum:momentum=-0.1", "momentum must be at least 0 and below 1, got -0.1"),
    ],
)
def test_what_an_optimiser_cannot_be_is_named(spec: str, message: str | None) -> None:
    if message is None:
        inner_optim.make(spec)
        return
    with pytest.raises(MetaftError) as error:
        inner_optim.make(spec)
    assert str(error.value).startswith("inner_optimizer: ") and message in str(error.value)
