"""What a search tries: a flat TOML file, as `--config` takes it, in which some values are lists of choices or ranges.

    command = "adapt"                                   # or "meta_train"; adapt where nothing is said
    data = "folder:photos"                              # fixed
    lr = {low = 1e-5, high = 1e-2, log = true}          # a range
    epochs = {low = 4, high = 24, step = 4}             # one of 4, 8, ..., 24
    strategy = ["head", "lp-ft", "lora:rank=8"]         # choices; of an option that is a list itself, lists
    extra = [[], ["mixup:alpha=0.2"]]

Types and bounds are those of the options themselves. Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metaft.config import read_toml
from metaft.errors import MetaftError, no_such, suggest
from metaft.options import Field, Settings, options, unknown

RANGE = ("low", "high", "log", "step")
"""What a range says of itself."""

_NEAREST = 1e-9
"""Of a step, by which the last one may miss `high` for the rounding of decimal numbers."""


@dataclasses.dataclass(frozen=True)
class Choices:
    """One of these values, which have no order."""

    name: str
    values: Sequence[Any]

    def at(self, u: float) -> Any:
        """The value for a uniform u in [0, 1): each is as probable as the others.

        >>> [Choices("head", ("linear", "cosine")).at(u) for u in (0.0, 0.49, 0.5)]
        ['linear', 'linear', 'cosine']
        """
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]

    def plain(self) -> Any:
        """As the TOML file has it."""
        return [list(v) if isinstance(v, tuple) else v for v in self.values]


@dataclasses.dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included."""

    name: str
    low: float
    high: float
    log: bool = False
    """Whether equal factors are equally probable, and not equal differences."""
    step: float | None = None
    whole: bool = False
    """Whether the option is a whole number."""

    @property
    def values(self) -> Sequence[Any] | None:
        """All values in their order, where there is a finite number of them."""
        step = 1 if self.whole and self.step is None else self.step
        if step is None:
            return None
        count = math.floor((self.high - self.low) / step + _NEAREST) + 1
        if self.whole:
            return range(int(self.low), int(self.low) + count * int(step), int(step))
        return [min(self.low + i * step, self.high) for i in range(count)]

    def at(self, u: float) -> Any:
        """The value for a uniform u in [0, 1). Of whole numbers on a log scale k has the share log((k + 1) / k) of
        log((high + 1) / low).

        >>> round(Range("lr", 1e-4, 1e-2, log=True).at(0.5), 9), Range("epochs", 4, 12, step=4, whole=True).at(0.5)
        (0.001, 8)
        """
        if self.log:
            high = self.high + 1 if self.whole else self.high
            value = self.low * math.exp(u * math.log(high / self.low))
            return min(int(value), int(self.high)) if self.whole else min(value, self.high)
        if (values := self.values) is not None:
            return Choices(self.name, values).at(u)
        return self.low + u * (self.high - self.low)

    def plain(self) -> Any:
        """As the TOML file has it."""
        more = {"log": True} if self.log else {} if self.step is None else {"step": self.step}
        return {"low": self.low, "high": self.high, **more}


Dimension = Choices | Range


class Space(NamedTuple):
    """Settings of a command, of which some are searched."""

    command: str
    fixed: Mapping[str, Any]
    """By the options' names."""
    searched: tuple[Dimension, ...]
    """In the order of the file."""

    @property
    def size(self) -> int | None:
        """How many combinations of values there are, where that is a finite number."""
        axes = [dimension.values for dimension in self.searched]
        try:
            return None if None in axes else math.prod(len(axis) for axis in axes if axis is not None)
        except OverflowError:  # of a range of more whole numbers than a length can be
            return None

    def plain(self) -> dict[str, Any]:
        """As a file has it, which `made` reads."""
        fixed = {k: list(v) if isinstance(v, tuple) else v for k, v in self.fixed.items()}
        return {"command": self.command, **fixed, **{d.name: d.plain() for d in self.searched}}


