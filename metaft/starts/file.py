"""Weights from a file of the user's own, for an architecture of a library."""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch

from metaft.errors import MetaftError, class_and_words
from metaft.models import published
from metaft.models.architecture import NormOf
from metaft.starts.base import Start
from metaft.starts.names import PACKAGED
from metaft.starts.published import of_architecture
from metaft.starts.weights import in_order, load_into, named_tensors, source_head, start_of
from metaft.support.foreign import ran_out
from metaft.support.paths import absolute, local


def from_file(path: str, arch: str, image_size: int | None, norm: NormOf = "keep", *, init: str) -> Start:
    """A file of tensors by name, `.safetensors`, or what torch.save wrote (read with weights_only=True: no code in it
    runs).

    Raises MetaftError for a file that cannot be read or an unknown architecture, and where the backbone's tensors are
    not this architecture's.
    """
    name = architecture_of(arch)
    tensors = named_tensors(read(path), path)
    # Size matters to few architectures; theirs is then that of the library's own weights.
    module = published.bare(name, (3, image_size or 224, image_size or 224))
    inputs = of_architecture(name, module, image_size)
    source = str(absolute(path))  # the same wherever a run goes on
    if arch in PACKAGED and not tensors.keys() & module.state_dict().keys():  # as its package names them
        tensors = in_order(module, tensors, source)
    head = published.head_for(name, module)
    notes, known = load_into(module, head, tensors, source, name), source_head(module, head, tensors)
    about = {"weights": source}
    return start_of(module, name, inputs, init=init, about=about, notes=tuple(notes), norm=norm, source=known)


def architecture_of(arch: str) -> str:
    """`library:name` of an architecture's name: `library/name`, or the name alone where torchvision has it, or else
    timm.

    Raises MetaftError where none has it.
    """
    from metaft.support.vision import models

    if arch in PACKAGED:
        return PACKAGED[arch].architecture
    if arch.partition("/")[0] in published.LIBRARIES:
        arch = arch.replace("/", ":", 1)
    if arch.partition(":")[0] in published.LIBRARIES and ":" in arch:
        return arch
    if arch in models.list_models(module=models):
        return f"torchvision:{arch}"
    try:
        if published.timm().is_model(arch):
            return f"timm:{arch}"
    except MetaftError:
        raise MetaftError(f"init: torchvision has no model {arch!r}, and timm is not installed") from None
    raise MetaftError(f"init: neither torchvision nor timm has a model {arch!r}")


def read(path: str) -> dict[str, Any]:
    """What a file of weights holds. Raises MetaftError."""
    file = local(path)
    if not os.path.isfile(file):
        raise MetaftError(f"init: {path} is {'no file' if os.path.lexists(file) else 'not there'}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        held = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():
            raise MetaftError(f"init: {path} cannot be read as weights ({class_and_words(error)})") from error
        raise MetaftError(
            f"init: {path} holds more than tensors, which would run code of its own; save module.state_dict() instead"
        ) from None
    except Exception as error:  # whatever a damaged file makes its reader raise
        if ran_out(error):
            raise
        raise MetaftError(
            f"init: {path} cannot be read as weights; it is damaged, or neither safetensors nor what torch.save writes "
            f"({class_and_words(error)})"
        ) from error
    if not isinstance(held, dict):
        raise MetaftError(f"init: {path} holds a {type(held).__name__}, not tensors by name; save module.state_dict()")
    return held
