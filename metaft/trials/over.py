"""The commands whose settings can be searched: by what a trial is judged, and what of it may be searched."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from metaft import schedules
from metaft.after.comparing import FIGURES, Figure
from metaft.config import AdaptConfig, MetaTrainConfig, read_toml
from metaft.errors import CheckpointError, MetaftError
from metaft.objective import figure_of
from metaft.options import Settings, flat
from metaft.plugin import load
from metaft.runs.folder import RunFolder, read_rows
from metaft.runs.recorded import CONFIGS
from metaft.spec import made_for
from metaft.starts import names
from metaft.trials.space import Choices, Space

JUDGED = "trials are judged by it, and could not be compared"
LUCK = "it is chance, of which a search would find the luckiest"
COMPUTED = "it says how or where a trial is computed, and not what it learns"
BESIDE = "it is beside what is learned"


class Validated(NamedTuple):
    """What a trial came to on validation."""

    value: float
    loss: float | None
    """By which equal values are told apart: the less, the better."""


class Checked(NamedTuple):
    """What was seen before a search begins."""

    notes: tuple[str, ...] = ()
    """On how its figures are to be read."""
    chosen: Mapping[str, Any] = types.MappingProxyType({})
    """Settings that were left open, and that trials are not to choose one by one."""


class Over(NamedTuple):
    """A command."""

    not_searched: Mapping[str, str]
    """Option -> why."""
    beside: Mapping[str, Any]
    """How a trial's settings differ from those of a run by itself: without what it is not judged by."""
    check: Callable[[Any, Space], Checked]
    """Of (the settings of a trial, the space). Raises MetaftError where it could not be judged."""
    measure: Callable[[Space], str]
    """What is validated: "accuracy", "mse" or "rmse"."""
    validated: Callable[[RunFolder], Validated]
    """Raises CheckpointError where there is no finite figure. Nothing of the run's test is read."""
    tested: Callable[[RunFolder], Figure]
    """The figure of a finished run's test."""


def higher_is_better(measure: str) -> bool:
    """Whether a search is for the highest value."""
    return measure == "accuracy"


# ---- adapt --------------------------------------------------------------------------------------------------------


def _check_adapt(config: AdaptConfig, space: Space) -> Checked:
    from metaft.finetune.setup import prepared, rows_of

    for name, wanted in (("method", "finetune"), ("auto", None)):
        if getattr(config, name) != wanted:
            raise MetaftError(f"{name}: its trials would have no validation images (given {getattr(config, name)!r})")
    if config.also:
        raise MetaftError(f"also: a search is for one target (given {', '.join(config.also)})")
    if any(value is not None for value in _all("soup", space)):
        raise MetaftError("soup: what goes into one is chosen on the validation images that would judge it")
    for strategy in _all("strategy", space):
        if strategy == "chosen":
            raise MetaftError("strategy: 'chosen' chooses by itself, on all images that there are to train on")
    for name in ("strategy", "schedule", "optimizer", "extra"):
        for value in _all(name, space):
            _words(name, value)
    setup = prepared(config, None, "seed")
    if not len(rows_of(setup, 0).val):
        few = "a class has fewer than 10 images to train on, so none are set aside for validation"
        if setup.config.recipe is not None and setup.config.recipe.patience is None:
            few = "from published weights no images are set aside for validation unless patience is given"
        raise MetaftError(
            f"patience: a search needs validation images, and {few}; give --patience 10 (with 10 or more images of "
            "each class) or data with a val/ part"
        )
    notes: tuple[str, ...] = ()
    if "all" in setup.target.parts and (setup.folds > 1 or config.draws.seeds > 1):
        each = "folds" if setup.folds > 1 else "draws"
        note = f"there is no test part of its own: what one of the {each} tests others validated, so the test's figure"
        notes = (f"{note} is a little too good",)
    return Checked(notes, {} if _all("init", space) else {"init": setup.start.name})


def _words(name: str, value: Any) -> None:
    """Raises MetaftError for a choice that no trial could be run with, whatever its other settings are."""
    from metaft.finetune.recipes import check
    from metaft.settings.finetuning import Recipe

    check(dataclasses.replace(Recipe(), **{name: value}))


def _measure_adapt(space: Space) -> str:
    return "rmse" if space.fixed.get("loss") == "mse" else "accuracy"


def _validated_adapt(run: RunFolder) -> Validated:
    """The mean over draws, and over folds, of the first start's figure in the epoch that was kept, which is that of
    the lowest validation loss."""
    curves: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    rows = read_rows(run.metrics, ["epoch"])
    for row in rows:
        if row["start"] == rows[0]["start"] and row.get("fold") != "all" and "val_loss" in row:
            curves.setdefault((row["draw"], row.get("fold")), []).append(row)
    kept = [min(curve, key=lambda row: row["val_loss"]) for curve in curves.values()]
    if not kept:
        raise CheckpointError("it has no validation figure")
    name = next(name for name in ("val_accuracy", "val_rmse") if name in kept[0])
    value, loss = (math.fsum(row[key] for row in kept) / len(kept) for key in (name, "val_loss"))
    return Validated(_finite(value), loss)


def _tested_adapt(run: RunFolder) -> Figure:
    (figure,) = FIGURES["adapt"](run, run.read_result()).values()
    return figure


# ---- meta_train ---------------------------------------------------------------------------------------------------


