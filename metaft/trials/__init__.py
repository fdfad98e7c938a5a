"""Trials of a command's settings: what is tried (`space`), in which order (`METHODS`), and how they are run."""

from __future__ import annotations

from collections.abc import Callable

from metaft.trials.at_random import AtRandom
from metaft.trials.base import Method
from metaft.trials.grid import Grid
from metaft.trials.space import Space
from metaft.trials.tpe import Tpe

METHODS: dict[str, Callable[[Space, int, bool], Method]] = {"grid": Grid, "random": AtRandom, "tpe": Tpe}
"""Each takes (space, seed, whether more is better)."""
