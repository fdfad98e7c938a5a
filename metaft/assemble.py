"""From settings to the objects of a run, the same way for training and for meta-test."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import platform
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from metaft import algorithms, models, objective, paths, plugin, tasks
from metaft._version import __version__
from metaft.algorithms.base import Algorithm
from metaft.checkpoint import digest
from metaft.cli import of_run
from metaft.config import Init, MetaTrainConfig, Settled
from metaft.defaults import device_of, hyper, resolve
from metaft.engines import PARALLEL, Engine, engine, settled_name, task_chunk
from metaft.engines.batching import why_not_mapped
from metaft.errors import CheckpointError, DataError, MetaftError, suggest
from metaft.metrics import label
from metaft.models import Model, convolution
from metaft.models.convolution import Form
from metaft.models.handed import said
from metaft.models.precision import in_bf16, matrix_units
from metaft.models.recomputed import recomputed
from metaft.objective import Objective
from metaft.outer import task_grad_of
from metaft.ranks import Ranks
from metaft.run import RunFolder
from metaft.snapshot import Snapshot, load_snapshot
from metaft.static import recorded
from metaft.tasks.pool import ClassPool
from metaft.tasks.sinusoid import Sinusoid
from metaft.testing import task_scores
from metaft.training import draw
from metaft.tuning import tune
from metaft.types import SPLITS, Dataset, Episode, Loss, Params, Source, Split


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """Everything that a resolved config stands for."""

    config: Settled
    dataset: Dataset
    model: Model
    algorithm: Algorithm
    device: str
    own: str = ""
    """What to say of the user's own module in a run's first line."""


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
        raise MetaftError(
            f"init: no {init!r}, known are {', '.join(get_args(Init))}{suggest(str(init), get_args(Init))}"
        )
    device = device_of(config.device)
    config = paths.in_full(dataclasses.replace(config, plugin=plugin.load(config.plugin, config.algorithm)))
    if dataset is None:
        dataset = tasks.load(
            config.dataset,
            data_root=config.data_root,
            split=config.split,
            download=config.download,
            image_size=config.image_size,
            channels=config.channels,
            classes=[name for names in (classes or {}).values() for name in names],
            skip_bad=config.skip_bad,
        )
        if paths.folder_of(config.dataset):
            config = dataclasses.replace(config, dataset=dataset.name)  # where it is now
        rotate = tasks.default_rotate(config.dataset, config.split)
    else:
        config = dataclasses.replace(config, dataset=paths.named_in_full(dataset.name))
        rotate = False
    taken = list((architecture or {}).get("shape", dataset.shape))
    if taken != list(dataset.shape):
        raise MetaftError(
            f"dataset: the run's model takes inputs of shape {taken}, but {dataset.name} has {list(dataset.shape)}"
        )
    settled = resolve(config, dataset, default_rotate=rotate, custom_model=module is not None)
    if module is not None:
        if settled.dropout:
            raise MetaftError(f"dropout: a module from Python brings its own (given {settled.dropout})")
        model = models.functional(_handed(module, init, settled.seed, snapshot).to(device))
        if model.outputs != settled.ways:
            raise MetaftError(
                f"ways: the module's head has {model.outputs} outputs, but tasks have {settled.ways} classes"
            )
    elif settled.model == "custom":
        raise MetaftError(
            "model: this run was trained with a module from Python (custom); hand it over there (module=...)"
        )
    else:
        model = models.build(
            settled.model, ways=settled.ways, shape=dataset.shape, width=settled.width, dropout=settled.dropout,
            seed=settled.seed, device=device,
        )  # fmt: skip
    example = None
    if module is not None or not models.is_ours(settled.model):
        example = _example(dataset, settled)
        models.check_repeats(model, dataset.shape, example)
    model = _computing_as(model, settled, example, dataset.shape)
    minimised: Loss = dataset.loss if loss is None else loss
    if callable(loss) or isinstance(loss, Objective):
        source, split = _some_source(dataset, settled)
        target = source.episodes(settled.seed, split, range(1)).query_y[0]
        like = next(iter(model.params.values()))
        objective.check(loss if isinstance(loss, Objective) else Objective(loss), model.outputs, target, like)
    algorithm = algorithms.build(settled.algorithm, model, hyper(settled, minimised))
    if not algorithm.init(settled.seed)[0]:
        raise MetaftError(
            f"algorithm: {settled.algorithm} has nothing to learn here, all but its head is frozen in the module"
        )
    dataset = dataset.to(device)
    if module is not None or not models.is_ours(settled.model):
        settled = _mappable(settled, model, algorithm, dataset)
    own = "" if module is None else said(module, "its own values" if init == "keep" else "drawn from the seed")
    return Parts(settled, dataset, model, algorithm, device, own)


def _handed(module: nn.Module, init: Init, seed: int, snapshot: Snapshot | None) -> nn.Module:
    """The user's module with what a run began with, on the CPU: its own parameters, or others drawn from the seed."""
    module = models.taken(module).cpu()
    if snapshot is not None:
        return models.with_constants(module, snapshot.frozen, snapshot.buffers)
    return models.initialise(module, seed) if init == "seed" else module


