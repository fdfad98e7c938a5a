"""Random search (Bergstra & Bengio 2012): each setting by itself, uniform over its choices or its range.

Where there is a finite number of combinations none is tried twice.
"""

from __future__ import annotations

from metaft.sampler import Stream, raw_words, uniform
from metaft.trials.methods.base import Values
from metaft.trials.space import Space


class AtRandom:
    """Draw i is a function of (seed, i) alone: word j of its stretch of the stream is setting j's. So is trial i: draw
    i, or, of a finite number of combinations, the i-th draw that is none of those before it."""

    exhausts = False

    def __init__(self, space: Space, seed: int, maximise: bool) -> None:
        self._space, self._seed = space, seed
        self.size = space.size
        self._drawn: dict[str, Values] = {}
        """Different ones of a finite number, by how they are written, in the order in which they came."""
        self._draws = 0

    def ask(self, number: int, before: Values | None = None) -> Values:
        if before is not None:
            return before
        if self.size is None:
            return self._draw(number)
        assert number < self.size, "there are no more"
        while len(self._drawn) <= number:
            values = self._draw(self._draws)
            self._drawn.setdefault(repr(values), values)
            self._draws += 1
        return [*self._drawn.values()][number]

    def _draw(self, number: int) -> Values:
        searched = self._space.searched
        words = raw_words(self._seed, "train", [number], len(searched), stream=Stream.SEARCH)
        return {d.name: d.at(float(u)) for d, u in zip(searched, uniform(words)[0], strict=True)}

    def tell(self, number: int, value: float | None) -> None:
        pass
