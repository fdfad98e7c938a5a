"""The head alone trains, on features that stay as they are: a linear probe where the head is linear."""

from __future__ import annotations

from collections.abc import Mapping

from metaft.finetune.strategies.base import Groups, Strategy, every


def rates(groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
    return every(groups[-1:])


def head() -> Strategy:
    return Strategy(rates)
