"""Fine-tuning, one visible loop. Every random choice is a function of (seed, epoch)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metaft import schedules
from metaft.errors import NonFiniteError
from metaft.finetune import optim, phases, strategies
from metaft.finetune.averaged import follow
from metaft.finetune.examples import Prepared
from metaft.finetune.extras import Extra, all_named
from metaft.finetune.features import evaluating, in_parts, takes_alone
from metaft.finetune.lessons import Labelled, turns
from metaft.finetune.measuring import Measuring
from metaft.finetune.states import cloned, values_of
from metaft.finetune.strategies import Strategy
from metaft.finetune.training import begin, stored
from metaft.inputs import Inputs
from metaft.inputs.base import Examples
from metaft.models.handed import copied
from metaft.runs.trail import Trail
from metaft.settings import Recipe

SMALLER = "try a smaller --lr"


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A backbone with stored moments, its head, and how they came about."""

    body: nn.Module
    head: nn.Module
    curve: list[dict[str, float]]
    """Per epoch: "epoch", "loss" and, with validation examples, "val_loss" and "val_accuracy" or, of numbers,
    "val_rmse"."""
    trained: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of the backbone, where gradients trained it: "numbers" that moved in some step, "of" how many it has, and the
    names of weights that the strategy had to leave ("stays")."""

    @property
    def kept(self) -> int:
        """The epoch whose parameters these are: that of the lowest validation loss, or the last."""
        validated = [row for row in self.curve if "val_loss" in row]
        return int(min(validated, key=lambda row: row["val_loss"])["epoch"] if validated else self.curve[-1]["epoch"])


# Above 60 lines: the one loop, to be seen whole.
def fit(
    body: nn.Module,
    inputs: Inputs,
    examples: Examples,
    labels: Tensor,
    classes: int,
    recipe: Recipe,
    *,
    seed: int = 0,
    val_examples: Examples | None = None,
    val_labels: Tensor | None = None,
    strategy: Strategy | None = None,
    extras: Sequence[Extra] | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    head: nn.Module | None = None,
    each_epoch: bool = True,
    should_stop: Callable[[], None] = lambda: None,
    resume: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    trail: Trail | None = None,
    log_every: int = 10,
    on_update: Callable[[Mapping[str, Any]], None] | None = None,
) -> Fitted:
    """Fine-tune a copy of `body` (features [n, D] out, EpisodeNorm inside) and a fresh head, or a copy of the `head` of
    a classifier, on raw examples [n, ...], which go to the body's device batch by batch. `labels` [n] are int64 of so
    many `classes`, or numbers where that is 0: the head then has one output, and the loss is the squared error. `known`
    are the features of training and validation examples, where the caller has them.

    `strategy` says what trains and at which rate in each step, `extras` change the loss (None: as the recipe says). The
    rate of a parameter in a step is the recipe's times the schedule's factor times the strategy's. Training batches are
    normalised with their own statistics; the result with those of all training examples, stored at the end. Epochs up
    to the first in which the body moves are on features that were computed once, where those do not depend on the
    batch. With validation examples the epoch of the lowest validation loss is kept (inductively, as the result will
    predict) and training stops after `patience` epochs without a better one; without `each_epoch` they judge the last
    epoch alone, and neither happens. `on_epoch` gets a copy of all that `resume` needs for the same bits, `trail`
    keeps some of what moves in any epoch, from before the first on, and `on_update` gets every `log_every` steps, or
    fewer (see `metaft.updates`), how far the step moved each layer. Raises
    NonFiniteError where the training or validation loss is not finite; that of the last step, which no loss has seen,
    shows in the result alone.
    """
    strategy = strategies.named(recipe.trains) if strategy is None else strategy
    extras = all_named(recipe.extra) if extras is None else extras
    schedule = schedules.make(recipe.anneals)
    given = Labelled(inputs, examples, labels, classes, val_examples, val_labels, known)
    training = begin(body, given, recipe, strategy, extras, seed, head)
    model, optimizer, lesson, still = training.model, training.optimizer, training.lesson, training.still
    val, steps, when = lesson.val, training.steps, (strategy, training.groups, recipe.passes, training.per_epoch)
    measuring = None if on_update is None else Measuring(training, log_every, on_update)
    curve: list[dict[str, float]] = []
    best = (math.inf, {})
    average = {} if recipe.ema is None else values_of(model, still)
    judged = model if recipe.ema is None else copied(model)
    if resume is not None:
        resume = dict(cloned(resume))  # an optimiser would go on to write into the tensors that it is given
        model.load_state_dict(resume["model"])
        optim.put_moments(optimizer, resume["adam"], strategy.rates(training.groups, 0, steps, training.per_epoch))
        curve, best = resume["curve"], (resume["best_loss"], resume["best"])
        average = resume.get("average", {})
    moving = phases.moved(*when, range(recipe.passes)) | set(training.groups[-1])
    watched = {name: p for name, p in model.named_parameters() if name in moving}
    if trail is not None:
        trail.visit(len(curve), watched)
    judge = "val_loss" if val is not None and each_epoch else "loss"  # of what a schedule may follow
    settled = phases.settled(*when)
    stayed = recipe.augment == "none" and not any(extra.of_inputs for extra in extras)
    # Features are those of the start, as long as this is true.
    stayed = stayed and phases.stays(*when, range(len(curve)))
    for epoch in range(len(curve), recipe.passes):
        if recipe.patience is not None and _stale(curve[settled:], recipe.patience):
            break
        total = 0.0
        stayed = stayed and (bool(still) or phases.stays(*when, [epoch]))
        lowered = schedules.lowered(schedule, [row[judge] for row in curve[settled:]])
        for number, turn in enumerate(turns(len(lesson.train), recipe, seed, epoch, training.per_epoch)):
            step = epoch * training.per_epoch + number
            rates, lr = training.rates(step), recipe.rate * lowered * schedule(step, steps)
            before = {} if measuring is None else measuring.before(step, turn, rates, on_features=stayed)
            total += training.step(turn, rates, lr, on_features=stayed)
            if measuring is not None:
                measuring.after(step, epoch, turn, before, on_features=stayed)
            if recipe.ema is not None:
                follow(average, model.state_dict(), recipe.ema, step, still)
            should_stop()
        if not math.isfinite(total):
            raise NonFiniteError(f"epoch {epoch + 1}: the training loss is {total}; {SMALLER}")
        row = {"epoch": float(epoch + 1), "loss": total / len(lesson.train)}
        if val is not None and lesson.val_labels is not None and (each_epoch or epoch + 1 == recipe.passes):
            judged.load_state_dict(average or model.state_dict())
            outputs = _outputs(judged, lesson.train, val, lesson.features.val if stayed else None)
            row |= lesson.outcome.validated(outputs, lesson.outcome.prepared(lesson.val_labels))
            if not math.isfinite(row["val_loss"]):
                raise NonFiniteError(f"epoch {epoch + 1}: the validation loss is {row['val_loss']}; {SMALLER}")
            if row["val_loss"] < best[0]:
                best = (row["val_loss"], values_of(judged, still))
        curve.append(row)
        if trail is not None:
            trail.visit(len(curve), watched)
        if on_epoch is not None:
            state = {"adam": optim.moments_of(optimizer), "curve": curve, "average": average}
            on_epoch({**cloned(state), "model": values_of(model, still), "best_loss": best[0], "best": best[1]})
    if trail is not None:
        trail.visit(len(curve), watched, last=True)
    if kept := best[1] or average:
        model.load_state_dict(kept)
    moved = phases.moved(*when, range(len(curve)))
    trained: dict[str, Any] = {"numbers": sum(model.get_parameter(name).numel() for name in moved)}
    trained |= {"of": sum(p.numel() for p in body.parameters()), "stays": strategy.stays(body)}
    model = strategy.finish(model)
    finished = lesson.outcome.finished(model.get_submodule("head"))
    return Fitted(stored(model.get_submodule("body"), lesson.train), finished, curve, trained)


def _stale(curve: list[dict[str, float]], patience: int) -> bool:
    """Whether the lowest validation loss is `patience` epochs old."""
    losses = [row["val_loss"] for row in curve if "val_loss" in row]
    return bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience


@torch.no_grad()
def _outputs(model: nn.Module, train: Prepared, val: Prepared, features: Tensor | None) -> Tensor:
    """Of validation examples, as the result would predict them."""
    if features is None:
        features = _evaluated(model.get_submodule("body"), train, val)
    return model.get_submodule("head")(features)


def _evaluated(body: nn.Module, train: Prepared, val: Prepared) -> Tensor:
    """Features of val as the result would have them. The body is copied only where it needs the moments of train."""
    if not takes_alone(body):
        return in_parts(stored(body, train), val)
    with evaluating(body):
        return in_parts(body, val)
