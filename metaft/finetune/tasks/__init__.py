"""How several targets are trained at once on one backbone: one file per way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metaft.errors import no_such
from metaft.finetune.tasks.base import Combined, Given, Tasks
from metaft.finetune.tasks.pcgrad import pcgrad
from metaft.finetune.tasks.summed import summed
from metaft.finetune.tasks.uncertainty import uncertainty
from metaft.sampler import Stream, raw_words

__all__ = ["TASKS", "Combined", "Given", "LogVariances", "Tasks", "flattened", "named", "orders_of", "put"]

TASKS: dict[str, Tasks] = {
    "sum": Tasks(summed),
    "uncertainty": Tasks(uncertainty, weighs=True),
    "pcgrad": Tasks(pcgrad),
}


def named(name: str) -> Tasks:
    """Raises MetaftError that begins with `tasks`."""
    if name not in TASKS:
        raise no_such("tasks", name, TASKS)
    return TASKS[name]


class LogVariances(nn.Module):
    """One of each target, from 0 on."""

    def __init__(self, targets: int, like: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(targets, dtype=like.dtype, device=like.device))


def orders_of(targets: int, seed: int, step: int) -> list[list[int]]:
    """For each target the others in the order of this step."""
    words = raw_words(seed, "train", [step], targets * targets, stream=Stream.TASKS)[0].reshape(targets, targets)
    return [[j for j in row.argsort(kind="stable").tolist() if j != i] for i, row in enumerate(words)]


def flattened(parameters: Sequence[nn.Parameter]) -> Tensor:
    """[P] of their gradients, zero where there is none."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.flatten() for g in gradients]) if gradients else torch.zeros(0)


def put(parameters: Sequence[nn.Parameter], gradient: Tensor) -> None:
    """The inverse, where there are any."""
    if not parameters:
        return
    for p, values in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        p.grad = torch.empty_like(p).copy_(values.view_as(p))  # in the parameter's own layout
