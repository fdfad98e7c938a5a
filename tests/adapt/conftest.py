"""Runs that the tests of metaft.adapt start from; made once for each worker."""

from __future__ import annotations

import contextlib
import io
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import OWN, Seen
from helpers import (
    TARGET,
    adapted,
    finished,
    meta_trained,
    sinusoid,
    words,
    write_folder,
    write_target,
)
from torch import Tensor, nn

from metaft import meta_train
from metaft.errors import MetaftWarning
from metaft.finetune import report, study


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest of a small run."""
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    monkeypatch.setattr(report, "draw_pictures", lambda *_: [])


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "squares")


class Runs(dict[str, Path]):
    """Finished meta-training runs, each made when it is first asked for: one per algorithm, one on colour images, one
    that takes no images."""

    def __init__(self, base: Path, squares: Path) -> None:
        super().__init__()
        self._base, self._squares = base, squares

    def __missing__(self, name: str) -> Path:
        path = self._base / name
        said = io.StringIO()  # a test that asks first may read what its own command says
        with (
            pytest.MonkeyPatch.context() as patch,
            warnings.catch_warnings(),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            patch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
            warnings.simplefilter("ignore", MetaftWarning)  # of iMAML, whose default is not made for eight pixels
            if name == "curve":
                meta_train.run(sinusoid(path))
            elif name == "colour":
                meta_trained(path, self._squares, channels=3)
            else:
                meta_trained(path, self._squares, algorithm=name, **OWN[name])
        self[name] = path
        return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, squares: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), squares)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of each of three classes to train and validate on; six, three and six to test."""
    path = write_target(tmp_path_factory.mktemp("data") / "Ziel ü", {"train": 10, "test": 6})
    for file in sorted((path / "test" / TARGET[1]).iterdir())[:3]:
        file.unlink()
    return path


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Path], data: Path) -> Path:
    """A finished run over three draws of eight images each. Tests copy it before they change it."""
    return finished(words(runs["maml"], data, tmp_path_factory.mktemp("runs") / "läuft", shots_per_class=8, seeds=3))


@pytest.fixture
def copy(tmp_path: Path, done: Path) -> Path:
    """A finished run of one's own to break."""
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Fills up with the fits of a run while it goes."""
    seen: list[Seen] = []
    real = study.fit

    def fit(body: nn.Module, inputs: Any, images: Any, labels: Tensor, n: int, recipe: Any, **k: Any) -> Any:
        before = {name: p.detach().clone() for name, p in body.named_parameters()}
        fitted = real(body, inputs, images, labels, n, recipe, **k)
        train, val = (part[torch.arange(len(part))] for part in (images, k["val_examples"]))
        seen.append(Seen(before, train, labels, val, k["val_labels"], recipe, k["seed"], fitted))
        return fitted

    monkeypatch.setattr(study, "fit", fit)
    return seen


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Path], data: Path) -> tuple[list[str], Any]:
    """(settings, what is left) of a run over two draws with validation that nobody disturbed."""
    argv = words(runs["maml"], data, tmp_path_factory.mktemp("runs") / "whole", seeds=2)
    return argv[:-2], adapted(finished(argv))
