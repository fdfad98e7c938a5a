"""Architectures that other libraries publish, by name: `torchvision:resnet18`, `timm:tf_efficientnet_lite0`.

Each becomes a backbone that ends in features and a linear head: a user's classes are never a library's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from metaft.errors import MetaftError, class_and_words, suggest
from metaft.models.drawn import own_generator
from metaft.support.foreign import in_our_words

HEAD = "head"
"""The name of the head in what `build` gives."""


class Headed(nn.Module):
    """A backbone that ends in features [n, D], and a linear head."""

    def __init__(self, body: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def build(name: str, outputs: int, shape: Sequence[int]) -> nn.Module:
    """A `Headed` of this architecture, in evaluation mode, for inputs [C, H, W], its values those of its constructor.

    Raises MetaftError for a library that is not installed, an unknown name, a model whose head cannot be told from its
    backbone, and inputs that it cannot take.
    """
    return headed(bare(name, shape), name, outputs, shape)


def bare(name: str, shape: Sequence[int]) -> nn.Module:
    """The library's own module, with the head that it comes with; auxiliary heads, which serve training from nothing
    alone, are left out. Raises MetaftError as `build` does."""
    library, _, model = name.partition(":")
    with own_generator(0):
        try:
            return LIBRARIES[library](model, tuple(shape)).eval()
        except (AssertionError, ValueError) as error:
            raise MetaftError(
                f"image_size: {name} cannot be made for images {[*shape]} ({class_and_words(error)})"
            ) from error


def head_of(module: nn.Module) -> str:
    """The name of a classification model's head: the last of its linear and convolution layers, as the libraries order
    them. Raises MetaftError where there is none."""
    layers = [path for path, part in module.named_modules() if path and isinstance(part, (nn.Linear, nn.Conv2d))]
    if not layers:
        raise MetaftError(f"init: {type(module).__name__} has no linear or convolution layer to serve as head")
    return layers[-1]


def without_head(module: nn.Module, head: str) -> nn.Module:
    """The same module, whose head passes on what it is given; a module's forward pass flattens maps by itself."""
    module.set_submodule(head, nn.Identity())
    return module


def headed(module: nn.Module, name: str, outputs: int, shape: Sequence[int]) -> Headed:
    """A library's module with a linear head in the place of its own. Raises MetaftError for inputs [C, H, W] that it
    cannot take, and where what comes to its head are no features [n, D]."""
    body = without_head(module, head_for(name, module))
    with in_our_words(f"image_size: {name} cannot take images {list(shape)}"), torch.no_grad():
        features = body(torch.zeros(2, *shape, device=next(body.parameters()).device))
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 2:
        what = f"{list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise MetaftError(f"init: what {name} gives its head is no batch of features [2, D], but {what}")
    with own_generator(0):
        return Headed(body, features.shape[1], outputs).eval()


def head_for(name: str, module: nn.Module) -> str:
    """The head's name in a bare module. timm says which layer it is; torchvision does not."""
    if not name.startswith("timm:"):
        return head_of(module)
    layer: Any = module.get_classifier() if hasattr(module, "get_classifier") else None  # type: ignore[operator]
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise MetaftError(f"init: the head of {name} is no single layer ({type(layer).__name__})")
    return next(path for path, part in module.named_modules() if part is layer)


def timm() -> ModuleType:
    """The library timm. Raises MetaftError where it is not installed."""
    from metaft.support.vision import torchvision  # timm's own import of it fails beside a CPU torch

    assert torchvision
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise MetaftError("init: timm is not installed; pip install 'metaft[vision]'") from None
    return timm


def _of_torchvision(name: str, shape: tuple[int, ...]) -> nn.Module:
    from metaft.support.vision import models

    if name not in (known := models.list_models(module=models)):
        raise MetaftError(f"init: there is no classification model torchvision:{name}{suggest(name, known)}")
    more: dict[str, Any] = {}
    if name in _AUXILIARY:  # their published weights come with this transformation of the inputs
        more = {"aux_logits": False, "init_weights": False, "transform_input": True}
    elif name.startswith("vit_"):
        more = {"image_size": shape[-1]}
    return models.get_model(name, weights=None, **more)


_AUXILIARY = ("googlenet", "inception_v3")


def _of_timm(name: str, shape: tuple[int, ...]) -> nn.Module:
    library = timm()
    if not library.is_model(name):
        raise MetaftError(f"init: there is no model timm:{name}{suggest(name, library.list_models())}")
    return library.create_model(name, pretrained=False)


LIBRARIES: dict[str, Callable[[str, tuple[int, ...]], nn.Module]] = {
    "torchvision": _of_torchvision,
    "timm": _of_timm,
}
"""Library -> its architecture of a name, for images of a shape."""
