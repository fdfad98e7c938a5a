"""Options as flags of a command line: what was given, as plain data, and a `--help` with a panel for each group."""

from __future__ import annotations

import argparse
import functools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from metaft.errors import MetaftError, suggest
from metaft.options import Field, Settings, options, wrong_choice

FLAGS_WIDTH = 28
"""Columns of `--help` before the help lines; a longer flag has a line of its own."""

_ITS_OWN = "This command"
"""The panel of what no other command has."""

_SWITCHED = {"True": True, "False": False, "None": None}
_NUMBERS = {int: "a whole number", float: "a number"}


def parse(cls: type[Settings], argv: Sequence[str], *, prog: str) -> dict[str, Any]:
    """What the command line gives, and nothing else, by the options' names.

    A flag is a name with hyphens (underscores do too), as `--name VALUE` or `--name=VALUE`; a switch is `--name` or
    `--no-name`, and one that may be left open also `--name True`, `False` or `None`. A list that is given again grows;
    of another option's values the last one counts, so that a script's words can be followed by one's own. Exits with
    status 0 for --help.
    Raises MetaftError for an unknown option, a missing or superfluous word, or a value of the wrong type; bounds are
    for `cls` to check.
    """
    known = options(cls)
    flagged, words = list(argv), []
    if "--" in flagged:
        end = flagged.index("--")
        flagged, words = flagged[:end], flagged[end + 1 :]
    _check_switches(known, flagged)
    given, others = _parser(cls, prog).parse_known_args(flagged, argparse.Namespace(words=[]))
    others = [*given.__dict__.pop("words"), *others]
    for word in others:
        if word.startswith("-") and word != "-":
            raise MetaftError(f"unknown option {word}{_hint(word.partition('=')[0], known)}")
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}
    return {**flags, **_positionals(known, [*others, *words])}


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


def _parser(cls: type[Settings], prog: str) -> _Parser:
    known = options(cls)
    words = [field for field in known.values() if field.option.positional]
    parser = _Parser(
        usage=" ".join([prog, *(field.option.metavar for field in words), "[--OPTION ...]"]),
        description=" ".join(str(cls.__doc__).split()).replace("%", "%%"),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=FLAGS_WIDTH),
    )
    for field in words:  # `_positionals` tells them apart, which argparse cannot do with flags between them
        parser.add_argument_group(field.option.metavar, field.option.help)
    panels: dict[str, Any] = {}
    for name, field in known.items():
        if not field.option.positional:
            title = _ITS_OWN if field.group is None else field.title
            if title not in panels:
                panels[title] = parser.add_argument_group(title)
            _add(parser, panels[title], name, field)
    return parser


class _Parser(argparse.ArgumentParser):
    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf$|nan$)")  # else -1e-3 is no value but a flag
        self.switches: list[argparse.Action] = []

    def format_help(self) -> str:
        for action in self.switches:
            action.nargs = 0  # the value is for those who know of it
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise MetaftError(message.removeprefix("argument "))


class _Longer(argparse.Action):
    """Add what is given to what was given before."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, ()), *values])


class _Switch(argparse.Action):
    """True, or False for a flag that begins with --no, or one of these words behind the flag."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        on = option_string not in _switched_off(self.dest)
        if isinstance(values, str) and on and values in _SWITCHED:
            on = _SWITCHED[values]
        elif isinstance(values, str):
            namespace.words.append(values)  # the next one, which is no business of a switch
        setattr(namespace, self.dest, on)


