"""The ways to matplotlib. Without a home, or a writable one, its settings lie in a temporary folder; nothing is lost by
that, and its import shall not say so in the middle of what a command prints."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, matplotlib logs errors alone."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def font_folder() -> Path:
    """Where matplotlib keeps the fonts that it ships."""
    with quiet():
        import matplotlib
    return Path(matplotlib.get_data_path()) / "fonts/ttf"
