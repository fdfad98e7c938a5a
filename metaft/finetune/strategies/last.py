"""The head and the last blocks of the backbone train, at one rate; all before them stays."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from metaft.errors import MetaftError
from metaft.finetune.strategies.base import Groups, Strategy, every


def rates(blocks: int, groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
    return every(groups[-1 - blocks :])


def last(*, blocks: int = 2) -> Strategy:
    """`blocks` of the backbone (see `metaft.models.blocks`); more than there are is all of them."""
    if blocks < 1:
        raise MetaftError(f"strategy: blocks must be at least 1, got {blocks}; head trains no block")
    return Strategy(partial(rates, blocks))
