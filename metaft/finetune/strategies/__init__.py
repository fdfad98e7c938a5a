"""What trains, how fast and when: one file per strategy."""

from __future__ import annotations

from collections.abc import Callable

from metaft.finetune.strategies.base import Groups, Strategy, every
from metaft.finetune.strategies.full import full
from metaft.finetune.strategies.head import head
from metaft.finetune.strategies.last import last
from metaft.finetune.strategies.lp_ft import lp_ft
from metaft.spec import bind

__all__ = ["CHOSEN", "STRATEGIES", "Groups", "Strategy", "every", "named"]

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "full": full,
    "head": head,
    "last": last,
    "lp-ft": lp_ft,
}


CHOSEN = "chosen"
"""What `--strategy` says where one of them is to be found by cross-validation."""


def named(text: str) -> Strategy:
    """`NAME[:key=value,...]`. Raises MetaftError that begins with `strategy`."""
    return bind("strategy", text, STRATEGIES, also=(CHOSEN,))()
