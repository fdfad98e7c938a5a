"""What an adapt run works with: its settings with nothing left open, the starts that are compared, and the images."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import nn

from metaft import plugin, schedules, targets
from metaft._version import __version__
from metaft.config import AdaptConfig, Init, of_other_method
from metaft.defaults import check_steps, device_of
from metaft.errors import DataError, MetaftError, no_such
from metaft.finetune import optim, strategies
from metaft.finetune.choose import CHOSEN
from metaft.finetune.inner import check_inner
from metaft.inputs import Inputs
from metaft.models.architecture import is_published
from metaft.options import flat, options
from metaft.runs.checkpoint import digest
from metaft.runs.machine import machine
from metaft.settings import RATE, RATE_OF_PUBLISHED, Recipe, StartSettings, TargetSettings
from metaft.starts import names
from metaft.starts.base import RANDOM, Start, constants
from metaft.starts.none import OWN, from_nothing
from metaft.starts.open import open_start
from metaft.starts.run import newest_run
from metaft.support import paths, places
from metaft.targets import Target
from metaft.tasks.folder import inputs_of

GLYPH_SHOTS = 5

# Classes that start from the same head row need more steps to part than the run's own: on notMNIST, with 5 images of
# each of 10 classes, 36 % of the test images are right after 3 steps, 57 % after 10 and 69 % after 30. The number was
# chosen after seeing these test figures, so notMNIST's own figures at 30 steps are a little too good.
MEAN_HEAD_STEPS = 30


PROBE = "probe"
"""The label of logistic regression on the start's features."""


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


class Planned(NamedTuple):
    """One fit of a run."""

    draw: int
    fold: int | None
    """None: there are none, or it is on all images."""
    contender: Contender


class Setup(NamedTuple):
    """Of one run."""

    config: AdaptConfig
    """With nothing open, and absolute paths."""
    contenders: tuple[Contender, ...]
    """The start that was asked for, and what it is compared with."""
    target: Target
    """As the first start takes it."""

    @property
    def start(self) -> Start:
        """The one that was asked for."""
        return self.contenders[0].start

    @property
    def folds(self) -> int:
        """Of cross-validation; 1 where there is a test part, drawn or given."""
        return 1 if self.one_part else self.target.folds

    one_part: bool = True
    """Whether each draw has a test part of its own."""

    @property
    def fits(self) -> list[Planned]:
        """All fits of the run in their order: those of one draw follow one another, fold by fold; where there are folds
        the first of all is on all images. The first one's classifier is kept."""
        folds: list[int | None] = [None] if self.folds == 1 else [*range(self.folds)]
        planned = [
            Planned(draw, fold, contender)
            for draw in range(self.config.draws.seeds)
            for fold in folds
            for contender in self.contenders
        ]
        return planned if self.folds == 1 else [Planned(0, None, self.contenders[0]), *planned]


def prepared(
    config: AdaptConfig, module: nn.Module | None, values: Init, begun: Mapping[str, Any] | None = None
) -> Setup:
    """The config with nothing open and with absolute paths, and what it names. Nothing is written.

    `begun` is the header of a run that goes on (see `header`): by its classes its data are known where they moved, and
    it compares what it began to compare. Raises MetaftError for
    settings, data, a run and a module that do not fit together.
    """
    device_of(config.compute.device)
    _check_method(config)
    _check_values(config, module, values)
    init, compare = config.start.init, config.start.compare  # as typed, which is how an error is to name them
    config = _with_data(names.in_full(config), (begun or {}).get("classes", ()))
    images = Images(config.target)
    if init is None:
        init = _newest(images) if config.method == "inner" else _chosen(images)
    settings = config.start
    if not names.takes_size(init) and any(map(names.takes_size, compare)):  # for which they are meant then
        settings = dataclasses.replace(settings, image_size=None if names.is_run(init) else settings.image_size)
        settings = dataclasses.replace(settings, init_norm=None)
    named = str(paths.absolute(init)) if names.is_run(init) else names.named_in_full(init)
    start = opened(init, images, settings, module, keep=values == "keep")
    target = images.of(start)
    start = start if start.name == OWN else dataclasses.replace(start, name=named)
    named = start.name
    _check_probe(config, start)
    open_values: dict[str, Any] = {"init": named}
    if config.target.data.startswith("glyphs:"):
        open_values["shots_per_class"] = GLYPH_SHOTS
    if config.method == "finetune":
        config = dataclasses.replace(config, recipe=_settled(config.recipe or Recipe(), start))
    else:
        config, open_values["inner_steps"] = _of_inner_method(config, start, len(target.class_names))
    left = flat(config)
    config = dataclasses.replace(config, **{k: v for k, v in open_values.items() if left[k] is None})
    one_part = "all" not in target.parts or config.target.shots_per_class is not None or old_folds(begun)
    setup = Setup(config, (), target, one_part)
    if setup.folds == 1:  # a class may have too few images
        target.rows(shots_per_class=config.target.shots_per_class, seed=config.draws.seed)
    others = [_other(name, images, config.start) for name in compare]
    contenders = _contenders(
        config, start, others, images, whole="compared_sha256" in (begun or {"compared_sha256": []})
    )
    known = [contender for contender in contenders if begun is None or contender.label in begun["starts"]]
    return setup._replace(contenders=tuple(known))


