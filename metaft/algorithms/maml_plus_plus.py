"""MAML++: MAML with the stabilisers of Antoniou, Edwards and Storkey."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from metaft import inner
from metaft.algorithms.base import Adapt, Algorithm
from metaft.algorithms.gradient import Hooks, by_gradient
from metaft.algorithms.meta_sgd import RATE
from metaft.algorithms.query import Judge, judge
from metaft.errors import MetaftError
from metaft.inner_augment import Augment
from metaft.inner_optim import InnerOptimizer
from metaft.models import Model
from metaft.types import Episode, Fast, Loss, Moments, Norm, Params

LATER = ".later"
"""Ends the name of a normalisation parameter's values [K-1, C] after step 0."""
ORDER = ".order"
"""Beside the meta-parameters of a task in training: 1 where its inner gradients count as functions of them, else 0."""
MOMENTUM = 0.1


# Above 60 lines for its docstring, a paragraph per change that can be switched off.
def maml_plus_plus(
    model: Model,
    *,
    loss: Loss = "cross_entropy",
    inner_lr: float = 0.1,
    inner_steps: int = 5,
    inner_optimizer: str | InnerOptimizer = "sgd",
    inner_augment: str | Augment = "none",
    first_order: bool = False,
    adapt_norm: bool = False,
    norm: Norm = "transductive",
    multi_step: float = 0.1,
    order_annealing: float = 0.5,
    learned_rates: bool = True,
    step_norm: bool = True,
    step_statistics: bool = False,
    iterations: int = 1500,
) -> Algorithm:
    """MAML of K = `inner_steps` steps with a bundle of changes, each of which can be switched off alone.

    Antoniou, Edwards and Storkey 2019, https://arxiv.org/abs/1810.09502, section 4, by its own names:

    - multi-step loss: the query losses after each step count, at first alike; over the share `multi_step` of the run's
      `iterations` the weights of all but the last go down to 0, linearly. 0 switches it off.
    - derivative-order annealing: the first share `order_annealing` of the run is first-order. 0 switches it off.
    - per-layer per-step rates: `learned_rates`. NAME.rate [K] in `meta`, all `inner_lr` at first.
    - per-step batch normalisation weights and biases: `step_norm`. Step s normalises with scales and shifts of its
      own, and so do predictions after it; `meta` has those of step 0 under NAME and the others in NAME.later [K-1, C].
    - per-step batch normalisation running statistics: `step_statistics`. `state` has the mean over tasks of the support
      moments after 0..K steps, updated by a tenth of the difference in each meta-step; inductive prediction takes them
      in the place of the task's own. Off: the paper's code keeps them, but normalises with the batch all the same.
    - cosine annealing of the outer rate is `--outer-schedule cosine`.

    Steps beyond K, at test, repeat rates, scales and shifts (and statistics) of the last one.

    Not the paper's: shares of the run in the place of epochs; a rate for each named parameter, weight and bias, where
    the paper says layer; all of it costs as second order from the first step on, with K query losses, whatever their
    weights, since the weights are data; those but the last go down to 0 (its code keeps each at 0.03 / K or more);
    `first_order` (as in `maml`, and then for the whole run), `norm="inductive"` and any `inner_optimizer`. `adapt_norm`
    is that of `maml`, and needs `step_norm=False`.

    Raises MetaftError for an inner_lr or inner_steps below 0, an unknown optimiser, a share that is not in 0..1,
    `adapt_norm` with `step_norm`, or `step_statistics` of a module whose input shape is not known.
    """
    for field, share in (("multi_step", multi_step), ("order_annealing", order_annealing)):
        if not 0 <= share <= 1:
            raise MetaftError(f"{field} must be a share of the run, 0 to 1, got {share}")
    if adapt_norm and step_norm:
        raise MetaftError("adapt_norm: with step_norm, scales and shifts are learned for each step and do not adapt")
    last = max(inner_steps, 1) - 1
    adapted = [name for name in model.params if adapt_norm or name not in model.norm]
    learned = dict(model.params)
    if learned_rates:
        learned |= {k + RATE: model.params[k].new_full((last + 1,), inner_lr) for k in adapted}
    if step_norm and last:
        learned |= {k + LATER: model.params[k].expand(last, *model.params[k].shape) for k in model.norm}

    base = by_gradient(
        "maml++",
        model,
        loss=loss,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        inner_augment=inner_augment,
        first_order=first_order,
        norm=norm,
        adapted=adapted,
        learned=learned,
        hooks=Hooks(
            rates=lambda meta: functools.partial(_moves, None if learned_rates else inner_lr, last, meta),
            at=functools.partial(_scales_and_shifts, model.norm if step_norm else (), last),
        ),
    )
    judged = judge(base.predict, loss=loss, norm=norm, loss_of=model.loss)
    bundle = _Bundle(model.outputs, inner_steps, norm, multi_step, order_annealing, step_statistics, iterations)
    member = dataclasses.replace(
        base,
        task_loss=functools.partial(_task_loss, bundle, base.adapt, judged),
        schedule=functools.partial(_schedule, bundle),
    )
    if not step_statistics:
        return member
    statistics = _initial_statistics(model, inner_steps + 1)
    return dataclasses.replace(
        member,
        init=functools.partial(_init, learned, statistics),
        adapt=functools.partial(_adapt_to_statistics, base.adapt, inner_steps),
    )


