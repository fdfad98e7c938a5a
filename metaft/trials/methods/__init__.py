"""In which order settings are tried, one file each."""

from __future__ import annotations

from collections.abc import Callable

from metaft.trials.methods.at_random import AtRandom
from metaft.trials.methods.base import Method
from metaft.trials.methods.grid import Grid
from metaft.trials.methods.tpe import Tpe
from metaft.trials.space import Space

METHODS: dict[str, Callable[[Space, int, bool], Method]] = {"grid": Grid, "random": AtRandom, "tpe": Tpe}
"""Each takes (space, seed, whether more is better)."""
