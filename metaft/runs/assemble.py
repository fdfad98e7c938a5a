"""From settings to the objects of a run, the same way for training and for meta-test."""

# Above 300 lines: each step needs what the one before found, and all of them are this one road.
from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import warnings
from collections.abc import Collection, Mapping
from typing import Any, get_args

import torch
from torch import nn

from metaft import algorithms, models, objective, plugin, tasks
from metaft._version import __version__
from metaft.algorithms.base import Algorithm
from metaft.config import Init, MetaTrainConfig, Settled
from metaft.defaults import device_of, hyper, resolve
from metaft.engines import PARALLEL, Engine, settled_name
from metaft.engines.batching import why_not_mapped
from metaft.errors import CheckpointError, DataError, MetaftError, MetaftWarning, first_line, no_such
from metaft.metrics import label
from metaft.models import Model
from metaft.models.handed import said
from metaft.models.precision import in_bf16, lacks_bf16
from metaft.models.recomputed import recomputed
from metaft.objective import Objective
from metaft.options import flat
from metaft.outer import task_grad_of
from metaft.runs.beginning import begin_from
from metaft.runs.machine import environment
from metaft.runs.snapshot import Snapshot
from metaft.runs.training import draw
from metaft.starts.names import in_full
from metaft.support import places
from metaft.support.collector import uncollected
from metaft.support.foreign import ran_out
from metaft.tasks.pool import ClassPool
from metaft.tasks.sinusoid import Sinusoid
from metaft.testing import task_scores
from metaft.types import SPLITS, Dataset, Episode, Loss, Params, Source, Split

UNSEEN = ("out", "snapshots", "log")
"""Settings that no checkpoint holds: where the run is, which may move, and what is kept beside its checkpoints."""


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Everything that a resolved config stands for."""

    config: Settled
    dataset: Dataset
    model: Model
    algorithm: Algorithm
    device: str
    module_note: str = ""
    """What to say of the user's own module in a run's first line."""


def with_member(config: MetaTrainConfig, **inherited: Any) -> MetaTrainConfig:
    """The same with the plugin's full name, and with the member's name and its settings in their two places, also where
    `--algorithm NAME:key=value` gave both. What is `inherited` counts where the config leaves it open.

    Raises MetaftError for a plugin or member that there is not, and settings that it has not or that are given twice.
    """
    learner, hyper = config.learner, config.inner.hyper
    module = plugin.load(inherited.get("plugin") if learner.plugin is None else learner.plugin, learner.algorithm)
    name, settings = algorithms.read(learner.algorithm, () if hyper == inherited.get("hyper") else hyper)
    return dataclasses.replace(config, plugin=module, algorithm=name, hyper=settings)


# Above 60 lines: the order in which the parts depend on one another.
@uncollected()
def assemble(
    config: MetaTrainConfig,
    *,
    dataset: Dataset | None = None,
    module: nn.Module | None = None,
    init: Init = "keep",
    loss: Loss | None = None,
    snapshot: Snapshot | None = None,
    classes: Mapping[str, Collection[str]] | None = None,
) -> Parts:
    """Load plugin and data, build the model and bind the algorithm.

    `dataset` and `module` take the place of `--dataset` and `--model` for those who bring their own from Python, `loss`
    that of the data set's own; `init` says whether the module's parameters are kept or drawn anew from the seed.
    `snapshot` is a run's, whose parameters are to be filled in: what nothing learns (frozen parameters, buffers) comes
    from it too; `classes` are its classes in each split, by which a folder is known that moved. Paths in the settings
    become absolute. Raises MetaftError.
    """
    architecture = snapshot and snapshot.header["architecture"]
    if init not in get_args(Init):
        raise no_such("init", init, get_args(Init))
    device = device_of(config.compute.device)
    config = in_full(with_member(config))
    config, dataset = _with_data(config, dataset, classes or {})
    shape = list((architecture or {}).get("shape", dataset.shape))
    if shape != list(dataset.shape):
        raise MetaftError(
            f"dataset: the run's model takes inputs of shape {shape}, but {dataset.name} has {list(dataset.shape)}"
        )
    begun = begin_from(config, dataset, snapshot, module)
    if begun is not None:
        config, dataset = begun.settings(config), begun.dataset
    settled = resolve(config, dataset, custom_model=module is not None)
    is_users = module is not None or not models.is_ours(settled.learner.model)
    if begun is not None:
        model = begun.model(settled, snapshot, device)
    elif module is None:
        model = _built(settled, dataset, device)
    else:
        model = _handed(module, init, settled, snapshot, device)
    example = _example(dataset, settled)
    if is_users:
        models.check_repeats(model, dataset.shape, example)
    elif example is not None and example.dtype != (own := next(iter(model.params.values())).dtype):
        raise MetaftError(
            f"dataset: {dataset.name} gives inputs in {example.dtype}, and {settled.learner.model} computes in {own}"
        )
    model = _computing_as(model, settled, example, dataset.shape)
    minimised: Loss = dataset.loss if loss is None else loss
    if callable(minimised) or isinstance(minimised, Objective):
        _check_loss(minimised if isinstance(minimised, Objective) else Objective(minimised), model, dataset, settled)
    algorithm = algorithms.build(settled.learner.algorithm, model, hyper(settled, minimised))
    _note_unused(settled, algorithm, device)
    if not algorithm.init(settled.compute.seed)[0]:
        raise MetaftError(
            f"algorithm: {settled.learner.algorithm} has nothing to learn here, all but its head is frozen in the "
            "module"
        )
    dataset = dataset.to(device)
    if is_users:
        settled = _mappable(settled, model, algorithm, dataset)
    note = "" if module is None else said(module, "its own values" if init == "keep" else "drawn from the seed")
    note = f" from {places.shown(config.start.init)}" if config.start.init else note
    return Parts(settled, dataset, model, algorithm, device, note)


def _with_data(
    config: MetaTrainConfig, dataset: Dataset | None, classes: Mapping[str, Collection[str]]
) -> tuple[MetaTrainConfig, Dataset]:
    """The settings with the data set as it is to be named, and the data."""
    if dataset is not None:
        return dataclasses.replace(config, dataset=places.named_in_full(dataset.name)), dataset
    dataset = tasks.load(
        config.data.dataset,
        data_root=config.data.data_root,
        split=config.data.split,
        download=config.data.download,
        image_size=config.data.image_size,
        channels=config.data.channels,
        classes=[name for names in classes.values() for name in names],
        skip_bad=config.data.skip_bad,
    )
    if places.path_of(config.data.dataset)[1] is not None:
        config = dataclasses.replace(config, dataset=dataset.name)  # where it is now
    return config, dataset


def _built(config: Settled, dataset: Dataset, device: str) -> Model:
    if config.learner.model == "custom":
        raise MetaftError(
            "model: this run was trained with a module from Python (custom); hand it over there (module=...)"
        )
    return models.build(
        config.learner.model, ways=config.task.ways, shape=dataset.shape, width=config.learner.width,
        dropout=config.learner.dropout, seed=config.compute.seed, device=device,
    )  # fmt: skip


def _check_loss(loss: Objective, model: Model, dataset: Dataset, config: Settled) -> None:
    """Raises MetaftError where a loss from Python cannot be one of this model's outputs."""
    source, split = _some_source(dataset, config)
    target = source.episodes(config.compute.seed, split, range(1)).query_y[0]
    like = next(iter(model.params.values()))
    objective.check(loss, model.outputs, target, like)


