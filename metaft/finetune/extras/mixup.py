"""mixup: pairs of examples and of their labels, mixed in the same share."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from metaft.finetune.extras.base import Batch, Extra, Objective, Origin
from metaft.finetune.extras.pairs import check_alpha, mixed_labels, partners, shares, words_of
from metaft.sampler import uniform

USE = 0
"""Of the random words of pairs."""


def mixed(batch: Batch, origin: Origin, alpha: float) -> Batch:
    """x' = l x_i + (1 - l) x_j and y' likewise, l ~ Beta(alpha, alpha) of each example (Zhang et al. 2018, eq. 1)."""
    words = words_of(batch, origin.seed, USE)
    partner = torch.from_numpy(partners(words[:, 0])).to(batch.x.device)
    share = torch.from_numpy(shares(uniform(words[:, 1]), alpha)).to(batch.x)
    by = share.view(-1, *[1] * (batch.x.dim() - 1))
    x = by * batch.x + (1 - by) * batch.x[partner]
    return batch._replace(x=x, y=mixed_labels(batch.y, partner, share, origin.classes))


def on_mixed(objective: Objective, origin: Origin, *, alpha: float) -> Objective:
    def of(model: nn.Module, batch: Batch) -> Tensor:
        return objective(model, mixed(batch, origin, alpha))

    return of


def mixup(*, alpha: float = 0.2) -> Extra:
    """Zhang et al. 2018, https://arxiv.org/abs/1710.09412. The loss is linear in the labels, so that it is the paper's
    l loss(y_i) + (1 - l) loss(y_j). Each example has a share of its own, where the authors' code has one per batch.
    Numbers are mixed as classes are."""
    check_alpha(alpha)
    return Extra(partial(on_mixed, alpha=alpha), "images and labels mixed in pairs")
