"""Pictures changed as far as a bound allows so that a loss rises: FGSM and PGD.

Bounds are in units of pixel values 0..1, before normalisation, and no pixel leaves that range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metaft import keyed
from metaft.inputs import Inputs


class Span(NamedTuple):
    """What pixels of 0 and of 1 become, each [C, H, W] as a model computes with them."""

    low: Tensor
    high: Tensor


def span_of(inputs: Inputs, like: Tensor) -> Span:
    """Of inputs whose raw numbers are bytes."""
    low, high = (inputs(torch.full(inputs.shape, value, dtype=torch.uint8)).to(like) for value in (0, 255))
    return Span(low, high)


def attacked(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    span: Span,
    *,
    eps: float,
    steps: int,
    begin: Tensor | None = None,
) -> Tensor:
    """x [n, C, H, W] after so many steps of projected sign ascent on `loss`, which is a sum or mean over examples that
    do not see each other (Madry et al. 2018, https://arxiv.org/abs/1706.06083, section 2.1).

    One step is of length eps: FGSM (Goodfellow et al. 2015, https://arxiv.org/abs/1412.6572, section 4). Of several
    each is 2.5 eps / steps long, as Madry's are, so that the edge of the bound is reached from anywhere inside. `begin`
    in -1..1, of x's shape, says where inside the bound the first one begins (None: at x). With eps 0 it is x.
    """
    if eps == 0:
        return x
    unit = eps * (span.high - span.low)
    lowest, highest = torch.maximum(x - unit, span.low), torch.minimum(x + unit, span.high)
    moved = x if begin is None else (x + begin * unit).clamp(lowest, highest)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(moved), moved)
        length = 1.0 if steps == 1 else 2.5 / steps
        moved = (moved.detach() + length * unit * gradient.sign()).clamp(lowest, highest)
    return moved.detach()


def within(keys: Tensor, like: Tensor) -> Tensor:
    """Uniform in -1..1, of the shape of `like` [n, ...], by a key of each: int64 [n]."""
    words = torch.func.vmap(lambda key: keyed.words(key, count=like[0].numel()))(keys)
    return (words.double() / 2**31 - 1).to(like).view_as(like)
