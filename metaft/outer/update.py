"""What becomes of a meta-gradient: clipping, the outer learning rate and the outer optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from metaft import schedules
from metaft.config import Settled
from metaft.errors import CheckpointError
from metaft.types import Params


def outer_lr(config: Settled, step: int) -> float:
    """Outer learning rate of meta-step `step` (0-based) under `--outer-schedule`."""
    return config.outer.outer_lr * schedules.make(config.outer.outer_schedule)(step, config.outer.iterations)


def clipped(parts: Sequence[Tensor], config: Settled) -> list[Tensor]:
    """Gradients under `--clip-value`, then `--clip-norm`, whose norm is that over all of them."""
    parts = list(parts)
    if config.outer.clip_value is not None:
        parts = [g.clamp(-config.outer.clip_value, config.outer.clip_value) for g in parts]
    if config.outer.clip_norm is not None:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in parts]))
        scale = (config.outer.clip_norm / norm.clamp_min(1e-12)).clamp_max(1.0)
        parts = [g * scale for g in parts]
    return parts


Moments = dict[str, Tensor]
"""Of one parameter, by slot, named as torch.optim's."""


_ADAM = ("exp_avg", "exp_avg_sq")


def _adam(params: list[Tensor], grads: list[Tensor], moments: list[Moments], lr: float) -> None:
    for p, own in zip(params, moments, strict=True):
        if not own:
            own["step"] = torch.zeros(())  # on the CPU, wherever the parameter is
            own |= {slot: torch.zeros_like(p) for slot in _ADAM}
    averages, squares, steps = ([own[slot] for own in moments] for slot in (*_ADAM, "step"))
    adam(
        params, grads, averages, squares, [], steps,
        amsgrad=False, beta1=0.9, beta2=0.999, lr=lr, weight_decay=0.0, eps=1e-8, maximize=False,
    )  # fmt: skip


def _sgd(params: list[Tensor], grads: list[Tensor], moments: list[Moments], lr: float) -> None:
    sgd(
        params, grads, [None] * len(params),
        weight_decay=0.0, momentum=0.0, lr=lr, dampening=0.0, nesterov=False, maximize=False,
    )  # fmt: skip


# The functions that torch.optim's classes call: the classes import torch's compiler, which takes two seconds.
_RULES: Mapping[str, Callable[[list[Tensor], list[Tensor], list[Moments], float], None]] = {
    "adam": _adam,
    "sgd": _sgd,
}


class Outer:
    """The outer optimiser over the meta-parameters: torch.optim's, with its moments as named tensors."""

    def __init__(self, config: Settled, meta: Params, moments: Mapping[str, Tensor] | None = None) -> None:
        self.config = config
        self.gradient: Params = {}
        """Of the last step, as clipped."""
        self.meta = {name: p.detach().clone() for name, p in meta.items()}
        self._rule = _RULES[config.outer.outer_optimizer]
        self._moments: dict[str, Moments] = {name: {} for name in self.meta}
        for key, value in (moments or {}).items():
            name, _, slot = key.rpartition("/")
            if name not in self.meta:
                raise CheckpointError(f"checkpoint: optimiser moment {key!r} belongs to no meta-parameter")
            device = "cpu" if slot == "step" else self.meta[name].device
            self._moments[name][slot] = value.to(device).clone()
        for name, own in self._moments.items():
            if own and own.keys() != {*_ADAM, "step"}:
                raise CheckpointError(f"checkpoint: the optimiser's moments of {name!r} are {sorted(own)}, not Adam's")

    @torch.no_grad()
    def step(self, grads: Params, step: int) -> None:
        """Clip, then one update of `meta` in place at the rate of meta-step `step`."""
        parts = clipped(list(grads.values()), self.config)
        for (name, p), g in zip(self.meta.items(), parts, strict=True):
            assert g.shape == p.shape, name
        self.gradient = dict(zip(self.meta, parts, strict=True))
        self._rule(list(self.meta.values()), parts, list(self._moments.values()), outer_lr(self.config, step))

    def moments(self) -> dict[str, Tensor]:
        return {f"{name}/{slot}": value for name, own in self._moments.items() for slot, value in own.items()}
