"""One process at a time writes to a run folder.

The lock is the kernel's, on an open file (`flock`), so it ends with its process however that ends, and a file that a
killed one left behind locks nothing. What the file holds, the process and its machine, is for the message alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from metaft.errors import CheckpointError, MetaftError

_WITHOUT = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_held: set[int] = set()


def _forget() -> None:
    # A forked worker shares the open file: while it lives, the lock would outlive a parent that is killed.
    for number in _held:
        os.close(number)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def held(file: Path, what: str) -> Iterator[None]:
    """Inside, no other process (and no other part of this one) can hold the same file. It is gone afterwards.

    Raises MetaftError, which names the holder, where there is one, and CheckpointError where the file cannot be made;
    both begin with `what`. On a file system without locks it does nothing but say so.
    """
    try:
        number = _locked(file, what)
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise CheckpointError(f"{what} cannot be written ({error.strerror})") from None
        print(f"note: {what} is on a file system without locks; start no second run there", file=sys.stderr)
        yield
        return
    _held.add(number)
    try:
        os.truncate(number, 0)
        os.write(number, f"{os.getpid()} {socket.gethostname()}".encode())
    except OSError:  # a full disk: the lock holds without a name on it
        pass
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file)  # before the lock ends: afterwards it could be another's
        if number in _held:  # not in a forked process, which has closed it
            _held.discard(number)
            os.close(number)


def _locked(file: Path, what: str) -> int:
    """The descriptor of the file, locked. Raises MetaftError where another holds it, and OSError."""
    while True:
        number = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(number, file):
                return number
        except BlockingIOError:
            process, _, machine = os.read(number, 300).decode(errors="replace").partition(" ")
            by = f"process {process} on {machine}" if machine else "another process"
            os.close(number)
            raise MetaftError(f"{what} is in use by {by}; wait until it has ended, or stop it") from None
        except BaseException:
            os.close(number)
            raise
        os.close(number)  # a run that just ended has removed this one


def _is(number: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(file))
    except FileNotFoundError:
        return False
