"""Losses whose derivatives are computed anew when they are asked for, so that an inner step keeps its weights alone.

The gradient of a loss needs all activations of the forward pass, and the derivative of that gradient those of both
passes. Here neither is kept: a derivative starts again from the parameters. A second-order inner loop of many steps
then needs memory for the weights after each step and for the activations of a single one, and takes about half again
as long (Chen et al. 2016, https://arxiv.org/abs/1604.06174, with each pass of an inner step as a segment).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaft.models import convolution, dropout
from metaft.models.functional import LossOf, Model
from metaft.types import Loss, Params

Function = Callable[..., tuple[Tensor, ...]]


def recomputed(model: Model) -> Model:
    """The same model, whose `loss` keeps nothing but its arguments where its gradient will be differentiated too.

    It is differentiated in the parameters alone; images and labels count as constants.
    """
    return dataclasses.replace(model, loss=_loss_of(model.loss))


def _loss_of(plain: LossOf) -> LossOf:
    def loss_of(params: Params, x: Tensor, y: Tensor, loss: Loss, *, curvature: bool = False) -> tuple[Tensor, Tensor]:
        if not curvature:
            return plain(params, x, y, loss)
        names, masks, form_of = list(params), dropout.in_use(), convolution.in_use()
        keys = () if masks is None else masks[:1]  # every tensor goes through the arguments: vmap sees none beside

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            values, (x, y, *keys) = tensors[: len(names)], tensors[len(names) :]
            # A derivative may be computed in another thread, which knows of no context.
            drop = contextlib.nullcontext() if masks is None else dropout.use_dropout(keys[0], masks[1])
            with drop, convolution.forms(form_of):
                return plain(dict(zip(names, values, strict=True)), x, y, loss)

        value, prediction = _Recomputed.apply(flat, len(names), *params.values(), x, y, *keys)  # type: ignore[reportGeneralTypeIssues]
        return value, prediction.detach()

    return loss_of


class _Recomputed(torch.autograd.Function):
    """(function, n, tensors) to function(*tensors), to be differentiated in the first n of them.

    Its derivative is again such a function, and so is that one's: autograd and torch.func can go on for ever.
    """

    @staticmethod
    def forward(function: Function, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return function(*(t.detach() for t in tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.function, ctx.n, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        n, tensors = ctx.n, ctx.saved_tensors
        moved = (*tensors[:n], *cotangents, *tensors[n:])
        grads = _Recomputed.apply(_derivative(ctx.function, n, len(cotangents)), n + len(cotangents), *moved)
        return None, None, *grads, *[None] * (len(tensors) - n)  # type: ignore[reportGeneralTypeIssues]

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Function, n: int, *tensors: Tensor) -> Any:
        _, _, *dims = in_dims
        if all(dim is None for dim in dims):
            out = _Recomputed.apply(function, n, *tensors)
            return out, tuple(None for _ in out)  # type: ignore[reportGeneralTypeIssues]
        mapped = torch.func.vmap(function, in_dims=tuple(dims), randomness="error")
        out = _Recomputed.apply(mapped, n, *tensors)
        return out, tuple(0 for _ in out)  # type: ignore[reportGeneralTypeIssues]


def _derivative(function: Function, n: int, outputs: int) -> Function:
    """(first n tensors, cotangents of all outputs, other tensors) to the cotangents of the first n."""

    def derivative(*tensors: Tensor) -> tuple[Tensor, ...]:
        first, cotangents, rest = tensors[:n], tensors[n : n + outputs], tensors[n + outputs :]
        _, back, *_ = torch.func.vjp(lambda *values: function(*values, *rest), *first)
        return back(cotangents)

    return derivative
