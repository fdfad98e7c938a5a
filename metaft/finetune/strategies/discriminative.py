"""Discriminative fine-tuning (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146, section 3.1): everything trains,
and each block at the rate of the one above it over `decay`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from metaft.errors import MetaftError
from metaft.finetune.strategies.base import Groups, Strategy, falling


def rates(decay: float, groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
    return falling(groups, 1 / decay)


def discriminative(*, decay: float = 2.6) -> Strategy:
    """The head trains at the whole rate, the last block at 1/`decay` of it, the one below at 1/`decay`^2, ..."""
    if not 1 <= decay < math.inf:
        raise MetaftError(f"strategy: decay must be at least 1, got {decay}")
    return Strategy(partial(rates, decay))
