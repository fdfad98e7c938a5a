"""Keeping freed memory in the process instead of handing it back to the kernel after every step."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_NEVER = -1  # read as the largest size that there is


def keep_freed_memory() -> bool:
    """Ask glibc to keep blocks below `keep_blocks` bytes, and all that lies behind the last one in use; returns whether
    there was a glibc to ask.

    Activations of an inner loop are large and short-lived. By default each is mapped and unmapped anew, and every page
    faults again, which on a virtual machine may cost more than computing what it holds. The commands call this; a
    library has no business to, so importing metaft does not.
    """
    mallopt = _mallopt()
    return mallopt is not None and keep_blocks() is not None and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def keep_blocks() -> int | None:
    """Ask glibc to keep blocks below as many bytes as it takes: 1 GiB, or 32 MiB, which every version takes. None where
    there is no glibc.

    Setting this or the other threshold ends glibc's own adjustment of both, so a refused one has to be replaced.
    """
    mallopt = _mallopt()
    return mallopt and next((size for size in (1 << 30, 32 << 20) if mallopt(_M_MMAP_THRESHOLD, size)), None)


def _mallopt() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl
        return None
