"""A run of `metaft.meta_train`, as it was best on validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from metaft.config import Settled
from metaft.errors import CheckpointError, MetaftError
from metaft.inputs import Inputs, of_header
from metaft.models import taken, with_constants
from metaft.models.architecture import build, is_of, is_published
from metaft.options import from_mapping
from metaft.runs.folder import RunFolder
from metaft.runs.opened import open_run
from metaft.starts.base import Start, check_module

RUNS = Path("runs")


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
        shape=_shape(path, header, inputs),
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
        norm=architecture.get("norm", "adapt"),
        buffers=snapshot.buffers if is_published(architecture["name"]) else {},
    )
    _check_fits(start)
    return start


def _shape(path: Path, header: Mapping[str, Any], inputs: Inputs | None) -> list[int]:
    """Of one input. Raises CheckpointError for a run that does not say, of a module on data without such a record."""
    if inputs is not None:
        return list(inputs.shape)
    shape = header.get("shape") or header["architecture"].get("shape")  # earlier versions wrote the latter alone
    if shape is None:
        raise CheckpointError(f"init: {path} does not say what shape its inputs have")
    return list(shape)


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
    check_module(start)


def runs_at_hand(shape: Sequence[int], *, any_size: bool) -> tuple[list[tuple[int, Path]], list[str]]:
    """The meta-training runs in `runs/` on images of this shape [C, H, W], or of any size of them, each with the time
    of its best checkpoint; and why each other folder is none, in words."""
    fitting: list[tuple[int, Path]] = []
    others: list[str] = []
    for path in sorted(RUNS.iterdir()) if RUNS.is_dir() else ():
        folder = RunFolder(path)
        try:
            if not folder.best.is_file():
                continue
            takes = from_run(path).shape
        except (MetaftError, OSError) as error:  # of another kind, damaged, locked, or with a module from Python
            others.append(f"{path}: {str(error).removeprefix('init: ')}")
            continue
        if takes == list(shape) or (any_size and len(takes) == 3 and takes[0] >= shape[0]):
            fitting.append((folder.best.stat().st_mtime_ns, path))
        else:
            others.append(f"{path} takes {takes}")
    return fitting, others


def newest_run(shape: Sequence[int], *, any_size: bool) -> Path:
    """The newest of `runs_at_hand`. Raises MetaftError where there is none, naming the shapes that there are."""
    fitting, others = runs_at_hand(shape, any_size=any_size)
    if not fitting:
        why = f" ({'; '.join(others)})" if others else ""
        raise MetaftError(
            f"init: no run in {RUNS}/ takes images of shape {list(shape)}{why}; make one with "
            "python -m metaft.meta_train, name one with --init RUN, or start from --init none"
        )
    return max(fitting)[1]
