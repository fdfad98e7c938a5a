"""Differentiable optimisers of the inner loop: pure functions, whose state is a value that they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metaft.errors import MetaftError
from metaft.spec import bind
from metaft.types import Params


class InnerOptimizer(NamedTuple):
    """What a step makes of the gradients so far; the caller multiplies it by its rates and subtracts it.

    Everything in a result is differentiable as far as the gradients are, so that where they are constants (first
    order), the state is one too.
    """

    init: Callable[[Params], Params]
    """Parameters -> state before the first step: named tensors, NAME.momentum or NAME.m and NAME.v; none for SGD."""
    update: Callable[[Params, Params, int | Tensor], tuple[Params, Params]]
    """(gradients, state, steps that the state has seen) -> (directions, state). The count may be a scalar tensor, for a
    state that is kept from task to task."""


def sgd() -> InnerOptimizer:
    """The gradient itself."""
    return InnerOptimizer(lambda params: {}, lambda grads, state, step: (grads, state))


def momentum(momentum: float = 0.9) -> InnerOptimizer:
    """b <- momentum * b + gradient; the direction is b. As torch.optim.SGD(momentum=...)."""
    return _with_momentum(momentum, nesterov=False)


def nesterov(momentum: float = 0.9) -> InnerOptimizer:
    """The same b; the direction is gradient + momentum * b. As torch.optim.SGD(momentum=..., nesterov=True)."""
    return _with_momentum(momentum, nesterov=True)


def adam(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> InnerOptimizer:
    """Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1; as torch.optim.Adam.

    m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2; the direction is m' / (sqrt(v') + eps), where
    m' = m / (1 - beta1^t) and v' = v / (1 - beta2^t) at step t = 1, 2, ... Where v is 0, as behind a dead ReLU, the
    root counts as constant: its derivative there is infinite, and times the 0 behind it would make NaN.
    """
    _check_decay("beta1", beta1)
    _check_decay("beta2", beta2)
    if not eps > 0:
        raise MetaftError(f"inner_optimizer: eps must be above 0, got {eps}")

    def init(params: Params) -> Params:
        return {f"{k}.{slot}": torch.zeros_like(p) for k, p in params.items() for slot in ("m", "v")}

    def update(grads: Params, state: Params, step: int | Tensor) -> tuple[Params, Params]:
        t = step + 1
        new: Params = {}
        directions: Params = {}
        for k, g in grads.items():
            m = new[f"{k}.m"] = beta1 * state[f"{k}.m"] + (1 - beta1) * g
            v = new[f"{k}.v"] = beta2 * state[f"{k}.v"] + (1 - beta2) * g.square()
            root = _root(v) / _like(1 - beta2**t, g) ** 0.5
            directions[k] = m / _like(1 - beta1**t, g) / (root + eps)
        return directions, new

    return InnerOptimizer(init, update)


OPTIMIZERS: dict[str, Callable[..., InnerOptimizer]] = {
    "sgd": sgd,
    "momentum": momentum,
    "nesterov": nesterov,
    "adam": adam,
}


def make(spec: str | InnerOptimizer) -> InnerOptimizer:
    """The optimiser of a name, with numbers of its own where they follow: `adam`, `adam:beta1=0.5,eps=1e-6`.

    Raises MetaftError for an unknown name, or a number that it does not have or that is out of range.
    """
    if not isinstance(spec, str):
        return spec
    make_it = bind("inner_optimizer", spec, OPTIMIZERS)
    try:
        return make_it()
    except MetaftError as error:
        raise MetaftError(f"{error} (in {spec!r})") from None


def _with_momentum(momentum: float, *, nesterov: bool) -> InnerOptimizer:
    _check_decay("momentum", momentum)

    def init(params: Params) -> Params:
        return {f"{k}.momentum": torch.zeros_like(p) for k, p in params.items()}

    def update(grads: Params, state: Params, step: int | Tensor) -> tuple[Params, Params]:
        new = {f"{k}.momentum": momentum * state[f"{k}.momentum"] + g for k, g in grads.items()}
        if nesterov:
            return {k: g + momentum * new[f"{k}.momentum"] for k, g in grads.items()}, new
        return {k: new[f"{k}.momentum"] for k in grads}, new

    return InnerOptimizer(init, update)


def _root(v: Tensor) -> Tensor:
    """sqrt, with derivative 0 at 0. The inner `where` keeps the infinite derivative out of the backward pass."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, torch.ones_like(v)).sqrt(), torch.zeros_like(v))


def _like(factor: float | Tensor, g: Tensor) -> float | Tensor:
    """A count kept in a tensor is of a type of its own, which must not decide that of the parameters."""
    return factor.to(g) if isinstance(factor, Tensor) else factor


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise MetaftError(f"inner_optimizer: {name} must be at least 0 and below 1, got {value}")
