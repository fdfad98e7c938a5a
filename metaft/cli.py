"""What the commands share: arguments from the command line and TOML, and errors as one line with a status."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from metaft.config import AdaptConfig, Config, MetaTrainConfig, from_mapping, read_toml
from metaft.errors import Interrupted, MetaftError, MetaftWarning, suggest
from metaft.names import is_text

Arguments = TypeVar("Arguments")


def parse(cls: type[Arguments], argv: Sequence[str], *, prog: str, default: Arguments | None = None) -> Arguments:
    """Arguments by tyro. `default` supplies what the command line leaves out.

    Exits with status 0 for --help. Raises MetaftError for an unknown option or a value of the wrong type.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            arguments = tyro.cli(cls, args=_switches(cls, argv), prog=prog, default=default)
    except SystemExit as done:
        if not done.code:
            raise
        line = _one_line(said.getvalue())
        known = [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = [word for word in argv if word.startswith("--") and word in line and word not in known]
        raise MetaftError(line + (suggest(unknown[0], known) if unknown else "")) from None
    assert arguments is not None
    return arguments


def _one_line(box: str) -> str:
    """What tyro says in a coloured box over several lines, without the box, its title and the help below the rule."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]
    said = itertools.takewhile(lambda line: line.strip("─╰╯"), lines)
    return " ".join(word for line in said for word in line.split())


def _switches(cls: type, argv: Sequence[str]) -> list[str]:
    """Spell `--rotate` and `--no-rotate` as `--rotate True` and `--rotate False`.

    tyro makes such pairs for a bool, but not for one that may also be left open (None).
    """
    three_way = {f.name.replace("_", "-") for f in dataclasses.fields(cls) if f.type == "bool | None"}  # type: ignore[arg-type]
    out: list[str] = []
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        name = word.removeprefix("--").replace("_", "-")
        if word.startswith("--") and name in three_way and following not in ("True", "False", "None"):
            out += [word, "True"]
        elif word.startswith("--no") and name.removeprefix("no-") in three_way:
            out += ["--" + name.removeprefix("no-"), "False"]
        else:
            out.append(word)
    return out


def option(argv: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`, looked up before the real parse (which needs it as default)."""
    for i, word in enumerate(argv):
        if word == f"--{name}" and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None


def settings(
    arguments: type[Any], config: type[Config], argv: Sequence[str], *, prog: str
) -> tuple[Config, Path | None]:
    """Settings of a command that has `--config` and `--resume`: (what holds now, the run folder to go on with).

    `arguments` is `config` with the fields `config` and `resume` added. What the command line leaves out is as in the
    TOML file or in the run. Raises MetaftError for what `parse` and `from_mapping` refuse, and for options that
    contradict each other.
    """
    for word in argv:
        if not is_text(word):
            raise MetaftError(f"{word!r} is not text; rename the file or folder")
    resume, file = option(argv, "resume"), option(argv, "config")
    if resume is not None and file is not None:
        raise MetaftError("config: a resumed run has its own settings; give --resume or --config, not both")
    if resume is not None and option(argv, "out") is not None:
        raise MetaftError(f"out: a resumed run stays in its folder {resume}; leave --out {option(argv, 'out')} away")
    base = config()
    if file is not None:
        base = from_mapping(config, read_toml(Path(file)), origin=file)
    elif resume is not None:
        from metaft.run import RunFolder

        base = of_run(config, RunFolder.open(Path(resume)).config, "resume")
    given = parse(arguments, argv, prog=prog, default=arguments(**dataclasses.asdict(base)))
    fields = {f.name: getattr(given, f.name) for f in dataclasses.fields(config)}
    return config(**fields), None if resume is None else Path(resume)


def of_run(config: type[Config], file: Path, field: str) -> Config:
    """The settings in a run folder's `config.toml`. Raises MetaftError, naming `field`, for another command's run."""
    values = read_toml(file)
    fields = {cls: {f.name for f in dataclasses.fields(cls)} for cls in KINDS}
    for other, kind in KINDS.items():
        if set(values) <= fields[other] and not set(values) <= fields[config]:
            raise MetaftError(f"{field}: {file.parent} is a run of metaft.{kind}, not of metaft.{KINDS[config]}")
    return from_mapping(config, values, origin=str(file))


KINDS: dict[type[Any], str] = {MetaTrainConfig: "meta_train", AdaptConfig: "adapt"}
"""The commands that leave run folders."""


def check_unchanged(config: Any, own: Any, path: Path, *, except_for: Iterable[str]) -> None:
    """Raises MetaftError for a setting that differs from the run's own and may not."""
    for field in dataclasses.fields(config):
        mine, theirs = getattr(config, field.name), getattr(own, field.name)
        if mine != theirs and field.name not in except_for:
            raise MetaftError(
                f"{field.name}: a resumed run keeps its settings; {path} was started with {theirs!r}, given {mine!r}"
            )


def guarded(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None) -> int:
    """Run a command and turn errors that the user can mend into one line on stderr and an exit status."""
    try:
        with _noted_warnings():
            command(sys.argv[1:] if argv is None else argv)
    except MetaftError as error:
        print(f"metaft: {'' if isinstance(error, Interrupted) else 'error: '}{error}", file=sys.stderr)
        return error.status
    except SystemExit as done:  # tyro, after --help
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


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request that the run asks for at safe points; a second one is final."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python delivers signals to its main thread alone; elsewhere (a notebook's worker) they are left as they are.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number

    def check(self, message: str) -> None:
        """Raises Interrupted with this message where a signal has come."""
        if self.received is not None:
            raise Interrupted(message, self.received)


def fresh_folder(base: Path) -> Path:
    """`base`, or the first of `base-2`, `base-3`, ... that is not taken."""
    number, path = 1, base
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path
