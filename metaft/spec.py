"""One grammar for members of a literal dict: `name[:POSITIONAL][:key=value,...]`, typed by the factory's signature.

    adam                           a name alone
    adam:beta1=0.5,eps=1e-6        with settings
    folder:/data/birds             with the positional that its factory takes
    folder:"/data/a:size=3"        quoted, where it would read as settings

What follows the first colon is the positional, where the factory takes one, unless what follows its last colon reads as
settings that the factory really has: paths need no quotes for colons, commas or spaces of their own. A quote that the
text itself holds is doubled. Everything here is a pure function of text and signatures, and imports no torch.
"""

# Above 300 lines: reading, writing and typing of one grammar, which no other file may know.
from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from metaft.errors import MetaftError, no_such, suggest

Made = TypeVar("Made")


class Spec(NamedTuple):
    """A member as it was written: nothing is typed yet."""

    name: str
    positional: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    """(key, value), in the order in which they were written."""


class Takes(NamedTuple):
    """What a member can be given in text."""

    positional: inspect.Parameter | str | None = None
    """The parameter, or its name alone where text is all that it can be."""
    options: Mapping[str, inspect.Parameter] = types.MappingProxyType({})

    @property
    def required(self) -> bool:
        """Whether the positional must be there."""
        p = self.positional
        return p is not None and (isinstance(p, str) or p.default is inspect.Parameter.empty)

    @property
    def place(self) -> str | None:
        """What stands for the positional: `PATH`."""
        return self.positional.name.upper() if isinstance(self.positional, inspect.Parameter) else self.positional

    def shown(self, name: str) -> str:
        """How the member is written: `"folder:PATH"`, `"adam:beta1=0.9,beta2=0.999,eps=1e-08"`."""
        pairs = (f"{p.name}={_default(p)}" for p in self.options.values())
        return ":".join(part for part in (name, self.place, ",".join(pairs)) if part)


def takes(factory: Callable[..., Any], *, reserved: Collection[str] = ()) -> Takes:
    """The parameters of a factory that text can give: those of a plain type (int, float, bool, str, a Literal of them,
    or one of these and None), the first of which is the positional where it is positional-only.

    The others, those that a partial has fixed and the `reserved` ones are the caller's.
    """
    plain = {name: p for name, p in parameters(factory).items() if name not in reserved and _kinds(p)}
    first = next((p for p in plain.values() if p.kind is p.POSITIONAL_ONLY), None)
    keyed = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return Takes(first, {name: p for name, p in plain.items() if p.kind in keyed})


def parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A factory's parameters but for those that a partial has fixed, with what annotations in text stand for."""
    try:
        declared = inspect.signature(factory, eval_str=True).parameters
    except Exception:  # a name that only a type checker imports: then the defaults have to say what is what
        declared = inspect.signature(factory).parameters
    fixed = factory.keywords if isinstance(factory, functools.partial) else {}
    return {name: p for name, p in declared.items() if name not in fixed}


def name_of(text: str, known: Collection[str]) -> str:
    """The member's name: of `known` ones, which may hold colons, the longest, else what comes before the colon."""
    fitting = [name for name in known if text == name or text.startswith(f"{name}:")]
    return max(fitting, key=len, default=text.partition(":")[0])


