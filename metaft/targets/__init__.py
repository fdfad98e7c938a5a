"""Labelled images to fine-tune to: one file per kind of `--data`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from metaft.errors import DataError, MetaftError
from metaft.inputs import ImageInputs, Inputs
from metaft.spec import Takes, parse
from metaft.support.paths import local
from metaft.targets.base import Target
from metaft.targets.csv import listed as _table
from metaft.targets.draws import Rows
from metaft.targets.files import Listed, target_of
from metaft.targets.folder import listed as _folder
from metaft.targets.glyphs import script_of
from metaft.tasks.folder import inputs_for

__all__ = ["FILES", "KINDS", "Rows", "Target", "load", "shape_of"]

FILES: dict[str, Callable[[Path], Listed]] = {
    "folder": _folder,
    "csv": _table,
}
"""Kinds that are picture files, by how they are listed."""

KINDS = {"folder": Takes("PATH"), "csv": Takes("FILE"), "glyphs": Takes("SCRIPT")}
"""What `--data` names."""


def shape_of(data: str) -> tuple[list[int], bool]:
    """([C, H, W] of the target's images, whether another size will do). Raises as `load` does."""
    kind, rest = _named_by(data)
    if kind in FILES:
        with _named():
            p = inputs_for([file for _, _, file in FILES[kind](local(rest)).files], sample=None)
        return [p.channels, p.height, p.width], True
    return list(load(data).examples.shape[1:]), False


def load(data: str, inputs: Inputs | None = None, *, skip_bad: bool = False) -> Target:
    """The target that `--data` names: "folder:PATH", "csv:FILE" or "glyphs:SCRIPT".

    PATH holds train/ and test/ (and val/, if there is one) folders of the same class folders, or class folders alone;
    FILE names a picture and its label in each line. Images get a start's `inputs`; without any, those of a folder which
    is meta-trained on. How many bits greys of more than 8 have is for all of the target's files to say. Raises
    DataError or MetaftError for what cannot be read (`skip_bad` leaves such pictures out), or not by these inputs.
    """
    if inputs is not None and not isinstance(inputs, ImageInputs):
        raise MetaftError(f"data: {data} holds images, but the run takes {inputs.kind}")
    kind, rest = _named_by(data)
    if kind == "glyphs":
        return script_of(rest, inputs)
    with _named():
        return target_of(FILES[kind](local(rest)), inputs, skip_bad=skip_bad)


def _named_by(data: str) -> tuple[str, str]:
    """(the kind, what stands behind its colon). Raises MetaftError."""
    kind, rest, _ = parse("data", data, KINDS)
    assert rest is not None
    return kind, rest


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Lets every error inside name the option."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error) if str(error).startswith("data: ") else f"data: {error}") from error
