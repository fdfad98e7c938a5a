"""Labelled images to fine-tune to: one file per kind of `--data`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from metaft.errors import DataError, MetaftError
from metaft.inputs import ImageInputs, Inputs
from metaft.spec import Takes
from metaft.support import places
from metaft.support.paths import local
from metaft.targets.base import Target
from metaft.targets.csv import listed as _table
from metaft.targets.draws import Rows
from metaft.targets.files import Listed, target_of
from metaft.targets.folder import listed as _folder
from metaft.targets.glyphs import script_of
from metaft.targets.torchvision import listed as _of_torchvision
from metaft.tasks.folder import inputs_for

__all__ = ["KINDS", "Rows", "Target", "check_numbers", "load", "shape_of"]


class Kind(NamedTuple):
    """What `--data` can name."""

    place: str
    """What stands behind the colon."""
    listed: Callable[[str, str | None], Listed] | None = None
    """How it is listed, of that and `--data-root`, where it is pictures that a start's inputs are read from."""
    numbers: Callable[[str], Listed] | None = None
    """The same where labels are numbers, where they can be."""


KINDS: dict[str, Kind] = {
    "folder": Kind("PATH", lambda path, root: _folder(local(path))),
    "csv": Kind("FILE", lambda file, root: _table(local(file)), lambda file: _table(local(file), numbers=True)),
    "torchvision": Kind("NAME", _of_torchvision),
    "glyphs": Kind("SCRIPT"),
}


def shape_of(data: str, data_root: str | None = None, *, numbers: bool = False) -> tuple[list[int], bool]:
    """([C, H, W] of the target's images, whether another size will do). Raises as `load` does."""
    kind, rest = _named_by(data)
    if kind.listed is not None:
        with _named():
            pictures = _listed(kind, rest, data, data_root, numbers=numbers)
            p = inputs_for([file for _, _, file in pictures.files], sample=None, opened=pictures.opened)
        return [p.channels, p.height, p.width], True
    return list(load(data, data_root=data_root).examples.shape[1:]), False


def load(
    data: str,
    inputs: Inputs | None = None,
    *,
    skip_bad: bool = False,
    data_root: str | None = None,
    numbers: bool = False,
) -> Target:
    """The target that `--data` names: "folder:PATH", "csv:FILE", "torchvision:NAME" or "glyphs:SCRIPT".

    PATH holds train/ and test/ (and val/, if there is one) folders of the same class folders, or class folders alone;
    FILE names a picture and its label in each line; NAME is a data set that torchvision stored in `data_root` (default:
    the environment's METAFT_DATA). Images get a start's `inputs`; without any, those of a folder which
    is meta-trained on. Labels are classes, or `numbers`, as a table may have them. How many bits greys of more than 8
    have is for all of the target's files to say. Raises DataError or MetaftError for what cannot be read (`skip_bad`
    leaves such pictures out), or not by these inputs.
    """
    if inputs is not None and not isinstance(inputs, ImageInputs):
        raise MetaftError(f"data: {data} holds images, but the run takes {inputs.kind}")
    kind, rest = _named_by(data)
    if kind.listed is None and not numbers:
        return script_of(rest, inputs)
    with _named():
        return target_of(_listed(kind, rest, data, data_root, numbers=numbers), inputs, skip_bad=skip_bad)


def check_numbers(data: str) -> None:
    """Raises MetaftError where labels can be no numbers."""
    kind, _ = _named_by(data)
    if kind.numbers is None:
        able = " or ".join(f"{name}:{of.place}" for name, of in KINDS.items() if of.numbers is not None)
        raise MetaftError(f"loss: mse is for labels that are numbers, as {able} may have; {data} has classes")


def _listed(kind: Kind, rest: str, data: str, data_root: str | None, *, numbers: bool) -> Listed:
    """The files of a target that is pictures. Raises MetaftError for numbers where there are classes."""
    if numbers:
        check_numbers(data)
        assert kind.numbers is not None
        return kind.numbers(rest)
    assert kind.listed is not None
    return kind.listed(rest, data_root)


def _named_by(data: str) -> tuple[Kind, str]:
    """(the kind, what stands behind its colon). Raises MetaftError."""
    kind, rest, _ = places.parsed("data", data, {name: Takes(kind.place) for name, kind in KINDS.items()})
    assert rest is not None
    return KINDS[kind], rest


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Lets every error inside name the option."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error) if str(error).startswith("data: ") else f"data: {error}") from error