def _handed(module: nn.Module, init: Init, config: Settled, snapshot: Snapshot | None, device: str) -> Model:
    """The user's module with what a run began with: its own parameters, or others drawn from the seed."""
    module = models.taken(module).cpu()
    if snapshot is not None:
        module = models.with_constants(module, snapshot.frozen, snapshot.buffers)
    elif init == "seed":
        module = models.initialise(module, config.compute.seed)
    model = models.functional(module.to(device))
    if model.outputs != config.task.ways:
        raise MetaftError(
            f"ways: the module's head has {model.outputs} outputs, but tasks have {config.task.ways} classes"
        )
    return model


def _some_source(dataset: Dataset, config: Settled) -> tuple[Source, Split]:
    """Tasks of the run's size from the first split that has any. Raises DataError where none has."""
    for split in SPLITS:
        with contextlib.suppress(DataError) if split != SPLITS[-1] else contextlib.nullcontext():
            source = dataset.source(
                ways=config.task.ways, shots=config.task.shots, query_shots=config.task.query_shots,
                rotate=config.data.rotate, splits=(split,),
            )  # fmt: skip
            return source, split
    raise AssertionError


def _example(dataset: Dataset, config: Settled) -> torch.Tensor | None:
    """Two inputs [2, ...] of the data, of the type that it has; None where they are pixels or numbers of metaft's own.

    Raises DataError where the data cannot give any.
    """
    if isinstance(dataset, (ClassPool, Sinusoid)):
        return None
    source, split = _some_source(dataset, config)
    task = source.episodes(config.compute.seed, split, range(1))
    x = torch.cat([task.support_x[0], task.query_x[0]])
    return torch.cat([x, x])[:2]


def _mappable(config: Settled, model: Model, algorithm: Algorithm, dataset: Dataset) -> Settled:
    """The settings with which tasks can be mapped: where vmap cannot take the user's module, one task at a time.

    Raises MetaftError where not even one task can be taken.
    """
    source, split = _some_source(dataset, config)
    meta, state = algorithm.init(config.compute.seed)
    knobs = {name: value.to(next(iter(meta.values())).device) for name, value in algorithm.schedule(0).items()}
    scores = functools.partial(_scores, algorithm, source.ways, min(1, config.test.test_inner_steps))
    trials: list[tuple[Any, Any, Any]] = [
        (scores, (meta, state), source.episodes(config.compute.seed, split, range(2)))
    ]
    if split == "train":
        trials.append(
            (task_grad_of(algorithm), (meta, state, knobs), draw(algorithm, source, config.compute.seed, range(2)))
        )
    what = f"module: {model.architecture.get('class', config.learner.model)} and {algorithm.name}"
    reasons = [why_not_mapped(*trial, what) for trial in trials]
    engine = config.compute.engine
    if engine not in PARALLEL:  # threads alone can be on a GPU too
        on_gpu = next(iter(meta.values())).device.type != "cpu"
        engine = "threads" if on_gpu else settled_name("auto", convolutional=True, device="cpu")
    if not any(reasons) or (config.compute.task_chunk == 1 and engine == config.compute.engine):
        return config
    obstacle = next(filter(None, reasons))
    print(f"engine: {engine}, one task at a time: vmap cannot take this module ({obstacle})", file=sys.stderr)
    return dataclasses.replace(config, engine=engine, task_chunk=1)


