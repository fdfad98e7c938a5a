"""What each channel of a network is worth to its predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.after.traced import ROOTS, Norm
from metaft.finetune.examples import evenly
from metaft.finetune.extras.distil import T

WATCHED, AT_ONCE = 64, 8
"""Images at most by which channels are chosen, evenly among those given, and how many in one pass."""


def saliences(body: nn.Module, head: nn.Module, images: Tensor, seed: int) -> dict[nn.Module, Tensor]:
    """[channels] for each layer of the body that gives channels: what the predictions lose, to second order, if what
    the channel gives is multiplied by a number a little below 1.

    That is the Fisher information of this number (Fisher pruning, Theis et al. 2018,
    https://arxiv.org/abs/1801.05787; with such gates Molchanov et al. 2019, https://arxiv.org/abs/1906.10771): the mean
    over images of the squared derivative by it of the log-likelihood of a label that is drawn from the network's own
    prediction. Labels of the images themselves would tell less, since a fitted network is sure of them and has no
    gradient; for the same reason predictions are softened, by the temperature of `distil`, at which what is left will
    follow the whole network.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[nn.Module, Tensor] = {}
    watched = images[torch.from_numpy(evenly(len(images), WATCHED))].double()
    for some in watched.split(AT_ONCE):
        with _gated(body, len(some)) as gates:
            logits = head(body(some)) / T
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        for layer, slope in zip(gates, torch.autograd.grad(loss, [*gates.values()], allow_unused=True), strict=True):
            if slope is not None:
                sums[layer] = sums.get(layer, 0) + slope.square().sum(0) / len(watched)
    return sums


@contextlib.contextmanager
def _gated(body: nn.Module, images: int) -> Iterator[dict[nn.Module, Tensor]]:
    """Inside, what each layer gives is multiplied by a one [images, channels] of its own, which can be differentiated
    by; a layer that is met twice has the same ones."""
    gates: dict[nn.Module, Tensor] = {}

    def multiplied(layer: nn.Module, _: Any, given: Tensor) -> Tensor:
        axis = -1 if isinstance(layer, nn.Linear) else 1
        if layer not in gates:
            gates[layer] = given.new_ones(images, given.shape[axis], requires_grad=True)
        gate = gates[layer].repeat_interleave(len(given) // images, 0)  # where parts of an image stand as images
        sides = [len(given), *[1] * (given.dim() - 1)]
        sides[axis] = given.shape[axis]
        return given * gate.view(sides)

    with contextlib.ExitStack() as stack:
        for layer in body.modules():
            if isinstance(layer, (*ROOTS, Norm)):
                stack.callback(layer.register_forward_hook(multiplied).remove)
        yield gates
