"""Whether an error says that memory ran out, which no library has one class for."""

from __future__ import annotations

import re

# torch's allocators on a CPU and a GPU, oneDNN, the system's calls, and its loader while torch is imported.
_SAID = re.compile(
    r"(?i)can ?not allocate memory|can't allocate memory|not enough memory|out of memory|bad_alloc|"
    r"could not create a (memory|primitive)|failed to map segment|can't start new thread"
)


def ran_out(error: BaseException) -> bool:
    """By its class, or by the first line of what it says."""
    classes = {each.__name__ for each in type(error).__mro__}
    return not classes.isdisjoint({"MemoryError", "OutOfMemoryError"}) or bool(_SAID.search(str(error).split("\n")[0]))
