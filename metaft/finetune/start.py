"""What fine-tuning begins with: a run's meta-learned parameters, or random ones in the same architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from metaft import models
from metaft.config import Settled
from metaft.defaults import model_for
from metaft.errors import CheckpointError, MetaftError
from metaft.inputs import Inputs, of_header
from metaft.models import check_repeats, class_of, taken, with_constants
from metaft.models.architecture import NormOf, build, filled, is_of
from metaft.models.functional import linear, probe_of
from metaft.models.handed import said
from metaft.models.head import body_of, why_apart
from metaft.models.stored import has_statistics
from metaft.options import from_mapping
from metaft.runs.assemble import open_run
from metaft.types import Params

OWN = "module"
"""The name of the start that a module's own values are."""

RANDOM = "random"
"""The label of the start that is drawn."""

WIDTH = 64  # of a backbone that no run has chosen


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """A backbone to start from. `settings`, `meta` and `state` are a run's, and None or empty without one."""

    name: str
    """The run folder, or "none"."""
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
    """Data set, algorithm, meta-step: what the report says of it."""
    frozen: frozenset[str] = frozenset()
    """Names of the parameters in `meta` that the run kept as they were handed over."""
    label: str = "meta-learned"
    """What the parameters are; by this name figures and curves are told apart."""
    norm: NormOf = "adapt"
    """"keep" where `meta` came with running statistics; a run's are moments of its tasks."""

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


def from_run(path: Path, module: nn.Module | None = None) -> Start:
    """The checkpoint of a meta-training run that was best on validation.

    Raises CheckpointError where it cannot be read or is not of this module, and MetaftError where the run is of another
    command, or the module is the user's own and was not handed over.
    """
    try:
        _, _, snapshot = open_run(path, field="init")
    except CheckpointError as error:
        raise CheckpointError(f"init: {error}") from None
    header = snapshot.header
    architecture = header["architecture"]
    if (architecture["name"] == "custom") != (module is not None):
        raise MetaftError(
            f"init: {path} was trained with a module from Python; hand it over there (module=...)"
            if module is None
            else f"init: {path} was trained with {architecture['name']}, not with a module from Python"
        )
    inputs = of_header(header)
    if module is not None:
        module = with_constants(taken(module).cpu(), snapshot.frozen, snapshot.buffers)
    start = Start(
        name=str(path),
        architecture=architecture,
        shape=list(architecture["shape"] if inputs is None else inputs.shape),
        inputs=inputs,
        settings=from_mapping(Settled, header["config"], origin=f"checkpoint of {path}"),
        meta={**snapshot.meta, **snapshot.frozen},
        state=snapshot.state,
        module=module,
        about={
            "dataset": header["dataset"],
            "algorithm": header["config"]["algorithm"],
            "step": snapshot.position.step,
            **({"loss": header["loss"]} if "loss" in header else {}),
        },
        frozen=frozenset(snapshot.frozen),
    )
    _check_fits(start)
    return start


def _check_fits(start: Start) -> None:
    """Raises CheckpointError where the run's parameters are not this architecture's, naming the first that differs."""
    module, head = build(start.architecture, None, module=start.module)
    for name, p in module.named_parameters():
        of_head, learned = is_of(name, head), (start.meta or {}).get(name)
        if learned is None and not of_head:
            raise CheckpointError(f"init: {start.name} has no parameter {name!r}, which this architecture needs")
        # The head's rows are classes, and another number of them is what adapting is for.
        if learned is not None and learned.shape[of_head:] != p.shape[of_head:]:
            raise CheckpointError(
                f"init: {name} has shape {list(learned.shape)} in the run, {list(p.shape)} in this architecture"
            )
    _check_module(start)


def from_nothing(inputs: Inputs, module: nn.Module | None = None, *, keep: bool = False) -> Start:
    """The architecture that meta-training would choose for such images, or the user's own module: with parameters that
    are drawn, or beside those with its own (`keep`). Raises MetaftError for a module that metaft does not take."""
    shape = list(inputs.shape)
    named = {"name": model_for(tuple(shape)), "ways": 2, "shape": shape, "width": WIDTH}
    handed = None if module is None else {"name": "custom", "class": class_of(module)}
    start = Start("none", handed or named, shape, inputs, None, None, {}, module, {}, label=RANDOM)
    _check_module(start)
    if keep and module is not None:
        norm: NormOf = "keep" if any(map(has_statistics, module.modules())) else "adapt"
        whole, _ = build(start.architecture, None, module=module, norm=norm)
        values = {name: p.detach() for name, p in whole.named_parameters()}
        return dataclasses.replace(start, name=OWN, meta=values, label="own values", norm=norm)
    return start


def compared(start: Start) -> tuple[Start, ...]:
    """The starts of a run: this one, and random parameters in the same architecture where it has any of its own."""
    return (
        (start,) if start.meta is None else (start, dataclasses.replace(start, label=RANDOM, meta=None, norm="adapt"))
    )


def _check_module(start: Start) -> None:
    """Raises MetaftError where the user's module is not one that meta-training would take, cannot be drawn, or is more
    than a body and a head, which is what adapting trains and a classifier holds."""
    if start.module is not None:
        check_repeats(models.functional(taken(start.module).cpu()), tuple(start.shape))
        build(start.architecture, 0, module=start.module)
    elif models.is_ours(start.architecture["name"]):
        return
    whole, head = build(start.architecture, None, module=start.module)
    x = probe_of(start.shape, next(whole.parameters()).dtype)
    if why := why_apart(whole, head, x):
        raise MetaftError(f"module: adapt takes {class_of(whole)} for a body and a head, and {why}")


def constants(start: Start) -> Params:
    """What the user's module holds and nothing learns."""
    if start.module is None:
        return {}
    model = models.functional(start.module)
    moments: Params = {}
    if start.norm == "keep":
        kept = build(start.architecture, None, module=start.module, norm="keep")[0].named_buffers()
        moments = {k: v for k, v in kept if k not in model.buffers}
    return {f"still/{name}": value for name, value in {**model.frozen, **model.buffers, **moments}.items()}


def said_of(start: Start) -> str:
    """What a run's first line says of the user's module."""
    more = ["running statistics kept"] if start.norm == "keep" else []
    return "" if start.module is None else said(start.module, *more)


def body(start: Start, seed: int) -> nn.Module:
    """The backbone, features [n, D] out: with the start's parameters or, where it has none, with some drawn from
    `seed`."""
    if start.meta is None:
        return body_of(*build(start.architecture, seed, module=start.module))
    return filled(body_of(*build(start.architecture, None, module=start.module, norm=start.norm)), start.meta)
