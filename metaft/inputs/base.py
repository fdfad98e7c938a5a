"""What kinds of input have in common: from a file to raw numbers, and from those to what a model computes with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

VALUES_AT_ONCE = 2**22
"""Numbers of the examples that are passed through a model at once where nothing is differentiated: with what the layers
make of them some hundred megabytes."""


class Reading(NamedTuple):
    """What came of a file."""

    file: Path
    raw: Tensor | None
    """[1, ...] as `Inputs` takes it; None where the file cannot be read."""
    error: str = ""
    """That it cannot be read, and why."""
    why: str = ""
    """Why alone."""
    kind: str = ""
    """What such files are called, e.g. "damaged file"."""
    beside: bool = False
    """Whether it only lay among those that were meant, and is none itself."""
    remarks: Mapping[str, Any] = {}
    """What `Inputs.notes` has to know of it."""


class Inputs(Protocol):
    """How a file becomes a model's input; it travels in checkpoints, so that new files get the same.

    Raw numbers are what a file holds in the fewest bytes (uint8 pixels, say), so that a whole data set fits memory.
    """

    kind: ClassVar[str]
    """By which `metaft.inputs.KINDS` knows it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input, without a leading axis."""
        ...

    def check(self, raw: Tensor) -> None:
        """Raises MetaftError for raw numbers of another type or shape than [n, *shape]."""
        ...

    def read(self, file: Path) -> Reading:
        """Of one file, which may be unreadable. Flaws that it is read with are noted, see `metaft.inputs.flaws`."""
        ...

    def __call__(self, raw: Tensor) -> Tensor:
        """Raw numbers [..., *shape] to float32 of the same shape."""
        ...

    def notes(self, readings: Sequence[Reading]) -> Iterator[str]:
        """What there is to know of how files were read, in plain words."""
        ...

    def plain(self) -> dict[str, Any]:
        """For a checkpoint; `metaft.inputs.from_plain` is the inverse, by way of JSON."""
        ...


class Examples(Protocol):
    """Raw inputs [n, ...]: a tensor, or what gives parts of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


def at_most(shape: tuple[int, ...], most: int = 1024) -> int:
    """How many examples of a shape are passed through a model at once where nothing is differentiated."""
    return max(16, min(most, VALUES_AT_ONCE // max(1, math.prod(shape))))
