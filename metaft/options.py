"""Options as fields of frozen dataclasses: each field says its type, default, bounds and help line, once.

A `Group` holds options that belong together, and is a panel of `--help`; `Settings` of a command hold groups, beside
options of their own. Names are unique among the groups of a command, so that outside (TOML, command line, checkpoints,
keywords) they are flat: `flat` and `from_mapping` convert. Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from metaft.errors import MetaftError, suggest
from metaft.support.names import is_text


@dataclasses.dataclass(frozen=True)
class Option:
    """What a field's type does not say, as `Annotated[int | None, Option("Classes per task.", at_least=1)] = None`."""

    help: str
    """One line."""
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    """Of the numbers that float32 still works with."""
    one_of: tuple[int, ...] = ()
    pattern: str = ""
    """What a text has to match as a whole."""
    like: str = ""
    """The pattern in words."""
    metavar: str = ""
    """What stands for the value in `--help`, where the type's own word says too little."""
    positional: bool = False
    """A word of the command line without a flag."""
    stored: bool = True
    """Whether a run folder keeps the value, which then has to be text."""


_PLACES = ("FILE", "FOLDER", "PATH")
"""What stands for a value in `--help` where that is a place."""


@dataclasses.dataclass(frozen=True)
class Field:
    """An option where it stands."""

    name: str
    option: Option
    group: str | None
    """The field of the settings that holds the option's group; None where they hold the option itself."""
    title: str
    """Of its panel."""
    types: tuple[Any, ...]
    """What it may be, with `NoneType` where it may be left open."""
    default: Any
    """`dataclasses.MISSING` where there is none."""

    @property
    def choices(self) -> tuple[Any, ...]:
        """All that there is to choose from, where that is a list."""
        return self.option.one_of or (self.words if _only_words(self.types) else ())

    @property
    def words(self) -> tuple[Any, ...]:
        """Those that it may be, by themselves or beside numbers."""
        literal = next((kind for kind in self.types if typing.get_origin(kind) is Literal), None)
        return () if literal is None else typing.get_args(literal)

    @property
    def open(self) -> bool:
        """Whether None is a value of it."""
        return types.NoneType in self.types

    def check(self, value: Any) -> None:
        """Raises MetaftError for a wrong type or value, naming the field and both."""
        _check_type(self.name, value, self.types)
        if value == "" and self.option.metavar in _PLACES:  # which would be the folder that one is in
            raise MetaftError(f"{self.name} must not be empty, got {value!r}")
        if isinstance(value, tuple):
            for item in value:
                _check_type(self.name, item, (str,))
        if isinstance(value, str) and self.option.pattern and not re.fullmatch(self.option.pattern, value):
            raise MetaftError(f"{self.name} must be {self.option.like}, got {value!r}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self._check_number(value)

    def _check_number(self, value: float) -> None:
        name, option = self.name, self.option
        if not math.isfinite(value):
            raise MetaftError(f"{name} must be finite, got {value}")
        if option.at_least is not None and value < option.at_least:
            raise MetaftError(f"{name} must be at least {option.at_least}, got {value}")
        if option.above is not None and value <= option.above:
            raise MetaftError(f"{name} must be above {option.above}, got {value}")
        if option.at_most is not None and value > option.at_most:
            most = f"{option.at_most:g}".replace("+", "")
            why = ", which float32 can still work with" if isinstance(option.at_most, float) else ""
            raise MetaftError(f"{name} must be at most {most}{why}, got {value}")
        if option.below is not None and value >= option.below:
            raise MetaftError(f"{name} must be below {option.below}, got {value}")
        if isinstance(value, int) and value >= 2**63:
            raise MetaftError(f"{name} must be below 2**63, got {value}")
        if option.one_of and value not in option.one_of:
            raise MetaftError(f"{name} must be {' or '.join(map(str, option.one_of))}, got {value}")


def _check_type(name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind) or (value is None and types.NoneType in kinds):
                return
            if _only_words(kinds):
                raise wrong_choice(name, value, typing.get_args(kind))
        elif type(value) is (typing.get_origin(kind) or kind) or (kind is float and type(value) is int):
            return
    wanted = " or ".join(_called(kind) for kind in kinds)
    raise MetaftError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__})")


def _only_words(kinds: tuple[Any, ...]) -> bool:
    """Whether a value is a word of a list, or left open."""
    return all(kind is types.NoneType or typing.get_origin(kind) is Literal for kind in kinds)


def _called(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return "nothing" if kind is types.NoneType else kind.__name__


def wrong_choice(name: str, value: Any, choices: tuple[Any, ...]) -> MetaftError:
    """What to say of a value that is none of the choices."""
    near = suggest(str(value), map(str, choices))
    return MetaftError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}{near}")


@dataclasses.dataclass(frozen=True)
class Group:
    """Options that belong together; the first line of a group's docstring is the title of its panel.

    Making one raises MetaftError for a field with a wrong type or value.
    """

    def __post_init__(self) -> None:
        for name, field in options(type(self)).items():
            field.check(getattr(self, name))


