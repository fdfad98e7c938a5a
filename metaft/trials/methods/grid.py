"""All combinations, the last setting of the file changing the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metaft.errors import MetaftError
from metaft.trials.methods.base import Values
from metaft.trials.space import Dimension, Space


class Grid:
    """Raises MetaftError for a range without steps."""

    exhausts = True

    def __init__(self, space: Space, seed: int, maximise: bool) -> None:
        self._axes = {dimension.name: _values(dimension) for dimension in space.searched}
        self.size = space.size

    def ask(self, number: int, before: Values | None = None) -> Values:
        if before is not None:
            return before
        values: dict[str, Any] = {}
        for name, axis in reversed(self._axes.items()):
            number, place = divmod(number, len(axis))
            values[name] = axis[place]
        return {name: values[name] for name in self._axes}

    def tell(self, number: int, value: float | None) -> None:
        pass


def _values(dimension: Dimension) -> Sequence[Any]:
    if dimension.values is None:
        raise MetaftError(
            f"method: a grid needs choices, or a range with a step, and {dimension.name} has neither "
            f"({dimension.plain()!r})"
        )
    return dimension.values
