"""Linear probing, then fine-tuning (Kumar et al. 2022, https://arxiv.org/abs/2202.10054, section 3): the head first, on
features that stay as they are, so that the first steps of all the rest do not follow a random one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

from metaft.errors import MetaftError
from metaft.finetune.strategies.base import Groups, Strategy, every
from metaft.spec import bind


def rates(
    share: float, rise: float, then: Strategy, groups: Groups, step: int, steps: int, per_epoch: int
) -> Mapping[str, float]:
    alone = min(max(1, round(share * steps)), max(1, steps - 1))  # both phases, however few the steps are
    if step < alone:
        return every(groups[-1:])
    risen, head = min(1.0, (step - alone + 1) / max(1.0, rise * steps)), set(groups[-1])
    after = then.rates(groups, step - alone, steps - alone, per_epoch)
    return {name: factor if name in head else risen * factor for name, factor in after.items()}


def lp_ft(
    strategies: Mapping[str, Callable[..., Strategy]], /, *, share: float = 0.3, rise: float = 0.0, then: str = "full"
) -> Strategy:
    """The head alone trains in `share` of the steps; the rest goes as `then`, which is one of `strategies`, goes in so
    many steps. In the first of these, `rise` of all steps, the rate of the backbone rises in even parts: Adam knows
    nothing of its gradients yet, and its first steps are as long as the rate whatever they are."""
    if not 0 < share < 1:
        raise MetaftError(f"strategy: share must be above 0 and below 1, got {share}")
    if not 0 <= rise < 1 - share:
        raise MetaftError(f"strategy: rise must be at least 0 and below {1 - share:g}, what share leaves, got {rise}")
    second = bind("strategy: then", then, strategies)()
    return dataclasses.replace(second, rates=partial(rates, share, rise, second))
