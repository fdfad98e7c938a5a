"""Data without a test part: cross-validation, in which each image is tested once, and a classifier of all of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from adapting import Text, result_of
from helpers import one_line, words, write_target
from hypothesis import given
from hypothesis import strategies as st

import metaft
from metaft import adapt
from metaft.finetune import study
from metaft.finetune.scores import pooled, scores
from metaft.targets.draws import fold


@pytest.fixture
def whole(data: Path, tmp_path: Path) -> Path:
    """Class folders alone."""
    return Path(shutil.copytree(data / "train", tmp_path / "all"))


@given(st.lists(st.integers(2, 9), min_size=2, max_size=5), st.integers(2, 5), st.integers(0, 9))
def test_each_image_is_in_the_test_of_one_fold_and_classes_are_spread_evenly(
    counts: list[int], count: int, seed: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    rows = np.flatnonzero(labels >= 0)
    parts = [fold(labels, rows, count, number, seed) for number in range(count)]
    assert sorted(np.concatenate([test for _, test in parts]).tolist()) == rows.tolist()
    for train, test in parts:
        assert sorted([*train, *test]) == rows.tolist()
    for label in range(len(counts)):
        sizes = [int((labels[test] == label).sum()) for _, test in parts]
        assert max(sizes) - min(sizes) <= 1
    sizes = [len(test) for _, test in parts]
    assert max(sizes) - min(sizes) <= 1
    again = [fold(labels, rows, count, number, seed)[1].tolist() for number in range(count)]
    assert again == [test.tolist() for _, test in parts]


def test_other_seeds_have_other_folds() -> None:
    """And none has the order of the files, in which pictures of one kind may follow one another."""
    labels = np.repeat([0, 1], 20)
    drawn = [fold(labels, np.arange(40), 4, 0, seed)[1].tolist() for seed in range(3)]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    in_order = [i for i in range(40) if i % 4 == 0]
    assert in_order not in drawn


def test_scores_of_parts_together_are_those_of_all_images() -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 3, 50), rng.dirichlet([1, 1, 1], 50)
    names = ("a", "b", "c")
    parts = [scores(labels[i::3], probabilities[i::3], names) for i in range(3)]
    together, whole = pooled(parts, names), scores(labels, probabilities, names)
    assert together.keys() == whole.keys()
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "macro_precision", "calibration_error"):
        assert together[key] == pytest.approx(whole[key]), key
    assert together["confusion"] == whole["confusion"] and together["per_class"] == whole["per_class"]


def test_without_a_test_part_each_image_is_tested_once_and_the_classifier_is_of_all(
    runs: dict[str, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[list[int]] = []
    trained: list[int] = []
    real, real_fit = study.test, study.fit
    monkeypatch.setattr(study, "test", lambda c, t, rows, *a, **k: tested.append([*rows]) or real(c, t, rows, *a, **k))
    monkeypatch.setattr(study, "fit", lambda b, i, x, *a, **k: trained.append(len(x)) or real_fit(b, i, x, *a, **k))
    argv = words(runs["maml"], whole, tmp_path / "o", shots_per_class=None, epochs=2, seeds=2)
    assert adapt.main(argv) == 0
    result = result_of(tmp_path / "o")
    images = sum(len(list(folder.iterdir())) for folder in whole.iterdir())
    assert (result["folds"], result["test_images"], result["mean"]["draws"]) == (3, images, 2)
    for draw in range(2):  # of three folds of two starts
        for start in range(2):
            folds = tested[6 * draw + start : 6 * draw + 6 : 2]  # the fit on all images is tested on none
            assert sorted(row for rows in folds for row in rows) == list(range(images))
    assert len(trained) == 13
    assert trained[0] == images
    assert sum(map(sum, result["confusion"])) == images
    assert any("3-fold stratified cross-validation" in note for note in result["notes"])
    rows = [json.loads(line) for line in (tmp_path / "o/metrics.jsonl").read_text().splitlines()]
    assert {row["fold"] for row in rows} == {0, 1, 2, "all"}
    assert len(metaft.load(tmp_path / "o").class_names) == 3
    assert not (tmp_path / "o/plots/mistakes.png").exists()


@pytest.mark.parametrize(("images", "validate"), [(14, 0), (15, 9)])
def test_the_classifier_that_is_kept_is_stopped_as_those_that_were_tested(
    images: int, validate: int, runs: dict[str, Path], tmp_path: Path
) -> None:
    """A fold of three classes of 14 has nine of each to train on, too few to set some aside, though 14 would do."""
    data = write_target(tmp_path / "d", {".": images})
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", shots_per_class=None, epochs=2, patience=2)) == 0
    rows = [json.loads(line) for line in (tmp_path / "o/metrics.jsonl").read_text().splitlines()]
    assert {"val_loss" in row for row in rows} == {validate > 0}
    (note,) = (note for note in result_of(tmp_path / "o")["notes"] if "cross-validation" in note)
    assert note.endswith(f"is kept is trained on all{' but 9, which validate it' if validate else ''}")


@pytest.mark.parametrize("after", [1, 3, 7, 13])
def test_stopped_in_a_fold_it_ends_with_the_same_bytes(
    after: int, runs: dict[str, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: str) -> list[str]:
        return words(runs["maml"], whole, tmp_path / out, shots_per_class=None, epochs=2)

    assert adapt.main(run("whole")) == 0
    epochs, real = [0], study.Journal.epoch

    def count(self: study.Journal, *args: object) -> None:
        real(self, *args)  # type: ignore[arg-type]
        epochs[0] += 1
        if epochs[0] == after:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(study.Journal, "epoch", count)
        assert adapt.main(run("stopped")) == 143
    assert adapt.main(["--resume", str(tmp_path / "stopped")]) == 0
    for name in ("metrics.jsonl", "classifier.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    results = [result_of(tmp_path / out) for out in ("whole", "stopped")]
    assert results[0]["confusion"] == results[1]["confusion"]
    assert results[0]["gain"]["accuracy"] == results[1]["gain"]["accuracy"]


def test_a_class_with_a_single_image_is_named(runs: dict[str, Path], whole: Path, tmp_path: Path, capsys: Text) -> None:
    folder = sorted(whole.iterdir())[1]
    for file in sorted(folder.iterdir())[1:]:
        file.unlink()
    assert adapt.main(words(runs["maml"], whole, tmp_path / "o", shots_per_class=None)) == 2
    one_line(capsys, f"data: class {folder.name!r} has 1 image, and without a test part needs 2 or more")
