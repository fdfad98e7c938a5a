"""How long to wait for another process, which may never answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_asks: ContextVar[Callable[[], None]] = ContextVar("patience", default=lambda: None)


@contextlib.contextmanager
def ends_by(asked: Callable[[], None]) -> Iterator[None]:
    """Inside, in this thread, whoever waits calls `asked` now and then; it raises where the wait is to end."""
    token = _asks.set(asked)
    try:
        yield
    finally:
        _asks.reset(token)


def ask() -> None:
    """To be called while waiting."""
    _asks.get()()
