"""Every option of an inner loop in every member that accepts it, in float64 against torch.optim and plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import scenarios
import torch
import torch.nn.functional as F
from test_reductions import contextual_conv4, from_one_row, from_prototypes
from torch import Tensor

from metaft import inner_augment, keyed, outer
from metaft.algorithms import ALGORITHMS, hyper_parameters
from metaft.algorithms.cavia import MAP
from metaft.types import Episode, Params

STEPS, LR = 3, 0.1
HYPER: dict[str, dict[str, Any]] = {
    "cavia": {"context": 3},
    "imaml": {"strength": 2.0},
    "reptile": {"batch_size": 10**6},
}
"""Besides rate and steps. Reptile's batch is all there is: which images it takes is tested in test_task_grads.py."""


def accepting(option: str) -> list[str]:
    return [name for name in ALGORITHMS if option in hyper_parameters(name)]


def adapted(name: str, task: Episode, *, key: int = 9, steps: int = STEPS, p: float = 0.0, **hyper: Any) -> Params:
    """The fast weights of a member."""
    member = ALGORITHMS[name](scenarios.model(dropout=p), inner_lr=LR, **HYPER.get(name, {}), **hyper)
    meta, state = member.init(0)
    own = torch.tensor(key)
    return member.adapt(meta, state, task.support_x, task.support_y, own, ways=3, steps=steps).params


def moves(name: str, params: Params, task: Episode) -> Params:
    """How far fast weights went."""
    start = adapted(name, task, steps=0)
    return {k: v - start[k] for k, v in params.items()}


def descent(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR)


def context_in(meta: Params, context: Tensor) -> Params:
    """CAVIA's fast weights, by the definition of its FiLM."""
    factor, shift = (meta[f"blocks.7.{kind}{MAP}"] @ context for kind in ("weight", "bias"))
    scale = (1 + factor) * meta["blocks.7.weight"]
    return {**meta, "blocks.7.weight": scale, "blocks.7.bias": (1 + factor) * meta["blocks.7.bias"] + shift}


def reference(
    name: str,
    task: Episode,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = descent,
    *,
    key: int = 9,
    drawn: str = "nothing",
    drawn_for: Callable[[int], int] = lambda step: step,
) -> Params:
    """Fast weights by torch.optim on the support loss, written out once more.

    `drawn` is "shifts" of images or dropout "masks", and `drawn_for` says which step's those of a step are.
    """
    model = scenarios.model()
    meta, _ = ALGORITHMS[name](model, **HYPER.get(name, {})).init(0)
    start = {"proto-maml": from_prototypes, "unicorn-maml": from_one_row}.get(name, lambda p, task: p)(meta, task)
    net, names = scenarios.conv4_reference, set(model.params)
    if name == "anil":
        names = set(model.head)
    elif name == "boil":
        names -= set(model.head)
    elif name == "maml++":
        names -= set(model.norm)
    elif name == "cavia":
        net, names = contextual_conv4, {"context"}
        start = {**start, "context": torch.zeros(3, dtype=torch.float64)}
    leaves = {k: start[k].clone().requires_grad_() for k in sorted(names)}
    theirs, own, x = optimizer(list(leaves.values())), torch.tensor(key), task.support_x
    y, eye = task.support_y, {"head.weight": torch.eye(4).double(), "head.bias": torch.zeros(4).double()}
    for step in range(STEPS):
        if name == "reptile":  # in the order of a first pass, which decides about who gets which shift
            rows = keyed.minibatches(own, len(y), len(y), STEPS)[step]
            x, y = task.support_x[rows], task.support_y[rows]
        seen = inner_augment.shift(x, own, drawn_for(step)) if drawn == "shifts" else x
        params = {**start, **leaves}
        features = net({**params, **eye}, seen)
        if drawn == "masks":  # of the only such layer, which stands before the head
            words = keyed.words(own, 1, drawn_for(step), 1, count=features.numel()).view_as(features)
            features = features * (words >= 2**31) / 0.5
        loss = F.cross_entropy(F.linear(features, params["head.weight"], params["head.bias"]), y)
        if name == "imaml":
            loss = loss + sum((p - start[k]).square().sum() for k, p in leaves.items())  # strength / 2 = 1
        theirs.zero_grad()
        loss.backward()
        theirs.step()
    fast = {**start, **{k: p.detach() for k, p in leaves.items()}}
    fast = context_in(fast, fast["context"]) if name == "cavia" else fast
    return {k: fast[k] for k in model.params}