def old_folds(begun: Mapping[str, Any] | None) -> bool:
    """Whether a run that goes on began when four in five images of data without parts were drawn to train on."""
    return begun is not None and "folds" not in begun


class Images:
    """The images of a target, read once for each kind of inputs that starts take."""

    def __init__(self, settings: TargetSettings) -> None:
        self.settings = settings
        self._read: list[Target] = []

    @functools.cached_property
    def shape(self) -> tuple[list[int], bool]:
        """([C, H, W] of the images without any start, whether another size will do)."""
        return targets.shape_of(self.settings.data, self.settings.data_root)

    def _loaded(self, inputs: Inputs | None) -> Target:
        settings = self.settings
        return targets.load(settings.data, inputs, skip_bad=settings.skip_bad, data_root=settings.data_root)

    @functools.cached_property
    def plain(self) -> Target:
        """As they are taken without any start."""
        self._read.append(self._loaded(None))
        return self._read[-1]

    def sized(self, side: int) -> Target:
        """As they are taken without any start, in another size."""
        (channels, *_), _ = self.shape
        return self._with(inputs_of(channels, side))

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


def _other(name: str, images: Images, settings: StartSettings) -> Start:
    """A start of `--compare`. A run takes pictures as it was trained, and chance has no statistics, whatever size and
    normalisation the first start is given."""
    if names.is_run(name):
        settings = dataclasses.replace(settings, image_size=None)
    if not names.takes_size(name):
        settings = dataclasses.replace(settings, init_norm=None)
    try:
        return opened(name, images, settings)
    except MetaftError as error:
        raise type(error)(f"compare: {str(error).removeprefix('init: ')}") from None


def _chosen(images: Images) -> str:
    """The start where none is named: published weights for colour where they are installed, else the newest run that
    fits. A line on stderr says which."""
    shape, any_size = images.shape
    packaged = [name for name in names.PACKAGED if names.is_installed(name)]
    if shape[0] == 3 and any_size and packaged:
        print(f"init: {packaged[0]}, since the pictures are in colour", file=sys.stderr)
        return packaged[0]
    return _newest(images)


def _newest(images: Images) -> str:
    """The newest run that fits, whose folder a line on stderr names."""
    shape, any_size = images.shape
    init = str(newest_run(shape, any_size=any_size))
    print(f"init: {init}, the newest run that fits", file=sys.stderr)
    return init


def _contenders(
    config: AdaptConfig, start: Start, others: Sequence[Start], images: Images, *, whole: bool
) -> Iterator[Contender]:
    """The start, those that it is to be compared with, and chance, which has the whole of an architecture train
    whatever else does: frozen random features are nothing to be better than. Older runs did not (`whole` False)."""
    yield Contender(start.label, start, images.of(start), config.recipe)
    if start.meta is not None and config.start.probe is not False:
        yield Contender(PROBE, start, images.of(start), None, probe=True)
    labels = {start.label, PROBE, RANDOM}
    for other, name in zip(others, config.start.compare, strict=True):
        label = _another(names.label_of(name), labels)
        labels.add(label)
        recipe = config.recipe
        if other.settings is None and recipe is None:  # nor an inner loop
            recipe = _settled(Recipe(), other)
        if other.meta is None and recipe is not None and recipe.trains != "full":
            recipe = dataclasses.replace(recipe, freeze="none", strategy="full")
        yield Contender(label, other, images.of(other), recipe)
    if start.meta is not None:
        size = config.start.image_size
        chance = scratch(start, lambda: (images.plain if size is None else images.sized(size)).inputs)
        recipe = config.recipe
        if is_published(start.architecture["name"]):  # whose rates and epochs are not those of a random start
            given = recipe or Recipe()
            recipe = Recipe(
                batch_size=given.batch_size, head=given.head, augment=given.augment, balance=given.balance, lr=RATE
            )
        elif recipe is not None and whole and recipe.trains != "full":
            recipe = dataclasses.replace(recipe, freeze="none", strategy="full")
        yield Contender(chance.label, chance, images.of(chance), recipe)


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


def _settled(recipe: Recipe, start: Start) -> Recipe:
    """With strategy and rate where they are left open: of published weights the head alone, which is soon done and
    loses nothing of them. Raises MetaftError as `_check` does."""
    is_librarys = is_published(start.architecture["name"])
    if is_librarys and recipe.strategy is None and recipe.freeze == "none":
        recipe = dataclasses.replace(recipe, strategy="head")
    _check(recipe)
    moves = is_librarys and recipe.trains != "head"
    return dataclasses.replace(recipe, lr=RATE_OF_PUBLISHED if moves and recipe.lr is None else recipe.rate)


