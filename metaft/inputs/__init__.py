"""From files to what a model computes with: one file per kind of input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metaft.errors import CheckpointError, no_such
from metaft.inputs.base import Inputs, Reading
from metaft.inputs.image import ImageInputs

__all__ = ["KINDS", "ImageInputs", "Inputs", "Reading", "from_plain", "of_header"]

KINDS: dict[str, Callable[[Mapping[str, Any]], Inputs]] = {
    "image": ImageInputs.from_plain,
}


def from_plain(values: Mapping[str, Any]) -> Inputs:
    """The inverse of `Inputs.plain`. Raises CheckpointError for a kind that is not known here."""
    kind = values["kind"]
    if kind not in KINDS:
        raise CheckpointError(f"{no_such('inputs', kind, KINDS, lacks='this version of metaft has no kind')}")
    return KINDS[kind]({k: v for k, v in values.items() if k != "kind"})


def of_header(header: Mapping[str, Any]) -> Inputs | None:
    """The inputs that a checkpoint's header tells of; None where the model takes numbers that no file gives."""
    if "inputs" in header:
        return from_plain(header["inputs"])
    if "preprocessing" in header:  # before there were kinds
        return ImageInputs.from_plain({**header["preprocessing"], "invert": header.get("invert", False)})
    return None
