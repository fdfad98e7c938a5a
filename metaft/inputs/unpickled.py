"""Pickles of arrays in lists and dicts, read without executing any of what a pickle can ask for.

Data sets of the field come as pickles, which are programs: an ordinary unpickler calls whatever they name. This one
knows how numpy writes an array, by names that mean functions of ours here, and refuses every other name.
"""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from metaft.errors import DataError

_NUMBERS = re.compile(r"[<>|=]?[biufc][1-8]")
"""Types of arrays: numbers alone."""


def arrays(file: Path) -> Any:
    """What a pickle holds: dicts, lists, tuples, sets, text, numbers and arrays of numbers. Python 2's text is text.

    Raises DataError where it is no pickle, or names anything else.
    """
    try:
        with file.open("rb") as stream:
            return _plain(_Unpickler(stream, encoding="bytes").load())
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from None
    except _Refused as error:
        raise DataError(f"{file} is not read: it {error}, and nothing of a pickle but arrays is") from None
    except MemoryError:
        raise
    except Exception as error:  # the bytes of a broken pickle may mean anything
        why = " ".join(str(error).split())[:160]
        raise DataError(f"{file} is no pickle of arrays ({type(error).__name__}: {why})") from None


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


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Kind,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    **{(module, "set"): set for module in ("builtins", "__builtin__")},
    **{(module, "bytes"): _no_bytes for module in ("builtins", "__builtin__")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _Refused(f"names {module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: object) -> Any:
        raise _Refused(f"names an object outside, {pid!r}")


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
