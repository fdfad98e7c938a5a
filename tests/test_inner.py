"""Steps that are halved until the loss falls, against the arithmetic of parabolas (float64)."""

from __future__ import annotations

import math

import pytest
import scenarios
import torch
from torch import Tensor

from metaft import algorithms, engines, inner, outer
from metaft.types import Params


def walk(curvature: Tensor, *, lr: float, halvings: int, steps: int = 1, sign: float = 1.0) -> list[float]:
    """Where p is after each step on curvature * p^2 / 2 from p = 1; `sign` -1 walks uphill."""

    def loss(params: Params, step: int) -> Tensor:
        return curvature * params["p"].square() / 2

    def rates(directions: Params, step: int) -> Params:
        return {k: sign * lr * d for k, d in directions.items()}

    states = inner.descend(
        loss, {"p": torch.ones((), dtype=torch.float64)}, steps=steps, lr=rates, first_order=True, halvings=halvings
    )
    return [float(state["p"]) for state in states]


@pytest.mark.parametrize(
    ("lr_times_curvature", "halvings", "share"),
    [(1.9, 3, 1.0), (2.5, 3, 0.5), (10.0, 3, 0.125), (10.0, 9, 0.125), (10.0, 2, 0.0)],
)
def test_a_step_is_halved_until_the_loss_falls(lr_times_curvature: float, halvings: int, share: float) -> None:
    """By share * rate the parabola's p becomes 1 - share * rate * curvature: lower where that is in -1..1."""
    (_, after) = walk(torch.tensor(4.0, dtype=torch.float64), lr=lr_times_curvature / 4, halvings=halvings)
    assert after == pytest.approx(1 - share * lr_times_curvature if share else 1.0, rel=1e-12)


def test_each_step_is_judged_anew_and_none_goes_uphill() -> None:
    curvature = torch.tensor(4.0, dtype=torch.float64)
    assert walk(curvature, lr=2.5, halvings=3, steps=3) == pytest.approx([1.0, -0.25, 0.0625, -0.015625], rel=1e-12)
    assert walk(curvature, lr=0.1, halvings=4, steps=2, sign=-1.0) == [1.0, 1.0, 1.0]


def test_a_gradient_that_is_no_number_is_not_hidden() -> None:
    """Of |p - 1| as a root of 0: the loss is finite, and no share of such a step makes it fall."""

    def loss(params: Params, step: int) -> Tensor:
        return (params["p"] - 1).square().sqrt()

    start = {"p": torch.ones((), dtype=torch.float64)}
    states = list(inner.descend(loss, start, steps=1, lr=0.1, first_order=True, halvings=2))
    assert math.isnan(float(states[-1]["p"]))


def test_a_fall_that_is_too_small_is_none() -> None:
    """At a rate of nearly 2 / curvature the loss falls, but by less than ARMIJO of what the slope promises."""
    just, barely = 2 - inner.ARMIJO, 2 - 3 * inner.ARMIJO  # (1 - r)^2 <= 1 - 2 * ARMIJO * r where r <= 2 - 2 * ARMIJO
    assert walk(torch.tensor(1.0, dtype=torch.float64), lr=just, halvings=1)[1] == pytest.approx(1 - just / 2)
    assert walk(torch.tensor(1.0, dtype=torch.float64), lr=barely, halvings=1)[1] == pytest.approx(1 - barely)
    assert walk(torch.tensor(1.0, dtype=torch.float64), lr=8 * barely, halvings=3)[1] == pytest.approx(1 - barely)


def test_tasks_side_by_side_have_steps_of_their_own() -> None:
    curvatures = torch.tensor([0.5, 4.0, 100.0], dtype=torch.float64)

    def last(curvature: Tensor) -> Tensor:
        start = {"p": torch.ones((), dtype=torch.float64)}
        states = inner.descend(
            lambda params, step: curvature * params["p"].square() / 2, start,
            steps=2, lr=1.0, first_order=True, halvings=3,
        )  # fmt: skip
        return [state["p"] for state in states][-1]

    found = torch.func.vmap(last)(curvatures)
    assert torch.equal(found, torch.stack([last(c) for c in curvatures]))
    assert found.tolist() == [0.25, 0.0, 1.0]


@pytest.mark.filterwarnings("ignore:imaml. I . H:metaft.MetaftWarning")
def test_imaml_with_a_line_search_stays_finite_at_any_rate() -> None:
    """And with a rate at which each step falls by itself it is what it was."""
    model, data = scenarios.model("mlp"), scenarios.episodes()

    def found(lr: float, line_search: int) -> outer.MetaGradient:
        member = algorithms.imaml(model, inner_lr=lr, inner_steps=30, line_search=line_search)
        with engines.engine("vmap") as engine:
            return outer.meta_gradient(engine, member, *member.init(0), data)

    assert not all(bool(g.isfinite().all()) for g in found(50.0, 0).grads.values())
    wild = found(50.0, 12)
    assert all(bool(g.isfinite().all()) for g in wild.grads.values())
    assert math.isfinite(wild.metrics["loss"])
    plain, searched = found(1e-3, 0), found(1e-3, 3)
    assert all(torch.equal(plain.grads[k], searched.grads[k]) for k in plain.grads)
