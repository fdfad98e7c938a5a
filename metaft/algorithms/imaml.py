"""iMAML: the meta-gradient from the end of the inner loop alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from metaft.algorithms.base import Algorithm, TaskGrad
from metaft.algorithms.gradient import Hooks, by_gradient
from metaft.algorithms.query import Judge, judge
from metaft.errors import MetaftError, check_count
from metaft.inner import hessian_product, value_and_grad
from metaft.inner_optim import InnerOptimizer
from metaft.models import Model
from metaft.types import Episode, Fast, Loss, Norm, Params

CURVATURE = "negative_curvature"


# Above 60 lines for its docstring: what is the paper's and what is not belongs in one place.
def imaml(
    model: Model,
    *,
    loss: Loss = "cross_entropy",
    inner_lr: float = 0.4,
    inner_steps: int = 16,
    inner_optimizer: str | InnerOptimizer = "sgd",
    norm: Norm = "transductive",
    strength: float = 2.0,
    cg_steps: int = 5,
    damping: float = 0.0,
    line_search: int = 0,
) -> Algorithm:
    """Stay near the initialisation, and differentiate the place where the inner loop ends instead of its way there.

    Rajeswaran, Finn, Kakade and Levine 2019, https://arxiv.org/abs/1909.04630. The inner problem is the paper's
    proximal one,

        fast = argmin over phi of  support loss(phi) + strength / 2 |phi - meta|^2,

    for which `inner_steps` steps of gradient descent from meta stand in; the paper calls `strength` lambda. At its
    minimum the derivative of fast in meta is (I + H / strength)^-1, with H the Hessian of the support loss at fast
    (lemma 1), so the meta-gradient is (I + H / strength)^-1 times the gradient of the query loss at fast. `cg_steps`
    steps of conjugate gradients (algorithm 2) come near it. They need products with H alone: memory does not grow with
    the inner steps. `metaft.outer.meta_gradient` takes that for the gradient, whether or not the minimum was reached.

    Where I + H / strength is not positive definite there is no such minimum. Conjugate gradients then stop before the
    first direction along which they see that (at the query gradient, if it is the first), the metric
    "negative_curvature" is the share of such tasks, and `meta_gradient` warns. A larger `strength` mends it. Models
    with batch normalisation are curved so sharply that at the paper's strength most tasks are such; what learns with
    them here is `strength=0.1` and `damping=50`: conjugate gradients then solve I + H / (strength + damping), no longer
    the derivative of the problem above, and nearly first order: the query gradient at the end of a proximal inner loop,
    but for 2 % (`docs/algorithms.md`). The metric and the warning are of I + H / strength all the same.

    Where the loss curves by more than 2 / `inner_lr`, gradient descent does not end near that minimum but goes away
    from it, further with every step. The meta-gradient does not see the way, so nothing keeps the curvature below that
    while it learns. `line_search` halves a step up to so many times, until the inner problem falls (`metaft.inner`).

    Not the paper's: no Hessian-free inner solver (its better row on Omniglot, the one with a line search), `damping`
    (the authors' code solves 2 I + H / (strength + 10)); `strength` is not learned, the meta-gradient's mean over the
    meta-batch, and `norm="inductive"`, in which the query gradient runs through the support set's moments at fast too.

    Raises MetaftError for an inner_lr or inner_steps below 0, an unknown optimiser, a strength not above 0, a damping
    below 0, cg_steps below 1, a line_search below 0, or a model with dropout, which would make each step one of another
    problem.
    """
    if not strength > 0:
        raise MetaftError(f"strength must be above 0, got {strength}")
    if not damping >= 0:
        raise MetaftError(f"damping must be at least 0, got {damping}")
    check_count("line_search", line_search, 0)
    if model.drops:
        raise MetaftError("dropout: imaml takes a model without it, since all its steps must go down the same loss")
    check_count("cg_steps", cg_steps, 1)

    descent = by_gradient(
        "imaml",
        model,
        loss=loss,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        first_order=True,  # nothing differentiates through the steps
        norm=norm,
        adapted=list(model.params),
        hooks=Hooks(penalty=functools.partial(_proximal, strength)),
        halvings=line_search,
    )
    judged = judge(descent.predict, loss=loss, norm=norm, loss_of=model.loss)

    solve = functools.partial(conjugate_gradients, steps=cg_steps, strength=strength, damping=damping)
    consequence = (
        f"and damping {damping:g} brings their meta-gradient near the query gradient"
        if damping
        else f"and their meta-gradient is cut short; more than strength {strength:g} makes it so, or learn nearly "
        "first order by --hyper strength=0.1 damping=50"
    )
    return dataclasses.replace(
        descent,
        task_loss=None,
        task_grad=functools.partial(_task_grad, model, descent, judged, solve),
        curvature=True,
        cautions={CURVATURE: f"imaml: I + H / strength is not positive definite in some tasks, {consequence}"},
    )


def _proximal(strength: float, meta: Params, params: Params) -> Tensor:
    """strength / 2 |params - meta|^2."""
    away = {k: p - meta[k] for k, p in params.items()}
    return strength / 2 * _dot(away, away)


def _task_grad(
    model: Model,
    descent: Algorithm,
    judged: Judge,
    solve: Callable[[Callable[[Params], Params], Params], tuple[Params, Tensor]],
    meta: Params,
    state: Params,
    knobs: Params,
    task: Episode,
) -> TaskGrad:
    """(I + H / strength)^-1 times the query gradient, both at the fast weights: `solve` of v -> H v and the latter."""
    x, y = task.support_x, task.support_y
    fast = descent.adapt(
        meta, state, x, y, task.key, ways=model.outputs, steps=descent.inner_steps, moments=False
    ).params

    def query(params: Params) -> tuple[Tensor, dict[str, Tensor]]:
        return judged(Fast(params, model.measure(params, x) if descent.norm == "inductive" else (), {}), task)

    _, metrics, b = value_and_grad(query, fast, create_graph=False)
    product = hessian_product(lambda params: model.loss(params, x, y, descent.loss, curvature=True)[0], fast)
    grads, negative = solve(product, b)
    return TaskGrad(grads, {}, {**metrics, CURVATURE: negative})


def conjugate_gradients(
    product: Callable[[Params], Params], b: Params, steps: int, *, strength: float, damping: float = 0.0
) -> tuple[Params, Tensor]:
    """(x, 1 where a direction was met along which I + H / strength is not positive, else 0).

    x solves (I + H / (strength + damping)) x = b, up to `steps` steps; `product` is v -> H v, H symmetric. From x = 0;
    it stops before a direction along which the matrix that it solves is not positive, at x = b if that is the first
    one. No tensor decides about the way of the computation, so that many tasks can share it.
    """
    x = {k: torch.zeros_like(v) for k, v in b.items()}
    r = p = b
    rr = _dot(b, b)
    going, negative = torch.ones_like(rr), torch.zeros_like(rr)
    for step in range(steps):
        hp = product(p)
        length, curved = _dot(p, p), _dot(p, hp)
        undamped, along = length + curved / strength, length + curved / (strength + damping)
        negative = torch.where((going > 0) & (undamped <= 0) & (rr > 0), torch.ones_like(rr), negative)
        going = torch.where(along > 0, going, torch.zeros_like(rr))  # not above 0 either where nothing is left to solve
        alpha = torch.where(going > 0, rr / torch.where(along > 0, along, torch.ones_like(rr)), 1.0 - min(step, 1))
        x = {k: x[k] + alpha * p[k] for k in x}
        r = {k: r[k] - alpha * (p[k] + hp[k] / (strength + damping)) for k in r}
        new = _dot(r, r)
        p = {k: r[k] + new / torch.where(rr > 0, rr, torch.ones_like(rr)) * p[k] for k in p}
        rr = new
    return x, negative


def _dot(a: Params, b: Params) -> Tensor:
    return torch.stack([(a[k] * b[k]).sum() for k in a]).sum()
