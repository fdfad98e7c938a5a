"""Errors that a user can mend. Each message is one line and names the field or file and the offending value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MetaftError(Exception):
    """Bad input: the commands print the message alone and end with exit status 2."""

    status = 2


class DataError(MetaftError):
    """A data set that is missing, broken or too small for the episodes asked of it."""


class CheckpointError(MetaftError):
    """A run folder or checkpoint that cannot be read, or does not fit what is asked of it."""


class NonFiniteError(MetaftError):
    """Training produced a loss or gradient that is not finite; exit status 1, since the input was well-formed."""

    status = 1


class Interrupted(MetaftError):
    """A signal asked the run to stop; its number decides the exit status (128 + number, as shells do)."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number


class MetaftWarning(UserWarning):
    """What was asked for is done, but may not be what was meant. The commands print it as one line, once."""


def suggest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word nearest to a misspelt one, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
