"""What an adapt run compares, on the same images: the start that was asked for, its probe, others, and chance."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from torch import nn

from metaft import targets
from metaft.config import AdaptConfig
from metaft.errors import DataError, MetaftError
from metaft.finetune.recipes import fitting, lasting, of_chance, of_whole, settled
from metaft.inputs import Inputs
from metaft.models.architecture import is_published
from metaft.settings.data import TargetSettings
from metaft.settings.finetuning import RATE, Recipe, StartSettings
from metaft.starts import names
from metaft.starts.base import RANDOM, Start
from metaft.starts.none import from_nothing
from metaft.starts.open import open_start
from metaft.starts.run import newest_run
from metaft.targets import Target
from metaft.tasks.folder import inputs_of

ALONE = "alone"
"""The label of a model of the first target alone, where there are several."""

PROBE = "probe"
"""The label of logistic regression on the start's features."""


KEPT_OF_PUBLISHED = (
    "batch_size", "accumulate", "head", "augment", "loss", "balance", "dropout", "ema", "label_smoothing", "extra",
)  # fmt: skip
"""Of a recipe for published weights, what a random start beside them is trained with; rates and epochs are its own."""


class Contender(NamedTuple):
    """One of those that a run compares, on the same images."""

    label: str
    """By this name figures and curves are told apart."""
    start: Start
    target: Target
    """The images as this start takes them."""
    recipe: Recipe | None
    """None: the run's own inner loop, or the probe."""
    probe: bool = False
    """Whether it is logistic regression on the start's features."""
    which: int = 0
    """The number of its target among those of the run, of which the first is 0."""
    others: tuple[Target, ...] = ()
    """Further targets that it is trained on too."""


class Images:
    """The images of a target, read once for each kind of inputs that starts take."""

    def __init__(self, settings: TargetSettings, *, numbers: bool = False) -> None:
        """Labels are classes, or `numbers`."""
        self.settings, self.numbers = settings, numbers
        self._read: list[Target] = []

    @functools.cached_property
    def shape(self) -> tuple[list[int], bool]:
        """([C, H, W] of the images without any start, whether another size will do)."""
        return targets.shape_of(self.settings.data, self.settings.data_root, numbers=self.numbers)

    def _loaded(self, inputs: Inputs | None) -> Target:
        settings = self.settings
        return targets.load(
            settings.data, inputs, skip_bad=settings.skip_bad, data_root=settings.data_root, numbers=self.numbers
        )

    @functools.cached_property
    def plain(self) -> Target:
        """As they are taken without any start."""
        self._read.append(self._loaded(None))
        return self._read[-1]

    def sized(self, side: int) -> Target:
        """As they are taken without any start, in another size."""
        (channels, *_), _ = self.shape
        return self._with(inputs_of(channels, side))

    def small(self, side: int | None) -> Target:
        """As they are taken without any start, in another size where that is the smaller one: what published weights
        are given to see is more than a small network trained from nothing has use for."""
        (_, *sides), _ = self.shape
        return self.plain if side is None or side >= min(sides) else self.sized(side)

    def of(self, start: Start) -> Target:
        """As this start takes them. Raises MetaftError where it cannot."""
        if start.inputs is None:
            raise MetaftError(
                f"init: {start.name} takes inputs of shape {start.shape} ({start.about['dataset']}), but the images of "
                f"{self.settings.data} are {self.shape[0]}"
            )
        return self._with(start.inputs)

    def _with(self, inputs: Inputs) -> Target:
        for target in self._read:
            if inputs in (target.inputs, target.asked):
                return target
        self._read.append(self._loaded(inputs))
        return self._read[-1]


def opened(
    init: str, images: Images, settings: StartSettings, module: nn.Module | None = None, *, keep: bool = False
) -> Start:
    """The start that a name means, for these images."""
    size = settings.image_size
    return open_start(
        init, lambda: (images.plain if size is None else images.sized(size)).inputs,
        image_size=size, norm=settings.init_norm, module=module, keep=keep,
    )  # fmt: skip


