"""The settings of each command: one frozen dataclass each, which is its `--help`, its TOML file and its record.

A field left at None takes the value that `metaft.defaults` chooses for data set, model and algorithm; the run folder's
`config.toml` holds what was chosen. Importing this module does not import torch, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from metaft.errors import MetaftError, suggest
from metaft.names import is_text
from metaft.paths import local

Config = TypeVar("Config", "MetaTrainConfig", "Settled", "EvaluateConfig", "AdaptConfig")

Init = Literal["keep", "seed"]
"""Of a module from Python: the values that it was handed over with, or others drawn from the seed."""


@dataclasses.dataclass(frozen=True)
class MetaTrainConfig:
    """Learn an initialisation from few-shot episodes, then meta-test it.

    "photos" below is for `--model conv4-pool` and for images above 32 pixels, see `metaft.defaults.photos`.
    """

    dataset: str = "glyphs"
    """glyphs (built in), omniglot, sinusoid, folder:PATH (class folders), or l2l:NAME (learn2learn's, e.g. cifarfs)."""
    data_root: str | None = None
    """Folder that holds the data sets, and folders that moved (auto: the environment variable METAFT_DATA)."""
    download: bool = False
    """Fetch the data set first, where that is possible (omniglot, l2l:NAME)."""
    split: str | None = None
    """How classes are split. omniglot: finn (default), vinyals, alphabets."""
    image_size: int | None = None
    """folder, l2l: pixels per side (auto: 28 for grey images, 84 for colour; l2l: their own where all are squares)."""
    channels: int | None = None
    """folder, l2l: 1 or 3 (auto: 1 where a sample of the images is grey)."""
    rotate: bool | None = None
    """--rotate / --no-rotate: one random quarter turn per class and task (auto: on for omniglot's finn split)."""
    skip_bad: bool = False
    """Leave out picture files that cannot be read, and say which, instead of stopping at them."""

    ways: int | None = None
    """Classes per task, N (auto: 5; sinusoid: 1)."""
    shots: int | None = None
    """Support images per class, K (auto: 1; sinusoid: 10 points)."""
    query_shots: int | None = None
    """Query images per class in training (auto: 5; photos: 15; sinusoid: 10)."""
    meta_batch: int | None = None
    """Tasks per meta-step, B (auto: 16; photos: 4, from 5 shots on 2; sinusoid: 25)."""

    algorithm: str = "maml"
    """Member of the family, e.g. fomaml, anil, reptile, proto-maml, protonet, baseline (all: docs/algorithms.md)."""
    plugin: str | None = None
    """PATH.py or a module that registers algorithms of your own; the run keeps it: opening the run runs it again."""
    model: str | None = None
    """conv4 (stride 2, mean), conv4-pool (max-pool) or mlp (auto: by the input's shape; above 32 pixels conv4-pool)."""
    width: int | None = None
    """Filters per convolution, or units per hidden layer (auto: 64 for conv4, 32 for conv4-pool, 40 for mlp)."""
    dropout: float = 0.0
    """Share of the features before the head that is dropped in inner steps, in training and at test."""
    batch_norm: Literal["transductive", "inductive"] = "transductive"
    """How training queries are normalised: with their own statistics, or with the support set's."""
    inner_steps: int | None = None
    """Inner gradient steps in training (auto: 1, photos: 5, or what the member says; protonet: none)."""
    inner_lr: float | None = None
    """Inner rate; where it is learned, the first one (auto: 0.4; photos, sinusoid: 0.01; or what the member says)."""
    inner_optimizer: str | None = None
    """sgd, momentum, nesterov or adam, or with numbers: momentum:momentum=0.5, adam:beta1=0,eps=1e-6 (auto: sgd)."""
    inner_augment: str | None = None
    """What is done to support images before each inner step: none, or shift by up to 2 pixels (auto: none)."""
    adapt_norm: bool | None = None
    """--adapt-norm / --no-adapt-norm: whether the inner loop moves scales and shifts too (auto: on; maml++: off)."""
    hyper: tuple[str, ...] = ()
    """NAME=VALUE ...: settings that only this algorithm has, e.g. first_order=true (see docs/algorithms.md)."""

    iterations: int | None = None
    """Meta-steps (auto: 1500; sinusoid: 15000)."""
    outer_optimizer: Literal["adam", "sgd"] | None = None
    """Outer optimiser (auto: adam)."""
    outer_lr: float | None = None
    """Outer rate, at the start of its schedule (auto: 0.003, photos and sinusoid: 0.001, or what the member says)."""
    outer_schedule: Literal["constant", "linear", "cosine"] | None = None
    """How the outer learning rate goes: constant, or down to 0 at the last iteration (auto: cosine)."""
    clip_value: float | None = None
    """Clip each entry of the meta-gradient to +- this (auto: photos without --clip-norm: 10, else not at all)."""
    clip_norm: float | None = None
    """Scale the meta-gradient down to at most this norm."""

    eval_every: int | None = None
    """Meta-steps between validations (auto: 250; sinusoid: 1000)."""
    eval_episodes: int = 200
    """Validation episodes; the best checkpoint is chosen on them."""
    eval_seed: int = 1234
    """Seed of validation and test episodes; independent of --seed."""
    test_ways: int | None = None
    """Classes per task in validation and test (auto: --ways)."""
    test_shots: int | None = None
    """Support images per class in validation and test (auto: --shots)."""
    test_query_shots: int | None = None
    """Query images per class in validation and test (auto: 15; sinusoid: 100)."""
    test_inner_steps: int | None = None
    """Inner steps in validation and test (auto: 3; photos, sinusoid: 10; --inner-steps if more; or the member's)."""
    test_episodes: int = 1000
    """Test episodes."""

    seed: int = 0
    """Seed of the initialisation and of the training episodes."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:N."""
    engine: Literal["auto", "tune", "processes", "threads", "vmap", "graph", "compiled"] = "auto"
    """How tasks are mapped (auto: processes for convolutions on a CPU, graph on a GPU, else vmap; tune: fastest)."""
    threads: int | None = None
    """Processes or threads, for engines of that name (auto: one per core); within an operation for others (auto: 1)."""
    task_chunk: int | None = None
    """Tasks at once, at most (auto: by their size, for processes and threads; else all, or as many as fit)."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """What models compute in; parameters and gradients are fp32 in all. tf32 is for GPUs; bf16 is slow on most CPUs."""
    inner_checkpoint: bool = False
    """Recompute inner steps in the backward pass: many steps then take little memory, and more time."""
    log_every: int = 10
    """Meta-steps per row of metrics.jsonl."""
    checkpoint_every: int = 100
    """Meta-steps between checkpoints; a killed run loses at most these."""
    out: str | None = None
    """Run folder (auto: runs/DATASET-ALGORITHM-NwKs-SEED, numbered if taken)."""

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class Settled(MetaTrainConfig):
    """A config in which nothing is open that training depends on; `metaft.defaults.resolve` makes it."""

    rotate: bool = False
    ways: int = 5
    shots: int = 1
    query_shots: int = 5
    meta_batch: int = 16
    outer_optimizer: Literal["adam", "sgd"] = "adam"
    outer_lr: float = 3e-3
    outer_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    model: str = "conv4"
    width: int = 64
    iterations: int = 1500
    eval_every: int = 250
    test_ways: int = 5
    test_shots: int = 1
    test_query_shots: int = 15
    test_inner_steps: int = 3


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Meta-test a finished run, at its own or at other ways and shots. A field left out is as in the run."""

    ways: int | None = None
    """Classes per task."""
    shots: int | None = None
    """Support images per class."""
    query_shots: int | None = None
    """Query images per class."""
    episodes: int | None = None
    """Episodes."""
    inner_steps: int | None = None
    """Inner gradient steps."""
    eval_seed: int | None = None
    """Seed of the episodes."""
    set: Literal["test", "val", "train"] = "test"
    """Which classes to draw from."""
    checkpoint: Literal["best", "last"] = "best"
    """The checkpoint that was best on validation, or the last one."""
    plugin: str | None = None
    """PATH.py or a module that registers the run's algorithm, where it is no longer the one that the run names."""
    dataset: str | None = None
    """Another data set, with inputs of the same shape."""
    data_root: str | None = None
    """Folder that holds the data sets, and the run's own folder of images where it moved."""
    download: bool = False
    """Fetch the data set first, where that is possible."""
    split: str | None = None
    """How classes are split."""
    rotate: bool | None = None
    """--rotate / --no-rotate: one random quarter turn per class and task."""
    skip_bad: bool = False
    """Leave out picture files that cannot be read, as the run does where it was trained so."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N."""
    engine: Literal["auto", "processes", "threads", "vmap", "graph"] = "auto"
    """How tasks are mapped."""
    threads: int | None = None
    """Tasks in parallel, for processes and threads."""
    task_chunk: int | None = None
    """Tasks at once for the vmap engine."""
    out: str | None = None
    """Where to write the result (auto: RUN/evaluations/NAME.json)."""

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class AdaptConfig:
    """Fine-tune a meta-learned initialisation to a target task, and compare it with a random one."""

    init: str | None = None
    """Run folder of metaft.meta_train, or none for a random start alone (auto: the newest in runs/ that fits)."""
    data: str = "glyphs:Hebrew"
    """folder:PATH (class folders, with or without train/ val/ test/), or glyphs:SCRIPT (a held-out script)."""
    data_root: str | None = None
    """Folder to look for --data in where it is not at its path (auto: the environment variable METAFT_DATA)."""
    skip_bad: bool = False
    """Leave out picture files that cannot be read, and say which, instead of stopping at them."""
    shots_per_class: int | None = None
    """Images per class to train and validate on (auto: 5 of glyphs; all of train/; without parts four in five)."""
    method: Literal["finetune", "inner"] = "finetune"
    """finetune: Adam and a fresh head. inner: the run's own inner loop, as in meta-training."""
    epochs: int | None = None
    """finetune: passes over the training images (auto: 40); fewer if the validation loss stops falling."""
    patience: int | None = None
    """finetune: epochs without a better validation loss before it stops (auto: 10)."""
    lr: float | None = None
    """finetune: learning rate of Adam (auto: 0.003)."""
    batch_size: int | None = None
    """finetune: images per step (auto: 32)."""
    head: Literal["linear", "cosine", "prototype"] | None = None
    """finetune: the classifier on the features (auto: linear)."""
    freeze: Literal["none", "backbone"] | None = None
    """finetune: what is not trained (auto: none)."""
    augment: Literal["none", "basic"] | None = None
    """finetune: small random turns and shifts of the training images (auto: none)."""
    inner_steps: int | None = None
    """inner: steps (auto: the run's --test-inner-steps; 30 where all classes start from its mean head row)."""
    plugin: str | None = None
    """inner: PATH.py or a module that registers the run's algorithm (auto: the run's own)."""

    seed: int = 0
    """Seed of the drawn images, the head, the order of images, and the random start."""
    seeds: int = 1
    """Repeat with this many seeds, from --seed on, for the mean gain and its 95 % interval."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:N."""
    out: str | None = None
    """Run folder (auto: runs/adapt-DATA-INIT-SEED, numbered if taken)."""

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Label images with the classifier that an adapt run left."""

    top: int = 1
    """How many of the most probable classes to name for each image."""
    csv: str | None = None
    """Write the labels to this file too, as comma-separated values."""
    skip_bad: bool = False
    """Take it for success too where more than half of the files cannot be read."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:N."""

    def __post_init__(self) -> None:
        check(self)


# The smallest value each number may have; None of them may be infinite or NaN.
_AT_LEAST: dict[str, float] = {
    "ways": 1,
    "shots": 1,
    "query_shots": 1,
    "meta_batch": 1,
    "width": 1,
    "inner_steps": 0,
    "inner_lr": 0,
    "dropout": 0,
    "iterations": 1,
    "eval_every": 1,
    "eval_episodes": 1,
    "eval_seed": 0,
    "test_ways": 1,
    "test_shots": 1,
    "test_query_shots": 1,
    "test_inner_steps": 0,
    "test_episodes": 1,
    "episodes": 1,
    "seed": 0,
    "threads": 1,
    "task_chunk": 1,
    "log_every": 1,
    "checkpoint_every": 1,
    "image_size": 1,
    "shots_per_class": 1,
    "epochs": 1,
    "patience": 1,
    "batch_size": 2,  # a batch of one has no statistics of its own
    "seeds": 1,
    "top": 1,
}
_ABOVE_ZERO = {"outer_lr", "clip_value", "clip_norm", "lr"}


_KEPT = (MetaTrainConfig, AdaptConfig)
"""What a run folder keeps as TOML, which is text."""


def check(config: MetaTrainConfig | EvaluateConfig | AdaptConfig | PredictConfig) -> None:
    """Raises MetaftError for the first field with a wrong type or value, naming both."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        _check_type(field.name, value, hints[field.name])
        if isinstance(value, str) and field.name != "out" and isinstance(config, _KEPT) and not is_text(value):
            raise MetaftError(f"{field.name}: {value!r} is not text; rename the file or folder")
        if isinstance(value, float) and not math.isfinite(value):
            raise MetaftError(f"{field.name} must be finite, got {value}")
        if value is None or isinstance(value, (bool, str)):
            continue
        if isinstance(value, tuple):
            for item in value:
                _check_type(field.name, item, str)
            continue
        if field.name in _AT_LEAST and value < _AT_LEAST[field.name]:
            raise MetaftError(f"{field.name} must be at least {_AT_LEAST[field.name]}, got {value}")
        if field.name in _ABOVE_ZERO and value <= 0:
            raise MetaftError(f"{field.name} must be above 0, got {value}")
        if field.name in _ABOVE_ZERO and value > 1e30:
            raise MetaftError(f"{field.name} must be at most 1e30, which float32 can still work with, got {value}")
        if type(value) is int and value >= 2**63:
            raise MetaftError(f"{field.name} must be below 2**63, got {value}")
    if getattr(config, "dropout", 0.0) >= 1:
        raise MetaftError(f"dropout must be below 1, got {getattr(config, 'dropout')}")  # noqa: B009
    if config.device != "auto" and not re.fullmatch(r"cpu|cuda(:\d+)?", config.device):
        raise MetaftError(f"device must be auto, cpu, cuda or cuda:N, got {config.device!r}")
    if getattr(config, "channels", None) not in (None, 1, 3):
        raise MetaftError(f"channels must be 1 or 3, got {getattr(config, 'channels')}")  # noqa: B009


def _check_type(name: str, value: Any, hint: Any) -> None:
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal:
            choices = typing.get_args(option)
            if value not in choices and not (value is None and type(None) in options):
                near = suggest(str(value), choices)
                raise MetaftError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}{near}")
            return
        if type(value) is (typing.get_origin(option) or option) or (option is float and type(value) is int):
            return
    wanted = " or ".join("nothing" if o is type(None) else o.__name__ for o in options)
    raise MetaftError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__})")


def from_mapping(cls: type[Config], values: Mapping[str, Any], *, origin: str) -> Config:
    """A config from plain data. Raises MetaftError that names `origin` and the unknown or wrong field."""
    known = {f.name: f.default for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise MetaftError(f"{origin}: unknown field {key!r}{suggest(key, known)}")
    lists = [key for key, value in values.items() if isinstance(value, list) and isinstance(known[key], tuple)]
    try:
        return cls(**{**values, **{key: tuple(values[key]) for key in lists}})
    except MetaftError as error:
        raise MetaftError(f"{origin}: {error}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """A flat TOML file as plain data; hyphens in keys count as underscores.

    Raises MetaftError for a missing or malformed file.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values = tomllib.loads(local(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MetaftError(f"config: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # what tomllib raises, and Python at numbers and depths beyond it
        raise MetaftError(f"config: {path} is not valid TOML: {error}") from None
    return {key.replace("-", "_"): value for key, value in values.items()}


def to_toml(config: MetaTrainConfig | EvaluateConfig | AdaptConfig) -> str:
    """The fields that have a value; TOML has no None, and a missing field means the default."""
    import tomli_w

    return tomli_w.dumps({k: v for k, v in dataclasses.asdict(config).items() if v not in (None, ())})
