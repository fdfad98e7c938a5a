"""A whole meta-step as one function of tensors that stay in place, which a GPU records once and replays.

An eager step is thousands of small calls, and a GPU waits for most of them. Here a step gathers its pixels, runs all
inner loops, takes the meta-gradient and updates the parameters without a look at any value: what chance decides was
drawn on the CPU ahead of time, for a stretch of steps at once, and a counter on the device says which is next. The host
sends one stretch, starts its steps, draws the next one, and reads the figures of the stretch back.

On a CPU the same function runs as it is.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaft.algorithms.base import Algorithm, TaskGrad
from metaft.config import Settled
from metaft.dist.ranks import Ranks
from metaft.engines.base import Engine
from metaft.errors import MetaftError, MetaftWarning, first_line
from metaft.metrics import figure_name
from metaft.outer import task_grad_of
from metaft.outer.update import clipped, outer_lr
from metaft.types import Params, Source, Static
from metaft.updates import together

_BETAS, _EPS = (0.9, 0.999), 1e-8
_STRETCH_BYTES = 1 << 28
"""Most that one stretch may send; only the pixels of a pool that stays in host memory come near."""


class Taken(NamedTuple):
    """What came of asking for meta-steps."""

    window: tuple[tuple[float, ...], ...]
    """The metrics of each step that was taken, as `logged` names them."""
    failure: str | None = None
    """Why the step after them was not: its loss or gradient is not finite."""


class Steps(Protocol):
    """How a run takes its meta-steps. Between calls all its tensors are those after the last step taken."""

    meta: Params
    state: Params

    def moments(self) -> Params:
        """The outer optimiser's tensors, named as in a checkpoint."""
        ...

    def gradient(self) -> Params:
        """The meta-gradient of the last step taken, as the outer optimiser got it."""
        ...

    def advance(self, step: int) -> Taken:
        """Take meta-step `step` (0-based), and perhaps more, but none past a row, validation or checkpoint."""
        ...


class Begun(Protocol):
    """What a run starts from (`metaft.runs.snapshot.Snapshot`)."""

    @property
    def meta(self) -> Params: ...
    @property
    def state(self) -> Params: ...
    @property
    def optimizer(self) -> dict[str, Tensor]: ...


def logged(algorithm: Algorithm) -> tuple[str, ...]:
    """Which metrics of a meta-step go into metrics.jsonl."""
    return ("loss", figure_name(algorithm.loss), *algorithm.cautions)


def why_not_finite(loss: float, gradient: bool) -> str | None:
    """What to say of a step's loss, and of a gradient that is finite or is not."""
    if not abs(loss) < float("inf"):
        return f"the loss is {loss}"
    return None if gradient else "the meta-gradient is not finite"


def obstacle(algorithm: Algorithm, source: Source, meta: Params, ranks: Ranks) -> str | None:
    """Why steps cannot be taken as a whole, or None."""
    if ranks.count > 1:
        return f"{ranks.count} processes add up their gradients in every step"
    if not algorithm.static:
        return f"the work of {algorithm.name} depends on its data"
    if not isinstance(source, Static):
        return f"{source.name} cannot draw indices and gather apart (see metaft.types.Static)"
    if len({p.dtype for p in meta.values()}) > 1:
        return "the parameters have several types"
    return None


