"""A meta-training run as it lies in its folder: its settings and one of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from metaft.config import MetaTrainConfig, read_toml
from metaft.errors import CheckpointError
from metaft.runs.folder import RunFolder
from metaft.runs.recorded import of_run
from metaft.runs.snapshot import Snapshot, load_snapshot


def open_run(path: Path, *, which: str = "best", field: str = "run") -> tuple[RunFolder, MetaTrainConfig, Snapshot]:
    """A meta-training run's settings and one of its checkpoints.

    Raises MetaftError, naming `field`, for another command's run, and CheckpointError with the checkpoint to use
    instead of one that cannot be read.
    """
    run = RunFolder.open(path)
    config = of_run(MetaTrainConfig, run.config, field)
    return run, config, read_snapshot(run, run.last if which == "last" else run.best)


def read_kept(run: RunFolder) -> list[Snapshot]:
    """The checkpoints of a run's ensemble. Raises CheckpointError where it has none, or one cannot be read."""
    kept = run.all_kept()
    if len(kept) < 2:
        keeps = read_toml(run.config).get("keep_best", 1)
        why = "metaft.meta_train --keep-best 5 keeps the five best checkpoints"
        if isinstance(keeps, int) and keeps > 1:
            why = f"it was to keep {keeps} checkpoints, one at each validation, and has come to {max(len(kept), 1)}"
        raise CheckpointError(f"checkpoint: {run.path} kept no ensemble; {why}")
    return [read_snapshot(run, path) for path in kept.values()]


def read_snapshot(run: RunFolder, wanted: Path) -> Snapshot:
    """One of a run's checkpoints. Raises CheckpointError with the checkpoint to use instead."""
    return run.load(wanted, load_snapshot, lambda snapshot: f"of step {snapshot.position.step}")
