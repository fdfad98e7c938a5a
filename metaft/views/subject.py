"""What is looked at: a finished run of meta_train or adapt, or a start."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metaft.after.pictures import data_of
from metaft.config import read_toml
from metaft.errors import CheckpointError, MetaftError
from metaft.finetune import classifier
from metaft.finetune.classifier import Classifier
from metaft.inputs import Reading
from metaft.models.architecture import build, filled, is_of
from metaft.models.blocks import blocks_of
from metaft.models.functional import probe_of
from metaft.models.handed import copied
from metaft.models.head import body_of
from metaft.options import Settings, options
from metaft.runs.assemble import Parts, assemble, fill
from metaft.runs.folder import RunFolder, read_rows
from metaft.runs.opened import open_run
from metaft.runs.recorded import CONFIGS, of_run
from metaft.runs.snapshot import Snapshot
from metaft.starts.base import Start
from metaft.starts.names import is_run, label_of
from metaft.starts.open import open_start
from metaft.starts.run import from_run
from metaft.support.paths import absolute, local
from metaft.targets import Rows, Target
from metaft.tasks.folder import inputs_of
from metaft.testing import ordinary
from metaft.types import Episode, Split
from metaft.views.checked import check


class Built(NamedTuple):
    """A module with its values."""

    module: nn.Module
    head: str
    blocks: tuple[tuple[str, ...], ...]
    """Names of the backbone's parameters in the module, block by block."""
    x: Tensor
    """One input [1, ...], as the module takes it."""


@dataclasses.dataclass(eq=False)
class Subject:
    """What views are of; what takes time is read when first asked for."""

    name: str
    """A run's folder or a start, without the way to it."""
    command: Literal["meta_train", "adapt", "start"]
    folder: RunFolder | None = None
    config: Settings | None = None
    result: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What `result.json` holds, checked; empty for a start."""
    module: nn.Module | None = None
    """The user's own, where the run was made with one."""
    opened: Start | None = None
    """A start that is looked at."""
    landscape: bool = False
    """Whether the view of that name is wanted, which takes minutes."""
    explain: tuple[Reading, ...] = ()
    """Images whose labels are to be explained."""
    data_root: str | None = None
    """Where a run's data lie, if they moved."""

    @functools.cached_property
    def start(self) -> Start:
        """The start itself, or a meta-training run as one. Raises MetaftError where it cannot be opened."""
        if self.opened is not None:
            return self.opened
        assert self.folder is not None and self.command == "meta_train"
        with _as_run():
            return from_run(self.folder.path, self.module)

    @functools.cached_property
    def classifier(self) -> Classifier:
        """What an adapt run left. Raises CheckpointError where it cannot be opened."""
        assert self.folder is not None
        with _as_run():
            return classifier.load(self.folder.path, module=self.module)

    @functools.cached_property
    def images(self) -> tuple[Target, Rows, bool]:
        """Of an adapt run, as `data_of` gives them: read once for all views. Raises MetaftError likewise."""
        assert self.folder is not None
        return data_of(self.folder, self.classifier, self.data_root)

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Of `metrics.jsonl`. Raises CheckpointError for one that is damaged, or no run's."""
        assert self.folder is not None
        with _as_run():
            rows = read_rows(self.folder.metrics, ["loss"] if self.command == "adapt" else ["step"])
        needed = ("draw", "epoch", "start") if self.command == "adapt" else ("kind",)
        for row in rows:
            if any(key not in row for key in needed):
                raise CheckpointError(
                    f"run: {self.folder.metrics}: a row is not one that a run writes: {str(row)[:60]}"
                )
        return rows

    @functools.cached_property
    def assembled(self) -> tuple[Parts, Snapshot]:
        """The objects of a meta-training run, its data among them, and its best checkpoint. Raises MetaftError where
        they are not to be had here."""
        assert self.folder is not None
        _, config, snapshot = open_run(self.folder.path)
        moved = {} if self.data_root is None else {"data_root": self.data_root}
        config = dataclasses.replace(config, device="cpu", **moved)  # where each machine has the same figures
        parts = assemble(
            config, module=self.module, snapshot=snapshot, classes=snapshot.header.get("classes"), loss=None
        )
        return parts, fill(parts, snapshot)

    @property
    def kept(self) -> str:
        """Of an adapt run, which epoch the classifier is of."""
        return f"epoch {self.result['starts'][0]['kept_epoch']}"

    def tasks(self, split: Split, count: int) -> list[Episode]:
        """The first `count` tasks of a split as a meta-training run is tested: the same each time. Raises as
        `assembled` does."""
        parts, _ = self.assembled
        c = parts.config
        source = parts.dataset.source(
            ways=c.test.test_ways, shots=c.test.test_shots, query_shots=c.test.test_query_shots, rotate=c.data.rotate,
            splits=(split,),
        )  # fmt: skip
        batch = ordinary(source.episodes(c.test.eval_seed, split, range(count)))
        return [Episode(*(t[i] for t in batch)) for i in range(count)]

    @functools.cached_property
    def built(self) -> Built:
        """The module with the values that it has. Raises MetaftError."""
        if self.command == "adapt":
            return _of_classifier(self.classifier)
        start = self.start
        drawn = None if start.meta else 0  # a random start's own seed is not decided yet
        module, head = build(start.architecture, drawn, module=start.module, norm=start.norm)
        if start.meta is not None:
            fresh = {name: p.detach() for name, p in module.named_parameters()}
            own = {k: v for k, v in start.meta.items() if k in fresh and v.shape == fresh[k].shape}
            module = filled(module, {**fresh, **own}, start.buffers)
        blocks = _blocks(body_of(module, head))
        dtype = next(module.parameters()).dtype
        return Built(module, head, blocks, probe_of(start.shape, dtype)[:1])

    @property
    def has_head(self) -> bool:
        """Whether the head's values are its own: those of published weights are for classes of theirs, and a run may
        have learned none."""
        if self.command == "adapt":
            return True
        return any(is_of(name, self.built.head) for name in self.start.meta or {})


