"""How a method of search says what to try next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

Values = Mapping[str, Any]
"""Of the searched settings, by name."""


class Method(Protocol):
    """Proposes trials one after the other. What it proposes is a function of its arguments and of what it was asked
    and told so far, in that order: a search that goes on asks and tells all of its journal again."""

    size: int | None
    """How many trials there are at most; None: as many as are wanted."""
    exhausts: bool
    """Whether all of them are wanted where no number is."""

    def ask(self, number: int, before: Values | None = None) -> Values:
        """The settings of the next trial, whose number is one above the last one's, from 0 on; those that it had
        `before`, where the search goes on and asks again."""
        ...

    def tell(self, number: int, value: float | None) -> None:
        """What a trial came to; None: it failed."""
        ...
