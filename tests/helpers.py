"""Small runs and small data that several test files share."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import resource
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metaft import adapt, choose, compare, compress, evaluate, export, look, meta_train, models, predict, search
from metaft.config import (
    AdaptConfig,
    ChooseConfig,
    CompareConfig,
    CompressConfig,
    EvaluateConfig,
    ExportConfig,
    LookConfig,
    MetaTrainConfig,
    PredictConfig,
    SearchConfig,
    Settled,
)
from metaft.inputs import ImageInputs
from metaft.runs.folder import RunFolder
from metaft.tasks.pool import ClassPool
from metaft.tasks.sinusoid import SinusoidTasks

COMMANDS: dict[str, Any] = {
    "meta_train": meta_train, "evaluate": evaluate, "adapt": adapt, "predict": predict, "export": export,
    "choose": choose, "compare": compare, "look": look, "search": search, "compress": compress,
}  # fmt: skip

CONFIGS = [
    MetaTrainConfig,
    EvaluateConfig,
    AdaptConfig,
    PredictConfig,
    ExportConfig,
    ChooseConfig,
    CompareConfig,
    CompressConfig,
    LookConfig,
    SearchConfig,
]
"""The settings of each command."""

SINUSOID: dict[str, Any] = {
    "dataset": "sinusoid",
    "shots": 5,
    "query_shots": 5,
    "meta_batch": 3,
    "width": 4,
    "inner_lr": 0.02,
    "iterations": 7,
    "outer_lr": 0.01,
    "eval_every": 3,
    "eval_episodes": 40,  # two chunks of a validation, so that there is a middle to stop in
    "test_query_shots": 5,
    "test_inner_steps": 2,
    "test_episodes": 40,
    "log_every": 2,
    "checkpoint_every": 2,
    "device": "cpu",
}
"""A run of a fifth of a second, in which steps, validations, rows and checkpoints do not coincide."""

IMAGES: dict[str, Any] = {
    "ways": 3,
    "shots": 1,
    "query_shots": 2,
    "meta_batch": 2,
    "model": "conv4",
    "width": 4,
    "iterations": 5,
    "outer_lr": 0.01,
    "eval_every": 2,
    "eval_episodes": 4,
    "test_query_shots": 2,
    "test_episodes": 4,
    "log_every": 2,
    "checkpoint_every": 3,
    "device": "cpu",
}
"""The same for images of `pool` or `write_folder`."""

ADAPT: dict[str, Any] = {"epochs": 3, "lr": 0.02, "batch_size": 7, "device": "cpu"}
"""Fine-tuning of a tenth of a second, whose last batch is smaller than the others."""

TARGET = ("apple", "c d", "βητα")
"""Class folders of `write_target`, sorted."""


def settled(**changes: Any) -> Settled:
    """The settings of a run on images with nothing open."""
    chosen: dict[str, Any] = {
        "rotate": False, "ways": 5, "shots": 1, "query_shots": 5, "meta_batch": 16, "model": "conv4", "width": 64,
        "outer_optimizer": "adam", "outer_lr": 3e-3, "outer_schedule": "cosine", "iterations": 1500, "eval_every": 250,
        "test_ways": 5, "test_shots": 1, "test_query_shots": 15, "test_inner_steps": 3,
    }  # fmt: skip
    return Settled(**{**chosen, **changes})


def sinusoid(out: Path | None = None, **changes: Any) -> MetaTrainConfig:
    return MetaTrainConfig(**{**SINUSOID, "out": None if out is None else str(out), **changes})


def images(out: Path | None = None, **changes: Any) -> MetaTrainConfig:
    """Settings of `IMAGES`; without a model, which a module from Python is in the place of, without its width too."""
    if "model" in changes and changes["model"] is None:
        changes = {"width": None, **changes}
    return MetaTrainConfig(**{**IMAGES, "out": None if out is None else str(out), **changes})


def options(settings: dict[str, Any], **changes: Any) -> list[str]:
    """The same settings as words of a command line."""
    words: list[str] = []
    for name, value in {**settings, **changes}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def pool(side: int = 8, channels: int = 1) -> ClassPool:
    """Six classes to train on, four for validation, four for test; ten noisy pictures of each."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (14, 1, channels, side, side))
    pictures = (patterns + rng.integers(0, 56, (14, 10, channels, side, side))).astype(np.uint8)
    return ClassPool(
        name=f"squares-{side}",
        images=torch.from_numpy(pictures.reshape(140, channels, side, side)),
        class_names=tuple(f"class {c}" for c in range(14)),
        starts=np.arange(14) * 10,
        counts=np.full(14, 10),
        splits={"train": np.arange(6), "val": np.arange(6, 10), "test": np.arange(10, 14)},
        inputs=ImageInputs(channels, side, side),
    )


