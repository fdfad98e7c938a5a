"""Values for the settings that a user left open: a fixed rule on the data set, the model and the algorithm."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from metaft import schedules
from metaft.algorithms import OPTIONS, hyper_parameters, is_ours, parse_hyper
from metaft.config import MetaTrainConfig, Settled
from metaft.errors import MetaftError, check_ways
from metaft.options import flat, options
from metaft.spec import made_for
from metaft.types import Dataset, Loss

_SUPERVISED: dict[str, object] = {"outer_lr": 1e-3, "test_inner_steps": 100}  # Chen et al. 2019

MEMBERS: dict[str, dict[str, object]] = {
    "reptile": {"outer_optimizer": "sgd", "outer_lr": 1.0, "outer_schedule": "linear", "test_inner_steps": 10},
    "cavia": {"inner_lr": 1.0},
    "maml++": {"outer_schedule": "cosine"},  # a part of it, whatever the others' is
    "baseline": _SUPERVISED,
    "baseline++": _SUPERVISED,
}
"""What a member needs other than the rest, by the fields of a config; the data set does not change it."""

_MINI: dict[str, object] = {"inner_lr": 0.01, "inner_steps": 5, "test_inner_steps": 10}  # Finn et al. 2017, section 5.2

PHOTOS: dict[str, dict[str, object]] = {
    **dict.fromkeys(("maml", "fomaml", "anil", "meta-sgd", "maml++", "meta-curvature", "proto-maml"), _MINI),
    "unicorn-maml": _MINI,
    "boil": {"inner_lr": 0.5, "inner_steps": 1},  # Oh et al. 2021: a body alone has to move far
    "imaml": {"inner_lr": 0.01},
    "reptile": {"inner_steps": 8},  # Nichol et al. 2018, table 5
}
"""What a member needs for `photos` besides; a member that is not here keeps the inner loop that it says itself."""


_PUBLISHED: dict[str, object] = {"outer_lr": 1e-4}
"""For a library's architecture with its published weights, which a rate for random ones would soon undo."""


def photos(model: str, shape: tuple[int, ...]) -> bool:
    """Whether defaults are those of mini-ImageNet rather than of Omniglot: by the model or, where that is another or
    the user's own, by the size of the images."""
    return "conv4-pool" in (model, model_for(shape))


def _of_photos(shots: int) -> dict[str, object]:
    """Finn et al. 2017, section A.1; at Omniglot's inner rate of 0.4 the loss is 15 after 20 meta-steps."""
    return {
        "query_shots": 15,
        "meta_batch": 4 if shots < 5 else 2,
        "outer_lr": 1e-3,
        "clip_value": 10.0,
    }


