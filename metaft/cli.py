"""What the commands share: errors as one line with a status, notes, signals, and the processes of a job."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from metaft.config import read_toml
from metaft.dist import patience
from metaft.dist.group import join
from metaft.dist.ranks import ALONE, Ranks
from metaft.dist.torchrun import check_alone
from metaft.errors import (
    CheckpointError,
    Interrupted,
    MetaftError,
    MetaftWarning,
    OutOfMemory,
    SaidElsewhere,
    first_line,
)
from metaft.support.allocator import keep_freed_memory
from metaft.support.foreign import ran_out
from metaft.support.output import of_command

Opened = TypeVar("Opened")


@of_command()
def guarded(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None, *, smaller: str) -> int:
    """Run a command and turn errors that the user can mend into one line on stderr and an exit status.

    `smaller` names what takes less memory where there is not enough. What cannot be printed changes neither.
    """
    argv = sys.argv[1:] if argv is None else argv
    keep_freed_memory()
    try:
        with _noted_warnings():
            command(argv)
    except MetaftError as error:
        if not isinstance(error, SaidElsewhere):
            line = _escaped(f"{_file_of(error, argv)}{error}")
            print(f"metaft: {'' if isinstance(error, Interrupted) else 'error: '}{line}", file=sys.stderr)
        return error.status
    except Exception as error:
        lacking = _no_memory(error, smaller)
        print(f"metaft: error: {lacking}", file=sys.stderr)
        return lacking.status
    except SystemExit as done:  # after --help
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt:  # before training or after the meta-test, when there is nothing to keep
        print("metaft: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


@contextlib.contextmanager
def _noted_warnings() -> Iterator[None]:
    """Inside, a MetaftWarning is one line on stderr without the place in the code."""
    former = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **kwargs: Any) -> None:
        if issubclass(category, MetaftWarning):
            print(f"metaft: note: {message}", file=sys.stderr)
        else:
            former(message, category, *place, **kwargs)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = former


def opened_run(open_it: Callable[[], Opened]) -> Opened:
    """What opens a run that a command names, with each warning as a note: a line without the place in the code. Raises
    CheckpointError, naming `run`."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            opened = open_it()
        except CheckpointError as error:
            raise CheckpointError(f"run: {error}") from None
    for warning in said:
        print(f"metaft: note: {warning.message}", file=sys.stderr)
    return opened


def _no_memory(error: Exception, smaller: str) -> OutOfMemory:
    """What to say where memory ran out. Raises any other error again."""
    if not ran_out(error):
        raise error
    return OutOfMemory(f"not enough memory ({first_line(error)}); try {smaller}")


def _escaped(text: str) -> str:
    """One line, whatever the names in it hold."""
    return "\\n".join(text.splitlines())


def _file_of(error: MetaftError, argv: Sequence[str]) -> str:
    """`"my.toml: "` where the message begins with a field that comes from the TOML file."""
    file = _option(argv, "config")
    field = re.match(r"\w+(?=[: ])", str(error))
    if file is None or field is None or _option(argv, field[0].replace("_", "-")) is not None:
        return ""
    try:
        return f"{file}: " if field[0] in read_toml(Path(file)) else ""
    except MetaftError:  # which is what the message is about
        return ""


def _option(argv: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`, as typed."""
    for i, word in enumerate(argv):
        if word == f"--{name}" and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None


def in_ranks(command: Callable[[Sequence[str], Ranks], None], argv: Sequence[str] | None, *, smaller: str) -> int:
    """`guarded` for a command that torchrun may start several times: rank 0 alone prints, and one speaks of errors."""

    def together(argv: Sequence[str]) -> None:
        with contextlib.ExitStack() as stack:
            ranks = join()
            stack.callback(ranks.close)
            if ranks.count > 1:
                # torchrun ends all where one has ended. None may go before it has said why, nor with another status.
                stack.callback(signal.signal, signal.SIGTERM, signal.SIG_IGN)
                stack.enter_context(StopSignals(ranks))
            try:
                with contextlib.ExitStack() as quiet:
                    if ranks.rank:
                        nowhere = quiet.enter_context(open(os.devnull, "w", encoding="utf-8"))
                        quiet.enter_context(contextlib.redirect_stdout(nowhere))
                        quiet.enter_context(contextlib.redirect_stderr(nowhere))
                    command(argv, ranks)
            except MetaftError as error:
                raise ranks.last_words(error) from None
            except Exception as error:
                raise ranks.last_words(_no_memory(error, smaller)) from None

    return guarded(together, argv, smaller=smaller)


def in_one(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None, *, prog: str, smaller: str) -> int:
    """`guarded` for a command that has no use for torchrun: several processes would do the same work and files."""

    def alone(argv: Sequence[str]) -> None:
        check_alone(prog)
        command(argv)

    return guarded(alone, argv, smaller=smaller)


class StopSignals:
    """Turns SIGINT and SIGTERM into a request that the run asks for at safe points; a second SIGINT is final.

    A second SIGTERM is not: under torchrun each process may get one from the scheduler and one from torchrun. Several
    ranks learn of a request together, see `Ranks.stop`. A worker process that is waited for (`metaft.engines.workers`)
    gets `PATIENCE` seconds to end its part after a request, and is then given up; among ranks, which stop together,
    four times as many.
    """

    PATIENCE = 5.0

    def __init__(self, ranks: Ranks = ALONE, message: str = "stopped") -> None:
        self.ranks = ranks
        self.message = message
        """What to say where a wait is given up."""
        self.received: int | None = None
        self._since = 0.0
        self._former: dict[int, Any] = {}
        self._waits = contextlib.ExitStack()

    def __enter__(self) -> StopSignals:
        # Python delivers signals to its main thread alone; elsewhere (a notebook's worker) they are left as they are.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._receive)
        self._waits.enter_context(patience.ends_by(self._overdue))
        return self

    def __exit__(self, *_: object) -> None:
        self._waits.close()
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.received is None:
            self._since = time.monotonic()
        self.received = number
        if self.ranks.count > 1:
            self.ranks.asked = number

    def _overdue(self) -> None:
        limit = self.PATIENCE * (1 if self.ranks.count == 1 else 4)
        if self.received is not None and time.monotonic() - self._since > limit:
            raise Interrupted(f"{self.message} (a worker process did not answer)", self.received)

    def check(self, message: str) -> None:
        """Raises Interrupted with this message where a signal has come, to any rank."""
        number = self.received if self.ranks.count == 1 else self.ranks.stop
        if number:
            raise Interrupted(message, number)


class _Stopped(BaseException):
    """No library between takes it for an error of its own."""


@contextlib.contextmanager
def stopped_at_once(message: str) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM end what goes on wherever it is, as an Interrupted with this message; further ones are
    ignored, so that what tidies up can do so. For what has no position to keep."""

    def receive(number: int, frame: types.FrameType | None) -> None:
        for other in former:
            signal.signal(other, signal.SIG_IGN)
        raise _Stopped(number)

    former: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in former:
            signal.signal(number, receive)
        yield
    except _Stopped as stopped:
        raise Interrupted(message, stopped.args[0]) from None
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
