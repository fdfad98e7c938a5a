"""What the steps of a fit work with, and what one step does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metaft.finetune import heads, optim
from metaft.finetune.batches import batches_of, cut
from metaft.finetune.examples import Prepared, like_of
from metaft.finetune.extras import Extra, Origin, composed
from metaft.finetune.features import Features, features_of, in_parts, takes_alone
from metaft.finetune.lessons import Labelled, Lesson, Turn
from metaft.finetune.outcomes import Outcome, outcome_of
from metaft.finetune.phases import groups_of, learning, stays
from metaft.finetune.strategies import Groups, Strategy
from metaft.finetune.tasks import Given, LogVariances, Tasks, flattened, put
from metaft.models.handed import copied
from metaft.models.stored import with_stored_moments
from metaft.sampler import Stream, raw_words
from metaft.settings.finetuning import Recipe
from metaft.types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """Of one fit. Steps change the values of model and optimiser, and nothing else."""

    recipe: Recipe
    strategy: Strategy
    model: nn.Module
    """Of "body" and "head"; of several targets also the heads of the further ones ("also") and their log-variances
    ("tasks")."""
    groups: Groups
    still: frozenset[str]
    """Names of the body's parameters and buffers, if none of them ever moves."""
    optimizer: torch.optim.Optimizer
    lessons: tuple[Lesson, ...]
    """Of each target."""
    per_epoch: int
    start: Params
    """What the parameters were before the first step."""
    tasks: Tasks | None = None
    """How several targets become one step."""

    @property
    def lesson(self) -> Lesson:
        """Of the first target."""
        return self.lessons[0]

    @property
    def steps(self) -> int:
        return self.recipe.passes * self.per_epoch

    def rates(self, step: int) -> Mapping[str, float]:
        """The factor of the rate of each parameter in a step, of those that ever move."""
        rates = self.strategy.rates(self.groups, step, self.steps, self.per_epoch)
        return {name: rate for name, rate in rates.items() if name not in self.still}

    def step(
        self,
        turns: Sequence[Turn],
        rates: Mapping[str, float],
        lr: float,
        *,
        on_features: bool,
        orders: Sequence[Sequence[int]] = (),
    ) -> list[float]:
        """One step at `rates` times `lr`, on a turn for each target; returns the loss of each before it, summed over
        the examples. `orders` are those of `Given`, for several targets."""
        optim.set_rates(self.optimizer, rates, lr)
        self.optimizer.zero_grad()
        if self.tasks is None:
            totals = [self._gradients(self.lesson, turns[0], on_features)]
        else:
            totals = self._together(self.tasks, turns, orders, on_features)
        if self.recipe.clip_norm is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.recipe.clip_norm)
        self.optimizer.step()
        return totals

    def _together(
        self, tasks: Tasks, turns: Sequence[Turn], orders: Sequence[Sequence[int]], on_features: bool
    ) -> list[float]:
        """Each target's gradients by themselves, then as `tasks` has them."""
        body = self.model.get_submodule("body")
        of_body = [] if on_features else [p for p in body.parameters() if p.requires_grad]
        like, totals, gradients = next(self.lesson.model.get_submodule("head").parameters()), [], []
        for lesson, turn in zip(self.lessons, turns, strict=True):
            totals.append(self._gradients(lesson, turn, on_features))
            gradients.append(flattened(of_body))
            for p in of_body:
                p.grad = None
        losses = like.new_tensor([total / len(turn.batch) for total, turn in zip(totals, turns, strict=True)])
        own = dict(self.model.named_parameters()).get("tasks.s")
        s = torch.zeros_like(losses) if own is None else own.detach()
        combined = tasks.combine(Given(losses, torch.stack(gradients), s, orders))
        put(of_body, combined.shared)
        if own is not None:
            own.grad = combined.log_variances
        for lesson, factor in zip(self.lessons, combined.factors, strict=True):
            for p in lesson.model.get_submodule("head").parameters():
                if p.grad is not None:
                    p.grad.mul_(factor)
        return totals

    def _gradients(self, lesson: Lesson, turn: Turn, on_features: bool) -> float:
        total, computed = 0.0, lesson.features.train if on_features else None
        for rows in map(torch.from_numpy, cut(turn.batch, self.recipe.batch_size)):
            loss = lesson.loss(rows, turn, computed)
            if len(rows) < len(turn.batch):
                loss = loss * lesson.share(rows, turn)
            if loss.requires_grad:
                loss.backward()
            total += float(loss.detach()) * len(turn.batch)
        return total


class _Target(NamedTuple):
    """One of those that a fit begins with."""

    train: Prepared
    val: Prepared | None
    val_labels: Tensor | None
    labels: Tensor
    outcome: Outcome
    features: Tensor | None
    """Of the training examples, where they are known."""
    head: nn.Module


