"""How a result is judged: the probe, calibration, warnings, and what is said in the end."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapting import Text, result_of
from helpers import inner_words, one_line, words, write_target
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from torch import nn

import metaft
from metaft import adapt
from metaft.finetune.numbers import number_scores
from metaft.finetune.probe import probe
from metaft.finetune.scores import calibration, scores
from metaft.finetune.warned import warnings_of
from metaft.inputs import ImageInputs
from metaft.plots.reliability import calibration_figure
from metaft.starts.base import body
from metaft.starts.run import from_run


def images_of(n: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    pixels = rng.integers(0, 120, (n, 1, 8, 8)) + 40 * labels[:, None, None, None]
    return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_probe_is_scikit_learns_logistic_regression_on_frozen_features(classes: int, runs: dict[str, Path]) -> None:
    start = from_run(runs["maml"])
    inputs, backbone = ImageInputs(1, 8, 8), body(start, 0)
    images, labels = images_of(30, classes)
    fitted = probe(backbone, inputs, images, labels, classes)
    with torch.no_grad():
        features = fitted.body(inputs(images)).double().numpy()
    reference = LogisticRegression(C=1.0, max_iter=2000).fit(features, labels.numpy())
    others = images_of(12, classes, seed=1)[0]
    with torch.no_grad():
        there = fitted.body(inputs(others))
        mine = fitted.head(there).softmax(-1).numpy()
    assert np.allclose(mine, reference.predict_proba(there.double().numpy()), atol=1e-5)
    for name, p in backbone.named_parameters():
        assert torch.equal(fitted.body.state_dict()[name], p), "frozen"


@pytest.mark.parametrize("make", [words, inner_words])
def test_a_probe_stands_beside_the_start_and_the_first_one_is_the_classifier(
    make: Any, runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    argv = [word for word in make(runs["maml"], data, tmp_path / "o") if word != "--no-probe"]
    assert adapt.main(argv) == 0
    result = result_of(tmp_path / "o")
    assert [start["name"] for start in result["starts"]] == ["meta-learned", "probe", "random"]
    assert [gain["over"] for gain in result["gains"]] == ["probe", "random"]
    assert result["scratch"]["accuracy"] == result["starts"][2]["accuracy"]
    test = [file for name in sorted((data / "test").iterdir()) for file in sorted(name.iterdir())]
    labels = metaft.load(tmp_path / "o").label(test)
    right = np.mean([label == file.parent.name for label, file in zip(labels, test, strict=True)])
    assert right == result["starts"][0]["accuracy"]
    last = (tmp_path / "o/report.txt").read_text().splitlines()[-1]
    assert "The probe, a logistic regression on the same start's features, gets" in last


def test_a_start_without_a_random_one_is_compared_with_nothing(
    data: Path, runs: dict[str, Path], tmp_path: Path, capsys: Text
) -> None:
    assert adapt.main(words(runs["maml"], data, tmp_path / "both")) == 0
    capsys.readouterr()
    assert adapt.main(["--no-random", *words(runs["maml"], data, tmp_path / "alone")]) == 0
    said, both, result = capsys.readouterr().out, result_of(tmp_path / "both"), result_of(tmp_path / "alone")
    assert [start["name"] for start in result["starts"]] == ["meta-learned"] and result["gains"] == []
    assert result["accuracy"] == both["accuracy"] and result["scratch"] is None
    assert said.rstrip().endswith("of 100 new images get the right label from the meta-learned start by strategy full.")


def test_a_random_start_has_no_probe(data: Path, tmp_path: Path, capsys: Text) -> None:
    argv = ["--init", "none", "--data", f"folder:{data}", "--epochs", "1", "--out", str(tmp_path / "o")]
    assert adapt.main(argv) == 0
    assert [start["name"] for start in result_of(tmp_path / "o")["starts"]] == ["random"]
    capsys.readouterr()
    assert adapt.main([*argv, "--probe", "--out", str(tmp_path / "p")]) == 2
    one_line(capsys, "probe: a random start has no features worth one")


def test_calibration_is_the_papers_formula() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.55, 0.45]])
    error, bins = calibration(np.array([0, 1, 1, 1]), probabilities)
    by_hand = sum(abs(right - sure) for right, sure in ((1, 0.9), (0, 0.8), (1, 0.7), (0, 0.55))) / 4
    assert error == pytest.approx(by_hand)  # each is in a bin by itself
    assert [b["images"] for b in bins] == [1, 1, 1, 1]
    both, [one] = calibration(np.array([0, 1]), np.array([[0.95, 0.05], [0.97, 0.03]]))
    assert (both, one["images"], one["accuracy"]) == (pytest.approx(0.46), 2, 0.5)
    certain, _ = calibration(np.array([0]), np.array([[1.0, 0.0]]))
    assert certain == 0.0


def test_balanced_accuracy_is_scikit_learns_and_a_class_without_images_has_no_say() -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 3, 40), rng.dirichlet([1, 1, 1], 40)
    names = ("a", "b", "c")
    found = scores(labels, probabilities, names)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, probabilities.argmax(-1)))
    lacking = scores(np.where(labels == 2, 0, labels), probabilities, names)
    for figure in ("f1", "precision", "recall"):
        of_two = [row[figure] for row in lacking["per_class"][:2]]
        assert lacking[f"macro_{figure}"] == pytest.approx(np.mean(of_two)), figure
    [said, *_] = warnings_of({**lacking, "kept_epoch": 1}, [], 3)
    assert said == "no test image is of 'c': macro figures are of the other 2"


def test_warnings_name_what_is_wrong_and_are_silent_where_nothing_is() -> None:
    names, chance = ("a", "b", "c"), math.log(3)

    def said(predicted: list[int], **row: float) -> list[str]:
        figures = scores(np.array([0, 1, 2, 0]), np.eye(3)[predicted], names)
        return warnings_of({**figures, "kept_epoch": 2}, [{"epoch": 2.0, **row}], 3)

    assert said([0, 1, 2, 0], loss=0.1, val_loss=0.2) == []
    assert said([1, 1, 1, 1], loss=0.1) == ["every test image is predicted to be 'b'"]
    assert said([0, 1, 1, 0], loss=0.1) == ["no test image is predicted to be 'c'"]
    assert said([0, 1, 2, 0], loss=0.9 * chance)[0].startswith("under-fitted: the training loss is 0.99, and that of")
    assert said([0, 1, 2, 0], loss=0.01) == [], "known by heart, but no surer of others than right"
    [never, by_heart] = said([0, 1, 1, 0], loss=0.01)
    assert by_heart.startswith("over-fitted: the training loss is 0.010, and on the test images its probabilities are")
    assert " 25 points" in by_heart and never.startswith("no test image is predicted")
    assert len(said([0, 1, 1, 0], loss=0.01, val_loss=0.02)) == 1, "validation says that it is not"
    assert said([0, 1, 2, 0], loss=0.1, val_loss=0.8)[0].startswith("over-fitted: the validation loss is 0.80")


@pytest.mark.parametrize("classes", [3, 0])
def test_a_rate_that_was_found_is_not_said_to_be_too_low(classes: int) -> None:
    chance = math.log(3) if classes else 1.0
    names = tuple("abc"[:classes])
    figures = scores(np.arange(3), np.eye(3), names) if classes else number_scores(np.arange(3.0), np.arange(3.0) + 0.1)

    def advice(share: float, *, searched: bool) -> str:
        row = {"epoch": 1.0, "loss": share * chance}
        [said] = warnings_of({**figures, "kept_epoch": 1}, [row], classes, searched=searched)
        return said.partition("; ")[2]

    assert advice(0.9, searched=False) == "more epochs, a higher rate or a strategy that trains more may help"
    assert advice(0.9, searched=True) == "more epochs or a strategy that trains more may help"
    assert advice(2.0, searched=False) == "a smaller --lr may help"
    assert advice(2.0, searched=True) == "a smaller --lr than the one that was found may help"


def test_a_constant_prediction_is_said_in_result_and_report(
    runs: dict[str, Path], tmp_path: Path, capsys: Text
) -> None:
    data = write_target(tmp_path / "d", {"train": 4, "test": 3})
    first, *others = sorted((data / "test").rglob("*.png"))
    for file in others:  # of each class the same picture
        shutil.copy(first, file)
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", epochs=1)) == 0
    said = capsys.readouterr().out
    starts = result_of(tmp_path / "o")["starts"]
    assert len(starts) == 2
    for start in starts:
        [warning] = [text for text in start["warnings"] if text.startswith("every test image is predicted to be ")]
        line = f"note: {start['name']} start: {warning}"
        assert line in said and line in (tmp_path / "o/report.txt").read_text()


def test_the_calibration_picture_has_a_point_for_each_bin() -> None:
    bins = [{"confidence": 0.5, "accuracy": 0.4, "images": 3}, {"confidence": 0.9, "accuracy": 1.0, "images": 5}]
    [axes] = calibration_figure({"a": (bins, 0.1), "b": (bins[:1], 0.2)}).axes
    assert [np.asarray(dots.get_offsets()).shape for dots in axes.collections] == [(2, 2), (1, 2)]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a: error 10.0 %", "b: error 20.0 %"]


def test_the_head_of_a_probe_is_linear() -> None:
    fitted = probe(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), ImageInputs(1, 8, 8), *images_of(9, 3), 3)
    assert isinstance(fitted.head, nn.Linear) and fitted.head.weight.shape == (3, 4)
    assert fitted.kept == 0
