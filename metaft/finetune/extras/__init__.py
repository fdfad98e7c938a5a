"""Changes to the loss of a fit: one file per extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from metaft.finetune.extras.base import Batch, Extra, Objective, Origin

__all__ = ["EXTRAS", "Batch", "Extra", "Objective", "Origin", "composed", "plain_loss"]

EXTRAS: dict[str, Callable[..., Extra]] = {}


def plain_loss(model: nn.Module, batch: Batch, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy) -> Tensor:
    """The loss of a batch's outputs and labels."""
    return loss(model.get_submodule("head")(model.get_submodule("body")(batch.x)), batch.y)


def composed(
    extras: Sequence[Extra], origin: Origin, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> Objective:
    """The loss as these extras change it, the first one first."""
    objective: Objective = partial(plain_loss, loss=loss)
    for extra in extras:
        objective = extra.wrap(objective, origin)
    return objective
