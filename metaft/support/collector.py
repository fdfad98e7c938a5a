"""Python's collector of cyclic garbage, which looks through all objects again and again while they only become more."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside it is off, as while modules are imported and 60,000 pictures listed, of which nothing is garbage: 0.2 of
    3.6 s until a run's first meta-step (docs/performance.md). What the caller had is back afterwards."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
