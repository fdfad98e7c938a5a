"""The inner loop for ONE task: a few differentiable steps of gradient descent on named tensors. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from metaft.inner_optim import InnerOptimizer, sgd
from metaft.models.norm import in_transform
from metaft.types import Fast, Params

Aux = TypeVar("Aux")

Rates = float | Mapping[str, Tensor] | Callable[[Params, int], Params]
"""One rate, one of each parameter (a scalar, or elementwise), or what (directions, step 0, 1, ...) amount to."""


ARMIJO = 1e-4
"""The share of a slope's promise that a step has to keep (Nocedal and Wright, Numerical Optimization, section 3.1)."""


def value_and_grad(
    loss: Callable[[Params], tuple[Tensor, Aux]], params: Params, *, create_graph: bool, others: Iterable[Tensor] = ()
) -> tuple[Tensor, Aux, Params]:
    """Value (scalar), auxiliary output and gradient of `loss` at `params`.

    With `create_graph` the gradient is itself differentiable, as far as `params`, or `others` that the loss uses,
    depend on something that is being differentiated; without, it is a constant. Plain autograd where possible,
    torch.func inside its transforms. Parameters that the loss does not use have gradient 0.
    """
    if in_transform() and create_graph:
        grads, (value, aux) = torch.func.grad_and_value(loss, has_aux=True)(params)
        return value, aux, grads
    if in_transform():  # torch.func.grad would record the backward pass too, and keep what both passes used
        value, back, aux = torch.func.vjp(loss, params, has_aux=True)  # type: ignore[reportAssignmentType]
        (grads,) = back(torch.ones_like(value), retain_graph=False, create_graph=False)
        return value, aux, {k: g.detach() for k, g in grads.items()}
    recording = torch.is_grad_enabled()  # else what requires a gradient is a constant all the same
    tracked = recording and any(p.requires_grad for p in (*params.values(), *others))
    with torch.enable_grad():
        leaves = {k: p if recording and p.requires_grad else p.detach().requires_grad_() for k, p in params.items()}
        value, aux = loss(leaves)
        grads = torch.autograd.grad(
            value, list(leaves.values()), create_graph=create_graph and tracked, materialize_grads=True
        )
    return value, aux, dict(zip(leaves, grads, strict=True))


def hessian_product(loss: Callable[[Params], Tensor], params: Params) -> Callable[[Params], Params]:
    """v -> H v with H the Hessian of `loss` at `params`, a constant. The loss is computed once for all products."""
    if in_transform():
        product = torch.func.vjp(torch.func.grad(loss), params)[1]
        return lambda v: product(v)[0]
    with torch.enable_grad():
        leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
        grads = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True, materialize_grads=True)
    curved = {k: g for k, g in zip(leaves, grads, strict=True) if g.requires_grad}

    def product_of(v: Params) -> Params:
        along = [v[k] for k in curved]
        rows = torch.autograd.grad(
            list(curved.values()), list(leaves.values()), along, retain_graph=True, materialize_grads=True
        )
        return dict(zip(leaves, rows, strict=True))

    return product_of


def descend(
    loss: Callable[[Params, int], Tensor],
    params: Params,
    *,
    steps: int,
    lr: Rates,
    first_order: bool = False,
    adapt: Iterable[str] | None = None,
    optimizer: InnerOptimizer | None = None,
    halvings: int = 0,
) -> Iterator[Params]:
    """Yield `params`, then the parameters after each of `steps` steps: p <- p - lr * dloss/dp.

    `loss` takes the parameters and the number of the step, 0, 1, ... Only names in `adapt` move (default: all); an
    `optimizer` makes a direction of the gradient. `first_order` treats each gradient as a constant, so that the
    derivative of the result in `params` is the identity. One parameter may have been computed from another: each
    gradient is the partial one, at which the others stay. With `halvings` a step is halved up to so many times, until
    the loss falls by Armijo's rule; one that never does is not taken.
    """
    names = list(params) if adapt is None else list(adapt)
    optimizer = sgd() if optimizer is None else optimizer
    # Nodes of their own: from a head that was made out of the body, autograd would go on into the body.
    params = {k: p.view_as(p) for k, p in params.items()}
    yield params
    state = optimizer.init({k: params[k] for k in names})
    for step in range(steps):
        fixed = params

        def of_adapted(moving: Params, fixed: Params = fixed, step: int = step) -> tuple[Tensor, tuple[()]]:
            return loss({**fixed, **moving}, step), ()

        moving = {k: params[k] for k in names}
        value, _, grads = value_and_grad(of_adapted, moving, create_graph=not first_order, others=fixed.values())
        directions, state = optimizer.update(grads, state, step)
        moves = lr(directions, step) if callable(lr) else _scaled(lr, directions)
        if halvings:
            share = _falling_share(lambda params: of_adapted(params)[0], moving, value, grads, moves, halvings)
            moves = {k: torch.where(share > 0, share * m, 0) for k, m in moves.items()}  # 0 * inf is not 0
        params = {**params, **{k: moving[k] - moves[k] for k in names}}
        yield params


def _scaled(lr: float | Mapping[str, Tensor], directions: Params) -> Params:
    return {k: (lr[k] if isinstance(lr, Mapping) else lr) * d for k, d in directions.items()}


def _falling_share(
    loss: Callable[[Params], Tensor], params: Params, value: Tensor, grads: Params, moves: Params, halvings: int
) -> Tensor:
    """The largest of 1, 1/2, ..., 2^-halvings by which `moves` lower the loss by a share of what the slope promises; 0
    where none does (Armijo's rule). All are tried, since of many tasks at once none can stop alone."""
    with torch.no_grad():
        slope = torch.stack([(grads[k] * moves[k]).sum() for k in moves]).sum().clamp(min=0)  # momentum may go uphill
        share = torch.zeros_like(value)
        for scale in (0.5**power for power in range(halvings + 1)):
            after = loss({k: params[k] - scale * m for k, m in moves.items()})
            falls = after <= value - ARMIJO * scale * slope
            share = torch.where((share == 0) & falls, torch.full_like(share, scale), share)
        finite = torch.stack([g.isfinite().all() for g in grads.values()]).all()
        return torch.where(finite, share, torch.ones_like(share))  # a gradient that is no number is to be seen


def collect(states: Iterator[Params], finish: Callable[[Params], Fast], trajectory: bool) -> Fast:
    """`finish` the last state, or every one, then stacked along a new leading axis [steps + 1]."""
    if not trajectory:
        final = next(states)
        for state in states:
            final = state
        return finish(final)
    every = [finish(state) for state in states]
    return Fast(
        params={k: torch.stack([f.params[k] for f in every]) for k in every[0].params},
        moments=tuple(
            (torch.stack([mean for mean, _ in layer]), torch.stack([var for _, var in layer]))
            for layer in zip(*[f.moments for f in every], strict=True)
        ),
        extra={k: torch.stack([f.extra[k] for f in every]) for k in every[0].extra},
    )


def at_step(trajectory: Fast, step: int) -> Fast:
    """One state out of a stacked trajectory."""
    return Fast(
        params={k: v[step] for k, v in trajectory.params.items()},
        moments=tuple((mean[step], var[step]) for mean, var in trajectory.moments),
        extra={k: v[step] for k, v in trajectory.extra.items()},
    )
