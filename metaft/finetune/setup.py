"""What an adapt run works with: its settings with nothing left open, the starts that are compared, and the images."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import nn

from metaft import plugin, targets
from metaft._version import __version__
from metaft.config import AdaptConfig, Init, of_other_method
from metaft.defaults import check_steps, device_of
from metaft.errors import MetaftError, no_such
from metaft.finetune import extras, strategies
from metaft.finetune.also import check_also, check_parts, check_validation, further_located, further_of
from metaft.finetune.contenders import Contender, Images, chosen, contenders_of, newest, opened, other
from metaft.finetune.inner import check_inner
from metaft.finetune.range_test import searched
from metaft.finetune.ranking import at_hand, ranked
from metaft.finetune.recipes import check_numbers, fits_alike, lasting, settled
from metaft.finetune.robust import bounds_of
from metaft.finetune.strategies import CHOSEN
from metaft.finetune.strategies.base import unchanged
from metaft.models.handed import copied
from metaft.options import flat, options
from metaft.runs.folder import RunFolder
from metaft.runs.machine import machine
from metaft.settings.data import TargetSettings
from metaft.settings.finetuning import Recipe
from metaft.starts import names
from metaft.starts.base import Start, body, digest_of
from metaft.starts.none import OWN
from metaft.support import paths, places
from metaft.targets import Target
from metaft.targets.draws import VALIDATION_FROM, Rows

GLYPH_SHOTS = 5

# Classes that start from the same head row need more steps to part than the run's own: on notMNIST, with 5 images of
# each of 10 classes, 36 % of the test images are right after 3 steps, 57 % after 10 and 69 % after 30. The number was
# chosen after seeing these test figures, so notMNIST's own figures at 30 steps are a little too good.
MEAN_HEAD_STEPS = 30


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
    one_part: bool = True
    """Whether each draw has a test part of its own."""
    ranked: tuple[Mapping[str, Any], ...] = ()
    """With --auto and without --init the starts at hand, the best first; see `metaft.finetune.ranking`."""
    range_test: Mapping[str, Any] | None = None
    """What led to the rate with --lr auto; see `metaft.finetune.range_test`."""
    further: tuple[Target, ...] = ()
    """Those of `--also`, as the start takes them."""

    @property
    def start(self) -> Start:
        """The one that was asked for."""
        return self.contenders[0].start

    @property
    def folds(self) -> int:
        """Of cross-validation; 1 where there is a test part, drawn or given."""
        return 1 if self.one_part else self.target.folds

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
    it compares what it began to compare. Raises MetaftError for settings, data, a run and a module that do not fit
    together.
    """
    device_of(config.compute.device)
    check_also(config)
    _check_method(config)
    if bounds_of(config.robust) and config.recipe is not None and config.recipe.loss == "mse":
        raise MetaftError(f"robust: accuracy is of classes, and --loss mse for numbers (given {config.robust[0]!r})")
    _check_values(config, module, values)
    init, compare = config.start.init, config.start.compare  # as typed, which is how an error is to name them
    config = names.in_full(config)
    if config.recipe is not None:
        config = dataclasses.replace(config, extra=tuple(map(extras.in_full, config.recipe.extra)))
    if config.auto is not None:
        config = _left_open(config)
    config = dataclasses.replace(config, target=located(config.target, (begun or {}).get("classes", ())))
    config = dataclasses.replace(config, also=further_located(config, (begun or {}).get("also_classes", ())))
    numbers = config.recipe is not None and config.recipe.loss == "mse"
    if config.recipe is not None and numbers:  # before a start is looked for, which would be said first
        check_numbers(config.recipe)
        targets.check_numbers(config.target.data)
    images = Images(config.target, numbers=numbers)
    if config.auto is not None and init is None and module is not None:
        raise MetaftError(
            "auto: the starts at hand are none of your module; give init='none', or the folder of its run"
        )
    rows: tuple[Mapping[str, Any], ...] = tuple((begun or {}).get("ranked", ()))
    if init is None and config.auto is not None and not numbers:
        rows = tuple(_ranked(config, images))
        init = rows[0]["start"]
    elif init is None:
        init = newest(images) if config.method == "inner" else chosen(images)
    settings = config.start
    if not names.takes_size(init) and any(map(names.takes_size, compare)):  # for which they are meant then
        settings = dataclasses.replace(settings, image_size=None if names.is_run(init) else settings.image_size)
        settings = dataclasses.replace(settings, init_norm=None)
    named = str(paths.absolute(init)) if names.is_run(init) else names.named_in_full(init)
    start = opened(init, images, settings, module, keep=values == "keep")
    target = images.of(start)
    start = start if start.name == OWN else dataclasses.replace(start, name=named)
    named = start.name
    further = further_of(config, start)
    _check_probe(config, start)
    if config.robust and target.inputs.kind != "image":
        raise MetaftError(f"robust: it is for pictures, and inputs are {target.inputs.kind}")
    for extra in extras.all_named(() if config.recipe is None else config.recipe.extra):
        extra.check(target.inputs, target.class_names)
    open_values: dict[str, Any] = {"init": named}
    open_values["shots_per_class"] = shots_of(config.target)
    if config.method == "finetune":
        config = dataclasses.replace(
            config, recipe=settled(config.recipe or Recipe(), start, resumed=begun is not None)
        )
    else:
        config, open_values["inner_steps"] = _of_inner_method(config, start, len(target.class_names))
    left = flat(config)
    config = dataclasses.replace(config, **{k: v for k, v in open_values.items() if left[k] is None})
    one_part = "all" not in target.parts or config.target.shots_per_class is not None or old_folds(begun)
    if further:
        check_parts((target, *further), config.target.shots_per_class)
    setup = Setup(config, (), target, one_part, rows, further=further)
    for draw in range(config.draws.seeds if setup.folds == 1 else 0):  # a class may have too few images
        for each in (target, *further):
            each.rows(shots_per_class=config.target.shots_per_class, seed=config.draws.seed + draw)
    check_validation((target, *further), [rows_of(setup, 0, which=which) for which in range(1 + len(further))])
    first = rows_of(setup, 0)
    trained = len(first.train)
    if config.recipe is not None:
        _check_soup(config.recipe, setup.folds, first, fresh=begun is None)
        config = dataclasses.replace(config, recipe=lasting(config.recipe, trained))
        device = device_of(config.compute.device)
        config, test = searched(config, start, target, first.train, device)
        setup = setup._replace(config=config, range_test=test or (begun or {}).get("range_test"))
    others = [other(name, images, config.start) for name in compare]
    contenders = contenders_of(
        config,
        start,
        others,
        images,
        trained=trained,
        whole="compared_sha256" in (begun or {"compared_sha256": []}),
        further=further,
    )
    known = [contender for contender in contenders if begun is None or contender.label in begun["starts"]]
    for contender in known:
        _check_strategy(contender)
    return setup._replace(contenders=tuple(known))


