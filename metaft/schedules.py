"""How a rate changes over training: step -> factor of the rate, one function per schedule."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial

from metaft.errors import MetaftError
from metaft.spec import bind

Schedule = Callable[[int, int], float]
"""(step, steps in all) -> factor of the rate in that step; the first step is 0."""


def at_constant(step: int, steps: int) -> float:
    return 1.0


def at_linear(step: int, steps: int) -> float:
    return 1.0 - step / max(1, steps)


def at_cosine(step: int, steps: int) -> float:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983, eq. 5, no restart)."""
    return 0.5 * (1.0 + math.cos(math.pi * (step / max(1, steps))))


def after_warmup(schedule: Schedule, warmup: float, step: int, steps: int) -> float:
    """A rise in even parts over a share of all steps, and the schedule over the rest."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return schedule(step - rising, steps - rising)


def _warmed(schedule: Schedule, warmup: float) -> Schedule:
    if not 0 <= warmup < 1:
        raise MetaftError(f"warmup must be at least 0 and below 1, got {warmup}")
    return partial(after_warmup, schedule, warmup) if warmup else schedule


def constant(*, warmup: float = 0.0) -> Schedule:
    return _warmed(at_constant, warmup)


def linear(*, warmup: float = 0.0) -> Schedule:
    return _warmed(at_linear, warmup)


def cosine(*, warmup: float = 0.0) -> Schedule:
    return _warmed(at_cosine, warmup)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}
"""`warmup` is the share of all steps in which the rate rises."""


@functools.cache
def make(text: str) -> Schedule:
    """`NAME[:warmup=SHARE]`. Raises MetaftError that begins with `schedule`."""
    return bind("schedule", text, SCHEDULES)()
