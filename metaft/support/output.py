"""What is printed never decides over what was done: no encoding, closed pipe or full disk ends a command.

A reader that has seen enough (`| head`) is no failure: what is printed after it goes nowhere, files are written all the
same, and the exit status is the command's own.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

_REPLACED = "metaft-replaced"


def _replaced(error: UnicodeError) -> tuple[bytes, int]:
    """For letters that an encoding lacks. Python keeps bytes of a file name that are no text as lone surrogates."""
    assert isinstance(error, UnicodeEncodeError)
    letters = map(ord, error.object[error.start : error.end])
    return bytes(c - 0xDC00 if 0xDC80 <= c <= 0xDCFF else ord("?") for c in letters), error.end


codecs.register_error(_REPLACED, _replaced)


class Steady:
    """A text stream over another one, or over none, whose writing raises nothing.

    A letter that the stream cannot take becomes "?", and the bytes of a file name that is not text stay as they are.
    After an error of the system's nothing more is written.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.lost: Exception | None = None
        """Why nothing more is written."""

    def __getattr__(self, name: str) -> Any:
        if name == "stream" or self.stream is None:
            raise AttributeError(name)
        return getattr(self.stream, name)

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    @property
    def closed_by_reader(self) -> bool:
        """Whether what it is piped to has ended."""
        return isinstance(self.lost, OSError) and self.lost.errno in (errno.EPIPE, errno.ECONNRESET)

    def isatty(self) -> bool:
        try:
            return self.stream is not None and bool(self.stream.isatty())
        except (OSError, ValueError):  # ValueError: it is closed
            return False

    def write(self, text: str) -> int:
        if self.stream is None or self.lost is not None:
            return len(text)
        try:
            self.stream.write(text)
        except UnicodeError:
            with self._loss_noted():
                self._write_bytes(text.encode(self.encoding, _REPLACED))
        except (OSError, ValueError) as error:
            self.lost = error
        return len(text)

    def _write_bytes(self, data: bytes) -> None:
        if not hasattr(self.stream, "buffer"):
            self.stream.write(data.decode(self.encoding, "replace"))
            return
        self.stream.flush()  # what came before
        self.stream.buffer.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.stream is not None and self.lost is None:
            with self._loss_noted():
                self.stream.flush()

    @contextlib.contextmanager
    def _loss_noted(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # UnicodeError is a ValueError
            self.lost = error


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Inside, or in a function that this decorates, printing to stdout and stderr raises nothing."""
    former = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream if isinstance(stream, Steady) else Steady(stream) for stream in former)  # type: ignore[assignment]
    ours = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
        # Only what is still ours: another may have been put there meanwhile.
        if sys.stdout is ours[0]:
            sys.stdout = former[0]
        if sys.stderr is ours[1]:
            sys.stderr = former[1]


@contextlib.contextmanager
def of_command() -> Iterator[None]:
    """`steady` for a whole command: files get no number that belongs to a closed stdout or stderr, and Python, when it
    ends, finds nothing left to write where it cannot."""
    for number in range(3):
        if not _is_open(number):
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
    with steady():
        ours = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Steady)]
        try:
            yield
        finally:
            for stream in ours:
                stream.flush()
                if stream.lost is not None:
                    _lead_nowhere(stream)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _lead_nowhere(stream: Steady) -> None:
    """What is still in the buffers of a broken stream is written to nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        if number in (1, 2):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def left(stream: Any) -> bool:
    """Whether the reader of a stream has ended, so that nothing more need be done for it."""
    return isinstance(stream, Steady) and stream.closed_by_reader


def lost(stream: Any) -> str:
    """Why what was printed did not arrive, where that is an error and no reader who has seen enough; or nothing."""
    if isinstance(stream, Steady) and stream.lost is not None and not stream.closed_by_reader:
        return str(getattr(stream.lost, "strerror", None) or stream.lost)
    return ""


def say(line: str) -> None:
    """A line on stderr, from where no `steady` need be around it."""
    with steady():
        print(line, file=sys.stderr)
