"""What a recipe's words stand for, settled and checked before anything is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from metaft import schedules
from metaft.errors import MetaftError
from metaft.finetune import extras, optim, strategies
from metaft.finetune.batches import cut
from metaft.finetune.strategies import CHOSEN
from metaft.finetune.strategies.base import unchanged
from metaft.inputs import Inputs
from metaft.models.architecture import is_published
from metaft.options import flat
from metaft.settings.finetuning import AUTO, PATIENCE, RATE, RATE_OF_FEW, RATE_OF_HEAD, RATE_OF_PUBLISHED, Recipe
from metaft.spec import made_for
from metaft.starts.base import Start

STEPS_OF_HEAD = 600
"""At least, of a head on features that are computed once: they cost little. From the Conv-4 features of a run, with 5
images of each of notMNIST's classes, 40 epochs, which are 80 steps, left it 18 points below the probe."""


PROBED_FIRST = Recipe(strategy="lp-ft:share=0.9,rise=0.05", epochs=240)
"""How `lp-ft` goes from published weights: the head until it has learned what there is to learn, which on features that
are computed once costs nothing, then everything in 24 passes. With 0.3 of 12 passes it began to move the weights by a
head that knew nothing (benchmarks/README.md)."""

CLIPPED = 1.0
"""Of gradients that move published weights."""


def settled(recipe: Recipe, start: Start, *, resumed: bool = False) -> Recipe:
    """With strategy, rate and patience where they are left open: of published weights the head alone, which is soon
    done and loses nothing of them, and without patience, since all images are worth more to train on than one in five
    of so few is as a judge. A `resumed` one is settled as it was when it began. Raises MetaftError as `check` does."""
    is_librarys = is_published(start.architecture["name"])
    if is_librarys and recipe.strategy is None and recipe.freeze == "none":
        recipe = dataclasses.replace(recipe, strategy="head")
    check(recipe)
    if of_chance(recipe) != recipe and start.meta is None:
        (text, *_) = (text for text in recipe.extra if extras.named(text).of_start)
        raise MetaftError(f"extra: {text} is about what a start knows, and a random one knows nothing")
    if recipe.soup is not None and start.meta is None:
        raise MetaftError(
            f"soup: fits of a random start end far from one another, where an average means nothing (given "
            f"{recipe.soup})"
        )
    if recipe.patience is None and not is_librarys:
        recipe = dataclasses.replace(recipe, patience=PATIENCE)
    if recipe.trains == CHOSEN:  # what is left open is what there is to choose
        return recipe
    if is_librarys and recipe.trains != "head" and not resumed:
        recipe = _moving(recipe)
    recipe = dataclasses.replace(recipe, schedule=recipe.anneals)
    if recipe.lr is not None:
        return recipe
    if recipe.trains == "head":
        return dataclasses.replace(recipe, lr=RATE if is_librarys else RATE_OF_HEAD)
    of_published = RATE_OF_FEW if strategies.named(recipe.trains).few else RATE_OF_PUBLISHED
    return dataclasses.replace(recipe, lr=of_published if is_librarys else RATE)


def as_settled(given: Recipe, own: Recipe, *, searched: bool = False) -> Recipe:
    """A recipe that is given to go on with a run, with the run's `own` settings where it left them open: they are what
    `settled` made of the same words. `searched` says that the run found its rate by a range test."""
    left = {name: getattr(own, name) for name, value in flat(given).items() if value is None}
    if (given.strategy, given.epochs, own.strategy) == ("lp-ft", None, PROBED_FIRST.strategy):
        left["strategy"] = own.strategy
    if given.lr == AUTO and searched:
        left["lr"] = own.lr
    return dataclasses.replace(given, **left)


def _moving(recipe: Recipe) -> Recipe:
    """What is left open where published weights move."""
    recipe = dataclasses.replace(recipe, clip_norm=CLIPPED if recipe.clip_norm is None else recipe.clip_norm)
    if recipe.trains == "lp-ft" and recipe.epochs is None and on_features(recipe):
        return dataclasses.replace(recipe, strategy=PROBED_FIRST.strategy, epochs=PROBED_FIRST.epochs)
    return dataclasses.replace(recipe, schedule="cosine" if recipe.schedule is None else recipe.schedule)


