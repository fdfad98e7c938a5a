"""Pictures of a run that is over: one that cannot be drawn takes nothing else away."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from metaft.errors import CheckpointError, words_of


def drawn(pictures: Mapping[Path, Callable[[], object]]) -> list[Path]:
    """Draws each, and returns the files that came out; the others are named in one line on stderr.

    Raises CheckpointError as the functions do, which is for files of the run that are damaged.
    """
    done: list[Path] = []
    failed: list[str] = []
    for path, draw in pictures.items():
        why = missed(draw)
        if why is None:
            done.append(path)
        else:
            failed.append(f"{path} ({why})")
    if failed:
        print(f"metaft: note: pictures that cannot be drawn: {', '.join(failed)}", file=sys.stderr)
    return done


def plotting() -> Any:
    """`metaft.plots`, fetched by the picture that needs it: without matplotlib no more is lost."""
    from metaft import plots

    return plots


def listed(paths: list[Path]) -> str:
    """What to say of the pictures that there are."""
    return "pictures: " + (", ".join(map(str, paths)) or "none")


def missed(draw: Callable[[], object]) -> str | None:
    """Why a picture, or a page of them, cannot be drawn, or None where it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that a font lacks, or of axes without an extent
            draw()
    except CheckpointError:
        raise
    except Exception as error:  # a full disk, no memory, figures that matplotlib cannot place
        return getattr(error, "strerror", None) or words_of(error)
    return None
