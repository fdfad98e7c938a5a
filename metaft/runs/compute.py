"""How a run computes: its engine and chunk, and the forms of its convolutions, chosen once and then kept."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from metaft.config import Settled
from metaft.dist.ranks import Ranks
from metaft.engines import PARALLEL, Engine, engine, settled_name, task_chunk
from metaft.errors import MetaftError
from metaft.models import convolution
from metaft.models.convolution import Form
from metaft.models.precision import matrix_units
from metaft.outer import task_grad_of
from metaft.outer.static import recorded
from metaft.outer.tuning import tune
from metaft.runs.assemble import Parts
from metaft.runs.checkpoint import digest
from metaft.runs.machine import machine
from metaft.runs.snapshot import Snapshot
from metaft.runs.training import draw
from metaft.tasks.pool import ClassPool
from metaft.types import Source


@contextlib.contextmanager
def engine_for(parts: Parts) -> Iterator[Engine]:
    """The engine that a run's settings ask for, in its precision; closed on leaving."""
    c = parts.config
    convolutional = parts.model.convolutional
    mapping = engine(
        c.compute.engine,
        convolutional=convolutional,
        device=parts.device,
        threads=c.compute.threads,
        chunk=c.compute.task_chunk,
    )
    with matrix_units(c.compute.precision), mapping as mapped:
        yield mapped


def with_engine(parts: Parts, train: Source, ranks: Ranks, *, before: str | None = None) -> Parts:
    """The same with the chunk settled, and the engine where it was to be tuned, as rank 0 finds them, so that a resume
    has the same bits.

    `train` draws the episodes on which `--engine tune` tries what there is. `before` is the engine that a resumed run
    had: its chunk is forgotten where another kind follows. Raises MetaftError for a chunk beside `tune`, which chooses
    it, for too few tasks, and where the ranks' data or devices are not of a kind.
    """
    c = parts.config
    check_ranks(parts, ranks)
    if c.task.meta_batch < ranks.count:
        raise MetaftError(
            f"meta_batch must be at least the number of processes, got {c.task.meta_batch} for {ranks.count}"
        )
    share = ranks.share(range(c.task.meta_batch))
    config = _engine_settled(parts, lambda: draw(parts.algorithm, train, c.compute.seed, share), ranks.count, before)
    return dataclasses.replace(parts, config=ranks.on_first(lambda: config))


def check_ranks(parts: Parts, ranks: Ranks) -> None:
    """Raises MetaftError where ranks have other data than rank 0 or another kind of device, or share a GPU."""
    ranks.check_device(parts.device)
    ranks.check_same("device", lambda: torch.device(parts.device).type)
    ranks.check_same(f"dataset: the class split of {parts.dataset.name}", lambda: parts.dataset.split_hash)
    still = {**parts.model.frozen, **parts.model.buffers}
    if parts.module_note:
        ranks.check_same("module: the digest of its frozen parameters and buffers", lambda: digest("", still)[:16])
    if isinstance(parts.dataset, ClassPool):
        ranks.check_same(f"dataset: the digest of the images of {parts.dataset.name}", parts.dataset.digest)


def _engine_settled(parts: Parts, draw_batch: Callable[[], Any], ranks: int, before: str | None) -> Settled:
    """`draw_batch` gives the part of a meta-batch that one of `ranks` processes takes."""
    c = parts.config
    name = settled_name(c.compute.engine, convolutional=parts.model.convolutional, device=parts.device)
    if before is not None and (before in PARALLEL) != (name in PARALLEL):
        c = dataclasses.replace(c, task_chunk=None)
    if c.compute.engine == "tune":
        if c.compute.task_chunk is not None:
            raise MetaftError(f"task_chunk: --engine tune chooses it by itself (given {c.compute.task_chunk})")
        meta, state = parts.algorithm.init(c.compute.seed)
        times = tune(
            parts.algorithm, meta, state, draw_batch(),
            convolutional=parts.model.convolutional, device=parts.device, threads=c.compute.threads,
        )  # fmt: skip
        tried = ", ".join(f"{_called(*key)} {1000 * seconds:.0f}" for key, seconds in times.items())
        (name, chunk), *_ = times
        print(f"engine: {_called(name, chunk)}; ms per meta-step: {tried}", file=sys.stderr)
        c = dataclasses.replace(c, engine=name, task_chunk=chunk)
    elif c.compute.task_chunk is None and name in PARALLEL:
        threads = c.compute.threads or torch.get_num_threads()
        values = c.task.ways * (c.task.shots + c.task.query_shots) * math.prod(parts.dataset.shape)
        c = dataclasses.replace(c, task_chunk=task_chunk(values, -(-c.task.meta_batch // ranks), threads))
    return c


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
    name = " ".join((*machine(parts.device).values(), c.compute.precision, mapped.name))
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


def _called(name: str, chunk: int | None) -> str:
    return f"{name} with {'all tasks' if chunk is None else f'{chunk} tasks'} at once"
