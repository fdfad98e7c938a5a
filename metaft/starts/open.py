"""From `--init` to a start."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from metaft.errors import MetaftError, no_such
from metaft.inputs import Inputs
from metaft.models.architecture import NormOf
from metaft.spec import Spec, parse
from metaft.starts.base import Start
from metaft.starts.file import from_file
from metaft.starts.names import KINDS, PACKAGED, WRITTEN, is_run
from metaft.starts.none import from_nothing
from metaft.starts.published import from_package, from_timm, from_torchvision
from metaft.starts.run import from_run
from metaft.support.paths import local


class Asked(NamedTuple):
    """What else there is to say of a start."""

    init: str
    """As it was written."""
    spec: Spec
    image_size: int | None
    """The side of pictures, where it is not to be the start's own."""
    inputs: Callable[[], Inputs]
    """Those that examples would have without any start."""
    norm: NormOf
    """Of published weights."""
    module: nn.Module | None
    keep: bool
    """Whether the module's own values are kept."""

    @property
    def positional(self) -> str:
        return self.spec.positional or ""


STARTS: dict[str, Callable[[Asked], Start]] = {
    "none": lambda asked: from_nothing(asked.inputs(), asked.module, keep=asked.keep),
    **{name: lambda asked: from_package(asked.spec.name, asked.image_size, asked.norm) for name in PACKAGED},
    "torchvision": lambda asked: from_torchvision(asked.positional, asked.image_size, asked.norm),
    "timm": lambda asked: from_timm(asked.positional, asked.image_size, asked.norm),
    "file": lambda asked: from_file(
        asked.positional, dict(asked.spec.options)["arch"], asked.image_size, asked.norm, init=asked.init
    ),
}
"""By the kinds of `metaft.starts.names`; what is none of them is a run's folder."""


def open_start(
    init: str,
    inputs: Callable[[], Inputs],
    *,
    image_size: int | None = None,
    norm: NormOf | None = None,
    module: nn.Module | None = None,
    keep: bool = False,
) -> Start:
    """The start that `--init` names. `inputs` are those that the examples would have without any.

    Raises MetaftError, which names `init` and what was wrong, for one that cannot be had.
    """
    if init == "":
        raise MetaftError(f"init: name one of {', '.join(WRITTEN)}, not ''")
    if is_run(init):
        if os.sep not in init and not os.path.lexists(local(init)):  # a path that is gone says so by itself
            raise no_such("init", init, KINDS, lacks="no run folder or start", written=WRITTEN)
        there = os.path.isdir(local(init))  # or that is what is wrong with it
        if there and image_size is not None:
            raise MetaftError(f"image_size: the pictures of {init} have the size of its own (given {image_size})")
        if there and norm is not None:
            raise MetaftError(f"init_norm: {init} normalises as it was trained (given {norm})")
        return from_run(Path(init), module)
    spec = parse("init", init, KINDS)
    if spec.name == "file" and "arch" not in dict(spec.options):
        raise MetaftError(f"init: write {KINDS['file'].shown('file')!r}, not {init!r}: its architecture is to be named")
    if module is not None and spec.name != "none":
        raise MetaftError(
            f"init: {init} brings an architecture, and a module was handed over; take init 'none' or a run"
        )
    if spec.name == "none" and norm is not None:
        raise MetaftError(f"init_norm: a random start has no running statistics (given {norm})")
    return STARTS[spec.name](Asked(init, spec, image_size, inputs, norm or "keep", module, keep))
