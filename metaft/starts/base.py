"""What training begins with: parameters, the architecture that they are of, and the inputs that it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from metaft import models
from metaft.config import Settled
from metaft.errors import MetaftError
from metaft.inputs import Inputs
from metaft.models import check_repeats, class_of, taken
from metaft.models.architecture import NormOf, build, filled, is_published
from metaft.models.functional import linear, probe_of
from metaft.models.handed import said
from metaft.models.head import body_of, why_apart
from metaft.runs.checkpoint import digest
from metaft.types import Params

RANDOM = "random"
"""The label of the start that is drawn."""


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """A backbone to start from. `settings` and `state` are a run's, and None or empty without one."""

    name: str
    """The run folder, or what else `--init` names."""
    architecture: Mapping[str, Any]
    """As in a checkpoint; its head and ways are those of meta-training."""
    shape: list[int]
    """Of one input, e.g. [C, H, W]."""
    inputs: Inputs | None
    """None where the model takes numbers that no file gives."""
    settings: Settled | None
    meta: Params | None
    """None: parameters are drawn from the seed of each draw."""
    state: Params
    module: nn.Module | None
    """The user's own module, where the architecture has no name; what nothing learns in it is the run's."""
    about: Mapping[str, Any]
    """Data set, algorithm, meta-step, or where weights are from: what the report says of it."""
    frozen: frozenset[str] = frozenset()
    """Names of the parameters in `meta` that the run kept as they were handed over."""
    label: str = "meta-learned"
    """What the parameters are; by this name figures and curves are told apart."""
    norm: NormOf = "adapt"
    """"keep" where `meta` came with running statistics; a run's are moments of its tasks."""
    buffers: Params = dataclasses.field(default_factory=dict)
    """What a library's architecture holds and nothing learns: running statistics and the like."""
    notes: tuple[str, ...] = ()
    """What there is to know of how it came about, in plain words."""
    source: Params = dataclasses.field(default_factory=dict)
    """"weight" [Z, D] and "bias" [Z] of the head that it was trained with, on Z classes of its own, where that is a
    linear layer on the features; else empty."""

    @property
    def head_rows(self) -> int | None:
        """Classes of the head that the run learned; None where it learned none, or one row that all classes share."""
        module, head = build(self.architecture, None, module=self.module)
        weight = (self.meta or {}).get(f"{head}.weight")
        if weight is None:  # of a head that is no plain linear layer the parameters have other names
            layer = linear(module, head)
            learned = any(f"{head}.{part}" in (self.meta or {}) for part, _ in layer.named_parameters())
            return layer.out_features if learned else None
        return None if len(weight) == 1 else len(weight)


def check_module(start: Start) -> None:
    """Raises MetaftError where the user's module is not one that meta-training would take, cannot be drawn, or is more
    than a body and a head, which is what adapting trains and a classifier holds."""
    name = start.architecture["name"]
    if start.module is not None:
        check_repeats(models.functional(taken(start.module).cpu()), tuple(start.shape))
        build(start.architecture, 0, module=start.module)
    elif is_published(name) or models.is_ours(name):
        return
    whole, head = build(start.architecture, None, module=start.module)
    x = probe_of(start.shape, next(whole.parameters()).dtype)
    if why := why_apart(whole, head, x):
        raise MetaftError(f"module: adapt takes {class_of(whole)} for a body and a head, and {why}")


def constants(start: Start) -> Params:
    """What a module holds and nothing learns."""
    still: Params = dict(start.buffers)
    if start.module is not None:
        model = models.functional(start.module)
        still |= {**model.frozen, **model.buffers}
        if start.norm == "keep":
            kept = build(start.architecture, None, module=start.module, norm="keep")[0].named_buffers()
            still |= {k: v for k, v in kept if k not in model.buffers}
    return {f"still/{name}": value for name, value in still.items()}


def digest_of(start: Start) -> str:
    """Of all values that a start has."""
    return digest("", {**(start.meta or {}), **constants(start)})


def said_of(start: Start) -> str:
    """What a run's first line says of the user's module."""
    more = ["running statistics kept"] if start.norm == "keep" else []
    if start.module is None:
        return f" ({'; '.join(more)})" if more else ""
    return said(start.module, *more)


def body(start: Start, seed: int) -> nn.Module:
    """The backbone, features [n, D] out: with the start's parameters or, where it has none, with some drawn from
    `seed`."""
    if start.meta is None:
        return body_of(*build(start.architecture, seed, module=start.module))
    whole, head = build(start.architecture, None, module=start.module, norm=start.norm)
    return filled(body_of(whole, head), start.meta, start.buffers)
