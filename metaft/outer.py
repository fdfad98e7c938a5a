"""Mapping one task's functions over a meta-batch, and the meta-gradient. All else is written for one task."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaft import workers
from metaft.algorithms.base import Algorithm, TaskGrad
from metaft.batching import CannotBatch, Out, Shared, TaskFunction, Tree, math_attention, rows, vmapped
from metaft.compilation import check_compiled, precision_of
from metaft.errors import MetaftError, MetaftWarning, no_such
from metaft.inner import value_and_grad
from metaft.models.functional import plain_operations
from metaft.modes import in_usual_modes_but_type
from metaft.ranks import ALONE, Ranks
from metaft.types import Episode, Params


class Engine(Protocol):
    """One way of running the same function on every task of a batch."""

    name: str
    threads: int
    """Tasks at the same time, or threads within an operation."""
    whole_steps: bool
    """Whether training is to take its steps as a whole (see `metaft.static`), as far as it can."""

    def map(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Iterator[Out]:
        """`fn(shared, task)` for each task of a tree whose tensors lead with a task axis; results come in task order.

        Engines may keep what they prepare for a function, so it should be the same object in each call.
        """
        ...

    def sum(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
        """The sum of `fn(shared, task)` over tasks: within each chunk, then over chunks, always in task order."""
        ...

    def close(self) -> None: ...


class _Parallel:
    """What threads and processes share: several chunks of tasks at the same time, each on one core."""

    whole_steps = False

    def __init__(self, name: str, threads: int, chunk: int | None) -> None:
        self.name = name
        self.threads = _at_least_1("threads", threads)
        self.chunk = None if chunk is None else _at_least_1("task_chunk", chunk)
        # Hold the caller to one intra-op thread: after each parallel operation of its own the OpenMP team would spin
        # on a core that the tasks need (measured: 1.6 times slower steps on 2 cores).
        self._intra_op = torch.get_num_threads()
        torch.set_num_threads(1)

    def chunk_of(self, tasks: Any) -> int:
        """How many of these tasks each of them takes at once."""
        if self.chunk is not None:
            return self.chunk
        count = _length(tasks)
        return task_chunk(sum(leaf.numel() for leaf in pytree.tree_leaves(tasks)) // count, count, self.threads)

    def close(self) -> None:
        torch.set_num_threads(self._intra_op)


class Threads(_Parallel):
    """Tasks side by side in threads of one intra-op thread each; sums take `chunk` tasks at once per thread, by vmap.

    With the same `chunk` bits do not depend on how many threads there are, since each chunk runs whole on one of them,
    alone; what `chunk=None` stands for does. Right for convolutions on a CPU, most of which are too small to be shared
    out among cores, where processes cannot be had: Python runs one thread at a time, so that threads wait for each
    other (see docs/performance.md).
    """

    def __init__(self, threads: int, chunk: int | None = None) -> None:
        super().__init__("threads", threads, chunk)
        self._pool = ThreadPoolExecutor(threads, workers.OWN_THREADS, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Iterator[Out]:
        parts = self._pool.map(lambda chunk: rows(fn, shared, chunk), _chunks(tasks, 1))
        return (row for part in parts for row in _unstacked(part))

    def sum(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
        return _added(self._pool.map(lambda chunk: _sum_of(fn, shared, chunk), _chunks(tasks, self.chunk_of(tasks))))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        super().close()


class Processes(_Parallel):
    """As `Threads`, with a process for each: the same bits, and none waits for another one's Python.

    For the CPU of systems that can fork. The workers of a function are forked at its first call, which computes one
    chunk in a process of its own, and once more for other shapes. A fork waits until the program's other threads sleep,
    for a moment at most: one that multiplies matrices all the time may leave a lock behind in the workers.
    Where what the user handed over may wait for threads that no worker would have (`workers.others`), nothing is
    forked: tasks run in threads, and a MetaftWarning says so.
    """

    _KEPT = 4
    """Functions whose workers are kept: those of training and of a validation, and some to spare."""

    def __init__(self, threads: int, chunk: int | None = None) -> None:
        if not workers.available():
            raise MetaftError("engine: this system cannot fork processes; use threads")
        super().__init__("processes", threads, chunk)
        self._workers: dict[Any, workers.Workers] = {}
        self._instead: Threads | None = None

    def map(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Iterator[Out]:
        if (unforked := self._unforked()) is not None:
            return unforked.map(fn, shared, tasks)
        results, spec = self._run(rows, fn, shared, tasks, size=1)
        return iter([pytree.tree_unflatten([each[i].clone() for each in results], spec) for i in range(_length(tasks))])

    def sum(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
        if (unforked := self._unforked()) is not None:
            return unforked.sum(fn, shared, tasks)
        results, spec = self._run(_sum_of, fn, shared, tasks, size=self.chunk_of(tasks))
        return _added(pytree.tree_unflatten([each[i] for each in results], spec) for i in range(len(results[0])))

    def _unforked(self) -> Threads | None:
        """What maps tasks where nothing is to be forked any more."""
        started = workers.others() if self._instead is None else []
        if started:
            self._instead = Threads(self.threads, self.chunk)
            names = ", ".join(repr(thread.name) for thread in started)
            text = f"engine processes: there are threads ({names}), which no fork survives; "
            warnings.warn(f"{text}tasks run in threads", MetaftWarning, stacklevel=4)
        return self._instead

    def _run(self, part: Any, fn: TaskFunction[Any, Any, Any], shared: Any, tasks: Any, size: int) -> Any:
        shared_leaves, spec = pytree.tree_flatten(shared)
        task_leaves, task_spec = pytree.tree_flatten(tasks)
        count = _length(tasks)
        shapes = [*(leaf.shape for leaf in shared_leaves), *(leaf.shape[1:] for leaf in task_leaves)]
        key = (part, fn, size, spec, task_spec, *shapes, *(leaf.dtype for leaf in (*shared_leaves, *task_leaves)))
        found = self._workers.pop(key, None)
        if found is not None and found.capacity < count:
            found.close()
            found = None
        if found is None:
            summed = part is _sum_of

            def run(shared: Any, tasks: Any) -> Any:
                result = part(fn, shared, tasks)
                return pytree.tree_map(lambda leaf: leaf.unsqueeze(0), result) if summed else result

            found = workers.Workers(self.threads, run, shared, tasks, size=size, summed=summed)
        try:
            with torch.no_grad():
                results = found.run(shared, tasks)
        except BaseException:  # some of them may still be at work, and their answers would be taken for the next call's
            found.close()
            raise
        self._workers[key] = found  # the last one used stands last
        while len(self._workers) > self._KEPT:
            self._workers.pop(next(iter(self._workers))).close()
        return results

    def close(self) -> None:
        for each in self._workers.values():
            each.close()
        self._workers.clear()
        if self._instead is not None:
            self._instead.close()
        super().close()


class Vmap:
    """All tasks, or `chunk` of them, at once through torch.func.vmap: for small dense models, and for GPUs.

    On a CPU each operation gets `threads` intra-op threads until close. One is the default: small operations gain
    nothing from two, wait long for a busy core, and give bits that depend on the count.
    """

    name = "vmap"
    whole_steps = False

    def __init__(self, chunk: int | None = None, threads: int = 1) -> None:
        self.chunk = None if chunk is None else _at_least_1("task_chunk", chunk)
        self.threads = _at_least_1("threads", threads)
        self._intra_op = torch.get_num_threads()
        torch.set_num_threads(threads)

    def map(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Iterator[Out]:
        def results(chunks: list[Tree]) -> list[Out]:
            return [row for chunk in chunks for row in _unstacked(vmapped(fn, shared, chunk))]

        return iter(self._fitting(results, tasks))

    def sum(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
        return self._fitting(lambda chunks: _added(self._sum_of(fn, shared, chunk) for chunk in chunks), tasks)

    def _sum_of(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
        return _summed(vmapped(fn, shared, tasks))

    def _fitting(self, run: Callable[[list[Tree]], Out], tasks: Tree) -> Out:
        """`run` on chunks of tasks: of `chunk` each, or, where a device's memory is too small, on smaller ones.

        What fits is remembered; one MetaftWarning says so. Raises MetaftError where not even one task does.
        """
        count = _length(tasks)
        size = first = min(self.chunk or count, count)
        while True:
            try:
                result = run(_chunks(tasks, size))
                break
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise MetaftError(
                        "engine: not even one task fits into the device's memory "
                        f"({' '.join(str(error).split('. ')[0].split())}); try --inner-checkpoint"
                    ) from None
            size = -(-size // 2)  # here, and not above, where the error still holds all that is to be freed
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if size < first:
            self.chunk = size
            text = f"{first} tasks at once do not fit into the device's memory; {size} do"
            warnings.warn(text, MetaftWarning, stacklevel=3)
        return result

    def close(self) -> None:
        torch.set_num_threads(self._intra_op)


class Graph(Vmap):
    """As `Vmap`; training records a whole meta-step once and replays it (see `metaft.static`)."""

    name = "graph"


class Compiled(Vmap):
    """As `Vmap`, with sums compiled by torch.compile: minutes once per function and shape, then fused operations.

    The function is traced by running it (`make_fx`), so that nothing of what it does in Python is left. Needs what
    torch.compile needs, on a CPU a C++ compiler. Raises MetaftError where that fails, or where the first sum is another
    one than without compiling by more than rounding.
    """

    name = "compiled"

    def __init__(self, chunk: int | None = None, threads: int = 1) -> None:
        super().__init__(chunk, threads)
        self._compiled: dict[Any, tuple[Callable[..., list[Tensor]], pytree.TreeSpec]] = {}

    def _sum_of(self, fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
        inputs, spec = pytree.tree_flatten((shared, tasks))
        key = (fn, spec, *((leaf.shape, leaf.dtype, leaf.device) for leaf in inputs))
        if key not in self._compiled:
            self._compiled[key] = self._compile(fn, inputs, spec)
        compiled, spec = self._compiled[key]
        with torch.no_grad():
            return pytree.tree_unflatten(compiled(*inputs), spec)

    @staticmethod
    def _compile(
        fn: TaskFunction[Any, Any, Any], inputs: list[Tensor], spec: pytree.TreeSpec
    ) -> tuple[Callable[..., list[Tensor]], pytree.TreeSpec]:
        from torch.fx.experimental.proxy_tensor import make_fx  # heavy, and only here

        traced: list[Any] = []

        def flat(*inputs: Tensor) -> list[Tensor]:
            shared, tasks = pytree.tree_unflatten(list(inputs), spec)
            traced[:] = [_summed(vmapped(fn, shared, tasks))]
            return pytree.tree_leaves(traced[0])

        try:
            with plain_operations(), torch.no_grad():
                graph = make_fx(flat)(*inputs)
                compiled = torch.compile(graph, dynamic=False, fullgraph=True)
                first = compiled(*inputs)
        except MetaftError:
            raise
        except Exception as error:  # whatever the compiler could not do, other engines can
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise MetaftError(f"engine: torch.compile failed ({reason}); use --engine processes or threads") from error
        # The tracing computed this sum already. A figure may turn by a rounding, such as a tie that is counted as
        # right, so gradients alone are compared; they come first among the leaves.
        (result,) = traced
        expected = pytree.tree_leaves(result.grads if isinstance(result, TaskGrad) else result)
        check_compiled(first[: len(expected)], expected, precision_of(graph, expected))
        return compiled, pytree.tree_structure(result)


def _at_least_1(field: str, value: int) -> int:
    if value < 1:
        raise MetaftError(f"{field} must be at least 1, got {value}")
    return value


def task_chunk(values: int, meta_batch: int, threads: int) -> int:
    """How many tasks of `values` numbers each (images and all) a thread or process takes at once.

    Small tasks cost more in calls than in arithmetic, and share the calls; large ones would only push each other out
    of the cache. On Conv-4 that makes 16 with 10 images of 28x28 per task, 8 with 80 of them, 1 with 80 of 84x84.
    """
    return max(1, min(16, (1 << 19) // max(1, values), -(-meta_batch // threads)))


def _length(tasks: Any) -> int:
    count = pytree.tree_leaves(tasks)[0].shape[0]
    if not count:
        raise MetaftError("meta_batch must be at least 1, got an empty batch of tasks")
    return count


def _chunks(tasks: Tree, size: int | None) -> list[Tree]:
    leaves, spec = pytree.tree_flatten(tasks)
    count = _length(tasks)
    parts = [leaf.split(size or count) for leaf in leaves]
    return [pytree.tree_unflatten(list(part), spec) for part in zip(*parts, strict=True)]


def why_not_mapped(fn: TaskFunction[Shared, Tree, Any], shared: Shared, tasks: Tree, what: str) -> str:
    """Why vmap cannot take two tasks by this function, "" where it can. One intra-op thread, for a fork may follow.

    Raises MetaftError, of `what`, where not even one task by itself can be taken.
    """
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, *_ = _chunks(tasks, 1)
        try:
            rows(fn, shared, first)
        except (MetaftError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the user's module does
            raise MetaftError(f"{what} do not go together ({_reason(error)})") from error
        try:
            vmapped(fn, shared, tasks)
        except CannotBatch as error:
            return _reason(error.__cause__ or error)
        return ""
    finally:
        torch.set_num_threads(intra_op)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _sum_of(fn: TaskFunction[Shared, Tree, Out], shared: Shared, tasks: Tree) -> Out:
    return _summed(rows(fn, shared, tasks))


def _summed(results: Out) -> Out:
    return pytree.tree_map(lambda leaf: leaf[0] if len(leaf) == 1 else leaf.sum(0), results)


def _added(results: Iterable[Out]) -> Out:
    total: list[Tensor] = []
    spec: pytree.TreeSpec | None = None
    for result in results:
        leaves, spec = pytree.tree_flatten(result)
        if not total:
            total = [leaf.clone() for leaf in leaves]
        else:
            for sum_, leaf in zip(total, leaves, strict=True):
                sum_ += leaf
    assert spec is not None
    return pytree.tree_unflatten(total, spec)


def _unstacked(results: Out) -> list[Out]:
    leaves, spec = pytree.tree_flatten(results)
    return [pytree.tree_unflatten([leaf[i] for leaf in leaves], spec) for i in range(leaves[0].shape[0])]


PARALLEL = ("processes", "threads")
"""Engines that give the same bits for the same chunk."""

ENGINES = (*PARALLEL, "vmap", "graph", "compiled")


def settled_name(name: str, *, convolutional: bool, device: str | torch.device) -> str:
    """The engine that `auto` stands for: a fixed rule on model and device."""
    if name != "auto":
        return name
    if torch.device(device).type != "cpu":
        return "graph"
    if not convolutional:
        return "vmap"
    return "processes" if workers.available() else "threads"


@contextlib.contextmanager
def engine(
    name: str = "auto",
    *,
    convolutional: bool = True,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    chunk: int | None = None,
) -> Iterator[Engine]:
    """An engine by name, closed on leaving.

    `auto`: for convolutions on a CPU processes, or threads where a system cannot fork; on a GPU graph; vmap for
    all else. `threads=None` uses as many processes or threads as torch would threads, and one for the other engines.
    `chunk=None` is what `task_chunk` says for processes and threads, and all for the others. Raises MetaftError for an
    unknown name.
    """
    on_cpu = torch.device(device).type == "cpu"
    name = settled_name(name, convolutional=convolutional, device=device)
    if name not in ENGINES:
        raise no_such("engine", name, ["auto", *ENGINES])
    if name == "processes" and not on_cpu:
        raise MetaftError(f"engine: processes are for the CPU, not for {device}; use vmap")
    if name in PARALLEL:
        count = torch.get_num_threads() if threads is None else threads
        made: Engine = (Processes if name == "processes" else Threads)(count, chunk)
    else:
        kinds = {kind.name: kind for kind in (Vmap, Graph, Compiled)}
        made = kinds[name](chunk, 1 if threads is None else threads)
        made.whole_steps = name == "graph" or (name == "compiled" and not on_cpu)
    try:
        yield made
    finally:
        made.close()


def tune(
    algorithm: Algorithm,
    meta: Params,
    state: Params,
    tasks: Any,
    *,
    convolutional: bool,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    seconds: float = 1.0,
) -> dict[tuple[str, int | None], float]:
    """Seconds per meta-step of each engine and chunk worth trying, fastest first; each is timed for `seconds`.

    Not `compiled` on a CPU, where compiling alone takes minutes. On a GPU what is timed is not a recorded step, but
    the meta-gradient by itself.
    """
    on_cpu = torch.device(device).type == "cpu"
    total = _length(tasks)
    count = threads or torch.get_num_threads()
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= -(-total // count)]
    candidates: list[tuple[str, int | None]] = [("vmap", None)] if on_cpu else [("graph", None), ("compiled", None)]
    if on_cpu:
        parallel = [name for name in PARALLEL if name == "threads" or workers.available()]
        candidates += [(name, size) for name in parallel for size in sizes]
    found: dict[tuple[str, int | None], float] = {}
    for name, chunk in candidates:
        with (
            contextlib.suppress(CannotBatch),  # the others can do without
            engine(name, convolutional=convolutional, device=device, threads=threads, chunk=chunk) as made,
        ):
            times: list[float] = []
            end = math.inf  # the first step prepares, and is not counted
            while not times or time.perf_counter() < end:
                start = time.perf_counter()
                meta_gradient(made, algorithm, meta, state, tasks)
                if end == math.inf:
                    end = time.perf_counter() + seconds
                else:
                    times.append(time.perf_counter() - start)
            found[name, chunk] = statistics.median(times)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def task_grad(algorithm: Algorithm, meta: Params, state: Params, knobs: Params, task: Any) -> TaskGrad:
    """One task's meta-gradient: the member's own, or the gradient of its task loss in `meta`."""
    with math_attention() if algorithm.curvature else contextlib.nullcontext():
        return _task_grad(algorithm, meta, state, knobs, task)


def _task_grad(algorithm: Algorithm, meta: Params, state: Params, knobs: Params, task: Any) -> TaskGrad:
    if algorithm.task_grad is not None:
        return algorithm.task_grad(meta, state, knobs, task)
    task_loss = algorithm.task_loss
    assert task_loss is not None  # Algorithm checks that it has one of the two

    def of_meta(meta: Params) -> tuple[Tensor, tuple[Params, dict[str, Tensor]]]:
        return task_loss(meta, state, knobs, task)

    _, (state_delta, metrics), grads = value_and_grad(of_meta, meta, create_graph=False)
    return TaskGrad(grads, state_delta, metrics)


@functools.lru_cache(maxsize=16)
def task_grad_of(algorithm: Algorithm) -> Callable[[tuple[Params, Params, Params], Any], TaskGrad]:
    """`task_grad` as engines want it: one object per algorithm."""
    return lambda shared, task: task_grad(algorithm, *shared, task)


class MetaGradient(NamedTuple):
    """Mean over the meta-batch."""

    grads: Params
    state: Params
    """`state` plus the mean of the tasks' deltas."""
    metrics: dict[str, float]


