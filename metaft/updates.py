"""How far each step of training moves each layer: the numbers of a run's `updates.jsonl`.

A row is of one step, counted from 1:

    {"step": 20, "layers": {"blocks.0": {"weights": 5.1, "update": 0.002, "gradient": 0.3, "distance": 0.9,
                                         "dead": 0.0}, ...}}

and of metaft.adapt has "draw", "start" and "epoch" too. A layer is a module that has parameters itself; those that the
step left where they were are not listed. Numbers are rounded to six digits; null is what does not exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metaft.types import Params

FIGURES = ("weights", "update", "gradient", "distance", "dead")
"""Of a layer: norm of its weights before the step; norm of the update over it; norm of the gradient, as the optimiser
got it; norm of what the weights are from the first step's; share of the units behind the layer's ReLU that are 0 for
all examples and places of the batch (absent where there is none)."""

SHARE = 0.02
"""Of a run's computation that measuring may take."""

_MEASURING, _UPDATING = 400.0, 100.0
"""What measuring a number costs, and what the optimiser's update of one costs at least, in FLOPs of a step: both are a
matter of memory. Measured on one core; a wrong factor of two is within what was left."""
_APART, _LEAST = 20, 5
"""Steps between two that are measured, at least, since how many operations there are matters where numbers are few; and
rows for which a short fit, which is over in seconds, may have them closer."""
_MANY = 100
"""Rows before they become half as many for each doubling of the steps, so that the file stays small."""


def every(log_every: int | None, numbers: int, flops: float, passes: float = 0.0, *, steps: int | None = None) -> int:
    """Steps from one that is measured to the next: the first multiple of `log_every` (None: any number) at which
    measuring takes at most `SHARE` of the computation. A step has so many FLOPs and moves so many numbers; finding dead
    units takes `passes` more FLOPs; there are `steps` in all, where that is known. It hangs on no clock, so that a
    resume measures the same steps.

    >>> every(10, numbers=1000, flops=1e9), every(10, numbers=1000, flops=192e3), every(100, numbers=1, flops=1e9)
    (20, 70, 100)
    >>> every(None, numbers=1000, flops=1e9, steps=40), every(None, numbers=1000, flops=1e9, steps=400)
    (8, 20)
    """
    cost = (_MEASURING * numbers + passes) / max(_UPDATING * numbers + flops, 1.0)
    apart = _APART if steps is None else min(_APART, steps / _LEAST)
    return (log_every or 1) * math.ceil(max(apart, cost / SHARE, 1.0) / (log_every or 1))


