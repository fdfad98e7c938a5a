"""Which images that test a student its teacher was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import finished, one_thread, words, write_target

from metaft.config import AdaptConfig
from metaft.finetune.setup import Setup, prepared, rows_of
from metaft.finetune.taught import seen_by_teachers


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def student(data: Path, teacher: Path, **more: object) -> Setup:
    extra = (f"distil:teacher={teacher}",)
    config = AdaptConfig(init="none", data=f"folder:{data}", epochs=1, image_size=8, extra=extra, device="cpu", **more)
    return prepared(config, None, "seed")


def test_images_of_other_draws_and_folds_are_counted(tmp_path: Path) -> None:
    data = write_target(tmp_path / "t", {".": 6}, noise=60)
    drawn = {"epochs": 1, "image_size": 8, "shots_per_class": 4}
    teacher = finished([w for w in words(Path("none"), data, tmp_path / "r", **drawn) if w != "--no-probe"])
    alike = student(data, teacher, shots_per_class=4)
    assert seen_by_teachers(alike) == [], "the same draw tests on what nobody has seen"
    others = student(data, teacher, shots_per_class=4, seeds=3)
    known = set(rows_of(alike, 0).train.tolist())
    tests = [rows_of(others, draw).test.tolist() for draw in range(3)]
    seen = sum(len(known & set(test)) for test in tests)
    assert seen > 0
    (note,) = seen_by_teachers(others)
    assert note.startswith(f"the teacher {teacher} was trained on {seen} of the {sum(map(len, tests))} images")
    (note,) = seen_by_teachers(student(data, teacher))
    assert "was trained on 12 of the 18 images" in note, "of all folds together each image is tested once"
    (note,) = seen_by_teachers(student(data, teacher / "classifier.safetensors", shots_per_class=4))
    assert "does not say what it was trained on" in note
    changed = dataclasses.replace(alike.target, labels=alike.target.labels.flip(0))
    (note,) = seen_by_teachers(alike._replace(target=changed))
    assert "was trained on other data" in note