def parse(field: str, text: str, members: Mapping[str, Takes], *, also: Collection[str] = ()) -> Spec:
    """Text to a Spec, all of whose keys its member has. `also` are other words for the field, which are no members.

    Raises MetaftError, which begins with `field` and holds what was wrong, for an unknown member or key, a key that is
    given twice, a positional that is missing or too much, and what is neither.
    """
    name = name_of(text, members)
    if name not in members:
        written = [f"{member}:{of.place}" if of.required else member for member, of in members.items()]
        raise no_such(field, text, [*members, *also], near=name, written=[*written, *also])
    member, rest = members[name], text[len(name) + 1 :]
    positional = None
    if member.positional is not None:
        positional, rest = _positional(rest, member)
    if positional in (None, "") and member.required:
        raise MetaftError(f"{field}: write {member.shown(name)!r}, not {text!r}")
    options: dict[str, str] = {}
    for part in parts(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise MetaftError(f"{field}: cannot read {part!r} of {text!r}; write {member.shown(name)!r}")
        if key not in member.options:
            raise no_setting(field, name, key, text, member.options)
        if _unquoted(value) is None:
            raise _unreadable(field, part, name, text, member, "; a quote ends before a comma or the end")
        if key in options:
            raise _unreadable(field, part, name, text, member, f"; {key!r} is given twice")
        options[key] = _unquoted(value) or ""
    return Spec(name, positional, tuple(options.items()))


def no_setting(field: str, name: str, key: str, given: str, known: Collection[str], more: str = "") -> MetaftError:
    """What to say of a setting that a member has not."""
    has = f"it has {', '.join(known)}" if known else "it has none"
    return MetaftError(f"{field}: {name} has no {key!r} (given {given!r}); {has}{more}{suggest(key, known)}")


def write(spec: Spec, member: Takes) -> str:
    """The text that `parse` reads as this Spec, with quotes only where they are needed."""
    options = ",".join(f"{key}={_as_value(value)}" for key, value in spec.options)
    text = ""
    for positional in ("",) if spec.positional is None else (spec.positional, _quoted(spec.positional)):
        text = ":".join(part for part in (spec.name, positional, options) if part)
        if spec.positional is None or _positional(text[len(spec.name) + 1 :], member) == (spec.positional, options):
            break
    return text


def made_for(field: str, text: str, make: Callable[[str], Made], *, own: str | None = None) -> Made:
    """`make(text)`. Its MetaftError, which begins with its `own` field (by default the same), names this one and holds
    the text."""
    try:
        return make(text)
    except MetaftError as error:
        said = str(error).removeprefix(f"{own or field}: ")
        raise MetaftError(f"{field}: {said}" + ("" if repr(text) in said else f" (given {text!r})")) from None


def bind(
    field: str,
    text: str | Spec,
    members: Mapping[str, Callable[..., Made]],
    *,
    reserved: Collection[str] = (),
    also: Collection[str] = (),
) -> functools.partial[Made]:
    """The factory that `text` names, with what it says bound to it; whoever calls it gives the rest.

    Raises MetaftError as `parse` does, and for a value of another type, a number that is not finite, or a parameter
    without a default that is not given.
    """
    table = {name: takes(factory, reserved=reserved) for name, factory in members.items()}
    written = text if isinstance(text, str) else write(text, table.get(text.name, Takes()))
    spec = parse(field, written, table, also=also)
    member = table[spec.name]
    missing = [k for k, p in member.options.items() if p.default is p.empty and k not in dict(spec.options)]
    if missing:
        raise MetaftError(f"{field}: {written!r} lacks {', '.join(missing)}; it is as in {member.shown(spec.name)!r}")

    def typed(value: str, parameter: inspect.Parameter, part: str) -> object:
        try:
            return convert(value, parameter)
        except ValueError as error:
            raise MetaftError(f"{field}: {part!r} {error} (given {written!r})") from None

    given = {key: typed(value, member.options[key], f"{key}={value}") for key, value in spec.options}
    if spec.positional is None:
        return functools.partial(members[spec.name], **given)
    positional: object = spec.positional
    if isinstance(member.positional, inspect.Parameter):
        positional = typed(spec.positional, member.positional, spec.positional)
    return functools.partial(members[spec.name], positional, **given)


def convert(text: str, parameter: inspect.Parameter) -> object:
    """Text as the parameter's type, or as that of its default where it has none; as a float where neither says.

    Raises ValueError, in words that follow what was given: "must be int", "must be finite", "must be one of a, b".
    """
    kinds = _kinds(parameter) or (float,)
    value = next((v for kind in kinds if (v := _read(text, kind)) is not _UNFIT), _UNFIT)
    if value is _UNFIT:
        words = [_WORDS.get(kind) or f"one of {', '.join(map(str, typing.get_args(kind)))}" for kind in kinds]
        raise ValueError(f"must be {' or '.join(words)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be finite")
    return value


_UNFIT = object()


def _read(text: str, kind: Any) -> object:
    """Text as one plain type, or `_UNFIT`."""
    try:
        return _READ[kind](text) if kind in _READ else _chosen(text, kind)
    except ValueError:
        return _UNFIT


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _nothing(text: str) -> None:
    if text.lower() != "none":
        raise ValueError


def _chosen(text: str, kind: Any) -> object:
    for choice in typing.get_args(kind):
        if str(choice) == text:
            return choice
    raise ValueError


def fraction(text: str) -> float:
    """A number, or one over another: `2/255`. Raises ValueError."""
    above, slash, below = text.partition("/")
    if not slash:
        return float(text)
    if float(below) == 0:
        raise ValueError(f"could not divide by zero: {text!r}")
    return float(above) / float(below)


_READ: dict[Any, Callable[[str], object]] = {
    types.NoneType: _nothing, bool: _flag, int: int, float: fraction, str: str,
}  # fmt: skip
"""How text is read as each plain type, the narrowest first: of several, the first that fits is taken."""

_WORDS: dict[Any, str] = {types.NoneType: "none", bool: "true or false", int: "int", float: "float", str: "str"}


def _kinds(parameter: inspect.Parameter) -> tuple[Any, ...]:
    """The plain types of a parameter in the order of `_READ`, Literals before strings; none where it has another."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return ()
    hint = parameter.annotation
    if hint is parameter.empty or isinstance(hint, str):
        kind = type(parameter.default)
        return (kind,) if kind in (bool, int, float, str) else ()
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = [types.NoneType if kind is None else kind for kind in (typing.get_args(hint) if union else (hint,))]
    order = [types.NoneType, bool, int, float, "literal", str]
    ranked = [(order.index("literal" if typing.get_origin(k) is Literal else k), k) for k in kinds if _is_plain(k)]
    return tuple(kind for _, kind in sorted(ranked, key=lambda pair: pair[0])) if len(ranked) == len(kinds) else ()


def _is_plain(kind: Any) -> bool:
    return typing.get_origin(kind) is Literal or kind in (types.NoneType, bool, int, float, str)


def _positional(rest: str, member: Takes) -> tuple[str | None, str]:
    """(the positional or None, the text of the settings) of what follows a name and its colon."""
    end = _end_of_quoted(rest)
    if end is not None and (end == len(rest) or rest[end] == ":"):
        return _unquoted(rest[:end]), rest[end + 1 :]
    if not member.required and _are_settings(rest, member):
        return None, rest
    for place in (i for i, letter in enumerate(rest) if letter == ":"):
        if _are_settings(rest[place + 1 :], member):
            return rest[:place] or None, rest[place + 1 :]
    return rest or None, ""


def _are_settings(text: str, member: Takes) -> bool:
    """Whether all of a text reads as settings of keys that the member has, without a colon outside quotes."""
    pairs = [part.partition("=") for part in parts(text)]
    return bool(pairs) and all(
        equals and key in member.options and (":" not in value or (value[0] in "'\"" and _unquoted(value) is not None))
        for key, equals, value in pairs
    )


def parts(text: str) -> list[str]:
    """Text cut at the commas outside quoted values."""
    parts: list[str] = []
    while text:
        start = text.find("=") + 1
        end = _end_of_quoted(text[start:]) if start else None
        comma = text.find(",", 0 if end is None else start + end)
        parts.append(text if comma < 0 else text[:comma])
        if comma == len(text) - 1:
            parts.append("")  # nothing behind a comma is not a setting
        text = "" if comma < 0 else text[comma + 1 :]
    return parts


def _end_of_quoted(text: str) -> int | None:
    """Where the quoted text ends with which `text` begins, if it does."""
    quote, place = text[:1], 1
    if quote not in ("'", '"'):
        return None
    while (place := text.find(quote, place)) >= 0:
        if text[place + 1 : place + 2] != quote:
            return place + 1
        place += 2
    return None


def _unquoted(value: str) -> str | None:
    """What a value stands for; None where something follows its closing quote, or there is none."""
    if value[:1] not in ("'", '"'):
        return value
    end = _end_of_quoted(value)
    return value[1:-1].replace(value[0] * 2, value[0]) if end == len(value) else None


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _as_value(text: str) -> str:
    return _quoted(text) if set(text) & set(":,='\"") else text


def _default(parameter: inspect.Parameter) -> object:
    return parameter.name.upper() if parameter.default is parameter.empty else parameter.default


def _unreadable(field: str, part: str, name: str, text: str, member: Takes, why: str) -> MetaftError:
    return MetaftError(f"{field}: cannot read {part!r} of {text!r}; it is as in {member.shown(name)!r}{why}")