@pytest.mark.parametrize("name", accepting("inner_optimizer"))
def test_the_inner_optimizer_is_torchs(name: str) -> None:
    task = scenarios.one(scenarios.episodes())
    # eps: where a gradient is 0 but for rounding, Adam would make steps of that
    found = moves(name, adapted(name, task, inner_optimizer="adam:beta1=0.5,eps=1e-2"), task)
    adam, sgd = (
        moves(name, reference(name, task, make), task)
        for make in (lambda p: torch.optim.Adam(p, lr=LR, betas=(0.5, 0.999), eps=1e-2), descent)
    )
    assert scenarios.relative_error(found, adam) < 1e-10
    assert scenarios.relative_error(found, sgd) > 1e-2
    if name != "reptile":  # whose own is an Adam
        assert scenarios.relative_error(moves(name, adapted(name, task), task), sgd) < 1e-10


@pytest.mark.parametrize("name", accepting("adapt_norm"))
def test_scales_and_shifts_move_where_asked_to_alone(name: str) -> None:
    task, model = scenarios.one(scenarios.episodes()), scenarios.model()
    free: dict[str, Any] = {"step_norm": False} if name == "maml++" else {}
    far = {on: moves(name, adapted(name, task, adapt_norm=on, **free), task) for on in (True, False)}
    assert all(bool((far[True][k] != 0).any()) for k in model.norm)
    assert not any(bool((far[False][k] != 0).any()) for k in model.norm)
    others = [k for k in model.params if k not in model.norm and bool((far[True][k] != 0).any())]
    assert others and all(bool((far[False][k] != 0).any()) for k in others)


@pytest.mark.parametrize("name", accepting("inner_augment"))
@pytest.mark.parametrize("option", ["shifts", "masks"])
def test_each_step_has_shifts_and_masks_of_its_own(option: str, name: str) -> None:
    """Those that are hashes of (the task's key, the step): not those of the first step, nor of another key."""
    task = scenarios.one(scenarios.episodes())
    hyper: dict[str, Any] = {"inner_augment": "shift"} if option == "shifts" else {"p": 0.5}
    hyper |= {"inner_optimizer": "sgd"}
    found = adapted(name, task, **hyper)
    far = moves(name, found, task)
    here, first = (reference(name, task, drawn=option, drawn_for=step) for step in (lambda s: s, lambda s: 0))
    assert scenarios.relative_error(far, moves(name, here, task)) < 1e-10
    assert scenarios.relative_error(far, moves(name, first, task)) > 1e-3
    again, other = (adapted(name, task, key=key, **hyper) for key in (9, 10))
    assert all(torch.equal(again[k], v) for k, v in found.items())
    assert scenarios.relative_error(moves(name, other, task), far) > 1e-3


@pytest.mark.parametrize("drawn", ["shifts", "masks"])
@pytest.mark.parametrize("name", [k for k in accepting("inner_augment") if k != "reptile"])
def test_training_draws_by_the_tasks_own_key(name: str, drawn: str) -> None:
    """The loss that is learned from is that after the very steps that `adapt` takes with this key."""
    hyper = {**HYPER.get(name, {}), **({"multi_step": 0.0} if name == "maml++" else {})}
    member = ALGORITHMS[name](
        scenarios.model(dropout=0.5 if drawn == "masks" else 0.0), inner_lr=LR, inner_steps=STEPS,
        inner_augment="shift" if drawn == "shifts" else "none", **hyper,
    )  # fmt: skip
    meta, state = member.init(0)
    losses = []
    for key in (9, 10):
        task = scenarios.one(scenarios.episodes())._replace(key=torch.tensor(key))
        fast = member.adapt(meta, state, task.support_x, task.support_y, task.key, ways=3, steps=STEPS)
        expected = F.cross_entropy(member.predict(fast, task.query_x, "transductive"), task.query_y)
        losses.append(float(outer.task_grad(member, meta, state, member.schedule(10**6), task).metrics["loss"]))
        assert losses[-1] == pytest.approx(float(expected), rel=1e-12)
    assert abs(losses[0] - losses[1]) > 1e-6
