"""Changes to the loss of a fit: one file per extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from metaft.finetune.extras.base import Batch, Extra, Objective, Origin

__all__ = ["EXTRAS", "Batch", "Extra", "Objective", "Origin", "composed", "cross_entropy"]

EXTRAS: dict[str, Callable[..., Extra]] = {}


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of a batch."""
    return F.cross_entropy(model.get_submodule("head")(model.get_submodule("body")(batch.x)), batch.y)


def composed(extras: Sequence[Extra], origin: Origin) -> Objective:
    """Cross-entropy as these extras change it, the first one first."""
    objective: Objective = cross_entropy
    for extra in extras:
        objective = extra.wrap(objective, origin)
    return objective