class _Bundle(NamedTuple):
    """What of a member decides about its objective."""

    ways: int
    inner_steps: int
    norm: Norm
    multi_step: float
    order_annealing: float
    step_statistics: bool
    iterations: int


def _moves(inner_lr: float | None, last: int, meta: Params, directions: Params, step: int) -> Params:
    """Directions times the rates of a step: those in `meta` where there is no `inner_lr`."""
    if ORDER in meta:
        order = meta[ORDER]  # 0 or 1, so this is exact; momentum too is a function of nothing but gradients
        directions = {k: order * d + (1 - order) * d.detach() for k, d in directions.items()}
    step = min(step, last)
    return {k: (meta[k + RATE][step] if inner_lr is None else inner_lr) * d for k, d in directions.items()}


def _scales_and_shifts(names: Iterable[str], last: int, meta: Params, step: int) -> Params:
    """Those of a step after the first one."""
    step = min(step, last)
    return {k: meta[k + LATER][step - 1] for k in names} if step else {}


def _init(learned: Params, statistics: Params, key: int) -> tuple[Params, Params]:
    return {k: p.clone() for k, p in learned.items()}, {k: v.clone() for k, v in statistics.items()}


def _adapt_to_statistics(
    adapt: Adapt,
    inner_steps: int,
    meta: Params,
    state: Params,
    support_x: Tensor,
    support_y: Tensor,
    key: Tensor,
    *,
    ways: int,
    steps: int,
    trajectory: bool = False,
    moments: bool = True,
) -> Fast:
    """`adapt` with the running statistics of its last step, or of every one, in the place of the task's moments."""
    fast = adapt(meta, {}, support_x, support_y, key, ways=ways, steps=steps, trajectory=trajectory, moments=False)
    if not moments:
        return fast
    rows = [min(s, inner_steps) for s in (range(steps + 1) if trajectory else (steps,))]
    return fast._replace(moments=_pairs({k: v[rows] if trajectory else v[rows[0]] for k, v in state.items()}))


def _task_loss(
    bundle: _Bundle, adapt: Adapt, judged: Judge, meta: Params, state: Params, knobs: Params, episode: Episode
) -> tuple[Tensor, tuple[Params, dict[str, Tensor]]]:
    """The weighted sum of the query losses after each step, or the one after the last."""
    trajectory = bundle.multi_step > 0 or bundle.step_statistics
    fast = adapt(
        {**meta, ORDER: knobs["order"].to(episode.support_x)} if bundle.order_annealing else meta,
        {},
        *episode[:2],
        episode.key,
        ways=bundle.ways,
        steps=bundle.inner_steps,
        trajectory=trajectory,
        moments=bundle.norm == "inductive" or bundle.step_statistics,
    )
    delta: Params = {}
    if bundle.step_statistics:
        measured = [t.detach() for pair in fast.moments for t in pair]
        delta = {k: MOMENTUM * (m - state[k]) for k, m in zip(sorted(state), measured, strict=True)}
        fast = fast._replace(moments=_pairs(state))
    first = min(1, bundle.inner_steps) if bundle.multi_step else bundle.inner_steps
    steps = range(first, bundle.inner_steps + 1)
    results = [judged(inner.at_step(fast, s) if trajectory else fast, episode) for s in steps]
    losses = torch.stack([value for value, _ in results])
    value = (knobs["weights"].to(losses) * losses).sum() if len(results) > 1 else losses[0]
    return value, (delta, {**results[-1][1], "loss": value.detach()})


def _schedule(bundle: _Bundle, step: int) -> Params:
    """The weights of the query losses, and whether inner gradients count as functions of the meta-parameters."""
    steps = max(bundle.inner_steps, 1)
    early = 1 - min(1.0, step / (bundle.multi_step * bundle.iterations)) if bundle.multi_step else 0.0
    weights = torch.full((steps,), early / steps, dtype=torch.float64)
    weights[-1] += 1 - early
    order = float(step >= bundle.order_annealing * bundle.iterations)
    return {"weights": weights, "order": torch.tensor(order, dtype=torch.float32)}


def _initial_statistics(model: Model, states: int) -> Params:
    """Mean 0 and variance 1 of every channel of every normalisation layer, for each state of the inner loop."""
    shape = model.architecture.get("shape")
    if not isinstance(shape, (list, tuple)):
        raise MetaftError("step_statistics: needs a model of a known input shape, and a module from Python has none")
    like = next(iter(model.params.values()))
    moments = model.measure(model.params, torch.zeros(2, *shape, dtype=like.dtype, device=like.device))
    return {
        f"{layer:03d}.{name}": torch.full((states, len(t)), fill, dtype=t.dtype, device=t.device)
        for layer, pair in enumerate(moments)
        for name, t, fill in zip(("mean", "var"), pair, (0.0, 1.0), strict=True)
    }


def _pairs(statistics: Params) -> Moments:
    parts = [statistics[k] for k in sorted(statistics)]
    return tuple(zip(parts[::2], parts[1::2], strict=True))
