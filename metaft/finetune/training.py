"""What the steps of a fit work with, and what one step does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from metaft.finetune import heads, optim
from metaft.finetune.batches import batches_of, cut
from metaft.finetune.examples import Prepared, like_of
from metaft.finetune.extras import Extra, Origin, composed
from metaft.finetune.features import Features, features_of, in_parts, takes_alone
from metaft.finetune.lessons import Labelled, Lesson, Turn
from metaft.finetune.outcomes import outcome_of
from metaft.finetune.phases import groups_of, learning, stays
from metaft.finetune.strategies import Groups, Strategy
from metaft.models.handed import copied
from metaft.models.stored import with_stored_moments
from metaft.sampler import Stream, raw_words
from metaft.settings import Recipe


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """Of one fit. Steps change the values of model and optimiser, and nothing else."""

    recipe: Recipe
    strategy: Strategy
    model: nn.Module
    """Of "body" and "head"."""
    groups: Groups
    still: frozenset[str]
    """Names of the body's parameters, if none of them ever moves."""
    optimizer: torch.optim.Optimizer
    lesson: Lesson
    per_epoch: int

    @property
    def steps(self) -> int:
        return self.recipe.passes * self.per_epoch

    def rates(self, step: int) -> Mapping[str, float]:
        """The factor of the rate of each parameter in a step, of those that ever move."""
        rates = self.strategy.rates(self.groups, step, self.steps, self.per_epoch)
        return {name: rate for name, rate in rates.items() if name not in self.still}

    def step(self, turn: Turn, rates: Mapping[str, float], lr: float, *, on_features: bool) -> float:
        """One step at `rates` times `lr`; returns the loss before it, summed over the examples."""
        optim.set_rates(self.optimizer, rates, lr)
        self.optimizer.zero_grad()
        total = self._gradients(self.lesson, turn, on_features)
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        return total

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


def begin(
    body: nn.Module,
    given: Labelled,
    recipe: Recipe,
    strategy: Strategy,
    extras: Sequence[Extra],
    seed: int,
    own: nn.Module | None = None,
) -> Training:
    """A copy of the body and of its `own` head, or a fresh one that starts from its features, as the strategy wants
    them, before the first step."""
    like = like_of(body)
    train, labels = Prepared(given.examples, given.inputs, like), given.labels.to(like.device)
    outcome = outcome_of(recipe, labels, given.classes, like)
    val = None if given.val_examples is None else Prepared(given.val_examples, given.inputs, like)
    val = val if val is not None and given.val_labels is not None and len(val) else None
    per_epoch = len(batches_of(len(train), recipe.images_per_step, seed, 0))
    known = (None, None) if given.known is None else given.known
    body = copied(body)
    # Of a body that needs no moments of these examples, others have use for the features too: they are cached.
    features = known[0]
    if own is not None:
        head = copied(own)
    else:
        features = first_features(body, train) if features is None else features
        head = outcome.begun(heads.build(recipe.head, features, labels, outcome.outputs, head_seed(seed)))
    model = strategy.prepare(nn.ModuleDict({"body": body, "head": head}), seed)
    same_body = model.get_submodule("body") is body
    groups, still = groups_of(model), set()
    if stays(strategy, groups, recipe.passes, per_epoch, range(recipe.passes)):
        # Nothing below the head may ever change, statistics included.
        still = {name for group in groups[:-1] for name in group}
        model.set_submodule("body", stored(model.get_submodule("body"), train))
        for name in still:
            model.get_parameter(name).requires_grad_(False)
    # A parameter is a group of the optimiser by itself: its rate may change with every step.
    optimizer = optim.named(recipe.optimizer)([(n, p) for n, p in learning(model) if n not in still], recipe.rate)
    origin = Origin({n: p.detach().clone() for n, p in model.named_parameters()}, seed, given.classes, given.inputs)
    lesson = Lesson(
        train, val, given.val_labels, outcome, outcome.prepared(labels), model,
        composed(extras, origin, outcome.loss, recipe.dropout),
        Features(model.get_submodule("body"), train, val, features if same_body else None, known[1]),
    )  # fmt: skip
    return Training(recipe, strategy, model, groups, frozenset(still), optimizer, lesson, per_epoch)


def first_features(body: nn.Module, train: Prepared) -> Tensor:
    """The features of training examples that a head begins with."""
    return (features_of if takes_alone(body) else in_parts)(stored(body, train), train)


def stored(body: nn.Module, train: Prepared) -> nn.Module:
    """A copy with the moments of all training examples."""
    return with_stored_moments(body, train).eval()


def head_seed(seed: int) -> int:
    """A seed for the head, of which a random backbone of this seed knows nothing."""
    return int(raw_words(seed, "train", [0], 1, stream=Stream.HEADS)[0, 0])
