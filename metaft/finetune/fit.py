"""Fine-tuning, one visible loop. Every random choice is a function of (seed, epoch)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metaft import schedules
from metaft.errors import NonFiniteError
from metaft.finetune import optim, phases, strategies, tasks
from metaft.finetune.averaged import follow
from metaft.finetune.examples import Prepared
from metaft.finetune.extras import Extra, all_named
from metaft.finetune.features import evaluating, in_parts, takes_alone
from metaft.finetune.lessons import Labelled, Lesson, as_they_are, turns
from metaft.finetune.measuring import Measuring
from metaft.finetune.states import cloned, copy_of, whole
from metaft.finetune.strategies import Strategy
from metaft.finetune.strategies.lora import Product, products_of
from metaft.finetune.training import begin, stored
from metaft.inputs import Inputs
from metaft.inputs.base import Examples
from metaft.models.handed import copied
from metaft.runs.trail import Trail
from metaft.settings.finetuning import Recipe
from metaft.types import Params

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
    names of weights that the strategy had to leave ("stays"); of several targets with learned weights the
    "log_variances" of their losses."""
    further: tuple[tuple[nn.Module, nn.Module], ...] = ()
    """Backbone and head of each further target; backbones differ in moments of the examples alone."""

    products: Mapping[str, Product] = dataclasses.field(default_factory=dict)
    """What low-rank adaptation added to the backbone, by the names of its weights; none of several targets."""

    @property
    def kept(self) -> int:
        """The epoch whose parameters these are: that of the lowest validation loss, or the last."""
        validated = [row for row in self.curve if "val_loss" in row]
        return int(min(validated, key=partial(of_all, "val_loss"))["epoch"] if validated else self.curve[-1]["epoch"])


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
    order: int | None = None,
    val_examples: Examples | None = None,
    val_labels: Tensor | None = None,
    strategy: Strategy | None = None,
    extras: Sequence[Extra] | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    head: nn.Module | None = None,
    also: Sequence[Labelled] = (),
    together: str = "sum",
    each_epoch: bool = True,
    should_stop: Callable[[], None] = lambda: None,
    resume: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    trail: Trail | None = None,
    log_every: int | None = None,
    on_update: Callable[[Mapping[str, Any]], None] | None = None,
) -> Fitted:
    """Fine-tune a copy of `body` (features [n, D] out, EpisodeNorm inside) and a fresh head, or a copy of the `head` of
    a classifier, on raw examples [n, ...], which go to the body's device batch by batch. `labels` [n] are int64 of so
    many `classes`, or numbers where that is 0: the head then has one output, and the loss is the squared error. `known`
    are the features of training and validation examples, where the caller has them.

    With further targets (`also`) there is one backbone, and a head for each, drawn as it is alone. A step is on a batch
    of each, as `together` says, a name in `metaft.finetune.tasks`; an epoch is one of the target that has the
    most steps, and the others are gone through again. The curve has the losses of the first target under their usual
    names, those of further ones under "loss_2", ..., "val_loss_2", ..., and "loss_sum" and "val_loss_sum", by which the
    epoch is judged. Validation is where all have examples for it.

    The head is drawn by `seed`; the order of the examples, and what becomes of them, by `order` (None: by `seed` too).

    `strategy` says what trains and at which rate in each step, `extras` change the loss (None: as the recipe says). The
    rate of a parameter in a step is the recipe's times the schedule's factor times the strategy's. Training batches are
    normalised with their own statistics; the result with those of all training examples, stored at the end. Epochs up
    to the first in which the body moves are on features that were computed once, where those do not depend on the
    batch. With validation examples the epoch of the lowest validation loss is kept (inductively, as the result will
    predict) and training stops after `patience` epochs without a better one; without `each_epoch` they judge the last
    epoch alone, and neither happens. `on_epoch` gets a copy of all that `resume` needs for the same bits, `trail`
    keeps some of what moves in any epoch, from before the first on, and `on_update` gets every `log_every` steps (None:
    as few as cost little, see `metaft.updates`) how far the step moved each layer. Raises NonFiniteError where the
    training or validation loss is not finite; that of the last step, which no loss has seen, shows in the result alone.
    """
    strategy = strategies.named(recipe.trains) if strategy is None else strategy
    extras = all_named(recipe.extra) if extras is None else extras
    schedule = schedules.make(recipe.anneals)
    given = Labelled(inputs, examples, labels, classes, val_examples, val_labels, known)
    way = tasks.named(together) if also else None
    training = begin(body, given, recipe, strategy, extras, seed, order, own=head, also=also, tasks=way)
    model, optimizer, lessons, still = training.model, training.optimizer, training.lessons, training.still
    drawn = seed if order is None else order
    steps, when = training.steps, (strategy, training.groups, recipe.passes, training.per_epoch)
    validates = all(lesson.val is not None and lesson.val_labels is not None for lesson in lessons)
    measuring = None if on_update is None else Measuring(training, log_every, on_update)
    curve: list[dict[str, float]] = []
    best = (math.inf, {})
    held = model.state_dict()

    def values() -> Params:
        """Of the model now; where only a head moves, in place, without the time that all layers take to be asked."""
        return held if still else model.state_dict()

    average = {} if recipe.ema is None else copy_of(held, still)
    judged = model if recipe.ema is None else copied(model)
    if resume is not None:
        # Copied, since an optimiser would go on to write into the tensors that it is given.
        resume = dict(cloned({k: v for k, v in resume.items() if k != "begun"}))
        model.load_state_dict(whole(resume["model"], training.start))
        optim.put_moments(optimizer, resume["adam"], strategy.rates(training.groups, 0, steps, training.per_epoch))
        curve, best = resume["curve"], (resume["best_loss"], {})
        if math.isfinite(best[0]):
            best = (best[0], whole(resume["best"], training.start))
        average = {} if recipe.ema is None else whole(resume["average"], training.start)
    watched: Params = {}
    if trail is not None:
        moving = phases.moved(*when, range(recipe.passes)) | set(training.groups[-1])
        watched = {name: p for name, p in model.named_parameters() if name in moving}
        trail.visit(len(curve), watched)
    judge = "val_loss" if validates and each_epoch else "loss"  # of what a schedule may follow
    settled = phases.settled(*when)
    # Features are those of the start, as long as this is true.
    stayed = as_they_are(recipe, extras) and phases.stays(*when, range(len(curve)))
    for epoch in range(len(curve), recipe.passes):
        if recipe.patience is not None and _stale(curve[settled:], recipe.patience):
            break
        totals, seen = np.zeros(len(lessons)), np.zeros(len(lessons), np.int64)
        stayed = stayed and (bool(still) or phases.stays(*when, [epoch]))
        lowered = schedules.lowered(schedule, [of_all(judge, row) for row in curve[settled:]])
        by_lesson = [turns(len(lesson.train), recipe, drawn, epoch, training.per_epoch) for lesson in lessons]
        for number, now in enumerate(zip(*by_lesson, strict=True)):
            step = epoch * training.per_epoch + number
            rates, lr = training.rates(step), recipe.rate * lowered * schedule(step, steps)
            before = {} if measuring is None else measuring.before(step, now[0], rates, on_features=stayed)
            orders = () if way is None else tasks.orders_of(len(lessons), drawn, step)
            totals += training.step(now, rates, lr, on_features=stayed, orders=orders)
            seen += [len(turn.batch) for turn in now]
            if measuring is not None:
                measuring.after(step, epoch, now[0], before, on_features=stayed)
            if recipe.ema is not None:
                follow(average, values(), recipe.ema, step, still)
            should_stop()
        if not math.isfinite(totals.sum()):
            raise NonFiniteError(f"epoch {epoch + 1}: the training loss is {totals.sum()}; {SMALLER}")
        row = {"epoch": float(epoch + 1), **_summed("loss", (totals / seen).tolist())}
        if validates and (each_epoch or epoch + 1 == recipe.passes):
            if average:
                judged.load_state_dict(average)
            row |= _validated(judged, lessons, still, stayed)
            val_loss = of_all("val_loss", row)
            if not math.isfinite(val_loss):
                raise NonFiniteError(f"epoch {epoch + 1}: the validation loss is {val_loss}; {SMALLER}")
            if val_loss < best[0]:
                best = (val_loss, copy_of(average or values(), still))
        curve.append(row)
        if trail is not None:
            trail.visit(len(curve), watched)
        if on_epoch is not None:
            on_epoch({
                "adam": cloned(optim.moments_of(optimizer)), "curve": [*curve], "average": copy_of(average, still),
                "model": copy_of(values(), still), "best_loss": best[0], "best": best[1], "begun": training.start,
            })  # fmt: skip
    if trail is not None:
        trail.visit(len(curve), watched, last=True)
    if kept := best[1] or average:
        model.load_state_dict(kept)
    moved = phases.moved(*when, range(len(curve)))
    trained: dict[str, Any] = {"numbers": sum(model.get_parameter(name).numel() for name in moved)}
    trained |= {"of": sum(p.numel() for p in body.parameters()), "stays": strategy.stays(body)}
    if way is not None and way.weighs:
        trained["log_variances"] = model.get_parameter("tasks.s").tolist()
    products = products_of(model.get_submodule("body")) if len(lessons) == 1 else {}
    first, *others = [_finished(strategy.finish(lesson.model), lesson) for lesson in lessons]
    return Fitted(*first, curve, trained, tuple(others), products)


