"""Meta-training that begins with a start: published weights, or another run's."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from metaft import models
from metaft.config import MetaTrainConfig, Settled
from metaft.errors import MetaftError
from metaft.inputs import ImageInputs, of_header
from metaft.models import Model
from metaft.models.architecture import build, filled, is_of, is_published
from metaft.runs.snapshot import Snapshot
from metaft.starts.base import Start
from metaft.starts.open import open_start
from metaft.tasks.pool import ClassPool
from metaft.types import Dataset, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Beginning:
    """The architecture of a start, its values, and the data as it takes them."""

    architecture: dict[str, Any]
    params: Params
    """Of the backbone; the head is drawn."""
    buffers: Params
    dataset: Dataset

    def settings(self, config: MetaTrainConfig) -> MetaTrainConfig:
        """With the architecture in the place of `--model` and `--width`."""
        named = {"model": self.architecture["name"], "width": self.architecture.get("width", config.learner.width)}
        return dataclasses.replace(config, **named)

    def model(self, config: Settled, snapshot: Snapshot | None, device: str) -> Model:
        """The backbone with these values and a head for the run's tasks, drawn from its seed."""
        architecture = {**self.architecture, "ways": config.task.ways}
        if config.learner.dropout:
            if not models.is_ours(str(architecture["name"])):
                raise MetaftError(f"dropout: a start brings its own (given {config.learner.dropout})")
            architecture["dropout"] = config.learner.dropout  # which has no parameters
        module, head = build(architecture, None)
        models.initialise(module.get_submodule(head), config.compute.seed)
        drawn = {name: p.detach() for name, p in module.named_parameters() if is_of(name, head)}
        params, buffers = self.params, self.buffers
        if snapshot is not None:
            params, buffers = {**snapshot.meta, **snapshot.frozen}, snapshot.buffers
        body = {k: v for k, v in params.items() if not is_of(k, head)}
        module = filled(module, {**{k: p.detach() for k, p in module.named_parameters()}, **drawn, **body}, buffers)
        return models.functional(module.to(device), head=head, architecture=architecture)


def begin_from(
    config: MetaTrainConfig, dataset: Dataset, snapshot: Snapshot | None, module: nn.Module | None
) -> Beginning | None:
    """What a run begins with where its settings, or the architecture of its `snapshot`, name a start; otherwise None.

    Raises MetaftError for a start that does not go with a module from Python, with `--model` or with the data.
    """
    init = config.start.init
    named = {} if snapshot is None else dict(snapshot.header["architecture"])
    if snapshot is not None and is_published(named["name"]):
        return Beginning(named, {}, {}, as_taken(dataset, of_header(snapshot.header), named["name"]))
    if init in (None, "none") or snapshot is not None:
        if config.start.init_norm is not None and snapshot is None:
            raise MetaftError(f"init_norm: is for a start (given {config.start.init_norm}, and no --init)")
        return None
    if module is not None:
        raise MetaftError(f"init: the module from Python is what the run begins with (given {init})")
    start = open_start(init, lambda: _inputs_of(dataset, init), norm=config.start.init_norm)
    architecture = {**start.architecture, "shape": list(dataset.shape)}
    if config.learner.model not in (None, architecture["name"]):
        raise MetaftError(f"model: {init} is {architecture['name']} (given {config.learner.model})")
    if not is_published(architecture["name"]) and start.shape != list(dataset.shape):
        raise MetaftError(f"init: {init} takes inputs {start.shape}, but {dataset.name} has {list(dataset.shape)}")
    values = _checked(start)
    width = start.architecture.get("width")
    if config.learner.width not in (None, width):
        raise MetaftError(f"width: {init} has its own (given {config.learner.width})")
    return Beginning(architecture, values, start.buffers, as_taken(dataset, start.inputs, init))


def _checked(start: Start) -> Params:
    if start.module is not None or start.meta is None:
        raise MetaftError(f"init: {start.name} is of a module from Python; hand that over instead (module=...)")
    return start.meta


def _inputs_of(dataset: Dataset, init: str) -> ImageInputs:
    if not isinstance(dataset, ClassPool):
        raise MetaftError(f"init: {init} takes pictures, and {dataset.name} has inputs {list(dataset.shape)}")
    return dataset.inputs


def as_taken(dataset: Dataset, inputs: object, init: str) -> Dataset:
    """The data with pixels as the start's backbone takes them: by the mean and deviation that it was trained with."""
    own = _inputs_of(dataset, init)
    if not isinstance(inputs, ImageInputs) or own.channels != inputs.channels:
        wants = inputs.channels if isinstance(inputs, ImageInputs) else "no"
        raise MetaftError(f"init: {init} takes pictures of {wants} channels, and {dataset.name} has {own.channels}")
    assert isinstance(dataset, ClassPool)
    return dataclasses.replace(dataset, inputs=dataclasses.replace(own, mean=inputs.mean, std=inputs.std))
