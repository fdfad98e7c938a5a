"""What the tests of metaft.adapt share: the runs' settings, what fits were given, and readings of a run folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from metaft.inputs import ImageInputs
from metaft.runs.snapshot import load_snapshot
from metaft.types import Params

Text = pytest.CaptureFixture[str]

OWN: dict[str, dict[str, Any]] = {
    "maml": {"inner_lr": 0.3, "test_inner_steps": 2},
    "fomaml": {"inner_lr": 0.2, "inner_optimizer": "nesterov", "adapt_norm": False, "test_inner_steps": 4},
    "anil": {"inner_lr": 0.3, "inner_augment": "shift", "test_inner_steps": 2},
    "boil": {"inner_lr": 0.3, "adapt_norm": False, "test_inner_steps": 2},
    "meta-sgd": {"inner_lr": 0.2, "test_inner_steps": 2},
    "maml++": {"inner_lr": 0.3, "inner_steps": 2, "test_inner_steps": 3},
    "meta-curvature": {"inner_lr": 0.2, "test_inner_steps": 2},
    "reptile": {"inner_lr": 0.01, "inner_steps": 3, "test_inner_steps": 3},
    "imaml": {"inner_lr": 0.1, "inner_steps": 3, "test_inner_steps": 2},
    "cavia": {"test_inner_steps": 2},
    "unicorn-maml": {"inner_lr": 0.3, "inner_steps": 2, "test_inner_steps": 2},
    "proto-maml": {"inner_lr": 0.05, "test_inner_steps": 2},
    "protonet": {},
    "matching-net": {},
    "baseline": {"inner_lr": 0.3, "test_inner_steps": 20},
    "baseline++": {"inner_lr": 0.3, "test_inner_steps": 20},
}
"""Settings of the runs that are no algorithm's defaults."""

GREY = ImageInputs(1, 8, 8)


def result_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one fit was given, and what it made of it."""

    body: Params
    images: Tensor
    labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    recipe: Any
    seed: int
    fitted: Any


def each(images: Tensor) -> set[bytes]:
    return {one.numpy().tobytes() for one in images}


def learned(run: Path) -> Params:
    """What a meta-training run learned, as its best checkpoint holds it."""
    return load_snapshot(run / "checkpoints/best.safetensors").meta


def put(run: Path, place: Path, age: float) -> None:
    """A copy of a run in a folder of runs, whose best checkpoint is so many seconds old."""
    shutil.copytree(run, place)
    now = time.time() - age
    os.utime(place / "checkpoints/best.safetensors", (now, now))


MACRO = ("accuracy", "macro_precision", "macro_recall", "macro_f1")


def figures(labels: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, Any]:
    """Confusion, precision, recall and F1 from their definitions."""
    confusion = np.zeros((classes, classes), int)
    for true, found in zip(labels, predicted, strict=True):
        confusion[true, found] += 1
    per_class = []
    for c in range(classes):
        right, called, there = confusion[c, c], confusion[:, c].sum(), confusion[c].sum()
        per_class.append((there, right / called if called else 0.0, right / there, 2 * right / (called + there)))
    macro = np.mean([row[1:] for row in per_class], axis=0)
    accuracy = np.trace(confusion) / len(labels)
    return {
        "confusion": confusion.tolist(),
        "per_class": per_class,
        **dict(zip(MACRO, (accuracy, *macro), strict=True)),
    }


KEYS = """
command version init data classes train_images test_images accuracy macro_f1 macro_precision macro_recall
confusion scratch seconds per_class gain draws notes
"""


def contents(path: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
