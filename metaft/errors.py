"""Errors that a user can mend. Each message is one line and names the field or file and the offending value."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Iterable


class MetaftError(Exception):
    """Bad input: the commands print the message alone and end with exit status 2."""

    status = 2
    by_all = False
    """Whether all processes of a job raise it at the same point, so that the first of them is sure to say it."""


class DataError(MetaftError):
    """A data set that is missing, broken or too small for the episodes asked of it."""


class CheckpointError(MetaftError):
    """A run folder or checkpoint that cannot be read, or does not fit what is asked of it."""


class NonFiniteError(MetaftError):
    """Training produced a loss or gradient that is not finite; exit status 1, since the input was well-formed."""

    status = 1
    by_all = True


class Interrupted(MetaftError):
    """A signal asked the run to stop; its number decides the exit status (128 + number, as shells do)."""

    by_all = True

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number


class OutOfMemory(MetaftError):
    """Memory ran out; exit status 1, since the input was well-formed."""

    status = 1


class OutputLost(MetaftError):
    """Results that were to be printed alone did not arrive; exit status 1, since the input was well-formed."""

    status = 1


class TrialsFailed(MetaftError):
    """No trial of a search came to a figure; exit status 1, since the input was well-formed."""

    status = 1


class RankLost(MetaftError):
    """Another process of the job died, or did not answer in time; exit status 1, since the input was well-formed."""

    status = 1
    hint = ""
    """How to go on, to be added to what is known of the other process."""
    waited = 0.0
    """Seconds for which this one had waited for it."""
    kept: int | None = None
    """The step of the last checkpoint, where this is the process that wrote it."""


class RanksDiffer(MetaftError):
    """What must be the same in all processes of a job is not."""


class SaidElsewhere(MetaftError):
    """An error that another process of the job puts into words; this one only ends with its status."""

    by_all = True

    def __init__(self, status: int) -> None:
        super().__init__("another process of this job says why")
        self.status = status


def check_ways(field: str, ways: int, loss: object) -> None:
    """Raises MetaftError for classes that cannot be told apart: one alone is right whatever is learned."""
    if loss == "cross_entropy" and ways < 2:
        raise MetaftError(f"{field} must be at least 2 where classes are told apart, got {ways}")


def check_count(field: str, value: object, at_least: int) -> None:
    """Raises MetaftError for what is no whole number, or one below `at_least`."""
    try:
        enough = operator.index(value) >= at_least  # type: ignore[reportArgumentType]
    except TypeError:
        raise MetaftError(f"{field} must be a whole number, got {value!r}") from None
    if not enough:
        raise MetaftError(f"{field} must be at least {at_least}, got {value}")


def check_rate(field: str, value: object) -> None:
    """Raises MetaftError for what is no number, or one below 0 or not finite."""
    if not isinstance(value, numbers.Real):
        raise MetaftError(f"{field} must be a number, got {value!r}")
    if not 0 <= float(value) < math.inf:
        raise MetaftError(f"{field} must be at least 0 and finite, got {value}")


class MetaftWarning(UserWarning):
    """What was asked for is done, but may not be what was meant. The commands print it as one line, once."""


def words_of(error: BaseException) -> str:
    """What it says, in one line, or its class where it says nothing.

    >>> words_of(ValueError("two   words")), words_of(MemoryError())
    ('two words', 'MemoryError')
    """
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what it says, or its class where that is empty.

    >>> first_line(RuntimeError("no  such kernel\\nat kernels.cpp:12")), first_line(MemoryError())
    ('no such kernel', 'MemoryError')
    """
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__


def class_and_words(error: BaseException, at_most: int | None = 200) -> str:
    """Of an error from code that is not ours: its class, and the first `at_most` characters of what it says.

    >>> class_and_words(ValueError("two   words")), class_and_words(AssertionError())
    ('ValueError: two words', 'AssertionError')
    """
    name, said = type(error).__name__, " ".join(str(error).split())[:at_most]
    return f"{name}: {said}" if said else name


def no_such(
    field: str,
    word: object,
    known: Iterable[str],
    *,
    lacks: str = "no",
    says: str = "known are",
    more: str = "",
    near: str | None = None,
    written: Iterable[str] | None = None,
) -> MetaftError:
    """What to raise for a word that is none of the known ones:

    >>> print(no_such("model", "conv5", ["conv4", "mlp"]))
    model: no 'conv5', known are conv4, mlp; did you mean 'conv4'?

    `lacks` and `says` are the words before the unknown and the known ones, `more` is what else
    there is. The suggestion is looked for by `near` in place of the word. The known ones are listed
    as they are `written`, where that is another way.
    """
    known = list(known)
    listed = ", ".join(known if written is None else written)
    near = suggest(str(word) if near is None else near, known)
    return MetaftError(f"{field}: {lacks} {word!r}, {says} {listed}{more}{near}")


def suggest(word: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """`"; did you mean 'x'?"` for the known word nearest to a misspelt one, or nothing."""
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=cutoff)
    return f"; did you mean {lower[near[0]]!r}?" if near else ""
