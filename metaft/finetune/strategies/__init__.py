"""What trains, how fast and when: one file per strategy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from metaft.finetune.strategies.base import Groups, Strategy, every
from metaft.finetune.strategies.bitfit import bitfit
from metaft.finetune.strategies.discriminative import discriminative
from metaft.finetune.strategies.full import full
from metaft.finetune.strategies.gradual import gradual
from metaft.finetune.strategies.head import head
from metaft.finetune.strategies.last import last
from metaft.finetune.strategies.layer_decay import layer_decay
from metaft.finetune.strategies.lora import lora
from metaft.finetune.strategies.lp_ft import lp_ft
from metaft.spec import bind

__all__ = ["CHOSEN", "STRATEGIES", "Groups", "Strategy", "every", "named"]

AFTER_HEAD: dict[str, Callable[..., Strategy]] = {
    "full": full,
    "last": last,
    "gradual": gradual,
    "discriminative": discriminative,
    "layer-decay": layer_decay,
    "bitfit": bitfit,
    "lora": lora,
}
"""What moves the backbone, hence also what `lp-ft` can go on with."""

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "head": head,
    "lp-ft": partial(lp_ft, AFTER_HEAD),
    **AFTER_HEAD,
}


CHOSEN = "chosen"
"""What `--strategy` says where one of them is to be found by cross-validation."""


def named(text: str) -> Strategy:
    """`NAME[:key=value,...]`. Raises MetaftError that begins with `strategy`."""
    return bind("strategy", text, STRATEGIES, also=(CHOSEN,))()
