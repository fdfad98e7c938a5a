"""Meta-Curvature: inner gradients transformed by learned matrices."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from metaft.algorithms.base import Algorithm
from metaft.algorithms.gradient import Hooks, by_gradient
from metaft.inner_augment import Augment
from metaft.inner_optim import InnerOptimizer
from metaft.models import Model
from metaft.types import Loss, Norm, Params

MODES = (".out", ".in", ".filter")
"""End the names of a parameter's matrices: over its outputs, its inputs, and the places of its filter."""


def meta_curvature(
    model: Model,
    *,
    loss: Loss = "cross_entropy",
    inner_lr: float = 0.4,
    inner_steps: int = 1,
    inner_optimizer: str | InnerOptimizer = "sgd",
    inner_augment: str | Augment = "none",
    first_order: bool = False,
    adapt_norm: bool = True,
    norm: Norm = "transductive",
) -> Algorithm:
    """MAML whose inner gradient is multiplied by a learned matrix along each of its modes.

    Park and Oliva 2019, https://arxiv.org/abs/1902.03356, section 3: the gradient G [out, in, filter] of a convolution
    becomes G x_1 M_out x_2 M_in x_3 M_filter, that of a linear layer M_out G M_in^T; the matrices are learned with the
    initialisation, and begin as the identity, at which this is MAML. They stand in `meta` beside the parameters,
    NAME.out [out, out], NAME.in [in, in] and NAME.filter [h*w, h*w].

    Not the paper's: a vector (bias, scale, shift) has the matrix of its one mode; a head has none over its classes,
    whose order is random in each task, so that a target may have another number of them; with another
    `inner_optimizer` its direction is transformed; the meta-gradient's mean over the meta-batch; `first_order`, which
    takes the inner gradient, but not the matrices, for a constant; and `norm="inductive"`. With `adapt_norm=False`
    scales and shifts stay out of the inner loop, as in `maml`, and have no matrices.

    Raises MetaftError for an inner_lr or inner_steps below 0, or an unknown optimiser or augmentation.
    """
    adapted = [name for name in model.params if adapt_norm or name not in model.norm]
    matrices = {
        name + mode: torch.eye(size, dtype=model.params[name].dtype, device=model.params[name].device)
        for name in adapted
        for mode, size in zip(MODES, _modes(model.params[name]).shape, strict=False)
        if size > 1 and not (mode == ".out" and name in model.head)
    }
    return by_gradient(
        "meta-curvature",
        model,
        loss=loss,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        inner_augment=inner_augment,
        first_order=first_order,
        norm=norm,
        adapted=adapted,
        learned={**model.params, **matrices},
        hooks=Hooks(rates=lambda meta: functools.partial(_moves, inner_lr, meta)),
    )


def _moves(inner_lr: float, meta: Params, directions: Params, step: int) -> Params:
    return {k: inner_lr * _transformed(d, [meta.get(k + mode) for mode in MODES]) for k, d in directions.items()}


def _modes(p: Tensor) -> Tensor:
    """[out], [out, in] or [out, in, places of the filter]."""
    return p.flatten(2) if p.dim() > 2 else p


def _transformed(g: Tensor, matrices: list[Tensor | None]) -> Tensor:
    """g times each matrix along its mode; None is the identity."""
    modes = _modes(g)
    for i, matrix in enumerate(matrices):
        if matrix is not None:
            rows = modes.movedim(i, 0)
            modes = (matrix @ rows.reshape(len(rows), -1)).view(rows.shape).movedim(0, i)
    return modes.reshape(g.shape)