def _of_classifier(found: Classifier) -> Built:
    """Without the preparation of its inputs, which has no layers."""
    module = nn.Sequential()
    module.add_module("body", found.body)
    module.add_module("head", found.head)
    blocks = tuple(tuple(f"body.{name}" for name in names) for names in _blocks(found.body))
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    return Built(module, "head", blocks, probe_of(found.inputs.shape, dtype)[:1])


def _blocks(body: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Of all its parameters, frozen ones too."""
    return blocks_of(copied(body).requires_grad_(True))


def open_subject(word: str, *, image_size: int | None = None, module: nn.Module | None = None) -> Subject:
    """What a word of the command line names. Raises MetaftError, naming `run`, for what cannot be looked at."""
    there = word != "" and is_run(word) and (os.sep in word or os.path.lexists(local(word)))
    with _as_run():
        if there:
            folder = RunFolder.open(Path(word))
            if image_size is not None:
                raise MetaftError(f"image_size: the pictures of {word} have the size of its own (given {image_size})")
            return of_folder(folder, module=module)
        size = None if word == "none" else image_size
        start = open_start(word, lambda: inputs_of(3, image_size), image_size=size, module=module)
    return Subject(label_of(word), "start", module=module, opened=start)


def of_folder(folder: RunFolder, *, module: nn.Module | None = None) -> Subject:
    """A finished run. Raises CheckpointError for one that is unfinished or damaged, or another program's."""
    path = folder.path
    values = read_toml(folder.config)
    if not folder.result.exists():
        kind = next((kind for kind, cls in CONFIGS.items() if values and values.keys() <= options(cls).keys()), None)
        if kind is None:
            raise CheckpointError(f"{path} is no run of meta_train or adapt")
        on = f"{kind} --resume {shlex.quote(str(path))}"
        if folder.compress.exists():
            on = f"compress RUN --out {shlex.quote(str(path))} --resume"
        raise CheckpointError(f"{path} is not finished, it has no result.json; go on with: python -m metaft.{on}")
    try:
        result = json.loads(folder.result.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder.result}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder.result}: not JSON ({error})") from None
    check(result, str(folder.result))
    command = result["command"]
    config = of_run(CONFIGS[command], folder.config, "run")
    return Subject(absolute(path).name, command, folder, config, result, module)


@contextlib.contextmanager
def _as_run() -> Iterator[None]:
    """Inside, an error that names another option names `run`, by which the command line says what is looked at."""
    try:
        yield
    except MetaftError as error:
        said = str(error)
        if said.startswith(("run: ", "image_size: ")):
            raise
        for prefix in ("init: ", "config: "):
            said = said.removeprefix(prefix)
        raise type(error)(f"run: {said}") from None