# Above 60 lines: a table of defaults, one line each.
def resolve(config: MetaTrainConfig, dataset: Dataset, *, custom_model: bool = False) -> Settled:
    """The same config with nothing left open that training depends on (only `threads`, `task_chunk`, `out` may be).

    One that is settled already, as that of a run, is taken as it is: a gradient that was not clipped stays so.
    """
    regression = dataset.loss == "mse"
    accepted = hyper_parameters(config.learner.algorithm)
    image = len(dataset.shape) == 3
    ways = config.task.ways or (1 if regression else 5)
    shots = config.task.shots or (10 if regression else 1)
    for field, given in (("ways", config.task.ways), ("test_ways", config.test.test_ways)):
        check_ways(field, given or ways, dataset.loss)
    model = "custom" if custom_model else config.learner.model or model_for(dataset.shape)
    large = image and not regression and photos(model, dataset.shape)
    theirs = PHOTOS.get(config.learner.algorithm, {}) if large and is_ours(config.learner.algorithm) else {}
    values: dict[str, object] = {
        **accepted,
        "rotate": bool(getattr(dataset, "default_rotate", False)),  # as pools say; data of a user's own need not
        "ways": ways,
        "shots": shots,
        "query_shots": 10 if regression else 5,
        # Half the published 32 tasks and three times the rate learn more per second: 5-way 1-shot Omniglot after 12,800
        # tasks is at 95.0 % with 16 and 0.004, at 93.1 % with 32 and 0.003, at 88.5 % with 32 and 0.001.
        "meta_batch": 25 if regression else 16,
        "outer_optimizer": "adam",
        "outer_lr": 1e-3 if regression else 3e-3,
        "outer_schedule": "cosine",
        "model": model,
        "width": {"mlp": 40, "conv4-pool": 32}.get(model, 64),
        "iterations": 15000 if regression else 1500,
        "eval_every": 1000 if regression else 250,
        "test_ways": ways,
        "test_shots": shots,
        "test_query_shots": 100 if regression else 15,
        "test_inner_steps": (10 if regression else 3) if "inner_steps" in accepted else 0,
        # Finn et al. 2017, section 5.1
        **({"inner_lr": 0.01} if regression and "inner_lr" in accepted else {}),
        **(_of_photos(shots) if large else {}),
        **(_PUBLISHED if ":" in model else {}),
        **MEMBERS.get(config.learner.algorithm, {}),
        **theirs,
    }
    steps = config.inner.inner_steps if config.inner.inner_steps is not None else values.get("inner_steps", 0)
    at_test = values["test_inner_steps"]
    assert isinstance(steps, int) and isinstance(at_test, int)
    values["test_inner_steps"] = max(steps, at_test)
    if config.data.rotate and not image:
        raise MetaftError(f"rotate: {config.data.dataset} has no images to rotate")
    if config.inner.inner_augment not in (None, "none") and not image:
        raise MetaftError(f"inner_augment: {config.data.dataset} has no images to {config.inner.inner_augment}")
    if config.learner.dropout and "inner_augment" not in accepted:
        raise MetaftError(
            f"dropout: {config.learner.algorithm} takes none in its inner loop (given {config.learner.dropout})"
        )
    check_steps("test_inner_steps", config.test.test_inner_steps, config.learner.algorithm)
    if config.outer.outer_schedule is not None:
        made_for("outer_schedule", config.outer.outer_schedule, schedules.of_steps, own="schedule")
    if custom_model:
        config = dataclasses.replace(config, model="custom")
    if "classes" in accepted and "classes" not in parse_hyper(config.learner.algorithm, config.inner.hyper):
        if not train_classes(dataset):
            raise MetaftError(f"algorithm: {config.learner.algorithm} trains on labels, and {dataset.name} has none")
        config = dataclasses.replace(config, hyper=(*config.inner.hyper, f"classes={train_classes(dataset)}"))
    if config.outer.clip_norm is not None or settled(config):
        values.pop("clip_value", None)
    left = flat(config)
    return Settled(**{**left, **{k: v for k, v in values.items() if k in left and left[k] is None}})


def settled(config: MetaTrainConfig) -> bool:
    """Whether all is set that `Settled` has, as in a run's `config.toml`."""
    needed = options(Settled)
    return all(value is not None or needed[name].open for name, value in flat(config).items())


def hyper(config: MetaTrainConfig, loss: Loss) -> dict[str, object]:
    """What to hand the algorithm: the settings it knows, and those it does not but the user gave (an error there)."""
    values = flat(config)
    given = {name: values[name] for name in OPTIONS if values[name] is not None}
    if "iterations" not in hyper_parameters(config.learner.algorithm):  # every run has them, few members care
        given.pop("iterations", None)
    special = parse_hyper(config.learner.algorithm, config.inner.hyper)
    return {"loss": loss, "norm": config.learner.batch_norm, **given, **special}


def train_classes(dataset: Dataset) -> int:
    """How many classes a data set has to train on, 0 where it has none."""
    classes: Any = dataset.describe().get("classes", {})
    return len(classes.get("train", ()))


def check_steps(field: str, steps: int | None, algorithm: str) -> None:
    """Raises MetaftError for inner steps asked of a member that has none."""
    if steps and not {"inner_lr", "inner_steps"} & hyper_parameters(algorithm).keys():  # baselines have the rate alone
        raise MetaftError(f"{field}: {algorithm} has no inner steps (given {steps})")


def device_of(name: str) -> str:
    """`auto` becomes a GPU where there is one. Raises MetaftError for a GPU that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        number = int(name.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            raise MetaftError(f"device: {name!r} is not there; this machine has {torch.cuda.device_count()} GPUs")
    return name


def model_for(shape: tuple[int, ...]) -> str:
    if len(shape) != 3:
        return "mlp"
    return "conv4" if max(shape[1:]) <= 32 else "conv4-pool"
