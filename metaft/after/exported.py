"""An exported model in the place of the classifier that it came from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from metaft.after.formats import FORMATS, Run
from metaft.errors import CheckpointError, MetaftError
from metaft.finetune.classifier import Classifier, Predictor, in_batches, load
from metaft.inputs import of_header
from metaft.inputs.base import Examples
from metaft.support.modes import in_usual_modes
from metaft.support.paths import local


class Exported(Predictor):
    """A file of `metaft.export`."""

    def __init__(self, run: Run, about: dict[str, Any]) -> None:
        inputs = of_header(about)
        assert inputs is not None, "every export is written with them"
        self.inputs, self.class_names, self.run, self.about = inputs, tuple(about["class_names"]), run, about

    @in_usual_modes
    def logits(self, examples: Examples, at_once: int | None = None) -> Tensor:
        def checked(raw: Tensor) -> Tensor:
            self.inputs.check(raw)
            return self.run(raw.contiguous())

        return in_batches(checked, examples, self.inputs, at_once)


def exported_file(run: Path | str) -> Path | None:
    """The model file that a path names, or that lies in the folder that it names; None where it names no export."""
    path = local(run)
    names = [format.file for format in FORMATS.values()]
    if os.path.isdir(path):
        return next((path / name for name in names if os.path.exists(path / name)), None)
    return path if path.suffix in {Path(name).suffix for name in names} else None


def open_exported(path: Path) -> Exported:
    """Raises CheckpointError for a file that metaft.export did not write, or a damaged one, and MetaftError where the
    package is missing that runs it."""
    if not os.path.exists(path):
        raise CheckpointError(f"{path} does not exist")
    format = next(format for format in FORMATS.values() if Path(format.file).suffix == path.suffix)
    return Exported(*format.opened(path))


def predictor_of(run: Path | str, device: str = "cpu", asked: str = "auto") -> Classifier | Exported:
    """The classifier of an adapt run on a device, or an exported one; that runs on a CPU, and raises MetaftError where
    another was `asked` for."""
    path = exported_file(run)
    if path is not None and str(device).startswith("cuda") and asked != "auto":
        raise MetaftError(f"device: an exported model runs on a CPU (given {asked})")
    return load(run, device=device) if path is None else open_exported(path)
