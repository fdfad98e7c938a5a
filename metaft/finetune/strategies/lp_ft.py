"""Linear probing, then fine-tuning (Kumar et al. 2022, https://arxiv.org/abs/2202.10054, section 3): the head first, on
features that stay as they are, so that the first steps of all the rest do not follow a random one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from metaft.errors import MetaftError
from metaft.finetune.strategies.base import Groups, Strategy, every


def rates(share: float, groups: Groups, step: int, steps: int) -> Mapping[str, float]:
    alone = min(max(1, round(share * steps)), max(1, steps - 1))  # both phases, however few the steps are
    return every(groups[-1:] if step < alone else groups)


def lp_ft(*, share: float = 0.3) -> Strategy:
    """The head alone trains in this share of the steps, everything in the rest."""
    if not 0 < share < 1:
        raise MetaftError(f"strategy: share must be above 0 and below 1, got {share}")
    return Strategy(partial(rates, share))
