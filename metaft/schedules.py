"""How a rate changes over training: step -> factor of the rate, one function per schedule."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    return _between(1.0, 0.0, step / max(1, steps))


def at_steps(every: float, factor: float, step: int, steps: int) -> float:
    """`factor` for each whole share `every` of the steps that is over."""
    return factor ** math.floor(step / (every * max(1, steps)) + 1e-9)  # the end of a share is its end, rounding aside


def at_one_cycle(rise: float, low: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `low` up to 1 over a share `rise` of the steps, and one from there down to `end`.

    Smith and Topin 2017, https://arxiv.org/abs/1708.07120, with cosines in the place of lines; the last step is at
    `end`, and the highest rate that of step rise * steps - 1.
    """
    top, last = rise * steps - 1, steps - 1
    if step <= top:
        return _between(low, 1.0, step / top if top > 0 else 1.0)
    return _between(1.0, end, (step - top) / (last - top) if last > top else 1.0)


def _between(first: float, second: float, share: float) -> float:
    return second + (first - second) * 0.5 * (1.0 + math.cos(math.pi * share))


def at_slanted_triangle(cut: float, ratio: float, step: int, steps: int) -> float:
    """A short line up and a long one down (Howard and Ruder 2018, https://arxiv.org/abs/1801.06146, equation 3): p goes
    from 0 to 1 over a share `cut` of the steps and back, and the factor is (1 + p (ratio - 1)) / ratio."""
    top = max(1, math.floor(cut * steps))
    p = step / top if step < top else 1 - (step - top) / (top * (1 / cut - 1))
    return (1 + max(0.0, p) * (ratio - 1)) / ratio


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


def step(*, every: float = 0.3, factor: float = 0.1, warmup: float = 0.0) -> Schedule:
    """`every` is a share of all steps: 0.1 with a factor of 0.5 halves the rate nine times."""
    _check_share("every", every)
    _check_share("factor", factor)
    return _warmed(partial(at_steps, every, factor), warmup)


def one_cycle(*, rise: float = 0.3, low: float = 0.04, end: float = 4e-6, warmup: float = 0.0) -> Schedule:
    """`low` and `end` are shares of the highest rate, by default those of torch's OneCycleLR."""
    _check_share("rise", rise)
    for name, share in (("low", low), ("end", end)):
        if not 0 <= share <= 1:
            raise MetaftError(f"{name} must be 0 to 1, got {share}")
    return _warmed(partial(at_one_cycle, rise, low, end), warmup)


def stlr(*, cut: float = 0.1, ratio: float = 32.0, warmup: float = 0.0) -> Schedule:
    _check_share("cut", cut)
    if not 1 <= ratio < math.inf:
        raise MetaftError(f"ratio must be at least 1, got {ratio}")
    return _warmed(partial(at_slanted_triangle, cut, ratio), warmup)


@dataclass(frozen=True)
class Plateau:
    """Of which the rate in a step is `schedule`'s, lowered by what the losses of the epochs before it say."""

    schedule: Schedule
    factor: float
    patience: int
    threshold: float

    def __call__(self, step: int, steps: int) -> float:
        return self.schedule(step, steps)

    def lowered(self, losses: Sequence[float]) -> float:
        """`factor` for each time that more than `patience` epochs in a row were no better than the best before them by
        a share `threshold` of it; that of torch's ReduceLROnPlateau, as a function of all losses so far."""
        best, bad, drops = math.inf, 0, 0
        for loss in losses:
            better = loss < best - self.threshold * abs(best) if math.isfinite(best) else loss < best
            best, bad = (loss, 0) if better else (best, bad + 1)
            if bad > self.patience:
                bad, drops = 0, drops + 1
        return self.factor**drops


def plateau(*, factor: float = 0.1, patience: int = 3, threshold: float = 1e-4, warmup: float = 0.0) -> Schedule:
    _check_share("factor", factor)
    if patience < 0:
        raise MetaftError(f"patience must be at least 0, got {patience}")
    if not 0 <= threshold < 1:
        raise MetaftError(f"threshold must be at least 0 and below 1, got {threshold}")
    return Plateau(_warmed(at_constant, warmup), factor, patience, threshold)


def lowered(schedule: Schedule, losses: Sequence[float]) -> float:
    """What the losses of the epochs so far make of a rate: 1, but for `plateau`."""
    return schedule.lowered(losses) if isinstance(schedule, Plateau) else 1.0


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise MetaftError(f"{name} must be above 0 and below 1, got {value}")


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "step": step,
    "one-cycle": one_cycle,
    "stlr": stlr,
    "plateau": plateau,
}
"""`warmup` is the share of all steps in which the rate rises."""


@functools.cache
def make(text: str) -> Schedule:
    """`NAME[:KEY=VALUE,...]`. Raises MetaftError that begins with `schedule` where the text is not one."""
    return bind("schedule", text, SCHEDULES)()


def of_steps(text: str) -> Schedule:
    """`make`, where nothing but the step may tell the rate. Raises MetaftError likewise, also for `plateau`."""
    schedule = make(text)
    if isinstance(schedule, Plateau):
        raise MetaftError("schedule: plateau follows the loss of epochs, and meta-training has steps alone")
    return schedule
