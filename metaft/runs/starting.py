"""What training begins with: a first snapshot, or the settings and the last checkpoint of a run that was begun."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence

from metaft.config import MetaTrainConfig, read_toml
from metaft.dist.ranks import Ranks
from metaft.engines import Engine
from metaft.errors import MetaftError
from metaft.models.convolution import Form
from metaft.options import flat, from_mapping
from metaft.runs.assemble import Parts, fill, header, with_member
from metaft.runs.compute import convolution_forms
from metaft.runs.folder import RunFolder
from metaft.runs.machine import say_what_changed
from metaft.runs.opened import open_run
from metaft.runs.snapshot import Snapshot, begin
from metaft.runs.training import draw
from metaft.starts.names import in_full
from metaft.support import places
from metaft.types import Dataset, Source


def resumed_settings(
    before: MetaTrainConfig,
    config: MetaTrainConfig | None,
    dataset: Dataset | None,
    classes: Mapping[str, Sequence[str]],
) -> MetaTrainConfig:
    """The settings of a run, changed by what was given; a data set that moved is named as the run does."""
    if config is not None and ":" in config.learner.algorithm:
        config = with_member(config, plugin=before.learner.plugin, hyper=before.inner.hyper)
    given = {} if config is None else {k: v for k, v in flat(config).items() if v not in (None, ())}
    if set(given.get("hyper", ())) <= set(before.inner.hyper):  # a run adds what it found out itself
        given.pop("hyper", None)
    named = {} if dataset is None else {"dataset": dataset.name}
    config = in_full(dataclasses.replace(before, **{**given, **named, "out": None}))
    if config.compute.engine == "tune" and config.compute.task_chunk == before.compute.task_chunk:
        config = dataclasses.replace(config, task_chunk=None)  # as it was chosen once, by it or another rule
    names = [name for part in classes.values() for name in part]
    data = places.as_run_names(config.data.dataset, before.data.dataset, config.data.data_root, names)
    return dataclasses.replace(config, dataset=data)


def reopened(folder: RunFolder) -> tuple[MetaTrainConfig, Snapshot | None]:
    """A run that was begun: its settings and last checkpoint, if it got so far."""
    folder.make_folders()
    folder.mend()
    if not folder.last.exists():
        return from_mapping(MetaTrainConfig, read_toml(folder.config), origin=str(folder.config)), None
    _, config, snapshot = open_run(folder.path, which="last", field="resume")
    return config, snapshot


def check_split(run: RunFolder, snapshot: Snapshot, parts: Parts) -> None:
    """Raises MetaftError where the data are split otherwise than when the run began."""
    if snapshot.header["split_hash"] != parts.dataset.split_hash:
        raise MetaftError(f"dataset: the class split of {parts.dataset.name} is not the one {run.path} began with")


def start_of(
    run: RunFolder, parts: Parts, mapped: Engine, train: Source, snapshot: Snapshot | None, ranks: Ranks
) -> tuple[Snapshot, dict[str, Form]]:
    """What training begins with, on the run's device: a first snapshot, or the one that the run had; and the forms of
    its convolutions."""
    seed = parts.config.compute.seed
    now, forms_before = header(parts, mapped, ranks.count), None
    if snapshot is None:
        snapshot = ranks.on_first(lambda: begin(parts.algorithm, seed, now, parts.model))
    else:
        say_what_changed(snapshot.header["environment"], now["environment"])
        if snapshot.header["environment"] == now["environment"]:
            forms_before = snapshot.header.get("convolutions")
        print(f"resuming {run.path} at step {snapshot.position.step}", file=sys.stderr)
    start = fill(parts, snapshot)
    share = ranks.share(range(parts.config.task.meta_batch))
    chosen = ranks.on_first(
        lambda: convolution_forms(parts, mapped, start, lambda: draw(parts.algorithm, train, seed, share), forms_before)
    )
    return dataclasses.replace(start, header={**now, "convolutions": chosen} if chosen else now), chosen
