"""Mapping one task's functions over a meta-batch, and the meta-gradient. All else is written for one task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaft.algorithms.base import Algorithm, TaskGrad
from metaft.errors import MetaftError, suggest
from metaft.inner import value_and_grad
from metaft.types import Episode, Params

Tree = TypeVar("Tree")
Out = TypeVar("Out")


class Engine(Protocol):
    """One way of running the same function on every task of a batch."""

    name: str

    def map(self, fn: Callable[[Tree], Out], tasks: Tree) -> Iterator[Out]:
        """Apply `fn` to each task of a tree whose tensors lead with a task axis; results come in task order."""
        ...

    def close(self) -> None: ...


class Threads:
    """Tasks side by side in threads of one intra-op thread each.

    A task's bits do not depend on how many threads there are, since each task runs whole on one of them, alone.
    The right engine for convolutions on a CPU, where batching them over tasks makes grouped convolutions (slow).
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise MetaftError(f"threads must be at least 1, got {threads}")
        self.name = "threads"
        self.threads = threads
        # The caller too is held to one intra-op thread until close: after each of its own parallel operations the
        # OpenMP team would spin on a core that the tasks need (measured: 1.6 times slower steps on 2 cores).
        self._intra_op = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(threads, "metaft-task", initializer=torch.set_num_threads, initargs=(1,))

    def map(self, fn: Callable[[Tree], Out], tasks: Tree) -> Iterator[Out]:
        leaves, spec = pytree.tree_flatten(tasks)

        def run(i: int) -> Out:
            # Grad mode is thread-local: a worker starts with its own, whatever the caller's is.
            with torch.no_grad():
                return fn(pytree.tree_unflatten([leaf[i] for leaf in leaves], spec))

        return self._pool.map(run, range(leaves[0].shape[0]))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._intra_op)


class Vmap:
    """All tasks, or `chunk` of them, at once through torch.func.vmap: for small dense models, and for GPUs.

    On a CPU each operation gets `threads` intra-op threads until close. One is the default: small operations gain
    nothing from two, wait long for a busy core, and give bits that depend on the count.
    """

    def __init__(self, chunk: int | None = None, threads: int = 1) -> None:
        if chunk is not None and chunk < 1:
            raise MetaftError(f"task_chunk must be at least 1, got {chunk}")
        self.name = "vmap"
        self.chunk = chunk
        self.threads = threads
        self._intra_op = torch.get_num_threads()
        torch.set_num_threads(threads)

    def map(self, fn: Callable[[Tree], Out], tasks: Tree) -> Iterator[Out]:
        leaves, spec = pytree.tree_flatten(tasks)
        total = leaves[0].shape[0]
        size = self.chunk or total
        for first in range(0, total, size):
            part = pytree.tree_unflatten([leaf[first : first + size] for leaf in leaves], spec)
            with torch.no_grad():
                out = torch.func.vmap(fn, randomness="error")(part)  # type: ignore[reportArgumentType]
            out_leaves, out_spec = pytree.tree_flatten(out)
            for i in range(min(size, total - first)):
                yield pytree.tree_unflatten([leaf[i] for leaf in out_leaves], out_spec)

    def close(self) -> None:
        torch.set_num_threads(self._intra_op)


ENGINES = ("threads", "vmap")


@contextlib.contextmanager
def engine(
    name: str = "auto",
    *,
    convolutional: bool = True,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    chunk: int | None = None,
) -> Iterator[Engine]:
    """An engine by name, closed on leaving. `auto`: threads for convolutions on a CPU, vmap for all else.

    `threads=None` uses as many as torch would for the threads engine, and one for vmap. Raises MetaftError for an
    unknown name.
    """
    if name == "auto":
        name = "threads" if convolutional and torch.device(device).type == "cpu" else "vmap"
    if name not in ENGINES:
        raise MetaftError(f"engine: no {name!r}, known are {['auto', *ENGINES]}{suggest(name, ENGINES)}")
    made = (
        Threads(torch.get_num_threads() if threads is None else threads)
        if name == "threads"
        else Vmap(chunk, threads or 1)
    )
    try:
        yield made
    finally:
        made.close()


def task_grad(algorithm: Algorithm, meta: Params, state: Params, knobs: Params, task: Any) -> TaskGrad:
    """One task's meta-gradient: the member's own, or the gradient of its task loss in `meta`."""
    if algorithm.task_grad is not None:
        return algorithm.task_grad(meta, state, knobs, task)
    task_loss = algorithm.task_loss
    assert task_loss is not None  # Algorithm checks that it has one of the two

    def of_meta(meta: Params) -> tuple[Tensor, tuple[Params, dict[str, Tensor]]]:
        return task_loss(meta, state, knobs, task)

    _, (state_delta, metrics), grads = value_and_grad(of_meta, meta, create_graph=False)
    return TaskGrad(grads, state_delta, metrics)


class MetaGradient(NamedTuple):
    """Mean over the meta-batch."""

    grads: Params
    state: Params
    """`state` plus the mean of the tasks' deltas."""
    metrics: dict[str, float]


def meta_gradient(
    engine: Engine, algorithm: Algorithm, meta: Params, state: Params, tasks: Episode | Any, *, step: int = 0
) -> MetaGradient:
    """Mean of the tasks' gradients in `meta`, summed in task order so that the bits do not depend on timing.

    `step` sets the algorithm's knobs. Neither `meta` nor `state` is changed.
    """
    knobs = algorithm.schedule(step)
    # Mapping per-task gradients, not differentiating a mapped loss: the latter is silently wrong at second order for
    # batch normalisation under vmap.
    results = engine.map(lambda task: task_grad(algorithm, meta, state, knobs, task), tasks)
    total: list[Tensor] | None = None
    spec: pytree.TreeSpec | None = None
    count = 0
    for result in results:
        leaves, spec = pytree.tree_flatten(result)
        if total is None:
            total = [leaf.clone() for leaf in leaves]
        else:
            for sum_, leaf in zip(total, leaves, strict=True):
                sum_ += leaf
        count += 1
    if total is None or spec is None:
        raise MetaftError("meta_batch must be at least 1, got an empty batch of tasks")
    mean: TaskGrad = pytree.tree_unflatten([leaf / count for leaf in total], spec)
    return MetaGradient(
        grads=mean.grads,
        state={
            name: value + mean.state_delta[name] if name in mean.state_delta else value for name, value in state.items()
        },
        metrics={name: float(value) for name, value in mean.metrics.items()},
    )