def write_folder(path: Path) -> Path:
    """The pool's pictures as a folder of class folders with train/, val/ and test/."""
    data = pool()
    for split, classes in data.splits.items():
        for c in classes:
            (path / split / f"class{c:02d}").mkdir(parents=True)
            for i in range(10):
                picture = data.images[data.starts[c] + i, 0].numpy()
                Image.fromarray(picture).save(path / split / f"class{c:02d}" / f"{i}.png")
    return path


def write_target(
    path: Path,
    parts: Mapping[str, int],
    *,
    classes: Sequence[str] = TARGET,
    side: int = 8,
    channels: int = 1,
    dark: bool = False,
    noise: int = 150,
) -> Path:
    """So many pictures of each class in each part ("." for none): bright ink on black, or the same dark on bright.

    Each class has a template inside a frame of paper; the more noise, the harder they are to tell apart.
    """
    templates = np.random.default_rng(5).integers(0, 256 - noise, (len(classes), side - 2, side - 2, channels))
    for part, count in parts.items():
        rng = np.random.default_rng([side, *part.encode()])
        for template, name in zip(templates, classes, strict=True):
            folder = path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.zeros((side, side, channels), np.uint8)
                pixels[1:-1, 1:-1] = template + rng.integers(0, noise, template.shape)
                pixels = 255 - pixels if dark else pixels
                Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(folder / f"{i:02d}.png")
    return path


def pixels_of(files: Sequence[Path]) -> Tensor:
    """Grey pictures as they are on the disk: uint8 [n, 1, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(Image.open(file))[None] for file in files]))


def files_of(folder: Path) -> tuple[list[Path], np.ndarray]:
    """(every picture in a folder of class folders, by class and name; the number of its class)."""
    files = sorted(folder.rglob("*.png"))
    names = sorted({file.parent.name for file in files})
    return files, np.array([names.index(file.parent.name) for file in files])


def meta_trained(out: Path, squares: Path, **changes: Any) -> Path:
    """A finished meta-training run on the pictures of `write_folder`, without pictures of its own.

    By the engine that needs the least time for so little: what matters is what the run leaves.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
        settings = {**IMAGES, "engine": "vmap", "dataset": f"folder:{squares}", "image_size": 8, "out": out}
        assert meta_train.main(options(settings, **changes)) == 0
    return out


def words(init: Path, data: Path, out: Path, **changes: Any) -> list[str]:
    """A command line of metaft.adapt. Settings that are None are left away."""
    settings = {**ADAPT, "init": init, "data": f"folder:{data}", **changes, "out": out}
    # Without the probe, which has tests of its own.
    return ["--no-probe", *options({k: v for k, v in settings.items() if v is not None})]


def inner_words(init: Path, data: Path, out: Path, **changes: Any) -> list[str]:
    """The same for the run's own inner loop."""
    return words(init, data, out, **{"method": "inner", "epochs": None, "lr": None, "batch_size": None, **changes})


