"""A named architecture or a module of the user's: built, apart into backbone and head, and filled with parameters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from metaft import models
from metaft.models.functional import linear, prepared
from metaft.models.handed import copied, taken
from metaft.models.stored import kept_statistics
from metaft.types import Params

NormOf = Literal["keep", "adapt"]
"""What normalises a start's layers: running statistics that it came with, or moments of the examples."""


def build(
    architecture: Mapping[str, Any],
    seed: int | None,
    *,
    outputs: int | None = None,
    module: nn.Module | None = None,
    norm: NormOf = "adapt",
) -> tuple[nn.Module, str]:
    """A checkpoint's architecture with random parameters drawn from `seed`, and the name of its head; None draws none,
    for parameters that are to be filled in.

    `outputs` gives it another number of classes; `module` is the user's own, where the architecture has no name: it
    keeps its frozen parameters and buffers. With `norm="keep"` layers with running statistics are StoredNorm, and look
    at no batch; those of a library's architecture are to be filled in, as is its backbone, of which nothing is drawn.
    Raises MetaftError for a module that metaft does not take.
    """
    norm = architecture.get("norm", norm)
    if module is None and is_published(architecture["name"]):
        from metaft.models import published  # few classifiers are of a library's architecture

        classes: int = architecture["ways"] if outputs is None else outputs
        whole = published.build(architecture["name"], classes, architecture["shape"])
        if norm == "keep":
            # No layer measures a batch then, so the less exact sums that PyTorch's batch normalisation has for images
            # laid out pixel by pixel are not asked for; a CPU's convolutions of them are 1.4 to 1.8 times as fast.
            kept_statistics(whole, unseen=True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        built, head = prepared(whole, published.HEAD)
        built = _narrowed(built, architecture)
        if seed is not None:
            models.initialise(built.get_submodule(head), seed)
        return built, head
    if module is None:
        outputs = architecture["ways"] if outputs is None else outputs
        built, head = models.skeleton({**architecture, "ways": outputs}), "head"
        if not models.is_ours(architecture["name"]):
            built, head = prepared(built)
    else:
        module = taken(module).cpu()
        unseen = is_published(architecture["name"])
        built, head = prepared(kept_statistics(module, unseen=unseen) if norm == "keep" else module)
        old = linear(built, head)
        if outputs is not None and outputs != old.out_features:
            new = partial(nn.Linear, old.in_features, outputs, bias=old.bias is not None, dtype=old.weight.dtype)
            built.set_submodule(head, models.undrawn(new))
    built = _narrowed(built, architecture)
    return built if seed is None else models.initialise(built, seed), head


def _narrowed(module: nn.Module, architecture: Mapping[str, Any]) -> nn.Module:
    if "widths" not in architecture:
        return module
    from metaft.models.narrowed import narrowed  # few are pruned

    return narrowed(module, architecture["widths"])


def is_published(name: str) -> bool:
    """Whether a named architecture is a library's: `torchvision:resnet18`."""
    return ":" in name


def is_of(name: str, head: str) -> bool:
    """Whether a parameter of this name is the head's."""
    return name.startswith(f"{head}.")


def filled(module: nn.Module, params: Params, buffers: Params | None = None) -> nn.Module:
    """A copy with these parameters and buffers, of which there may be more; other buffers stay, and frozen parameters
    that are not in them."""
    module = copied(module)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name in params or p.requires_grad:
                p.copy_(params[name])
        for name, b in module.named_buffers():
            if name in (buffers or {}):
                b.copy_((buffers or {})[name])
    return module
