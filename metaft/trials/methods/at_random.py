"""Random search (Bergstra & Bengio 2012): each setting by itself, uniform over its choices or its range.

Where there is a finite number of combinations none is tried twice.
"""

from __future__ import annotations

from metaft.sampler import Stream, raw_words, uniform
from metaft.trials.methods.base import Values
from metaft.trials.methods.grid import Grid
from metaft.trials.space import Space

PATIENCE = 1000
"""Draws in a row that may be of what was tried."""


class AtRandom:
    """Draw i is a function of (seed, i) alone: word j of its stretch of the stream is setting j's. So is trial i: draw
    i, or, of a finite number of combinations, the next draw that is none of those tried. Where that is long in coming,
    since few are left or what is left is improbable, it is the first that is left, in the order of a grid."""

    exhausts = False

    def __init__(self, space: Space, seed: int, maximise: bool) -> None:
        self._space, self._seed = space, seed
        self.size = space.size
        self._trials: list[Values] = []
        self._tried: set[str] = set()
        """As they are written."""
        self._draws = 0

    def ask(self, number: int, before: Values | None = None) -> Values:
        if self.size is None:
            return self._draw(number) if before is None else before
        while len(self._trials) < number:  # asked for out of turn
            self._take(self._untried())
        if len(self._trials) == number:
            self._take(self._untried() if before is None else before)
        return self._trials[number]

    def _take(self, values: Values) -> None:
        self._trials.append(values)
        self._tried.add(_written(values))

    def _untried(self) -> Values:
        for _ in range(PATIENCE):
            values = self._draw(self._draws)
            self._draws += 1
            if _written(values) not in self._tried:
                return values
        every = map(Grid(self._space, self._seed, True).ask, range(self.size or 0))
        return next((values for values in every if _written(values) not in self._tried), values)

    def _draw(self, number: int) -> Values:
        searched = self._space.searched
        words = raw_words(self._seed, "train", [number], len(searched), stream=Stream.SEARCH)
        return {d.name: d.at(float(u)) for d, u in zip(searched, uniform(words)[0], strict=True)}

    def tell(self, number: int, value: float | None) -> None:
        pass


def _written(values: Values) -> str:
    return repr(sorted(values.items()))
