"""What the commands share: settings from the command line, TOML and runs, and errors as one line with a status."""

# Above 300 lines: signals, errors, files and settings meet in every command, in this order.
from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from metaft.config import AdaptConfig, MetaTrainConfig, read_toml
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
from metaft.flags import parse
from metaft.options import Config, Settings, flat, from_mapping, options
from metaft.support.allocator import keep_freed_memory
from metaft.support.collector import uncollected
from metaft.support.memory import ran_out
from metaft.support.names import is_text
from metaft.support.output import of_command
from metaft.support.paths import to_replace

Opened = TypeVar("Opened")


@uncollected()
def settings(
    arguments: type[Settings], config: type[Config], argv: Sequence[str], *, prog: str, launch: str | None = None
) -> tuple[Config, Path | None]:
    """Settings of a command that has `--config` and `--resume`: (what holds now, the run folder to go on with).

    `arguments` is `config` with the group `Origin` added. What the command line leaves out is as in the TOML file or in
    the run. A `launch` that was restarted goes on with the run that it began. Raises MetaftError for what `parse` and
    `from_mapping` refuse, and for options that contradict each other.
    """
    for word in argv:
        if not is_text(word):
            raise MetaftError(f"{word!r} is not text; rename the file or folder")
    given = parse(arguments, argv, prog=prog)
    file, resume, auto_resume = (given.pop(name, None) for name in ("config", "resume", "auto_resume"))
    if resume is not None and file is not None:
        raise MetaftError("config: a resumed run has its own settings; give --resume or --config, not both")
    if resume is not None and given.get("out") is not None:
        raise MetaftError(f"out: a resumed run stays in its folder {resume}; leave --out {given['out']} away")
    base = config()
    if file is not None:
        base = from_mapping(config, read_toml(Path(file)), origin=file)
    elif resume is not None:
        from metaft.runs.folder import RunFolder

        try:
            base = of_run(config, RunFolder.open(Path(resume)).config, "resume")
        except CheckpointError as error:
            raise CheckpointError(f"resume: {error}") from None
    asked = dataclasses.replace(base, **given)
    if resume is None and (auto_resume or _began(flat(asked)["out"], launch)):
        return _taken_up(config, asked)
    return asked, None if resume is None else Path(resume)


def _began(out: str | None, launch: str | None) -> bool:
    """Whether the run in `--out` is one that this launch began before it was restarted, and no other's."""
    from metaft.runs.folder import RunFolder

    return out is not None and launch is not None and RunFolder(Path(out)).began_by(launch)


def _taken_up(kind: type[Config], config: Config) -> tuple[Config, Path | None]:
    """Settings as given, and the run in `--out` where there is one to go on with."""
    from metaft.runs.folder import RunFolder

    out = flat(config)["out"]
    if out is None:
        raise MetaftError("auto_resume: give --out too, the folder of the run to go on with")
    folder = RunFolder(Path(out))
    if not folder.config.exists():
        return config, None
    recorded = of_run(kind, folder.config, "out")
    config = dataclasses.replace(config, out=None)
    if flat(config).get("engine") == "tune":  # once, for all
        tuned = {name: flat(recorded)[name] for name in ("engine", "task_chunk")}
        config = dataclasses.replace(config, **tuned)
    return config, folder.path


def of_run(config: type[Config], file: Path, field: str) -> Config:
    """The settings in a run folder's `config.toml`. Raises MetaftError, naming `field`, for another command's run."""
    values = read_toml(file)
    for kind, other in CONFIGS.items():
        if values.keys() <= options(other).keys() and not values.keys() <= options(config).keys():
            own = next(name for name, settings in CONFIGS.items() if settings is config)
            raise MetaftError(f"{field}: {file.parent} is a run of metaft.{kind}, not of metaft.{own}")
    return from_mapping(config, values, origin=str(file))


CONFIGS: dict[str, type[Settings]] = {"meta_train": MetaTrainConfig, "adapt": AdaptConfig}
"""The commands that leave run folders, and the settings of each."""


def check_unchanged(config: Settings, own: Settings, path: Path, *, except_for: Iterable[str]) -> None:
    """Raises MetaftError for a setting that differs from the run's own and may not."""
    theirs = flat(own)
    for name, mine in flat(config).items():
        if name in theirs and mine != theirs[name] and name not in except_for:
            raise MetaftError(
                f"{name}: a resumed run keeps its settings; {path} was started with {theirs[name]!r}, given {mine!r}"
            )


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


def check_writable(path: Path, field: str, folder: Path) -> None:
    """Raises CheckpointError, naming `field`, for a file that could not be written; `folder` is to hold it.

    A device or pipe is left alone, since opening a pipe waits for its reader.
    """
    try:
        target = to_replace(path)
        if target is None:
            return
        with tempfile.TemporaryFile(dir=folder if target == path else target.parent):
            pass
    except OSError as error:
        raise CheckpointError(f"{field}: {path} cannot be written ({error.strerror})") from None


def check_own(path: Path, field: str, begins: Sequence[str], what: str) -> None:
    """Raises MetaftError, naming `field`, for a file that holds something else than `what`, and would be replaced: it
    does not begin with any of `begins`."""
    try:
        target = to_replace(path)
        if target is None:
            return
        with target.open("rb") as file:
            head = file.read(max(map(len, begins)))
    except OSError:  # nothing is there; or `check_writable` says what is
        return
    if head and not head.startswith(tuple(each.encode() for each in begins)):
        raise MetaftError(f"{field}: {path} is there, and is no {what}; name another file, or remove it")


def fresh_folder(base: Path) -> Path:
    """`base`, or the first of `base-2`, `base-3`, ... that is not taken."""
    number, path = 1, base
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path
