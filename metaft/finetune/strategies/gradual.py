"""Gradual unfreezing (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146, section 3.3): the head first, then one
block more at a time from the top, since the lowest know what is most general and have the most to lose."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from metaft.errors import MetaftError
from metaft.finetune.strategies.base import Groups, Strategy
from metaft.finetune.strategies.base import every as all_of


def rates(every: int, groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
    blocks = step // (every * max(1, per_epoch))
    return all_of(groups[-1 - blocks :] if blocks < len(groups) else groups)


def gradual(*, every: int = 1) -> Strategy:
    """The head alone trains in the first `every` epochs; after each further `every` of them so does one more block of
    the backbone (see `metaft.models.blocks`). Blocks that no epoch is left for stay as they are."""
    if every < 1:
        raise MetaftError(f"strategy: every must be at least 1, got {every}")
    return Strategy(partial(rates, every))