def _check(recipe: Recipe) -> None:
    """Raises MetaftError for a strategy, optimiser or schedule that there is not, and two strategies."""
    if recipe.freeze == "backbone" and recipe.trains != "head":
        raise MetaftError(f"freeze: backbone is --strategy head, and --strategy {recipe.trains} is given")
    if recipe.trains != CHOSEN:
        _make("strategy", recipe.trains, strategies.named)
    _make("optimizer", recipe.optimizer, optim.named)
    _make("schedule", recipe.schedule, schedules.make)


def _make(field: str, text: str, make: Callable[[str], object]) -> None:
    """Raises MetaftError that names the field and holds the text."""
    try:
        make(text)
    except MetaftError as error:
        said = str(error).removeprefix(f"{field}: ")
        raise MetaftError(f"{field}: {said}" + ("" if repr(text) in said else f" (given {text!r})")) from None


def _of_inner_method(config: AdaptConfig, start: Start, classes: int) -> tuple[AdaptConfig, int]:
    """The settings with the plugin that the run's member comes from, and how many steps it takes where none are given.
    Raises MetaftError where its inner loop cannot tell so many classes apart."""
    if start.settings is None:
        raise MetaftError(f"method: inner is the loop of a run, and {start.name} is none; name one with --init RUN")
    learner = start.settings.learner
    given = learner.plugin if config.inner.plugin is None else config.inner.plugin
    config = dataclasses.replace(config, plugin=plugin.load(given, learner.algorithm))
    check_steps("inner_steps", config.inner.inner_steps, learner.algorithm)
    check_inner(start, classes)
    mean_head = start.head_rows not in (None, classes)
    return config, MEAN_HEAD_STEPS if mean_head else start.settings.test.test_inner_steps


def _check_probe(config: AdaptConfig, start: Start) -> None:
    """Raises MetaftError for a probe of features that nothing has learned."""
    if config.start.probe and start.meta is None:
        raise MetaftError("probe: a random start has no features worth one (given True)")


def _check_values(config: AdaptConfig, module: nn.Module | None, values: Init) -> None:
    """Raises MetaftError for a wish for a module's own values where there are none to be had."""
    if values not in get_args(Init):
        raise no_such("init", values, get_args(Init))
    if values == "keep" and (module is None or config.start.init != "none"):
        begins = config.start.init or "the one that fits the images"
        what = (
            "no module was handed over" if module is None else f"the start is {begins}; take AdaptConfig(init='none')"
        )
        raise MetaftError(f"init: 'keep' is for a module without a run (init none), and {what}")


def _with_data(config: AdaptConfig, classes: Collection[str]) -> AdaptConfig:
    """The settings with the folder of images where it is. Raises DataError."""
    path = places.folder_of(config.target.data)
    if path is None:
        return config
    try:
        return dataclasses.replace(config, data=f"folder:{places.found(path, config.target.data_root, classes)}")
    except DataError as error:
        raise DataError(f"data: folder {error}") from None


def _check_method(config: AdaptConfig) -> None:
    """Raises MetaftError for settings of the other method, which would be ignored."""
    others = flat(config.inner)
    if config.method == "inner":
        recipe = {} if config.recipe is None else flat(config.recipe)
        others = {k: v for k, v in recipe.items() if v != options(Recipe)[k].default} or recipe
    for field, value in others.items():
        if value is not None:
            raise of_other_method(field, config.method, value)
    if config.method == "inner" and config.start.init == "none":
        raise MetaftError("method: inner is the loop of a run; name one with --init RUN instead of none")


def header(setup: Setup) -> dict[str, Any]:
    """The plain data that every checkpoint of an adapt run carries."""
    config, contenders, target, *_ = setup
    start = contenders[0].start
    data = hashlib.sha256(repr((target.class_names, tuple(target.examples.shape))).encode())
    for part in (target.examples, target.labels):
        data.update(np.ascontiguousarray(part.numpy()).data)
    return {
        "version": __version__,
        "init": start.name,
        "init_sha256": digest_of(start),
        "compared_sha256": [digest_of(contender.start) for contender in contenders[1:] if contender.start.meta],
        "data": target.name,
        "data_sha256": data.hexdigest(),
        "classes": list(target.class_names),
        "starts": [contender.label for contender in contenders],
        "folds": setup.folds,
        "environment": {**machine(device_of(config.compute.device)), "threads": str(torch.get_num_threads())},
    }


def digest_of(start: Start) -> str:
    """Of all values that a start has."""
    return digest("", {**(start.meta or {}), **constants(start)})
