"""Runs of `metaft.adapt` that a table is made of: each in a folder, finished by the first call that needs it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from metaft import adapt


def apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A script's own words, and those after `--`, which go to every run."""
    words = list(argv)
    return (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])


def finished(out: Path, words: Sequence[str]) -> Path:
    """The folder of a run with these words; one that was stopped goes on. Raises SystemExit where it fails."""
    if not (out / "result.json").exists():
        with contextlib.redirect_stdout(sys.stderr):
            status = adapt.main([*words, "--auto-resume", "--out", str(out)])
        if status:
            raise SystemExit(status)
    return out