def read(path: Path, commands: Mapping[str, type[Settings]]) -> tuple[str, dict[str, Any]]:
    """The command and the other values of a file. Raises MetaftError for what is no TOML, or names no command."""
    try:
        values = read_toml(path)
    except MetaftError as error:
        raise MetaftError(f"space: {str(error).removeprefix('config: ')}") from None
    return command_of(values, commands, str(path)), values


def command_of(values: dict[str, Any], commands: Collection[str], origin: str) -> str:
    """Taken out of the values. Raises MetaftError where there is no such command."""
    command = values.pop("command", "adapt")
    if command not in [*commands]:
        raise no_such(f"{origin}: command", str(command), commands)
    return command


def made(command: str, settings: type[Settings], values: Mapping[str, Any], *, origin: str) -> Space:
    """The space that these values of a file say. Raises MetaftError, which begins with `origin` and holds the option
    and the value, for an option that there is not, and for a type or number that it does not take."""
    known, fixed, searched = options(settings), {}, []
    try:
        for name, value in values.items():
            if name not in known:
                raise unknown(name, known)
            field = known[name]
            if isinstance(value, Mapping):
                searched.append(_range(field, value))
            elif isinstance(value, list) and not _is_fixed(field, value):
                searched.append(_choices(field, value))
            else:
                fixed[name] = _checked(field, value)
    except MetaftError as error:
        raise MetaftError(f"{origin}: {error}") from None
    if not searched:
        raise MetaftError(f"{origin}: nothing to search: no value is a list of choices or a range {{low, high}}")
    return Space(command, fixed, tuple(searched))


def _is_fixed(field: Field, value: list[Any]) -> bool:
    """Whether a list is the one value of an option that takes several."""
    return isinstance(field.default, tuple) and not any(isinstance(item, list) for item in value)


def _checked(field: Field, value: Any) -> Any:
    """A value as the option takes it. Raises MetaftError."""
    value = tuple(value) if isinstance(value, list) and isinstance(field.default, tuple) else value
    field.check(value)
    return float(value) if float in field.types and type(value) is int else value


def _choices(field: Field, values: list[Any]) -> Choices:
    if not values:
        raise MetaftError(f"{field.name}: a list of choices is empty")
    checked = [_checked(field, value) for value in values]
    twice = next((value for i, value in enumerate(checked) if value in checked[:i]), None)
    if twice is not None:
        raise MetaftError(f"{field.name}: the choice {twice!r} is there twice")
    return Choices(field.name, tuple(checked))


def _range(field: Field, given: Mapping[str, Any]) -> Range:
    name, number = field.name, next((kind for kind in field.types if kind in (int, float)), None)
    if number is None or bool in field.types:
        kinds = " or ".join(getattr(k, "__name__", str(k)) for k in field.types if k is not types.NoneType)
        raise MetaftError(f"{name}: a range is for numbers, and it is {kinds}; write a list of choices, not {given!r}")
    for key in given:
        if key not in RANGE:
            raise MetaftError(f"{name}: a range has {', '.join(RANGE)}, no {key!r}{suggest(key, RANGE)}")
    for key in ("low", "high"):
        if key not in given:
            raise MetaftError(f"{name}: a range needs {key}, and {dict(given)!r} has none")
    log, step = given.get("log", False), given.get("step")
    if not isinstance(log, bool):
        raise MetaftError(f"{name}: log must be true or false, got {log!r}")
    low, high = (_checked(field, given[key]) for key in ("low", "high"))
    if not low < high:
        raise MetaftError(f"{name}: low must be below high, got {low!r} and {high!r}")
    if log and low <= 0:
        raise MetaftError(f"{name}: low must be above 0 on a log scale, got {low!r}")
    if step is not None and (type(step) not in (int, number) or not 0 < step <= high - low):
        raise MetaftError(f"{name}: step must be {number.__name__} from above 0 to high - low, got {step!r}")
    if log and step is not None:
        raise MetaftError(f"{name}: a log scale has no steps, and step = {step!r} is given; leave one away")
    return Range(name, low, high, log, number(step) if step is not None else None, number is int)
