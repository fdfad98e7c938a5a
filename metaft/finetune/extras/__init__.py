"""Changes to the loss of a fit: one file per extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from metaft.finetune.extras.base import Batch, Extra, Objective, Origin

__all__ = ["EXTRAS", "Batch", "Extra", "Objective", "Origin", "composed", "cross_entropy"]

EXTRAS: dict[str, Callable[..., Extra]] = {}


def cross_entropy(model: nn.Module, batch: Batch, weights: Tensor | None = None) -> Tensor:
    """The mean cross-entropy of a batch, weighted by class where there are `weights` [classes]."""
    return F.cross_entropy(model.get_submodule("head")(model.get_submodule("body")(batch.x)), batch.y, weights)


def composed(extras: Sequence[Extra], origin: Origin, weights: Tensor | None = None) -> Objective:
    """Cross-entropy as these extras change it, the first one first."""
    objective: Objective = partial(cross_entropy, weights=weights)
    for extra in extras:
        objective = extra.wrap(objective, origin)
    return objective