def _check_soup(recipe: Recipe, folds: int, rows: Rows, *, fresh: bool) -> None:
    """Raises MetaftError for a soup of which no images could decide what goes into it, that would not be tested, or, in
    a `fresh` run, whose fits would be alike."""
    soup, images = recipe.soup, len(rows.train)
    if soup is None:
        return
    if folds > 1:
        raise MetaftError(f"soup: without a test part there are folds, and it is for one draw (given {soup})")
    if len(rows.val) == 0:
        raise MetaftError(
            f"soup: validation images decide what goes into it, and a class has fewer than {VALIDATION_FROM} images to "
            f"set some aside from (given {soup})"
        )
    if fresh and fits_alike(recipe, images):
        raise MetaftError(
            f"soup: the {images} training images are one batch, and nothing else about a fit is left to chance, so "
            f"that {soup} would be alike; they differ with --augment basic, or with a --batch-size of at most "
            f"{images - 2}"
        )


def _check_strategy(contender: Contender) -> None:
    """Raises MetaftError for a start whose backbone has nothing that its strategy could train."""
    recipe, start = contender.recipe, contender.start
    if contender.probe or recipe is None or recipe.trains == CHOSEN:
        return
    strategy = strategies.named(recipe.trains)
    if strategy.prepare is unchanged:
        return
    try:
        strategy.prepare(nn.ModuleDict({"body": copied(body(start, 0)), "head": nn.Identity()}), 0)
    except MetaftError as error:
        raise MetaftError(f"{error} (given {recipe.trains!r}, from {start.name})") from None


def _left_open(config: AdaptConfig) -> AdaptConfig:
    """The settings of `--auto`, whose strategy is what there is to choose. Raises MetaftError for one that is given."""
    recipe = config.recipe or Recipe()
    if recipe.strategy not in (None, CHOSEN) or recipe.freeze != "none":
        raise MetaftError(f"auto: the strategy is chosen, and {recipe.trains} is given (--strategy or --freeze)")
    return dataclasses.replace(config, recipe=dataclasses.replace(recipe, strategy=CHOSEN))