def _add(parser: _Parser, panel: Any, name: str, field: Field) -> None:
    """The flags of an option; spellings that go without saying are not shown."""
    said = f"{field.option.help}{_default_of(field)}".replace("%", "%%")
    if _is_switch(field):
        off = _switched_off(name)
        # What is off unless it is given has its opposite for the sake of a TOML file or a run that says otherwise.
        shown = [flag(name), off[0]] if field.open else [flag(name)]
        hidden = {*off, f"--{name}"}.difference(shown)
        for spelt, line in ((shown, said), (sorted(hidden), argparse.SUPPRESS)):
            how = {"dest": name, "action": _Switch, "nargs": "?" if field.open else 0}
            parser.switches.append(panel.add_argument(*spelt, help=line, **how))
        return
    how = {"dest": name, "type": functools.partial(_read, field), "metavar": _metavar(field)}
    if isinstance(field.default, tuple):
        how |= {"nargs": "*", "action": _Longer}
    panel.add_argument(flag(name), help=said, **how)
    if "_" in name:
        panel.add_argument(f"--{name}", help=argparse.SUPPRESS, **how)


def _is_switch(field: Field) -> bool:
    return bool in field.types


def _switched_off(name: str) -> list[str]:
    """The flags that say no, the one to show first."""
    return list(dict.fromkeys([f"--no{flag(name)[1:]}", f"--no-{name}", f"--no_{name}"]))


def _metavar(field: Field) -> str:
    if field.option.metavar:
        return field.option.metavar
    if field.choices:
        return "{" + ",".join(map(str, field.choices)) + "}"
    return "|".join([{int: "N", float: "X"}.get(_kind(field), "TEXT"), *field.words])


def _kind(field: Field) -> Any:
    """The type of a value that is given."""
    return next(kind for kind in field.types if kind is not types.NoneType)


def _default_of(field: Field) -> str:
    """What to add to a help line where a default says something."""
    silent = field.default is None or field.default is False or field.default == ()
    if silent or "(auto" in field.option.help:
        return ""
    return f" (default: {field.default})"


def _read(field: Field, text: str) -> Any:
    """The value of a word of the command line. Raises MetaftError for one of the wrong type."""
    kind = _kind(field)
    if text == "None" and field.open:  # takes back what a TOML file says
        return None
    if typing.get_origin(kind) is Literal:
        if text not in field.choices:
            raise wrong_choice(field.name, text, field.choices)
        return text
    if kind not in _NUMBERS or text in field.words:
        return text
    try:
        return kind(text)
    except ValueError:
        wanted = " or ".join([_NUMBERS[kind], *map(repr, field.words)])
        raise MetaftError(f"{field.name} must be {wanted}, got {text!r}") from None


def _check_switches(known: Mapping[str, Field], argv: Sequence[str]) -> None:
    """Raises MetaftError for a switch with a value."""
    switches = {name: field for name, field in known.items() if _is_switch(field)}
    for word in argv:
        spelt, equals, value = word.partition("=")
        for name, field in switches.items():
            on = spelt in (flag(name), f"--{name}")
            if equals and (on or spelt in _switched_off(name)) and not (on and field.open and value in _SWITCHED):
                raise MetaftError(f"{spelt} takes no value, got {value!r}")


def _positionals(known: Mapping[str, Field], words: Sequence[str]) -> dict[str, Any]:
    """The words without a flag, in their order; the last option may take several."""
    given: dict[str, Any] = {}
    rest = list(words)
    for name, field in known.items():
        if not field.option.positional:
            continue
        if not rest and field.open:
            continue
        if not rest:
            raise MetaftError(f"{name}: {field.option.metavar} is missing: {field.option.help}")
        taken = len(rest) if _kind(field) is not str else 1
        given[name] = tuple(rest) if _kind(field) is not str else rest[0]
        rest = rest[taken:]
    if rest:
        raise MetaftError(f"unexpected {rest[0]!r}; options begin with --")
    return given


def _hint(word: str, known: Mapping[str, Field]) -> str:
    """What was meant by a word that is no option. Which settings an algorithm has only torch's import would tell."""
    flags = [flag(name) for name, field in known.items() if not field.option.positional]
    if "hyper" not in known:
        return suggest(word, flags, cutoff=0.6)  # all begin with two hyphens, which makes them alike
    setting = word.lstrip("-").replace("-", "_")
    of_one = f"; what only some algorithms have is given as --hyper {setting}=VALUE"
    return suggest(word, flags, cutoff=0.75) or of_one  # else "--loss" would be near to "--log"
