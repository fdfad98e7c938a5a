"""Paths as people write them, the same way for every option, TOML field and function.

`~` and `~user` are a home folder, a relative path is below the folder that the command runs in; nothing else is
expanded. What a run folder keeps is absolute, so that it holds wherever the run is opened.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path


def local(path: str | os.PathLike[str]) -> Path:
    """A path with its `~` taken for the home folder; where nobody knows that, it stays."""
    return Path(os.path.expanduser(path))


def absolute(path: str | os.PathLike[str]) -> Path:
    """The same from the root on."""
    there = local(path)
    with contextlib.suppress(OSError, ValueError):  # of a working folder that is gone, of a letter that no path has
        # Behind a link ".." is another folder than the one that is written before it.
        return Path(os.path.realpath(there) if ".." in there.parts else os.path.abspath(there))
    return there


def to_replace(path: Path) -> Path | None:
    """The file whose place a new one takes: `path`, or the one that it links to, which need not be there yet.

    None for a device, a pipe, or another name of stdout or stderr, which are written to instead. Raises OSError for
    what is none of these (a folder, a disk) and for links in a circle.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or stream_at(path) is not None:
        return None
    if not stat.S_ISREG(mode):
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENOTSUP
        raise OSError(number, os.strerror(number))
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def stream_at(path: Path) -> int | None:
    """1 or 2 where a link such as /dev/stdout leads to what that number has open."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.islink(path) and os.path.samestat(os.stat(path), os.fstat(number)):
                return number
    return None