class StaticSteps:
    """`Steps` over tensors that stay in place. `record` turns the step into what runs it (default: by the device);
    `every` is that of `metaft.updates`, None where nothing is measured."""

    def __init__(
        self,
        config: Settled,
        engine: Engine,
        algorithm: Algorithm,
        source: Source,
        start: Begun,
        *,
        every: int | None = None,
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        assert isinstance(source, Static)
        self._config, self._engine, self._algorithm, self._source = config, engine, algorithm, source
        self._function = task_grad_of(algorithm)
        self._size = source.ways * (source.shots + source.query_shots)
        self._flat = torch.cat([p.detach().reshape(-1) for p in start.meta.values()])
        self._grad = torch.zeros_like(self._flat)
        self._device = self._flat.device
        self.meta = self._named(self._flat, start.meta)
        self.state = {name: value.detach().clone() for name, value in start.state.items()}
        self._adam = config.outer.outer_optimizer == "adam"
        self._moments = {slot: self._stored(start, slot) for slot in (("exp_avg", "exp_avg_sq") if self._adam else ())}
        self._updates = max((int(v) for k, v in start.optimizer.items() if k.endswith("/step")), default=0)
        self._at = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._alive = torch.ones((), dtype=torch.bool, device=self._device)
        self._every = every
        self._most = self._to_next(0)
        self._logged = logged(algorithm)
        self._log = torch.zeros(0)
        self._table: Any = None
        self._ahead: tuple[int, int, Any] | None = None
        on_gpu = self._device.type == "cuda"
        self._record = record or ((lambda step: recorded(step, self._device)) if on_gpu else lambda step: step)
        self._run: Callable[[], None] | None = None

    def moments(self) -> Params:
        if not self._updates:
            return {}
        parts = {slot: self._named(flat, self.meta) for slot, flat in self._moments.items()}
        tensors = {f"{name}/{slot}": each[name] for slot, each in parts.items() for name in self.meta}
        count = {f"{name}/step": torch.tensor(float(self._updates)) for name in self.meta} if self._adam else {}
        return {**tensors, **count}

    def gradient(self) -> Params:
        return self._named(self._grad, self.meta)

    def advance(self, step: int) -> Taken:
        count = self._send(step)
        before = [tensor.clone() for tensor in self._changed()]
        try:
            if self._run is None:  # recording takes steps, which are undone
                self._run = self._record(self._step)
                self._restore(before)
            for _ in range(count):
                self._run()
            following = step + count
            if following < self._config.outer.iterations:  # drawn while the device is at work
                self._ahead = (following, *self._drawn(following, self._updates + count))
            rows = self._log[:count].tolist()
        except BaseException:  # the caller will keep the state, and say that it is the one before this call
            self._restore(before)
            raise
        good = next((i for i, row in enumerate(rows) if not row[-1]), count)
        self._updates += good
        for i, text in enumerate(self._algorithm.cautions.values(), 2):
            if any(row[i] > 0 for row in rows[:good]):
                warnings.warn(text, MetaftWarning, stacklevel=2)
        failure = None if good == count else why_not_finite(rows[good][0], False)
        return Taken(tuple(tuple(row[:-1]) for row in rows[:good]), failure)

    def _stretch(self, step: int) -> int:
        """Steps from this one that are taken together; one whose updates are measured is by itself."""
        most = self._to_next(step)
        return most if self._every is None else together(step, self._every, most)

    def _to_next(self, step: int) -> int:
        """Steps from this one to the next row, validation or checkpoint."""
        c = self._config
        every = (c.output.log_every, c.test.eval_every, c.output.checkpoint_every)
        return min(c.outer.iterations - step, *(n - step % n for n in every))

    def _drawn(self, step: int, updates: int) -> tuple[int, Any]:
        """How many steps the stretch from this one has, and all they need from the host: CPU tensors [steps, ...].

        `updates` are those of the optimiser before.
        """
        c = self._config
        count = min(self._stretch(step), self._most)
        indices = range(step * c.task.meta_batch, (step + count) * c.task.meta_batch)
        if self._algorithm.data == "episodes":
            drawn = self._source.indices(c.compute.seed, "train", indices)
        else:
            drawn = self._source.batch_indices(c.compute.seed, "train", indices, self._size)
        drawn = pytree.tree_map(lambda leaf: leaf.unflatten(0, (count, c.task.meta_batch)), drawn)
        knobs = [self._algorithm.schedule(at) for at in range(step, step + count)]
        knobs = {name: torch.stack([each[name].cpu() for each in knobs]) for name in knobs[0]}
        rates = [self._rates(step + i, updates + i + 1) for i in range(count)]
        table = (drawn, knobs, torch.tensor(rates, dtype=torch.float64).to(self._flat.dtype))
        if self._device.type == "cuda":
            table = pytree.tree_map(lambda leaf: leaf.pin_memory(), table)
        return count, table

    def _rates(self, step: int, update: int) -> tuple[float, float]:
        """The rate of a step and what its root is divided by: Adam's corrections for moments that began at 0."""
        lr = outer_lr(self._config, step)
        if not self._adam:
            return lr, 1.0
        return lr / (1 - _BETAS[0] ** update), (1 - _BETAS[1] ** update) ** 0.5

    def _send(self, step: int) -> int:
        """Have the device ready for a stretch, and say how many steps it has."""
        if self._table is None:  # one step tells how many at once are not too many
            whole, self._most = self._most, 1
            each = sum(leaf.nbytes for leaf in pytree.tree_leaves(self._drawn(step, self._updates)[1]))
            self._most = min(whole, max(1, _STRETCH_BYTES // each))
        if self._ahead is None or self._ahead[0] != step:
            count, table = self._drawn(step, self._updates)
        else:
            _, count, table = self._ahead
        self._ahead = None
        if self._table is None:
            self._log = torch.zeros(self._most, len(self._logged) + 1, dtype=torch.float64, device=self._device)
            self._table = pytree.tree_map(
                lambda leaf: torch.zeros(self._most, *leaf.shape[1:], dtype=leaf.dtype, device=self._device), table
            )
        for slots, leaf in zip(pytree.tree_leaves(self._table), pytree.tree_leaves(table), strict=True):
            slots[:count].copy_(leaf, non_blocking=True)
        self._at.zero_()
        self._alive.fill_(True)
        return count

    def _changed(self) -> list[Tensor]:
        """What a step changes, its log excepted."""
        return [self._flat, *self._moments.values(), *self.state.values(), self._at, self._alive]

    def _restore(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self._changed(), values, strict=True):
            tensor.copy_(value)

    @torch.no_grad()
    def _step(self) -> None:
        drawn, knobs, rates = pytree.tree_map(lambda leaf: leaf.index_select(0, self._at).squeeze(0), self._table)
        gather = self._source.gather if self._algorithm.data == "episodes" else self._source.gather_batch
        total: TaskGrad = self._engine.sum(self._function, (self.meta, self.state, knobs), gather(drawn))
        tasks = self._config.task.meta_batch
        (grad,) = clipped([torch.cat([total.grads[name].reshape(-1) for name in self.meta]) / tasks], self._config)
        self._grad.copy_(grad)
        shown = [total.metrics[name] / tasks for name in self._logged]
        # From the first step that is not finite on nothing changes any more, until the host has read so.
        self._alive &= shown[0].isfinite() & grad.isfinite().all()
        for name, delta in total.state_delta.items():
            self._assign(self.state[name], self.state[name] + delta / tasks)
        self._update(grad, *rates.unbind())
        row = torch.stack([value.double().reshape(()) for value in (*shown, self._alive)])
        self._log.index_copy_(0, self._at, row.unsqueeze(0))
        self._at.copy_((self._at + 1) % self._most)

    def _update(self, grad: Tensor, rate: Tensor, root: Tensor) -> None:
        """torch.optim's Adam or SGD for all parameters in one, operation by operation."""
        if not self._adam:
            self._assign(self._flat, self._flat - rate * grad)
            return
        first = torch.lerp(self._moments["exp_avg"], grad, 1 - _BETAS[0])
        second = torch.addcmul(self._moments["exp_avg_sq"] * _BETAS[1], grad, grad, value=1 - _BETAS[1])
        self._assign(self._moments["exp_avg"], first)
        self._assign(self._moments["exp_avg_sq"], second)
        self._assign(self._flat, self._flat - rate * (first / (second.sqrt() / root + _EPS)))

    def _assign(self, tensor: Tensor, value: Tensor) -> None:
        tensor.copy_(torch.where(self._alive, value, tensor))

    def _stored(self, start: Begun, slot: str) -> Tensor:
        parts = [start.optimizer.get(f"{name}/{slot}", torch.zeros_like(p)) for name, p in start.meta.items()]
        return torch.cat([part.reshape(-1).to(self._flat) for part in parts])

    @staticmethod
    def _named(flat: Tensor, like: Mapping[str, Tensor]) -> Params:
        """Views of a vector, by name."""
        parts = flat.split([p.numel() for p in like.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(like.items(), parts, strict=True)}


def recorded(step: Callable[[], None], device: torch.device, *, said: bool = True) -> Callable[[], None]:
    """A function of a GPU's tensors in place, recorded as a CUDA graph, which takes a few runs of it and is `said`.

    What cannot be recorded runs as it is, with a MetaftWarning that says so.
    """
    with torch.cuda.device(device):  # the streams below are those of the current device, whichever the tensors are on
        begin = time.perf_counter()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose and prepare their kernels in the first calls: not to be recorded
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        warm = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
        except (RuntimeError, MetaftError) as error:  # the latter where memory is short of a second copy of a step's
            torch.cuda.synchronize()
            why = f"the meta-step cannot be recorded ({first_line(error)}); it runs as it is"
            warnings.warn(why, MetaftWarning, stacklevel=2)
            return step
    took = f"{warm - begin:.1f} s of warm-up, {time.perf_counter() - warm:.1f} s of capture"
    if said:
        print(f"meta-step recorded: {took}", file=sys.stderr)
    return graph.replay