@in_usual_modes_but_type
def meta_gradient(
    engine: Engine,
    algorithm: Algorithm,
    meta: Params,
    state: Params,
    tasks: Episode | Any,
    *,
    step: int = 0,
    ranks: Ranks = ALONE,
) -> MetaGradient:
    """Mean of the tasks' gradients in `meta`, summed in task order so that the bits do not depend on timing.

    `step` sets the algorithm's knobs. Of several `ranks` each gives its own tasks, at least one, and all get the mean
    over all tasks. Neither `meta` nor `state` is changed. Warns (MetaftWarning) of what the algorithm says to warn of,
    where a task met it.
    """
    # Mapping per-task gradients, not differentiating a mapped loss: the latter is silently wrong at second order for
    # batch normalisation under vmap.
    total = engine.sum(task_grad_of(algorithm), (meta, state, algorithm.schedule(step)), tasks)
    leaves, spec = pytree.tree_flatten(total)
    *leaves, count = ranks.sum_flat([*leaves, torch.tensor(float(_length(tasks)), device=leaves[0].device)])
    mean: TaskGrad = pytree.tree_unflatten([leaf / int(count) for leaf in leaves], spec)
    metrics = {name: float(value) for name, value in mean.metrics.items()}
    for name, text in algorithm.cautions.items():
        if metrics[name] > 0:
            warnings.warn(text, MetaftWarning, stacklevel=2)
    return MetaGradient(
        grads=mean.grads,
        state={
            name: value + mean.state_delta[name] if name in mean.state_delta else value for name, value in state.items()
        },
        metrics=metrics,
    )