def other(name: str, images: Images, settings: StartSettings, field: str = "compare") -> Start:
    """A start beside the first, which an option `field` names. A run takes pictures as it was trained, and chance has
    no statistics, whatever size and normalisation the first start is given."""
    if names.is_run(name):
        settings = dataclasses.replace(settings, image_size=None)
    if not names.takes_size(name):
        settings = dataclasses.replace(settings, init_norm=None)
    try:
        return opened(name, images, settings)
    except DataError:  # of the images, whose option it names
        raise
    except MetaftError as error:
        raise type(error)(f"{field}: {str(error).removeprefix('init: ')}") from None


def chosen(images: Images) -> str:
    """The start where none is named: published weights for colour where they are installed, else the newest run that
    fits. A line on stderr says which."""
    packaged = packaged_for(images)
    if packaged:
        print(f"init: {packaged[0]}, since the pictures are in colour", file=sys.stderr)
        return packaged[0]
    return newest(images)


def packaged_for(images: Images) -> list[str]:
    """Published weights that are installed and take such images, which are in colour."""
    shape, any_size = images.shape
    return [name for name in names.PACKAGED if names.is_installed(name)] if shape[0] == 3 and any_size else []


def newest(images: Images) -> str:
    """The newest run that fits, whose folder a line on stderr names."""
    shape, any_size = images.shape
    init = str(newest_run(shape, any_size=any_size))
    print(f"init: {init}, the newest run that fits", file=sys.stderr)
    return init


def contenders_of(
    config: AdaptConfig,
    start: Start,
    others: Sequence[Start],
    images: Images,
    *,
    trained: int,
    whole: bool,
    further: tuple[Target, ...] = (),
) -> Iterator[Contender]:
    """The start, those that it is to be compared with, and chance, which has the whole of an architecture train
    whatever else does: frozen random features are nothing to be better than. Older runs did not (`whole` False).
    `trained` is on how many images. With `further` targets the start is trained on all of them, and beside it stands a
    model of each alone."""
    yield Contender(start.label, start, images.of(start), config.recipe, others=further)
    for which, target in enumerate((images.of(start), *further) if further else ()):
        label = _another(f"{ALONE} on {which + 1}" if which else ALONE, {start.label})
        yield Contender(label, start, target, config.recipe, which=which)
    if start.meta is not None and config.start.probe is not False:
        yield Contender(PROBE, start, images.of(start), None, probe=True)
    if config.recipe is not None:  # others are single fits
        config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, soup=None))
    labels = {start.label, PROBE, RANDOM}
    for other, name in zip(others, config.start.compare, strict=True):
        label = _another(names.label_of(name), labels)
        labels.add(label)
        recipe = config.recipe
        if other.settings is None and recipe is None:  # nor an inner loop
            recipe = lasting(settled(Recipe(), other), trained)
        if other.meta is None and recipe is not None and recipe.trains != "full":
            recipe = of_whole(recipe, trained)
        recipe = _for(other, images, recipe)
        yield Contender(label, other, images.of(other), recipe)
    if start.meta is not None and config.start.random is not False:
        chance = scratch(start, lambda: images.small(config.start.image_size).inputs)
        recipe = config.recipe
        if is_published(start.architecture["name"]):  # whose rates and epochs are not those of a random start
            given = recipe or Recipe()
            recipe = Recipe(lr=RATE, **{name: getattr(given, name) for name in KEPT_OF_PUBLISHED})
        elif recipe is not None and whole and recipe.trains != "full":
            recipe = of_whole(recipe, trained)
        recipe = _for(chance, images, recipe)
        yield Contender(chance.label, chance, images.of(chance), recipe)


def _for(start: Start, images: Images, recipe: Recipe | None) -> Recipe | None:
    """A recipe without the extras that mean nothing for a start beside the first."""
    if recipe is None or not recipe.extra:
        return recipe
    target = images.of(start)
    return fitting(of_chance(recipe) if start.meta is None else recipe, target.inputs, target.class_names)


def _another(label: str, labels: Collection[str]) -> str:
    """The label, with a number behind it where there is one like it already."""
    numbered = (label, *(f"{label} ({n})" for n in range(2, len(labels) + 3)))
    return next(each for each in numbered if each not in labels)


def scratch(start: Start, inputs: Callable[[], Inputs]) -> Start:
    """What a start is measured against: its own architecture, drawn, or, where that is a library's, which nobody trains
    from nothing on a few images, the one that metaft chooses for such `inputs`."""
    if is_published(start.architecture["name"]):
        return from_nothing(inputs())
    return dataclasses.replace(start, label=RANDOM, meta=None, norm="adapt")
