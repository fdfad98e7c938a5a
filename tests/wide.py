"""A command of metaft's that computes in float64, for jobs of several processes: `wide COMMAND ARGUMENTS`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from helpers import in_float64


def main(argv: Sequence[str]) -> int:
    command, *rest = argv
    with in_float64():
        return importlib.import_module(f"metaft.{command}").main(rest)
