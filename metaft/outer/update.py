"""What becomes of a meta-gradient: clipping, the outer learning rate and the outer optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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


class Outer:
    """The outer optimiser over the meta-parameters: torch.optim's, with its moments as named tensors."""

    def __init__(self, config: Settled, meta: Params, moments: Mapping[str, Tensor] | None = None) -> None:
        self.config = config
        self.meta = {name: p.detach().clone() for name, p in meta.items()}
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.outer.outer_optimizer]
        self.optimizer = kind(list(self.meta.values()), lr=config.outer.outer_lr)
        for key, value in (moments or {}).items():
            name, _, slot = key.rpartition("/")
            if name not in self.meta:
                raise CheckpointError(f"checkpoint: optimiser moment {key!r} belongs to no meta-parameter")
            # Adam counts its steps in a CPU tensor, wherever the parameter is
            device = "cpu" if slot == "step" else self.meta[name].device
            self.optimizer.state[self.meta[name]][slot] = value.to(device).clone()

    def step(self, grads: Params, step: int) -> None:
        """Clip, then one update of `meta` in place at the rate of meta-step `step`."""
        parts = clipped(list(grads.values()), self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = outer_lr(self.config, step)
        for (name, p), g in zip(self.meta.items(), parts, strict=True):
            assert g.shape == p.shape, name
            p.grad = g
        self.optimizer.step()

    def moments(self) -> dict[str, Tensor]:
        return {
            f"{name}/{slot}": value
            for name, p in self.meta.items()
            for slot, value in self.optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor)
        }
