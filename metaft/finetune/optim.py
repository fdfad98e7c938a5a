"""The optimisers of fine-tuning, over parameters by name: each is a group by itself, whose rate may change with every
step, and whose state a checkpoint finds again by the name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from metaft.errors import CheckpointError, MetaftError
from metaft.spec import bind

Named = Sequence[tuple[str, nn.Parameter]]
Moments = dict[str, dict[str, Tensor]]
"""An optimiser's state, by the parameters' names."""


def groups_of(parameters: Named, decay: float) -> list[dict[str, object]]:
    """A group for each; biases, scales and shifts (one axis or none) do not decay, since that would pull a
    normalisation towards nothing and regularises no function."""
    return [{"params": [p], "name": n, "weight_decay": decay if p.dim() > 1 else 0.0} for n, p in parameters]


def adam(
    parameters: Named, lr: float, *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> torch.optim.Optimizer:
    """Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1."""
    _check(beta1=beta1, beta2=beta2)
    _check_eps(eps)
    return torch.optim.Adam(groups_of(parameters, 0.0), lr=lr, betas=(beta1, beta2), eps=eps)


def adamw(
    parameters: Named,
    lr: float,
    *,
    weight_decay: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2."""
    _check(beta1=beta1, beta2=beta2)
    _check_eps(eps)
    return torch.optim.AdamW(groups_of(parameters, _decay(weight_decay)), lr=lr, betas=(beta1, beta2), eps=eps)


def sgd(
    parameters: Named, lr: float, *, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Stochastic gradient descent; with Nesterov's momentum if wanted."""
    _check(momentum=momentum)
    if nesterov and momentum == 0:
        raise MetaftError("optimizer: nesterov needs a momentum above 0, got 0.0")
    groups = groups_of(parameters, _decay(weight_decay))
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": adam,
    "adamw": adamw,
    "sgd": sgd,
}


def named(text: str) -> partial[torch.optim.Optimizer]:
    """`NAME[:key=value,...]`, to be called with parameters and a rate. Raises MetaftError that begins with `optimizer`,
    also for values out of range."""
    make = bind("optimizer", text, OPTIMIZERS, reserved=("parameters", "lr"))
    make([("probe", nn.Parameter(torch.zeros(1)))], 1.0)
    return make


def _check(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise MetaftError(f"optimizer: {name} must be at least 0 and below 1, got {value}")


def _check_eps(value: float) -> None:
    if value <= 0:
        raise MetaftError(f"optimizer: eps must be above 0, got {value}")


def _decay(value: float) -> float:
    if value < 0:
        raise MetaftError(f"optimizer: weight_decay must be at least 0, got {value}")
    return value


def set_rates(optimizer: torch.optim.Optimizer, rates: Mapping[str, float], lr: float) -> None:
    """Give each parameter its factor of `lr`; those of factor 0 get no gradient, so that an optimiser leaves them
    alone, momentum and decay included. Raises MetaftError for a rate of what is no parameter."""
    if unknown := rates.keys() - {group["name"] for group in optimizer.param_groups}:
        raise MetaftError(f"strategy: it has rates for {sorted(unknown)[:4]}, which are no parameters that can train")
    for group in optimizer.param_groups:
        factor = rates.get(group["name"], 0.0)
        group["lr"] = lr * factor
        for p in group["params"]:
            p.requires_grad_(factor > 0)


def moments_of(optimizer: torch.optim.Optimizer) -> Moments:
    """An optimiser's state by the parameters' names; of those that never moved there is none."""
    parameters = {group["name"]: p for group in optimizer.param_groups for p in group["params"]}
    state = {name: optimizer.state[p] for name, p in parameters.items() if p in optimizer.state}
    return {name: {k: v for k, v in slots.items() if v is not None} for name, slots in state.items()}


def put_moments(
    optimizer: torch.optim.Optimizer, moments: Mapping[str, Mapping[str, Tensor]], rates: Mapping[str, float]
) -> None:
    """The inverse of `moments_of`. Older checkpoints have numbers of what trained (`rates`) in the place of names.

    Raises CheckpointError for the state of a parameter that is not here.
    """
    parameters = {g["name"]: p for g in optimizer.param_groups for p in g["params"]}
    trained = [name for name in parameters if rates.get(name)]
    for key, slots in moments.items():
        numbered = key.isdecimal()
        name = key if not numbered else trained[int(key)] if int(key) < len(trained) else ""
        p = parameters.get(name)
        if p is None or any(slot != "step" and value.shape != p.shape for slot, value in slots.items()):
            raise CheckpointError(f"resume: the optimiser's state for {key!r} in the checkpoint is of no parameter")
        # In the parameter's own layout, for the same bits in each step.
        optimizer.state[p] = {
            slot: value if slot == "step" else torch.empty_like(p).copy_(value) for slot, value in slots.items()
        }
