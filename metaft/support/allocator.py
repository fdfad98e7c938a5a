"""Keeping freed memory in the process instead of handing it back to the kernel after every step."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_NEVER = -1  # read as the largest size that there is


def keep_freed_memory(threshold: int = 1 << 30) -> bool:
    """Ask glibc to keep blocks below `threshold` bytes, and all that lies behind the last one in use; returns whether
    there was a glibc to ask.

    Activations of an inner loop are large and short-lived. By default each is mapped and unmapped anew, and every page
    faults again, which on a virtual machine may cost more than computing what it holds. The commands call this; a
    library has no business to, so importing metaft does not.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl
        return False
    # Setting either one ends glibc's own adjustment of both, so a refused threshold is replaced by the largest that
    # every version takes.
    mapped = mallopt(_M_MMAP_THRESHOLD, threshold) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    return bool(mapped) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