def on_features(recipe: Recipe) -> bool:
    """Whether a backbone that stays has no images to see twice: nothing changes them from epoch to epoch."""
    return recipe.augment == "none" and not any(extra.of_inputs for extra in extras.all_named(recipe.extra))


def fits_alike(recipe: Recipe, images: int) -> bool:
    """Whether fits on so many images that differ in `order` (see `training.begin`) differ by rounding alone: all images
    are one batch, and nothing else about a fit is random."""
    return len(cut(np.arange(images), recipe.batch_size)) == 1 and on_features(recipe) and not recipe.dropout


def of_chance(recipe: Recipe) -> Recipe:
    """For a random start, without what is about a start's knowledge, which it has none of."""
    return dataclasses.replace(recipe, extra=tuple(t for t in recipe.extra if not extras.named(t).of_start))


def fitting(recipe: Recipe, inputs: Inputs, class_names: Sequence[str]) -> Recipe:
    """Without extras that cannot be applied to these inputs: of another start than the one that they were given for."""

    def fits(text: str) -> bool:
        try:
            extras.named(text).check(inputs, class_names)
        except MetaftError:
            return False
        return True

    return dataclasses.replace(recipe, extra=tuple(filter(fits, recipe.extra)))


def epochs_of(recipe: Recipe, images: int) -> int:
    """Those that are given, or what is chosen for so many images: see `--epochs`."""
    if recipe.epochs is not None or recipe.trains != "head" or not on_features(recipe):
        return recipe.passes
    return max(recipe.passes, math.ceil(STEPS_OF_HEAD / math.ceil(images / recipe.images_per_step)))


def lasting(recipe: Recipe, images: int) -> Recipe:
    """With the number of epochs for so many images; a choice has its own."""
    return recipe if recipe.trains == CHOSEN else dataclasses.replace(recipe, epochs=epochs_of(recipe, images))


def of_whole(recipe: Recipe, images: int) -> Recipe:
    """A recipe for training everything, from one of another strategy, with epochs and a rate of its own where they are
    those that a head alone gets when they are left open."""
    epochs = None if recipe == lasting(dataclasses.replace(recipe, epochs=None), images) else recipe.epochs
    lr = RATE if recipe.trains == "head" and epochs is None and recipe.lr == RATE_OF_HEAD else recipe.lr
    return lasting(dataclasses.replace(recipe, freeze="none", strategy="full", epochs=epochs, lr=lr), images)


def check(recipe: Recipe) -> None:
    """Raises MetaftError for a strategy, extra, optimiser or schedule that there is not, two strategies, and what goes
    with classes alone where labels are numbers."""
    if recipe.freeze == "backbone" and recipe.trains != "head":
        raise MetaftError(f"freeze: backbone is --strategy head, and --strategy {recipe.trains} is given")
    check_numbers(recipe)
    if recipe.soup is not None and recipe.trains == CHOSEN:
        raise MetaftError(f"soup: it is of fits by one strategy, and it is still to be chosen (given {recipe.soup})")
    if recipe.lr == AUTO and recipe.trains == CHOSEN:
        raise MetaftError("lr: auto is for one strategy, and what is chosen among several has rates of its own to try")
    if recipe.trains != CHOSEN:
        made_for("strategy", recipe.trains, strategies.named)
    about_start = [
        text for text, extra in zip(recipe.extra, extras.all_named(recipe.extra), strict=True) if extra.of_start
    ]
    if about_start and recipe.trains != CHOSEN and strategies.named(recipe.trains).prepare is not unchanged:
        raise MetaftError(
            f"extra: {about_start[0]} is about a start's weights, which --strategy {recipe.trains} leaves as they are"
        )
    made_for("optimizer", recipe.optimizer, optim.named)
    made_for("schedule", recipe.anneals, schedules.make)


def check_numbers(recipe: Recipe) -> None:
    """Raises MetaftError for what goes with classes alone where labels are numbers."""
    for field, needed in (("head", "linear"), ("balance", "none"), ("label_smoothing", 0.0), ("soup", None)):
        if recipe.loss == "mse" and (value := getattr(recipe, field)) != needed:
            raise MetaftError(f"{field}: {value} is for classes, and --loss mse for numbers")
    for text, extra in zip(recipe.extra, extras.all_named(recipe.extra), strict=True):
        if recipe.loss == "mse" and extra.of_classes:
            raise MetaftError(f"extra: {text} is for classes, and --loss mse for numbers")
