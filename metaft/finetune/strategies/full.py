"""Everything trains, at one rate."""

from __future__ import annotations

from collections.abc import Mapping

from metaft.finetune.strategies.base import Groups, Strategy, every


def rates(groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
    return every(groups)


def full() -> Strategy:
    return Strategy(rates)
