"""Layer-wise decay of the rate (Clark et al. 2020, https://arxiv.org/abs/2003.10555, appendix B; of pictures Bao et al.
2022, https://arxiv.org/abs/2106.08254, section 3.1): everything trains, and the lower the slower."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from metaft.errors import MetaftError
from metaft.finetune.strategies.base import Groups, Strategy, falling


def rates(d: float, groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
    return falling(groups, d)


def layer_decay(*, d: float = 0.75) -> Strategy:
    """Block l of L has the rate times `d`^(L + 1 - l), and the head, as block L + 1, the whole one; 1 is `full`."""
    if not 0 < d <= 1:
        raise MetaftError(f"strategy: d must be above 0 and at most 1, got {d}")
    return Strategy(partial(rates, d))