def due(step: int, every: int) -> bool:
    """Whether step 1, 2, ... is measured: the first, and multiples of `every`, fewer and fewer of them.

    >>> [step for step in range(1, 41) if due(step, 10)], due(1010, 10), due(1020, 10), due(4040, 10)
    ([1, 10, 20, 30, 40], False, True, False)
    """
    return step == 1 or step % (every << (step // (every * _MANY)).bit_length()) == 0


def together(step: int, every: int, most: int) -> int:
    """How many steps may be taken at once after `step` so that one that is measured is taken alone.

    >>> together(0, 10, 50), together(1, 10, 50), together(9, 10, 50), together(10, 10, 4)
    (1, 8, 1, 4)
    """
    if due(step + 1, every):
        return 1
    return next((n for n in range(1, most) if due(step + n + 1, every)), most)


def layer_of(name: str) -> str:
    """The layer of a parameter.

    >>> layer_of("blocks.0.weight"), layer_of("scale")
    ('blocks.0', 'scale')
    """
    return name.rpartition(".")[0] or name


def copied(params: Mapping[str, Tensor]) -> Params:
    """Values that stay as they are now."""
    return {name: p.detach().clone() for name, p in params.items()}


@torch.no_grad()
def layers(
    before: Params, after: Mapping[str, Tensor], start: Params, gradient: Mapping[str, Tensor | None]
) -> dict[str, dict[str, float | None]]:
    """The figures of each layer that has parameters in `before`, all but "dead"."""
    names = list(before)
    parts = [
        [before[n] for n in names],
        [after[n].detach() - before[n] for n in names],
        [torch.zeros_like(before[n]) if (g := gradient[n]) is None else g for n in names],
        [after[n].detach() - start[n] for n in names],
    ]
    # One tensor for all, which a GPU hands over once.
    norms = torch.stack([torch.linalg.vector_norm(t).double() for part in parts for t in part])
    squares = norms.square().reshape(len(parts), len(names)).tolist()
    sums: dict[str, list[float]] = {}
    for i, name in enumerate(names):
        own = sums.setdefault(layer_of(name), [0.0] * len(parts))
        for k in range(len(parts)):
            own[k] += squares[k][i]
    return {layer: _figures(*map(math.sqrt, own)) for layer, own in sums.items()}


def _figures(weights: float, update: float, gradient: float, distance: float) -> dict[str, float | None]:
    ratio = update / weights if weights > 0 else None
    return {
        "weights": rounded(weights), "update": None if ratio is None else rounded(ratio),
        "gradient": rounded(gradient), "distance": rounded(distance),
    }  # fmt: skip


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def row(
    step: int,
    before: Params,
    after: Mapping[str, Tensor],
    start: Params,
    gradient: Mapping[str, Tensor | None],
    dead: Mapping[str, float],
) -> dict[str, Any]:
    """A row of `updates.jsonl`."""
    found = layers(before, after, start, gradient)
    shown = {name: {**own, **({"dead": dead[name]} if name in dead else {})} for name, own in found.items()}
    return {"step": step, "layers": shown}


# ---- dead units -----------------------------------------------------------------------------------------------------

_PRODUCTS = {F.conv1d, F.conv2d, F.conv3d, F.linear}
_RELU = {F.relu, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


def _is_relu(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """nn.ReLU6 calls `hardtanh` from 0 to 6."""
    low = kwargs.get("min_val", args[1] if len(args) > 1 else -1.0)
    return func in _RELU or (func is F.hardtanh and low == 0)


class _Watch(TorchFunctionMode):
    """Sees which units of each ReLU are above 0, and whose they are: of the layer whose parameters were used last."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._layers = {p.data_ptr(): (layer_of(name), len(p)) for name, p in params.items() if len(p.shape)}
        self._last: tuple[str, int] | None = None
        self.alive: dict[str, Tensor] = {}
        """bool [units] of each layer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                self._last = self._layers.get(value.data_ptr(), self._last)
        result = func(*args, **kwargs)
        if _is_relu(func, args, kwargs) and self._last is not None and result.dim() > 1:
            self._saw(result, *self._last)
        return result

    def _saw(self, x: Tensor, layer: str, rows: int) -> None:
        units = 1 if x.dim() in (2, 4, 5) or x.shape[1] == rows else x.dim() - 1
        alive = x.detach().amax([d for d in range(x.dim()) if d != units]) > 0
        known = self.alive.get(layer)
        self.alive[layer] = alive if known is None or known.shape != alive.shape else known | alive


def dead_units(run: Callable[[], object], params: Mapping[str, Tensor]) -> dict[str, float]:
    """By layer the share of units behind its ReLU (or ReLU6) that are 0 for all that `run` passes through, units being
    channels or features. `params` are those that it computes with, by which layers are known."""
    with torch.no_grad(), _Watch(params) as watch:
        run()
    shares = {layer: 1 - alive.double().mean() for layer, alive in watch.alive.items()}
    return {layer: rounded(float(share)) for layer, share in shares.items()}


class _Count(TorchFunctionMode):
    """Adds up what convolutions and linear layers do; `torch.utils.flop_counter` looks at every operation for that."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and len(args) > 1:
            weight = args[1]
            self.flops += 2 * weight.numel() * result.numel() // len(weight)  # once at each place of each image
        return result


def flops_of(run: Callable[[], object]) -> int:
    """FLOPs of the convolutions and linear layers that `run` passes through."""
    with torch.no_grad(), _Count() as count:
        run()
    return count.flops


# ---- as a page shows them -------------------------------------------------------------------------------------------


def grouped(names: Sequence[str], most: int) -> dict[str, str]:
    """The layers by the longest common beginnings of their names of which there are at most so many.

    >>> grouped(["a.0.x", "a.0.y", "a.1.x", "b"], 3)
    {'a.0.x': 'a.0', 'a.0.y': 'a.0', 'a.1.x': 'a.1', 'b': 'b'}
    """
    for depth in range(max(name.count(".") for name in names) + 1, 0, -1):
        groups = {name: ".".join(name.split(".")[:depth]) for name in names}
        if len(set(groups.values())) <= most or depth == 1:
            return groups
    raise AssertionError


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The figures of several layers as one: norms over all of them, and the mean share of dead units."""

    def norm(values: Iterator[float]) -> float:
        return math.sqrt(math.fsum(value**2 for value in values))

    weights = norm(p["weights"] for p in parts)
    update = norm((p["update"] or 0.0) * p["weights"] for p in parts)
    dead = [p["dead"] for p in parts if p.get("dead") is not None]
    return {
        "weights": weights, "update": update / weights if weights > 0 else None,
        "gradient": norm(p["gradient"] for p in parts), "distance": norm(p["distance"] for p in parts),
        "dead": math.fsum(dead) / len(dead) if dead else None,
    }  # fmt: skip