def _ranked(config: AdaptConfig, images: Images) -> list[dict[str, Any]]:
    """The starts at hand, the best for the images that the first draw trains on first. At most half of the time is for
    them. Raises MetaftError where there are none."""
    assert config.auto is not None
    starts = at_hand(images, "auto", image_size=config.start.image_size)
    return ranked(
        starts, images, shots_per_class=shots_of(config.target), seed=config.draws.seed, seconds=30 * config.auto
    )


def rows_of(setup: Setup, draw: int, fold: int | None = 0, which: int = 0) -> Rows:
    """The images of one draw, and of one of its folds where it has any (None: all, without a test), of one of the
    targets."""
    config, target = setup.config, (setup.target, *setup.further)[which]
    # The inner loop, a choice by cross-validation and a recipe without patience have no use for a validation part, and
    # train on it too; one that the data come with judges all but the first two.
    recipe = config.recipe
    asked = recipe is not None and (recipe.patience is not None or recipe.soup is not None)
    judged = asked or (recipe is not None and "val" in target.parts)
    validate = judged and recipe is not None and recipe.trains != CHOSEN
    if setup.folds > 1:
        rows = target.rows_of_fold(0 if fold is None else fold, seed=config.draws.seed + draw, validate=validate)
        if fold is not None:
            return rows
        # The classifier that is kept is trained as the first one that was tested: with validation images or without.
        return target.rows_of_fold(None, seed=config.draws.seed + draw, validate=len(rows.val) > 0)
    return target.rows(shots_per_class=config.target.shots_per_class, seed=config.draws.seed + draw, validate=validate)


def old_folds(begun: Mapping[str, Any] | None) -> bool:
    """Whether a run that goes on began when four in five images of data without parts were drawn to train on."""
    return begun is not None and "folds" not in begun


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


def shots_of(target: TargetSettings) -> int | None:
    """Images per class that are drawn; None: all that there are to draw from."""
    if target.shots_per_class is None and target.data.startswith("glyphs:"):
        return GLYPH_SHOTS
    return target.shots_per_class


def located(target: TargetSettings, classes: Collection[str] = ()) -> TargetSettings:
    """The settings with the folder of images where it is. Raises DataError."""
    return dataclasses.replace(target, data=places.located("data", target.data, target.data_root, classes))


def _check_method(config: AdaptConfig) -> None:
    """Raises MetaftError for settings of the other method, which would be ignored."""
    others = flat(config.inner)
    if config.method == "inner" and config.auto is not None:
        raise of_other_method("auto", config.method, config.auto)
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
    given = () if config.recipe is None else extras.all_named(config.recipe.extra)
    teachers = [digest_of_run(extra.run) for extra in given if extra.run is not None]
    return {
        **({} if config.auto is None else {"ranked": list(setup.ranked)}),
        **({} if setup.range_test is None else {"range_test": setup.range_test}),
        "version": __version__,
        "init": start.name,
        "init_sha256": digest_of(start),
        "compared_sha256": [digest_of(contender.start) for contender in contenders[1:] if contender.start.meta],
        **({"teachers_sha256": teachers} if teachers else {}),
        **_of_further(setup.further),
        "data": target.name,
        "data_sha256": digest_of_data(target),
        "classes": list(target.class_names),
        "starts": [contender.label for contender in contenders],
        "folds": setup.folds,
        "environment": {**machine(device_of(config.compute.device)), "threads": str(torch.get_num_threads())},
    }


def _of_further(further: Sequence[Target]) -> dict[str, Any]:
    """What a header knows further targets by, where they moved, and whether they changed."""
    if not further:
        return {}
    return {
        "also_sha256": [digest_of_data(each) for each in further],
        "also_classes": [list(each.class_names) for each in further],
    }


def digest_of_data(target: Target) -> str:
    """Of its images as they are taken, and of their labels."""
    data = hashlib.sha256(repr((target.class_names, tuple(target.examples.shape))).encode())
    for part in (target.examples, target.labels):
        data.update(np.ascontiguousarray(part.numpy()).data)
    return data.hexdigest()


def digest_of_run(path: Path) -> str:
    """Of the classifier that an adapt run left, or of its file alone."""
    file = RunFolder(path).classifier if path.is_dir() else path
    return hashlib.sha256(file.read_bytes()).hexdigest()
