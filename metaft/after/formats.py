"""The kinds of file that a classifier can become, and how such files compute."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from metaft._version import __version__
from metaft.after.whole import Whole
from metaft.errors import CheckpointError, MetaftError, words_of
from metaft.support.foreign import in_our_words, ran_out

META = "metaft"
"""The name of a file's metadata: JSON of what `about` says."""

Run = Callable[[Tensor], Tensor]
"""Raw inputs [n, ...] to logits [n, classes], on the CPU."""


@dataclasses.dataclass(frozen=True)
class Format:
    """One kind of file."""

    file: str
    """Its name in the folder of an export."""
    kind: str
    """What such a file is, in words."""
    module: str
    """Has `write(whole, path, about)` and `opened(path) -> (Run, the text under `META`, if any)`."""
    needs: tuple[str, ...] = ()
    """Packages that the extra `export` brings, to write it."""
    runs_with: tuple[str, ...] = ()
    """Those of them that it takes to run it."""

    def check(self) -> None:
        """Raises MetaftError where a package is missing that it takes to write such a file."""
        self._module(self.needs)

    def write(self, whole: Whole, path: Path, about: Mapping[str, Any]) -> None:
        """Raises MetaftError where the model cannot be exported so, or a package is missing."""
        module = self._module(self.needs)
        with in_our_words(f"format: the model cannot be exported to {self.file}", passing=(OSError,)), quiet():
            module.write(whole, path, about)

    def opened(self, path: Path) -> tuple[Run, dict[str, Any]]:
        """How the file computes, and what it says of itself. Raises MetaftError where it cannot be read."""
        module = self._module(self.runs_with)
        try:
            with quiet():
                run, about = module.opened(path)
        except Exception as error:  # one for each kind of damage
            if ran_out(error):
                raise
            raise CheckpointError(f"{path}: cannot be read as {self.kind} ({words_of(error)[:200]})") from None
        if not about:
            raise CheckpointError(f"{path}: is no model that metaft.export wrote")
        return run, json.loads(about)

    def _module(self, packages: tuple[str, ...]) -> Any:
        missing = [name for name in packages if not is_there(name)]
        if missing:
            raise MetaftError(
                f"format: {self.file} needs {', '.join(missing)}, not installed; pip install 'metaft[export]'"
            )
        return importlib.import_module(self.module)


FORMATS: dict[str, Format] = {
    "onnx": Format("model.onnx", "ONNX", "metaft.after.onnx", ("onnx", "onnxscript", "onnxruntime"), ("onnxruntime",)),
    "torch-export": Format("model.pt2", "torch.export's", "metaft.after.torch_export"),
}


def is_there(package: str) -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec(package) is not None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of metaft, torch and these packages, as they are installed."""
    others = {name: importlib.metadata.version(name) for name in ("torch", *packages)}
    return {"metaft": __version__, **others}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, what converters say of their own deprecations and progress is kept from the user."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