def _finished(model: nn.Module, lesson: Lesson) -> tuple[nn.Module, nn.Module]:
    """Backbone and head as they predict."""
    finished = lesson.outcome.finished(model.get_submodule("head"))
    return stored(model.get_submodule("body"), lesson.train), finished


def _summed(name: str, losses: Sequence[float]) -> dict[str, float]:
    """One target's, and of several each by itself and their sum."""
    first, *others = losses
    row = {name: first, **{f"{name}_{number}": loss for number, loss in enumerate(others, 2)}}
    return {**row, f"{name}_sum": sum(losses)} if others else row


def of_all(name: str, row: Mapping[str, float]) -> float:
    """A loss of a curve's row: of several targets their sum."""
    return row.get(f"{name}_sum", row[name])


def _validated(judged: nn.Module, lessons: Sequence[Lesson], still: Collection[str], stayed: bool) -> dict[str, float]:
    """Of validation examples, as the result would predict them; all but the losses of the first target alone."""
    rows = []
    for number, lesson in enumerate(lessons):
        assert lesson.val is not None and lesson.val_labels is not None
        # Of a body that never moves each target has one, with its own moments.
        body = (lesson.model if still else judged).get_submodule("body")
        head = judged.get_submodule(f"also.{number - 1}" if number else "head")
        outputs = _outputs(body, head, lesson.train, lesson.val, lesson.features.val if stayed else None)
        rows.append(lesson.outcome.validated(outputs, lesson.outcome.prepared(lesson.val_labels)))
    return {**rows[0], **_summed("val_loss", [row["val_loss"] for row in rows])}


def _stale(curve: list[dict[str, float]], patience: int) -> bool:
    """Whether the lowest validation loss is `patience` epochs old."""
    losses = [of_all("val_loss", row) for row in curve if "val_loss" in row]
    return bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience


@torch.no_grad()
def _outputs(body: nn.Module, head: nn.Module, train: Prepared, val: Prepared, features: Tensor | None) -> Tensor:
    return head(_evaluated(body, train, val) if features is None else features)


def _evaluated(body: nn.Module, train: Prepared, val: Prepared) -> Tensor:
    """Features of val as the result would have them. The body is copied only where it needs the moments of train."""
    if not takes_alone(body):
        return in_parts(stored(body, train), val)
    with evaluating(body):
        return in_parts(body, val)
