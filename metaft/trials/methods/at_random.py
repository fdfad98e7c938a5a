"""Random search (Bergstra & Bengio 2012): each setting by itself, uniform over its choices or its range."""

from __future__ import annotations

from metaft.sampler import Stream, raw_words, uniform
from metaft.trials.methods.base import Values
from metaft.trials.space import Space


class AtRandom:
    """Trial i is a function of (seed, i) alone: word j of its stretch of the stream is setting j's."""

    size: int | None = None

    def __init__(self, space: Space, seed: int, maximise: bool) -> None:
        self._space, self._seed = space, seed

    def ask(self, number: int, before: Values | None = None) -> Values:
        if before is not None:
            return before
        searched = self._space.searched
        words = raw_words(self._seed, "train", [number], len(searched), stream=Stream.SEARCH)
        return {d.name: d.at(float(u)) for d, u in zip(searched, uniform(words)[0], strict=True)}

    def tell(self, number: int, value: float | None) -> None:
        pass
