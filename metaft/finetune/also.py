"""Further targets of a run (`--also`): what goes with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from metaft.config import AdaptConfig
from metaft.errors import MetaftError
from metaft.finetune.contenders import Images
from metaft.finetune.strategies import CHOSEN
from metaft.settings.finetuning import AUTO, Recipe
from metaft.starts.base import Start
from metaft.support import places
from metaft.targets import Target
from metaft.targets.draws import Rows


def check_also(config: AdaptConfig) -> None:
    """Raises MetaftError for what several targets do not go with."""
    if not config.also:
        if config.tasks is not None:
            raise MetaftError(
                f"tasks: it is for several targets, and --also names no further one (given {config.tasks})"
            )
        return
    for name in config.also:
        if [config.target.data, *config.also].count(name) > 1:
            raise MetaftError(f"also: {name!r} is given twice, here or as --data")
    for field, value in _apart(config):
        raise MetaftError(f"also: several targets do not go with --{field} yet (given {value})")


def _apart(config: AdaptConfig) -> Iterator[tuple[str, Any]]:
    """Options that do not go with several targets, and their values."""
    recipe = config.recipe or Recipe()
    if config.method == "inner":
        yield "method", config.method
    for field, value in (("auto", config.auto), ("soup", recipe.soup), ("snapshots", config.output.snapshots)):
        if value is not None:
            yield field, value
    for field, value in (("robust", config.robust), ("compare", config.start.compare), ("extra", recipe.extra)):
        if value:
            yield field, value[0]
    words = (("strategy", recipe.trains, CHOSEN), ("lr", recipe.lr, AUTO), ("loss", recipe.loss, "mse"))
    for field, value, refused in words:
        if value == refused:
            yield field, value


def further_located(config: AdaptConfig, classes: Sequence[Sequence[str]] = ()) -> tuple[str, ...]:
    """The names of further targets with the folders of images where they are; `classes` are those that a run knows of
    each. `config` knows where the first one is. Raises DataError, naming `also`, for one that is nowhere, and
    MetaftError where two come to one place: they are looked for by their last names."""
    known = classes or [()] * len(config.also)
    names = [
        places.located("also", name, config.target.data_root, of) for name, of in zip(config.also, known, strict=True)
    ]
    for number, name in enumerate(names):
        if name in (config.target.data, *names[:number]):
            raise MetaftError(
                f"also: {config.also[number]} is found at {places.path_of(name)[1]}, as another target is"
            )
    return tuple(names)


def further_of(config: AdaptConfig, start: Start) -> tuple[Target, ...]:
    """The further targets as the start takes them. Raises MetaftError, naming `also`, where it cannot."""
    try:
        return tuple(Images(dataclasses.replace(config.target, data=name)).of(start) for name in config.also)
    except MetaftError as error:  # no such kind of data, or what DataError is about
        raise type(error)(f"also: {str(error).removeprefix('data: ')}") from None


def check_parts(targets: Sequence[Target], shots: int | None) -> None:
    """Raises MetaftError where one of several has no test part, drawn or given: folds are of one target."""
    for target in targets:
        if "all" in target.parts and shots is None:
            raise MetaftError(
                f"also: without a test part there are folds, which are of one target alone, and {target.name} has none "
                "(--shots-per-class draws one)"
            )


def check_validation(targets: Sequence[Target], rows: Sequence[Rows]) -> None:
    """Raises MetaftError where some of several targets have validation images and others have none: the epoch that is
    kept is the best for all."""
    without = [target.name for target, part in zip(targets, rows, strict=True) if len(part.val) == 0]
    if 0 < len(without) < len(targets):
        raise MetaftError(
            f"also: {without[0]} has no images to validate with, and another target has; draw as many of each class "
            "(--shots-per-class)"
        )
