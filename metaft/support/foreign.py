"""Errors of code that is not ours, which have no class in common: whether memory ran out, and else in our words."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

from metaft.errors import MetaftError, class_and_words

# torch's allocators on a CPU and a GPU, oneDNN, the system's calls, and its loader while torch is imported.
_SAID = re.compile(
    r"(?i)can ?not allocate memory|can't allocate memory|not enough memory|out of memory|bad_alloc|"
    r"could not create a (memory|primitive)|failed to map segment|can't start new thread"
)


def ran_out(error: BaseException) -> bool:
    """By its class, or by the first line of what it says."""
    classes = {each.__name__ for each in type(error).__mro__}
    return not classes.isdisjoint({"MemoryError", "OutOfMemoryError"}) or bool(_SAID.search(str(error).split("\n")[0]))


@contextlib.contextmanager
def in_our_words(
    what: str | Callable[[Exception], MetaftError], *, passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Inside, an error of a library or of the user's own code becomes a MetaftError: `what` fails, with its class and
    words behind it, or what a function makes of it. Errors in our words already, of the classes in `passing`, and a
    full memory stay as they are."""
    try:
        yield
    except (MetaftError, *passing):
        raise
    except Exception as error:
        if ran_out(error):
            raise
        said = MetaftError(f"{what} ({class_and_words(error)})") if isinstance(what, str) else what(error)
        raise said from error
