"""Examples that are mixed in pairs: who with whom, in which share, and what becomes of their labels.

All of it is a function of (seed, epoch, example), so that neither the order within a batch nor a resume changes it.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from metaft.errors import MetaftError
from metaft.finetune.extras.base import Batch
from metaft.sampler import Stream, raw_words

WORDS = 4
"""Of each example in each epoch, for each use: one block of the counter, the same for all, so that no two overlap."""


def words_of(batch: Batch, seed: int, use: int) -> np.ndarray:
    """uint64 [n, WORDS] for each example in its epoch; each `use`, from 0 on, has others."""
    items = [(use << 56) + (batch.epoch << 32) + row for row in batch.rows.tolist()]
    return raw_words(seed, "train", items, WORDS, stream=Stream.EXTRAS)


def partners(keys: np.ndarray) -> np.ndarray:
    """int64 [n]: the example with which each is mixed, the next one in the order of their keys, and of the last the
    first: never itself, in a batch of two or more."""
    order = np.argsort(keys, kind="stable")
    partner = np.empty(len(order), np.int64)
    partner[order] = np.roll(order, -1)
    return partner


def shares(uniform: np.ndarray, alpha: float) -> np.ndarray:
    """float64 [n]: Beta(alpha, alpha), by its quantiles."""
    from scipy.special import betaincinv

    return betaincinv(alpha, alpha, uniform)


def mixed_labels(y: Tensor, partner: Tensor, share: Tensor, classes: int) -> Tensor:
    """share y + (1 - share) y of the partner: of classes float [n, classes], of numbers [n]. `share` is [n]."""
    if classes and y.dim() == 1:
        y = F.one_hot(y, classes).to(share.dtype)
    by = share.view(-1, *[1] * (y.dim() - 1))
    return by * y + (1 - by) * y[partner]


def check_alpha(alpha: float) -> None:
    """Raises MetaftError for what is no parameter of a Beta distribution."""
    if not 0 < alpha <= 100:
        raise MetaftError(f"extra: alpha must be above 0 and at most 100, got {alpha}")
