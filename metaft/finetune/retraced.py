"""The fits of an adapt run again, for their training loss at any values of what they moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metaft.errors import CheckpointError
from metaft.finetune import strategies
from metaft.finetune.choose import SETTLED
from metaft.finetune.classifier import Classifier
from metaft.finetune.examples import Part, evenly
from metaft.finetune.extras import Batch, Origin, composed
from metaft.finetune.journal import Position
from metaft.finetune.lessons import Labelled
from metaft.finetune.setup import Planned, Setup, rows_of
from metaft.finetune.strategies import CHOSEN
from metaft.finetune.trails import followed
from metaft.finetune.training import begin
from metaft.models.norm import EpisodeNorm
from metaft.runs.folder import RunFolder
from metaft.runs.trail import Waypoint, read_trail
from metaft.settings.finetuning import Recipe
from metaft.starts.base import body
from metaft.types import Params


class Retraced(NamedTuple):
    """One fit of a run, where it went, and its loss."""

    label: str
    waypoints: list[Waypoint]
    """Empty where it left none."""
    end: Waypoint
    """What it came to: the last of them, or where there are none what the classifier that was kept holds of it."""
    loss: Callable[[Params], float]
    """The training loss of some of its images at such values."""
    images: int
    mode: str
    """How they are normalised."""
    still: dict[str, Tensor]
    """What stays, by which two fits are told to be of one model."""


def retraced(
    run: RunFolder, setup: Setup, position: Position, classifier: Classifier, kept: int, *, most: int
) -> list[Retraced]:
    """The fits of which there are snapshots, and the one of which the run's `classifier` is, `kept` in that epoch: each
    with its loss on at most so many of the images that it trained on.

    Raises CheckpointError where snapshots are damaged or of another model.
    """
    found = []
    for number, planned in enumerate(followed(setup)):
        waypoints = read_trail(run.snapshots, str(number))
        if waypoints or planned.contender.label == setup.contenders[0].label:
            fit = _retraced(setup, position, planned, waypoints, Waypoint(kept, _values_of(classifier)), most)
            found += [fit] if fit is not None else []
    return found


def _values_of(classifier: Classifier) -> Params:
    """By their names in a fit's model."""
    parts = {"body": classifier.body, "head": classifier.head}
    return {f"{part}.{name}": p.detach() for part, module in parts.items() for name, p in module.named_parameters()}


def _retraced(
    setup: Setup, position: Position, planned: Planned, waypoints: list[Waypoint], kept: Waypoint, most: int
) -> Retraced | None:
    """None where there are no snapshots, and what was trained is no part of the classifier as it was `kept`: of numbers
    its head is in their unit, and not in that of the loss."""
    start, target = planned.contender.start, planned.contender.target
    recipe, seed = _recipe(planned, position), setup.config.draws.seed
    if not waypoints and not target.class_names:
        return None
    rows = torch.from_numpy(rows_of(setup, 0, planned.fold if waypoints else None).train)
    given = Labelled(target.inputs, Part(target.examples, rows), target.labels[rows], len(target.class_names))
    training = begin(body(start, seed), given, recipe, strategies.named(recipe.trains), (), seed)
    model, lesson = training.model, training.lesson
    train, outcome = lesson.train, lesson.outcome
    model.eval()  # dropout of the backbone's own is left out
    some = torch.from_numpy(evenly(len(train), most))
    batch = Batch(train[some], lesson.targets[some], some, 0)
    parameters = dict(model.named_parameters())
    for waypoint in waypoints:
        if any(k not in parameters or v.shape != parameters[k].shape for k, v in waypoint.params.items()):
            raise CheckpointError(f"snapshots: those of {planned.contender.label} are not of this run's model")
    if waypoints:
        end = waypoints[-1]
    else:
        if any(k not in kept.params or kept.params[k].shape != p.shape for k, p in parameters.items()):
            return None
        moved = [k for k, p in parameters.items() if not torch.equal(p, kept.params[k])]
        end = kept._replace(params={k: kept.params[k] for k in moved})
    moving = end.params
    still = {k: v.detach().clone() for k, v in model.state_dict().items() if k not in moving}
    if not any(name.startswith("body.") for name in moving):
        batch = _of_features(model, batch)
    objective = composed((), Origin({}, seed, len(target.class_names), target.inputs), outcome.loss)

    @torch.no_grad()
    def loss(params: Params) -> float:
        for name, value in params.items():
            parameters[name].copy_(value)
        return float(objective(model, batch))

    alone = not any(isinstance(part, EpisodeNorm) for part in model.modules())
    mode = "each image by itself" if alone else "the images as one batch, as in training"
    return Retraced(planned.contender.label, waypoints, end, loss, len(some), mode, still)


@torch.no_grad()
def _of_features(model: nn.Module, batch: Batch) -> Batch:
    """The batch as the head takes it, in a model whose body has nothing left to do."""
    features = model.get_submodule("body")(batch.x)
    model.set_submodule("body", nn.Identity())
    return batch._replace(x=features)


def _recipe(planned: Planned, position: Position) -> Recipe:
    """With what was chosen for that fit in the place of `--strategy chosen`."""
    recipe = planned.contender.recipe
    assert recipe is not None
    if recipe.trains != CHOSEN:
        return recipe
    here = {"draw": planned.draw, "start": planned.contender.label}
    if planned.fold is not None:
        here["fold"] = planned.fold
    made = next(fit["chosen"] for fit in position.fits if {k: fit.get(k) for k in here} == here)
    return dataclasses.replace(recipe, **{k: made[k] for k in SETTLED if k in made})