def finished(argv: list[str]) -> Path:
    """The run folder, which is the last word, of such a command line that has been run, without pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.finetune.report.draw_pictures", lambda *_: [])
        assert adapt.main(argv) == 0
    return Path(argv[-1])


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether named tensors are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Inside, runs compute in float64: models are built in it, and data come in it.

    For runs that take the same steps in other ways (chunks, ranks, engines) and are compared as a whole. In float32 no
    bound follows: Adam moves an entry by the sign of its gradient, even where that is a rounding error, so two runs
    part by up to the rate in each step. In float64 such an entry is below Adam's eps, and stays.
    """
    build, functional, normalise, points = (
        models.build, models.functional, ImageInputs.__call__, SinusoidTasks._tensor
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", functools.partial(build, dtype=torch.float64))
        patch.setattr(models, "functional", lambda module, **more: functional(module.double(), **more))
        patch.setattr(ImageInputs, "__call__", lambda self, images: normalise(self, images).double())
        patch.setattr(SinusoidTasks, "_tensor", lambda self, values: points(self, values).double())
        yield


SAME_RUN = 1e-9
"""Relative difference of two runs in float64 that add up in another order: 2^-53 times some hundred roundings in each
of a few steps is 1e-13, and the rest is room for what inner loops and small denominators make of it. A task that is
left out, a rate or a chunk that is wrong moves the first digits."""


def rounded_alike(found: Any, expected: Any, rel: float = SAME_RUN) -> bool:
    """Whether two pieces of plain data are equal, but for rounding of their floats."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(rounded_alike(found[k], v, rel) for k, v in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(functools.partial(rounded_alike, rel=rel), found, expected))
    return found == (pytest.approx(expected, rel=rel, abs=rel) if isinstance(expected, float) else expected)


ONE_PASS = 1e-4
"""Difference of what one forward pass of a small network gives in float32 when it is added up in another order, as a
batch of another size is: 2^-24 times some hundred roundings in a row, on values of up to ten. Another weight, or
another image in the batch, moves the second digit."""


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Inside, torch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> contextlib.AbstractContextManager[None]:
    """For what is slow on two (see conftest.py), whatever the caller has asked for."""
    return on_threads(1)


def adapted(path: Path) -> dict[str, Any]:
    """All that two adapt runs of the same settings must have in common to the last bit."""
    run = RunFolder(path)
    report = (path / "report.txt").read_text(encoding="utf-8")
    return {
        "classifier": run.classifier.read_bytes(),
        "last": run.last.read_bytes(),
        "metrics": run.metrics.read_bytes(),
        "updates": run.updates.read_bytes() if run.updates.exists() else b"",
        "config": run.config.read_bytes(),
        "result": timeless(json.loads(run.result.read_text(encoding="utf-8"))),
        "report": re.sub(r", in \d+:\d+(:\d+)?$", "", report, flags=re.MULTILINE),
    }


def timeless(value: Any) -> Any:
    """Plain data without what a clock said, at any depth."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k != "seconds"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def one_line(capsys: pytest.CaptureFixture[str], *parts: object) -> str:
    """The one line that a command left, on stderr, which holds all the parts."""
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("metaft: error: ")
    for part in parts:
        assert str(part) in lines[0]
    assert said.out == ""
    return lines[0]


def untimed(result: dict[str, Any]) -> dict[str, Any]:
    """A result without clock times, and without what it says of the machine (how many threads, say)."""
    return {k: v for k, v in result.items() if k not in ("seconds", "tasks_per_second", "environment")}


def remains(path: Path) -> dict[str, Any]:
    """All that two runs of the same settings must have in common to the last bit."""
    run = RunFolder(path)
    return {
        "last": run.last.read_bytes(),
        "best": run.best.read_bytes(),
        "metrics": run.metrics.read_bytes(),
        "updates": run.updates.read_bytes() if run.updates.exists() else b"",
        "config": run.config.read_bytes(),
        "result": untimed(json.loads(run.result.read_text())),
    }


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Inside, a file that grows beyond `size` bytes meets a full disk.

    The limit is the whole process's: it must end before pytest writes again, whose own output may be a longer file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def base_of(array: Any) -> Any:
    """What holds an array's memory."""
    while isinstance(array, (np.ndarray, memoryview)):
        owner = array.base if isinstance(array, np.ndarray) else array.obj
        if owner is None:
            return None
        array = owner
    return array


class Convolutions(TorchDispatchMode):
    """Takes down the types that convolutions of any kind are given, and those of inputs narrower than the stride where
    there is a gradient in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []
        self.narrow: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(func):
            self.types += [arg.dtype for arg in args if isinstance(arg, torch.Tensor)]
            if "backward" in str(func) and args[-1][1] and args[1].shape[-1] < args[4][-1]:
                self.narrow.add(args[1].dtype)
        return func(*args, **(kwargs or {}))
