"""Training labels that look wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapting import result_of
from helpers import TARGET, write_target
from sklearn.linear_model import LogisticRegression
from torch import nn

from metaft import adapt
from metaft.config import AdaptConfig
from metaft.finetune.suspects import cross_validated, suspects, tells_apart
from metaft.targets.draws import grouped_fold


def test_a_suspect_is_confidently_another_class_than_its_own() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    right = np.array([0.9, 0.7, 0.2, 0.9, 0.8, 0.4])  # of the own class; means 0.6 and 0.7
    probabilities = np.stack([np.where(labels == 0, right, 1 - right), np.where(labels == 1, right, 1 - right)], 1)
    found = suspects(labels, probabilities)
    assert [(s.row, s.looks) for s in found] == [(2, 1), (5, 0)], "0.8 >= 0.7 for class 1, and 0.6 >= 0.6 for class 0"
    assert (found[0].probability, found[0].own) == pytest.approx((0.8, 0.2)), "the surest comes first"
    probabilities[5] = [0.59, 0.41]
    assert [s.row for s in suspects(labels, probabilities)] == [2], "0.59 is the larger one, and not confident"


def test_an_image_that_is_more_probably_something_else_than_this_class_is_no_suspect() -> None:
    labels = np.array([0, 0, 1, 1, 2])
    probabilities = np.array(
        [[0.2, 0.45, 0.35], [0.9, 0.1, 0.0], [0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]],
    )  # image 0 is confidently of class 1, whose own images get 0.4, but not of it rather than of any other
    assert suspects(labels, probabilities) == []
    probabilities[0] = [0.2, 0.5, 0.3]
    assert [(s.row, s.looks) for s in suspects(labels, probabilities)] == [(0, 1)]


def test_a_class_below_its_own_mean_is_no_rival_though_it_is_the_most_probable() -> None:
    labels = np.array([0, 1, 1, 2, 2])
    probabilities = np.array(
        [[0.3, 0.4, 0.3], [0.1, 0.9, 0.0], [0.1, 0.8, 0.1], [0.0, 0.8, 0.2], [0.2, 0.2, 0.6]],
    )  # means 0.3, 0.85 and 0.4: what image 3 is most like is not confident, nor is its own class
    assert suspects(labels, probabilities) == []


def test_who_is_right_no_more_often_than_chance_tells_nothing_apart() -> None:
    labels = np.arange(10) % 2

    def guesses(right: int) -> np.ndarray:
        predicted = np.where(np.arange(10) < right, labels, 1 - labels)
        return np.eye(2)[predicted]

    assert not tells_apart(labels, guesses(8)), "0.5 and two standard errors are 0.82"
    assert tells_apart(labels, guesses(9))
    assert not tells_apart(np.array([0] * 9 + [1]), np.eye(2)[np.zeros(10, int)]), "the largest class alone"
    assert not tells_apart(np.arange(90) % 9, np.eye(9)[np.where(np.arange(90) < 35, np.arange(90) % 9, 0)])


@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_are_of_a_probe_that_has_not_seen_the_image(classes: int) -> None:
    labels = np.arange(24) % classes
    features = np.random.default_rng(0).normal(size=(24, 4)) + labels[:, None]
    groups = np.arange(24)
    groups[[5, 11]] = 5  # of one class where there are two or three
    mine = cross_validated(features, labels, classes, groups=groups, seed=3)
    for number in range(5):
        train, test = grouped_fold(labels, groups, 5, number, 3)
        assert (5 in test) == (11 in test)
        reference = LogisticRegression(C=1.0, max_iter=2000).fit(features[train], labels[train])
        assert np.allclose(mine[test], reference.predict_proba(features[test]), atol=1e-6)
    features[0] += 100  # of which no other image's probe but those that train on it may know
    assert not np.allclose(mine, cross_validated(features, labels, classes, groups=groups, seed=3))


def linear() -> nn.Module:
    """A backbone that keeps what the pictures differ by, and a head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.Tanh(), nn.Linear(16, 3))


def judged(out: Path, data: Path, **changes: Any) -> dict[str, Any]:
    config = AdaptConfig(init="none", data=f"folder:{data}", epochs=2, device="cpu", out=str(out), **changes)
    return adapt.run(config, module=linear(), init="keep")


def test_a_picture_in_the_wrong_folder_is_listed(tmp_path: Path) -> None:
    data = write_target(tmp_path / "data", {"train": 10, "test": 2}, side=28, noise=40)
    first, second = (data / "train" / name for name in TARGET[:2])
    sorted(second.iterdir())[4].rename(first / "wrong.png")
    result = judged(tmp_path / "o", data)
    [found] = result["suspects"]
    assert Path(found["file"]).name == "wrong.png" and (found["label"], found["looks_like"]) == TARGET[:2]
    assert found["probability"] > 0.5 > found["own_probability"]
    assert result_of(tmp_path / "o")["suspects"] == result["suspects"]
    text = (tmp_path / "o/report.txt").read_text()
    assert "training labels that look wrong to a probe that has not seen them (1):" in text
    assert f"{found['file']}: apple, looks like c d (" in text


@pytest.mark.parametrize("change", ["no probe", "two images", "noise"])
def test_nobody_is_accused_where_nobody_can_tell(change: str, tmp_path: Path) -> None:
    data = write_target(tmp_path / "data", {"train": 8, "test": 2}, side=28, noise=250 if change == "noise" else 40)
    shots = 2 if change == "two images" else None
    assert judged(tmp_path / "o", data, probe=change != "no probe", shots_per_class=shots)["suspects"] is None
    assert "look wrong" not in (tmp_path / "o/report.txt").read_text()