def _some_source(dataset: Dataset, config: Settled) -> tuple[Source, Split]:
    """Tasks of the run's size from the first split that has any. Raises DataError where none has."""
    for split in SPLITS:
        with contextlib.suppress(DataError) if split != SPLITS[-1] else contextlib.nullcontext():
            source = dataset.source(
                ways=config.ways, shots=config.shots, query_shots=config.query_shots, rotate=config.rotate,
                splits=(split,),
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
    task = source.episodes(config.seed, split, range(1))
    x = torch.cat([task.support_x[0], task.query_x[0]])
    return torch.cat([x, x])[:2]


def _mappable(config: Settled, model: Model, algorithm: Algorithm, dataset: Dataset) -> Settled:
    """The settings with which tasks can be mapped: where vmap cannot take the user's module, one task at a time.

    Raises MetaftError where not even one task can be taken.
    """
    source, split = _some_source(dataset, config)
    meta, state = algorithm.init(config.seed)
    knobs = {name: value.to(next(iter(meta.values())).device) for name, value in algorithm.schedule(0).items()}
    scores = functools.partial(_scores, algorithm, source.ways, min(1, config.test_inner_steps))
    trials: list[tuple[Any, Any, Any]] = [(scores, (meta, state), source.episodes(config.seed, split, range(2)))]
    if split == "train":
        trials.append((task_grad_of(algorithm), (meta, state, knobs), draw(algorithm, source, config.seed, range(2))))
    what = f"module: {model.architecture.get('class', config.model)} and {algorithm.name}"
    reasons = [why_not_mapped(*trial, what) for trial in trials]
    engine = config.engine
    if engine not in PARALLEL:  # threads alone can be on a GPU too
        on_gpu = next(iter(meta.values())).device.type != "cpu"
        engine = "threads" if on_gpu else settled_name("auto", convolutional=True, device="cpu")
    if not any(reasons) or (config.task_chunk == 1 and engine == config.engine):
        return config
    obstacle = next(filter(None, reasons))
    print(f"engine: {engine}, one task at a time: vmap cannot take this module ({obstacle})", file=sys.stderr)
    return dataclasses.replace(config, engine=engine, task_chunk=1)


def _scores(algorithm: Algorithm, ways: int, steps: int, shared: tuple[Params, Params], task: Episode) -> torch.Tensor:
    return task_scores(algorithm, *shared, task, ways=ways, steps=steps)


def _computing_as(model: Model, config: Settled, example: torch.Tensor | None, shape: tuple[int, ...]) -> Model:
    """The model under `--precision` and `--inner-checkpoint`. Raises MetaftError where it cannot be."""
    if config.precision == "bf16":
        model = in_bf16(model)
        probe = next(iter(model.params.values()))
        x = torch.zeros(2, *shape, dtype=probe.dtype) if example is None else example
        try:
            model.apply(model.params, x.to(probe.device), None)
        except RuntimeError as error:  # a module of the user's own, say with constants in float32
            raise MetaftError(f"precision: this model cannot compute in bf16 ({str(error).splitlines()[0]})") from None
    return recomputed(model) if config.inner_checkpoint else model


@contextlib.contextmanager
def engine_for(parts: Parts) -> Iterator[Engine]:
    """The engine that a run's settings ask for, in its precision; closed on leaving."""
    c = parts.config
    made = engine(
        c.engine,
        convolutional=parts.model.convolutional,
        device=parts.device,
        threads=c.threads,
        chunk=c.task_chunk,
    )
    with matrix_units(c.precision), made as mapped:
        yield mapped


def with_engine(parts: Parts, draw_batch: Callable[[], Any], *, ranks: int = 1, before: str | None = None) -> Parts:
    """The same with the chunk settled, and the engine where it was to be tuned, so that a resume has the same bits.

    `draw_batch` gives the part of a meta-batch that one of `ranks` processes takes, on which `--engine tune` tries what
    there is. `before` is the engine that a resumed run had: its chunk is forgotten where another kind follows. Raises
    MetaftError for a chunk beside `tune`, which chooses it.
    """
    c = parts.config
    name = settled_name(c.engine, convolutional=parts.model.convolutional, device=parts.device)
    if before is not None and (before in PARALLEL) != (name in PARALLEL):
        c = dataclasses.replace(c, task_chunk=None)
    if c.engine == "tune":
        if c.task_chunk is not None:
            raise MetaftError(f"task_chunk: --engine tune chooses it by itself (given {c.task_chunk})")
        meta, state = parts.algorithm.init(c.seed)
        times = tune(
            parts.algorithm, meta, state, draw_batch(),
            convolutional=parts.model.convolutional, device=parts.device, threads=c.threads,
        )  # fmt: skip
        tried = ", ".join(f"{_called(*key)} {1000 * seconds:.0f}" for key, seconds in times.items())
        (name, chunk), *_ = times
        print(f"engine: {_called(name, chunk)}; ms per meta-step: {tried}", file=sys.stderr)
        c = dataclasses.replace(c, engine=name, task_chunk=chunk)
    elif c.task_chunk is None and name in PARALLEL:
        threads = c.threads or torch.get_num_threads()
        values = c.ways * (c.shots + c.query_shots) * math.prod(parts.dataset.shape)
        c = dataclasses.replace(c, task_chunk=task_chunk(values, -(-c.meta_batch // ranks), threads))
    return dataclasses.replace(parts, config=c)


def convolution_forms(
    parts: Parts, mapped: Engine, start: Snapshot, draw_batch: Callable[[], Any], before: Mapping[str, Form] | None
) -> dict[str, Form]:
    """The faster form of each convolution of a meta-step, as measured, and a line on stderr; none where all stay as
    they are. `before` is what the run that goes on had chosen on the same machine: the same form gives the same bits.
    """
    if not times_convolutions(parts, mapped):
        return {}
    if before is not None:
        return dict(before)
    knobs = {name: value.to(parts.device) for name, value in parts.algorithm.schedule(0).items()}
    shared = (start.meta, start.state, knobs)
    shapes = convolution.shapes_of(lambda: mapped.sum(task_grad_of(parts.algorithm), shared, draw_batch()))
    device, c = torch.device(parts.device), parts.config
    record = functools.partial(recorded, device=device, said=False) if mapped.whole_steps else None
    measure = functools.partial(convolution.seconds, device=device, record=record)
    name = " ".join((*machine(parts.device).values(), c.precision, mapped.name))
    begin = time.perf_counter()
    chosen = convolution.choose(shapes, measure, machine=name)
    counts = ", ".join(f"{form} for {n}" for form, n in collections.Counter(chosen.values()).most_common())
    print(f"convolutions: {counts} layer shapes ({time.perf_counter() - begin:.1f} s)", file=sys.stderr)
    return chosen


def times_convolutions(parts: Parts, mapped: Engine) -> bool:
    """Whether forms are to be chosen: on a GPU; on a CPU nothing is timed and no bit changes. torch.compile makes
    its own choice."""
    on_gpu = torch.device(parts.device).type == "cuda"
    return on_gpu and parts.model.convolutional and mapped.name in ("graph", "vmap")


def check_ranks(parts: Parts, ranks: Ranks) -> None:
    """Raises MetaftError where ranks have other data than rank 0 or another kind of device, or share a GPU."""
    ranks.check_device(parts.device)
    ranks.check_same("device", lambda: torch.device(parts.device).type)
    ranks.check_same(f"dataset: the class split of {parts.dataset.name}", lambda: parts.dataset.split_hash)
    still = {**parts.model.frozen, **parts.model.buffers}
    if parts.own:
        ranks.check_same("module: the digest of its frozen parameters and buffers", lambda: digest("", still)[:16])
    if isinstance(parts.dataset, ClassPool):
        ranks.check_same(f"dataset: the digest of the images of {parts.dataset.name}", parts.dataset.digest)


def _called(name: str, chunk: int | None) -> str:
    return f"{name} with {'all tasks' if chunk is None else f'{chunk} tasks'} at once"


def open_run(path: Path, *, which: str = "best", field: str = "run") -> tuple[RunFolder, MetaTrainConfig, Snapshot]:
    """A meta-training run's settings and one of its checkpoints.

    Raises MetaftError, naming `field`, for another command's run, and CheckpointError with the checkpoint to use
    instead of one that cannot be read.
    """
    run = RunFolder.open(path)
    config = of_run(MetaTrainConfig, run.config, field)
    return run, config, read_snapshot(run, run.best if which == "best" else run.last)


def read_snapshot(run: RunFolder, wanted: Path) -> Snapshot:
    """One of a run's checkpoints. Raises CheckpointError with the checkpoint to use instead."""
    return run.load(wanted, load_snapshot, lambda snapshot: f"of step {snapshot.position.step}")


def header(parts: Parts, engine: Engine, ranks: int = 1) -> dict[str, Any]:
    """The plain data that every checkpoint of a run on so many processes carries."""
    return {
        "version": __version__,
        # Not where the folder is: it may move, and a resumed run must end with the same bytes.
        "config": {k: v for k, v in dataclasses.asdict(parts.config).items() if v is not None and k != "out"},
        "architecture": dict(parts.model.architecture),
        "dataset": parts.dataset.name,
        "split_hash": parts.dataset.split_hash,
        **parts.dataset.describe(),
        **({} if isinstance(parts.algorithm.loss, str) else {"loss": label(parts.algorithm.loss)}),
        "environment": {**environment(engine, parts.device), "ranks": str(ranks)},
    }


def environment(engine: Engine, device: str) -> dict[str, str]:
    """What the exact bits of a run depend on besides its settings."""
    return {
        "engine": engine.name,
        "chunk": str(getattr(engine, "chunk", None)),
        # Processes and threads give the same bits whatever their number.
        "threads": str(getattr(engine, "threads", None)) if engine.name not in PARALLEL else "any",
        **machine(device),
    }


def machine(device: str) -> dict[str, str]:
    """The part of `environment` that no setting decides."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "device": name, "machine": platform.machine(), "processor": processor()}


def processor() -> str:
    """The CPU's name, or what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def where_measured(device: str, threads: int) -> dict[str, Any]:
    """What a result says of the machine and the processes, threads or intra-op threads that it comes from."""
    return {**machine(device), "cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": threads}


def say_what_changed(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """A line on stderr where a resumed run cannot go on with the same bits. What an older run did not note is no
    change."""
    changed = [f"{k} {before[k]} -> {now[k]}" for k in now if k in before and before[k] != now[k]]
    if changed:
        print(
            f"note: {', '.join(changed)}: the run goes on to rounding (1e-6), not with the same bits", file=sys.stderr
        )


def fill(parts: Parts, snapshot: Snapshot) -> Snapshot:
    """A snapshot on the run's device, checked against what the algorithm expects, with what nothing learns.

    Raises CheckpointError that names the first tensor with another shape, or the set of names that differ.
    """
    own = None if isinstance(parts.algorithm.loss, str) else label(parts.algorithm.loss)
    if (theirs := snapshot.header.get("loss")) != own:
        what = f"with {theirs}, a loss from Python; hand it over there" if theirs else "without a loss from Python"
        raise MetaftError(f"loss: this run was trained {what} (loss=...{'' if own is None else f', given {own}'})")
    meta, state = parts.algorithm.init(parts.config.seed)
    if snapshot.frozen.keys() != parts.model.frozen.keys():
        raise CheckpointError(
            f"checkpoint: frozen in the run are {sorted(snapshot.frozen)[:6]}, and in the module that was handed over "
            f"{sorted(parts.model.frozen)[:6]}"
        )
    for expected, found in ((meta, snapshot.meta), (state, snapshot.state)):
        if expected.keys() != found.keys():
            raise CheckpointError(
                f"checkpoint: its tensors are not this model's: {sorted(expected.keys() ^ found.keys())[:6]}"
            )
        for name, tensor in expected.items():
            if tensor.shape != found[name].shape:
                raise CheckpointError(
                    f"checkpoint: {name} has shape {list(found[name].shape)}, the model's is {list(tensor.shape)}"
                )
    return dataclasses.replace(
        snapshot,
        meta={k: snapshot.meta[k].to(parts.device) for k in meta},
        state={k: snapshot.state[k].to(parts.device) for k in state},
        frozen=parts.model.frozen,
        buffers=parts.model.buffers,
    )