def _note_unused(config: Settled, algorithm: Algorithm, device: str) -> None:
    """Warns of settings of how to compute that change nothing here."""
    if config.compute.precision == "tf32" and device == "cpu":
        warnings.warn("precision: tf32 is for GPUs; on this CPU it is fp32", MetaftWarning, stacklevel=2)
    if config.compute.inner_checkpoint and not algorithm.curvature:
        name = algorithm.name
        warnings.warn(
            f"inner_checkpoint: {name} differentiates no inner step, so that this changes nothing",
            MetaftWarning,
            stacklevel=2,
        )


def _scores(algorithm: Algorithm, ways: int, steps: int, shared: tuple[Params, Params], task: Episode) -> torch.Tensor:
    return task_scores(algorithm, *shared, task, ways=ways, steps=steps)


def _computing_as(model: Model, config: Settled, example: torch.Tensor | None, shape: tuple[int, ...]) -> Model:
    """The model under `--precision` and `--inner-checkpoint`. Raises MetaftError where it cannot be."""
    if config.compute.precision == "bf16":
        model = in_bf16(model)
        probe = next(iter(model.params.values()))
        x = torch.zeros(2, *shape, dtype=probe.dtype) if example is None else example
        try:
            model.apply(model.params, x.to(probe.device), None)
        except RuntimeError as error:  # a module of the user's own, say with constants in float32
            if ran_out(error):
                raise
            raise MetaftError(f"precision: this model cannot compute in bf16 ({first_line(error)})") from None
        if probe.device.type == "cpu" and lacks_bf16():
            said = "precision: this processor has no bf16 units (AMX or AVX512-BF16), so that bf16 is slower than fp32"
            warnings.warn(said, MetaftWarning, stacklevel=2)
    return recomputed(model) if config.compute.inner_checkpoint else model


def header(parts: Parts, engine: Engine, ranks: int = 1) -> dict[str, Any]:
    """The plain data that every checkpoint of a run on so many processes carries."""
    return {
        "version": __version__,
        "config": {k: v for k, v in flat(parts.config).items() if v is not None and k not in UNSEEN},
        "architecture": dict(parts.model.architecture),
        "dataset": parts.dataset.name,
        "shape": list(parts.dataset.shape),
        "split_hash": parts.dataset.split_hash,
        **parts.dataset.describe(),
        **({} if isinstance(parts.algorithm.loss, str) else {"loss": label(parts.algorithm.loss)}),
        "environment": {**environment(engine, parts.device), "ranks": str(ranks)},
    }


def fill(parts: Parts, snapshot: Snapshot) -> Snapshot:
    """A snapshot on the run's device, checked against what the algorithm expects, with what nothing learns.

    Raises CheckpointError that names the first tensor with another shape, or the set of names that differ.
    """
    given = None if isinstance(parts.algorithm.loss, str) else label(parts.algorithm.loss)
    if (theirs := snapshot.header.get("loss")) != given:
        what = f"with {theirs}, a loss from Python; hand it over there" if theirs else "without a loss from Python"
        raise MetaftError(f"loss: this run was trained {what} (loss=...{'' if given is None else f', given {given}'})")
    meta, state = parts.algorithm.init(parts.config.compute.seed)
    if snapshot.frozen.keys() != parts.model.frozen.keys():
        raise CheckpointError(
            f"checkpoint: frozen in the run are {sorted(snapshot.frozen)[:6]}, and in the module that was handed over "
            f"{sorted(parts.model.frozen)[:6]}"
        )
    for expected, stored in ((meta, snapshot.meta), (state, snapshot.state)):
        if expected.keys() != stored.keys():
            raise CheckpointError(
                f"checkpoint: its tensors are not this model's: {sorted(expected.keys() ^ stored.keys())[:6]}"
            )
        for name, tensor in expected.items():
            if tensor.shape != stored[name].shape:
                raise CheckpointError(
                    f"checkpoint: {name} has shape {list(stored[name].shape)}, the model's is {list(tensor.shape)}"
                )
    return dataclasses.replace(
        snapshot,
        meta={k: snapshot.meta[k].to(parts.device) for k in meta},
        state={k: snapshot.state[k].to(parts.device) for k in state},
        frozen=parts.model.frozen,
        buffers=parts.model.buffers,
    )
