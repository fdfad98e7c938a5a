"""CutMix: a box of each picture comes from another one, and the label by its share of the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.finetune.extras.base import Batch, Extra, Objective, Origin
from metaft.finetune.extras.pairs import check_alpha, mixed_labels, partners, shares, words_of
from metaft.inputs import Inputs
from metaft.sampler import uniform

USE = 1
"""Of the random words of pairs."""


def edges(size: int, share: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the boxes begin and end along a side, int64 [n] each: size sqrt(1 - share) long around a pixel at `where`,
    0..1, and cut off at the picture's edges (Yun et al. 2019, eq. 2)."""
    half, middle = (size * np.sqrt(1 - share)).astype(np.int64) // 2, (size * where).astype(np.int64)
    return np.clip(middle - half, 0, size), np.clip(middle + half, 0, size)


def boxes(height: int, width: int, words: np.ndarray, alpha: float) -> Tensor:
    """bool [n, 1, height, width]: what comes from the other picture, by words [n, 4]."""
    share = shares(uniform(words[:, 1]), alpha)
    sides = []
    for size, word in ((height, words[:, 2]), (width, words[:, 3])):
        first, last = edges(size, share, uniform(word))
        at = np.arange(size)
        sides.append((first[:, None] <= at) & (at < last[:, None]))
    rows, columns = sides
    return torch.from_numpy(rows[:, None, :, None] & columns[:, None, None, :])


def cut(batch: Batch, origin: Origin, alpha: float) -> Batch:
    """x' = M x_i + (1 - M) x_j, and y' by the share of pixels that M leaves (eq. 1)."""
    words = words_of(batch, origin.seed, USE)
    partner = torch.from_numpy(partners(words[:, 0])).to(batch.x.device)
    height, width = batch.x.shape[-2:]
    box = boxes(height, width, words, alpha).to(batch.x.device)
    share = 1 - box.flatten(1).to(batch.x).mean(1)
    x = torch.where(box, batch.x[partner], batch.x)
    return batch._replace(x=x, y=mixed_labels(batch.y, partner, share, origin.classes))


def on_cut(objective: Objective, origin: Origin, *, alpha: float) -> Objective:
    def of(model: nn.Module, batch: Batch) -> Tensor:
        return objective(model, cut(batch, origin, alpha))

    return of


def check_pictures(inputs: Inputs, class_names: Sequence[str]) -> None:
    """Raises MetaftError where no box can be cut of an input."""
    if len(inputs.shape) != 3:
        raise MetaftError(f"extra: cutmix is for pictures, and inputs have the shape {list(inputs.shape)}")


def cutmix(*, alpha: float = 1.0) -> Extra:
    """Yun et al. 2019, https://arxiv.org/abs/1905.04899, section 3.1. Each picture has a box of its own, where the
    authors' code has one per batch."""
    check_alpha(alpha)
    return Extra(partial(on_cut, alpha=alpha), "boxes of other images pasted in", of_classes=True, check=check_pictures)
