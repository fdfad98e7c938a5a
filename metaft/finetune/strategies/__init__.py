"""What trains, how fast and when: one file per strategy."""

from __future__ import annotations

from collections.abc import Callable

from metaft.finetune.strategies.base import Groups, Strategy, every
from metaft.finetune.strategies.full import full
from metaft.finetune.strategies.head import head

__all__ = ["STRATEGIES", "Groups", "Strategy", "every"]

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "full": full,
    "head": head,
}