def begin(
    body: nn.Module,
    given: Labelled,
    recipe: Recipe,
    strategy: Strategy,
    extras: Sequence[Extra],
    seed: int,
    order: int | None = None,
    *,
    own: nn.Module | None = None,
    also: Sequence[Labelled] = (),
    tasks: Tasks | None = None,
) -> Training:
    """A copy of the body and of its `own` head, or a fresh one that starts from its features, as the strategy wants
    them, before the first step. The head and what a strategy puts in are drawn by `seed`, what extras do by `order`
    (None: by it too). With further targets (`also`) each has a head of its own, drawn as it is alone, and `tasks` says
    how they become one step."""
    drawn = seed if order is None else order
    body = copied(body)
    targets = [_target(body, each, recipe, seed, own if each is given else None) for each in (given, *also)]
    per_epoch = max(len(batches_of(len(each.train), recipe.images_per_step, seed, 0)) for each in targets)
    whole = nn.ModuleDict({"body": body, "head": targets[0].head})
    if also:
        whole["also"] = nn.ModuleList(each.head for each in targets[1:])
    if tasks is not None and tasks.weighs:
        whole["tasks"] = LogVariances(len(targets), like_of(body))
    model = strategy.prepare(whole, seed)
    bodies = [model.get_submodule("body")] * len(targets)
    same_body = bodies[0] is body
    groups, still = groups_of(model), set()
    if stays(strategy, groups, recipe.passes, per_epoch, range(recipe.passes)):
        # Nothing below the head may ever change, statistics included.
        still = {name for group in groups[:-1] for name in group}
        bodies = [stored(alike, each.train) for alike, each in zip(bodies, targets, strict=True)]
        model.set_submodule("body", bodies[0])
        for name in still:
            model.get_parameter(name).requires_grad_(False)
        still |= {f"body.{name}" for name, _ in bodies[0].named_buffers()}
    # A parameter is a group of the optimiser by itself: its rate may change with every step.
    optimizer = optim.named(recipe.optimizer)([(n, p) for n, p in learning(model) if n not in still], recipe.rate)
    models = [model, *(
        nn.ModuleDict({"body": alike, "head": model.get_submodule(f"also.{number}")})
        for number, alike in enumerate(bodies[1:])
    )]  # fmt: skip
    lessons, start = [], {n: p.detach().clone() for n, p in model.named_parameters()}
    for each, labelled, one in zip(targets, (given, *also), models, strict=True):
        begun = start if one is model else {n: p.detach().clone() for n, p in one.named_parameters()}
        origin = Origin(begun, drawn, labelled.classes, labelled.inputs)
        known_val = None if labelled.known is None else labelled.known[1]
        lessons.append(Lesson(
            each.train, each.val, each.val_labels, each.outcome, each.outcome.prepared(each.labels), one,
            composed(extras, origin, each.outcome.loss, recipe.dropout),
            Features(one.get_submodule("body"), each.train, each.val, each.features if same_body else None, known_val),
        ))  # fmt: skip
    return Training(
        recipe, strategy, model, groups, frozenset(still), optimizer, tuple(lessons), per_epoch, start, tasks
    )


def _target(body: nn.Module, given: Labelled, recipe: Recipe, seed: int, own: nn.Module | None) -> _Target:
    """With a copy of its `own` head, or a fresh one that starts from the body's features."""
    like = like_of(body)
    train, labels = Prepared(given.examples, given.inputs, like), given.labels.to(like.device)
    outcome = outcome_of(recipe, labels, given.classes, like)
    val = None if given.val_examples is None else Prepared(given.val_examples, given.inputs, like)
    val = val if val is not None and given.val_labels is not None and len(val) else None
    # Of a body that needs no moments of these examples, others have use for the features too: they are cached.
    features = None if given.known is None else given.known[0]
    if own is not None:
        return _Target(train, val, given.val_labels, labels, outcome, features, copied(own))
    features = first_features(body, train) if features is None else features
    head = outcome.begun(heads.build(recipe.head, features, labels, outcome.outputs, head_seed(seed)))
    return _Target(train, val, given.val_labels, labels, outcome, features, head)


def first_features(body: nn.Module, train: Prepared) -> Tensor:
    """The features of training examples that a head begins with."""
    return (features_of if takes_alone(body) else in_parts)(stored(body, train), train)


def stored(body: nn.Module, train: Prepared) -> nn.Module:
    """A copy with the moments of all training examples."""
    return with_stored_moments(body, train).eval()


def head_seed(seed: int) -> int:
    """A seed for the head, of which a random backbone of this seed knows nothing."""
    return int(raw_words(seed, "train", [0], 1, stream=Stream.HEADS)[0, 0])