@dataclasses.dataclass(frozen=True, init=False)
class Settings:
    """What a command is asked for: groups of options, and options that belong to none.

    Keywords are options by their own names, whole groups, or both, where an option replaces what its group says; so
    does `dataclasses.replace`. A group that may be None, which says that nothing of it was given, begins at its
    defaults where one of its options is given; None gives none of them. Raises MetaftError for an unknown keyword, and
    for a field with a wrong type or value.
    """

    stored: ClassVar[bool] = False
    """Whether run folders keep the settings, as TOML, which is text."""

    def __init__(self, **given: Any) -> None:
        known = options(type(self))
        parts = {field.name: field.default for field in dataclasses.fields(self)}
        for name in given:
            if name not in known and name not in parts:
                raise unknown(name, known)
        hints = _hints(type(self))
        for name, default in parts.items():
            value = given.get(name, default)
            kind = _group_in(hints[name])
            if kind is not None:
                changes = {k: v for k, v in given.items() if k in known and known[k].group == name}
                if types.NoneType in _kinds(hints[name]):
                    changes = {k: v for k, v in changes.items() if v is not None}
                value = _assembled(name, value, kind, changes)
                if value is None and types.NoneType not in _kinds(hints[name]):
                    raise MetaftError(f"{name} must be {kind.__name__}, got None")
            object.__setattr__(self, name, value)
        for name, value in flat(self).items():
            if known[name].group is None:
                known[name].check(value)
            if isinstance(value, str) and self.stored and known[name].option.stored and not is_text(value):
                raise MetaftError(f"{name}: {value!r} is not text; rename the file or folder")

    def __getattr__(self, name: str) -> Any:
        """Raises AttributeError for what settings have not; of an option it says which group has it."""
        known = {} if name.startswith("_") else options(type(self))
        where = next((f"; it is .{f.group}.{f.name}" for f in known.values() if f.name == name and f.group), None)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{where or suggest(name, known)}")


def _assembled(name: str, value: Any, kind: type[Group], changes: Mapping[str, Any]) -> Group | None:
    """A group with what is given of its options. Raises MetaftError for another value than a group."""
    if value is dataclasses.MISSING or (value is None and changes):
        return kind(**changes)
    if value is not None and not isinstance(value, kind):
        raise MetaftError(f"{name} must be {kind.__name__}, got {value!r}")
    if value is not None and (strange := options(type(value)).keys() - options(kind).keys()):
        raise MetaftError(f"{name} must be {kind.__name__}, got a group with {', '.join(sorted(strange))} too")
    return value if value is None or not changes else dataclasses.replace(value, **changes)


def unknown(name: str, known: Mapping[str, Field]) -> MetaftError:
    """What to say of a name that no option has."""
    return MetaftError(f"unknown field {name!r}{suggest(name, known)}")


Config = TypeVar("Config", bound=Settings)


@functools.cache
def options(cls: type[Settings] | type[Group]) -> dict[str, Field]:
    """The options of a command or of a group by their names, in their order."""
    fields: dict[str, Field] = {}
    for field in dataclasses.fields(cls):
        hint = _hints(cls)[field.name]
        group = _group_in(hint)
        if group is not None:
            more = {name: dataclasses.replace(inside, group=field.name) for name, inside in options(group).items()}
        else:
            option = _option(cls, field.name)
            more = {field.name: Field(field.name, option, None, title(cls), _kinds(hint), field.default)}
        assert not fields.keys() & more.keys(), f"{cls.__name__}: {sorted(fields.keys() & more.keys())} twice"
        fields |= more
    return fields


def title(cls: type) -> str:
    """The first line of a class's docstring, without its full stop."""
    return inspect.getdoc(cls).split("\n")[0].removesuffix(".")  # type: ignore[union-attr]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _option(cls: type, name: str) -> Option:
    """What the class says of a field; a class that only narrows the type of a base's field leaves it to the base."""
    for base in cls.__mro__:
        if name in inspect.get_annotations(base):
            hint = _hints(base)[name]
            for extra in typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ():
                if isinstance(extra, Option):
                    return extra
    raise TypeError(f"{cls.__name__}.{name} is not annotated with an Option")


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _group_in(hint: Any) -> type[Group] | None:
    """The group that a field of settings holds, if it does."""
    classes = (kind for kind in _kinds(hint) if typing.get_origin(kind) is None and isinstance(kind, type))
    return next((kind for kind in classes if issubclass(kind, Group)), None)


def flat(settings: Settings | Group) -> dict[str, Any]:
    """The values by the options' names, in their order, without those of groups that are None."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Group):
            values |= flat(value)
        elif _group_in(_hints(type(settings))[field.name]) is None:
            values[field.name] = value
    return values


def from_mapping(cls: type[Config], values: Mapping[str, Any], *, origin: str) -> Config:
    """Settings from flat plain data. Raises MetaftError that names `origin` and the unknown or wrong field."""
    known = options(cls)
    try:
        for key, value in values.items():
            if isinstance(value, Mapping):
                name = key if key in known else repr(key)
                raise MetaftError(f"{name} must be one value, got a table; options stand by themselves: NAME = VALUE")
            if key not in known:
                raise unknown(key, known)
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list) and isinstance(known[k].default, tuple)}
        return cls(**{**values, **lists})
    except MetaftError as error:
        raise MetaftError(f"{origin}: {error}") from None
