"""Pickles of arrays in lists and dicts, read without executing any of what a pickle can ask for.

Data sets of the field come as pickles, which are programs: an ordinary unpickler calls whatever they name, and gives
any state to anything. This one knows how numpy writes an array, by names that mean functions of ours here, and refuses
every other name.
"""

from __future__ import annotations

import math
import mmap
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from metaft.errors import DataError, class_and_words

_NUMBERS = re.compile(r"[<>|=]?[biufc][1-8]")
"""Types of arrays: numbers alone."""


def arrays(file: Path) -> Any:
    """What a pickle holds: dicts, lists, tuples, sets, text, numbers and arrays of numbers. Python 2's text is text.

    Raises DataError where it is no pickle, or names anything else.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _plain(_Unpickler(content, encoding="bytes").load())  # type: ignore[reportArgumentType]
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from None
    except _Refused as error:
        raise DataError(f"{file} is not read: it {error}, and nothing of a pickle but arrays is") from None
    except MemoryError:
        raise
    except Exception as error:  # the bytes of a broken pickle may mean anything
        raise DataError(f"{file} is no pickle of arrays ({class_and_words(error)})") from None


class _Refused(Exception):
    pass


class _Dtype:
    """Of `numpy.dtype`, a name; its state adds the order of bytes."""

    __slots__ = ("name",)

    def __init__(self, name: object, *rest: object) -> None:
        text = _text(name)
        if not isinstance(text, str) or not _NUMBERS.fullmatch(text):
            raise _Refused(f"holds an array of {text!r}")
        self.name = text

    def __setstate__(self, state: Any) -> None:
        order = _text(state[1])
        if order not in ("<", ">", "|", "="):
            raise _Refused(f"holds an array of byte order {order!r}")
        self.name = order + self.name.lstrip("<>|=")

    def of(self, raw: object, shape: tuple[int, ...], fortran: bool) -> np.ndarray:
        if not isinstance(raw, bytes | bytearray):
            raise _Refused(f"holds an array in a {type(raw).__name__}")
        flat = np.frombuffer(raw, np.dtype(self.name), math.prod(shape))
        return flat.reshape(shape, order="F" if fortran else "C")


class _Array:
    """Of `numpy.ndarray`, which its state makes."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = dtype.of(raw, tuple(map(int, shape)), bool(fortran))


class _Kind:
    """Stands for `numpy.ndarray` itself."""

    __slots__ = ()


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    return _Array()


def _from_buffer(raw: object, dtype: _Dtype, shape: tuple[int, ...], order: object) -> np.ndarray:
    return dtype.of(raw, shape, _text(order) == "F")


def _scalar(dtype: _Dtype, raw: object) -> Any:
    return dtype.of(raw, (1,), False)[0].item()


def _encode(text: object, how: object) -> bytes:
    """Of `_codecs.encode`, what Python 3 writes bytes with for Python 2."""
    if not isinstance(text, str) or _text(how) != "latin1":
        raise _Refused(f"calls _codecs.encode with {how!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Of `bytes` itself, by which Python 3 writes an empty one for Python 2."""
    return b""


class _Unpickler(pickle._Unpickler):
    """Python's own, not the one in C: what it does with a broken pickle are exceptions alone.

    Its reading of lengths believes no more than the file has, and what follows keeps it from calling anything of what
    it holds: only arrays and their types take a state, and keys are flat, since the hash of a deep tuple overflows.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _Refused(f"names {module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: object) -> Any:
        raise _Refused("names an object outside")

    def build(self) -> None:
        if not isinstance(self.stack[-2], _Array | _Dtype):
            raise _Refused(f"gives a state to a {type(self.stack[-2]).__name__}")
        state = self.stack.pop()
        self.stack[-1].__setstate__(state)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _into(self.stack[-1], [(key, value)])

    def set_items(self) -> None:
        items = self.pop_mark()
        _into(self.stack[-1], list(zip(items[::2], items[1::2], strict=True)))

    def put_dict(self) -> None:
        items = self.pop_mark()
        made: dict[Any, Any] = {}
        _into(made, list(zip(items[::2], items[1::2], strict=True)))
        self.stack.append(made)

    def add_items(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise _Refused("adds to what is no set")
        self.stack[-1].update(map(_flat, items))

    def put_frozen_set(self) -> None:
        self.stack.append(set(map(_flat, self.pop_mark())))

    dispatch |= {
        pickle.BUILD[0]: build,
        pickle.SETITEM[0]: set_item,
        pickle.SETITEMS[0]: set_items,
        pickle.DICT[0]: put_dict,
        pickle.ADDITEMS[0]: add_items,
        pickle.FROZENSET[0]: put_frozen_set,
    }


def _into(mapping: object, items: list[tuple[Any, Any]]) -> None:
    if not isinstance(mapping, dict):
        raise _Refused("sets items of what is no dict")
    mapping.update({_flat(key): value for key, value in items})


def _flat(key: Any) -> Any:
    if not isinstance(key, str | bytes | int | float | None):
        raise _Refused(f"has a {type(key).__name__} for a key")
    return key


def _set(items: object = ()) -> set[Any]:
    if not isinstance(items, list | tuple):
        raise _Refused("makes a set of what is no list")
    return set(map(_flat, items))


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Kind,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    **{(module, "set"): _set for module in ("builtins", "__builtin__")},
    **{(module, "bytes"): _no_bytes for module in ("builtins", "__builtin__")},
}


def _text(value: object) -> object:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _plain(value: Any) -> Any:
    """With arrays in the place of what stands for them, and text for Python 2's."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, _Array):
        if value.array is None:
            raise _Refused("holds an array without values")
        return value.array
    if isinstance(value, _Dtype | _Kind) or callable(value):
        raise _Refused(f"holds {type(value).__name__.lstrip('_')} in the place of an array")
    return _text(value)