def _check_meta_train(config: MetaTrainConfig, space: Space) -> Checked:
    from metaft import algorithms, inner_augment, inner_optim
    from metaft.runs.assemble import assemble

    for name in ("ways", "shots"):
        if _is_searched(name, space) and f"test_{name}" not in space.fixed:
            raise MetaftError(f"{name}: trials are validated with as many unless test_{name} is given, which is to be")
    for algorithm in _all("algorithm", space) or (config.learner.algorithm,):
        load(config.learner.plugin, algorithm)
    checks: dict[str, Callable[[Any], object]] = {
        "algorithm": lambda text: algorithms.read(text),
        "outer_schedule": lambda text: made_for("outer_schedule", text, schedules.of_steps, own="schedule"),
        "inner_optimizer": inner_optim.make,
        "inner_augment": inner_augment.named,
    }
    for name, check in checks.items():
        for value in _all(name, space):
            check(value)
    assemble(config)
    return Checked()


def _measure_meta_train(space: Space) -> str:
    return "mse" if space.fixed.get("dataset") == "sinusoid" else "accuracy"


def _validated_meta_train(run: RunFolder) -> Validated:
    """The figure of the checkpoint that is best on validation, in training's normalisation."""
    norm = read_toml(run.config)["batch_norm"]
    figures = [row[norm] for row in read_rows(run.metrics) if row["kind"] == "val"]
    name = figure_of(figures[0]) if figures else ""
    values = [row[name] for row in figures if row[name] is not None]
    if not values:
        raise CheckpointError("it has no finite validation figure")
    return Validated(max(values) if higher_is_better(name) else min(values), None)


def _tested_meta_train(run: RunFolder) -> Figure:
    return FIGURES["meta_train"](run, run.read_result())[read_toml(run.config)["batch_norm"]]


# ---- what both share ----------------------------------------------------------------------------------------------


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise CheckpointError(f"its validation figure is {value}")
    return value


def _all(name: str, space: Space) -> tuple[Any, ...]:
    """The values that a setting is to have, if any is said."""
    for dimension in space.searched:
        if dimension.name == name and isinstance(dimension, Choices):
            return tuple(dimension.values)
    return (space.fixed[name],) if name in space.fixed else ()


def _is_searched(name: str, space: Space) -> bool:
    return any(dimension.name == name for dimension in space.searched)


_PLACES = dict.fromkeys(("data_root", "device", "out", "report", "plugin", "skip_bad"), COMPUTED)

OVER: dict[str, Over] = {
    "adapt": Over(
        {
            **_PLACES,
            **dict.fromkeys(("data", "shots_per_class", "seeds", "loss", "method", "auto"), JUDGED),
            **dict.fromkeys(("compare", "probe", "random", "robust", "also", "tasks"), BESIDE),
            "seed": LUCK,
            "inner_steps": "it is of --method inner, which has no validation",
        },
        {"probe": False, "random": False, "report": False},
        _check_adapt,
        _measure_adapt,
        _validated_adapt,
        _tested_adapt,
    ),
    "meta_train": Over(
        {
            **_PLACES,
            **dict.fromkeys(
                ("download", "engine", "threads", "task_chunk", "inner_checkpoint", "checkpoint_every"), COMPUTED
            ),
            **dict.fromkeys(("dataset", "split", "rotate", "batch_norm", "eval_every", "eval_episodes"), JUDGED),
            **dict.fromkeys(("eval_seed", "eval_modes", "test_ways", "test_shots", "test_query_shots"), JUDGED),
            **dict.fromkeys(("keep_best", "log_every", "test_episodes"), BESIDE),
            "seed": LUCK,
        },
        {"report": False},
        _check_meta_train,
        _measure_meta_train,
        _validated_meta_train,
        _tested_meta_train,
    ),
}


def check_searched(space: Space, origin: str) -> None:
    """Raises MetaftError for a setting that a search may not vary, and for one that is the search's own."""
    for dimension in space.searched:
        why = OVER[space.command].not_searched.get(dimension.name)
        if why is not None:
            raise MetaftError(f"{origin}: {dimension.name}: it cannot be searched: {why} ({dimension.plain()!r})")
    if "out" in space.fixed:
        raise MetaftError(f"{origin}: out: trials lie in the folder of the search (given {space.fixed['out']!r})")


def settings_of(space: Space, values: Mapping[str, Any]) -> Settings:
    """The settings of a trial, with absolute paths. Raises MetaftError for values that do not go together."""
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}  # as a journal has them
    return names.in_full(CONFIGS[space.command](**{**space.fixed, **lists}))


def in_full(space: Space) -> Space:
    """With absolute paths, so that a search may go on from another folder."""
    from metaft.finetune import extras

    def full(name: str, value: Any) -> Any:
        if name == "init":
            return names.named_in_full(value)
        return tuple(map(extras.in_full, value)) if name == "extra" else value

    config = flat(names.in_full(CONFIGS[space.command](**space.fixed)))
    fixed = {name: full(name, config[name]) for name in space.fixed}
    if fixed.get("plugin"):
        fixed["plugin"] = load(fixed["plugin"], config.get("algorithm", "maml"))
    searched = [
        dataclasses.replace(d, values=tuple(full(d.name, value) for value in d.values)) if isinstance(d, Choices) else d
        for d in space.searched
    ]
    return Space(space.command, fixed, tuple(searched))
