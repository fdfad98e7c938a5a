"""The pictures of an adapt run: what is drawn is what was given, at any number of classes, without a warning."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from metaft import plots
from metaft.names import short_names
from metaft.plots.confusion import confusion_figure
from metaft.plots.grid import mistakes_figure
from metaft.plots.lines import learning_figure

HEBREW = [f"Hebrew/U+05D{i} HEBREW LETTER {name}" for i, name in enumerate(("ALEF", "BET", "GIMEL"))]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_confusion_matrix_has_true_classes_in_rows() -> None:
    figure = confusion_figure([[8, 2, 0], [0, 4, 0], [1, 1, 2]], HEBREW)
    axes = figure.axes[0]
    shares = np.asarray(axes.images[0].get_array())
    assert shares.tolist() == [[0.8, 0.2, 0], [0, 1, 0], [0.25, 0.25, 0.5]]
    counts = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert counts == {(0, 0): "8", (0, 1): "2", (1, 1): "4", (2, 0): "1", (2, 1): "1", (2, 2): "2"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ALEF", "BET", "GIMEL"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ALEF", "BET", "GIMEL"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert axes.get_title(loc="left") == "14 of 18 test images right (77.8 %)"


@pytest.mark.parametrize("classes", [2, 10, 25, 26, 45, 128])
def test_class_names_of_a_confusion_matrix_do_not_overlap(classes: int, tmp_path: Path) -> None:
    names = [f"a rather long name of a class, {i}" for i in range(classes)]
    counts = np.eye(classes, dtype=int) * 3
    counts[0] = 0  # a class without test images
    figure = confusion_figure(counts.tolist(), names)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(abs(a.y0 - b.y0) >= 0.9 * a.height for a, b in itertools.pairwise(boxes))
    assert (len(axes.texts) > 0) == (classes <= 25)
    plots.confusion(tmp_path / "c.png", counts.tolist(), names)
    with Image.open(tmp_path / "c.png") as picture:
        assert max(picture.size) < 5000


@pytest.mark.parametrize("matrix", [[[1, 2]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]])
def test_a_matrix_that_is_not_of_the_classes_is_refused(matrix: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"must be \[2, 2\] for 2 names, got"):
        confusion_figure(matrix, ["a", "b"])


def rows(values: list[float], **validation: list[float]) -> list[dict[str, float]]:
    given = {"loss": values, **validation}
    return [{"epoch": float(i + 1), **{k: v[i] for k, v in given.items()}} for i in range(len(values))]


def test_learning_curves_of_two_starts_that_stopped_at_different_epochs() -> None:
    starts = {
        "meta-learned": rows([1.0, 0.5, 0.1], val_loss=[1.1, 0.9, 1.2], val_accuracy=[0.4, 0.6, 0.5]),
        "random": rows([2.0, 1.5], val_loss=[2.0, 1.9], val_accuracy=[0.2, 0.3]),
    }
    loss, accuracy = learning_figure(starts, "epoch", {"meta-learned": 2, "random": 2}).axes
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in loss.lines}
    assert drawn == {
        "meta-learned start": [1.0, 0.5, 0.1],
        "meta-learned start, validation": [1.1, 0.9, 1.2],
        "random start": [2.0, 1.5],
        "random start, validation": [2.0, 1.9],
    }
    drawn = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in accuracy.lines}
    assert drawn["meta-learned start"] == [[1, 0.4], [2, 0.6], [3, 0.5]]
    assert drawn["kept, meta-learned"] == [[2, 0.6]] and drawn["kept, random"] == [[2, 0.3]]
    assert loss.get_yscale() == "log"


def test_learning_curves_without_validation(tmp_path: Path) -> None:
    (axes,) = learning_figure({"random": [{"epoch": 0.0, "loss": 0.7}]}, "inner step", {}).axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("inner step", "training loss", "linear")
    assert np.asarray(axes.lines[0].get_xydata()).tolist() == [[0, 0.7]]
    plots.learning(tmp_path / "l.png", {"meta-learned": rows([1.0, 0.9]), "random": rows([3.0, 0.0])}, kept={})
    assert (tmp_path / "l.png").stat().st_size > 1000


def test_mistakes_are_the_wrong_ones_the_most_confident_first(tmp_path: Path) -> None:
    images = (torch.arange(5, dtype=torch.uint8) * 50).view(5, 1, 1, 1).expand(5, 1, 6, 6)
    labels, predicted = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 2, 0, 1, 1])
    sure = torch.tensor([0.99, 0.5, 0.9, 0.7, 0.98])
    figure = mistakes_figure(images, labels, predicted, sure, HEBREW)
    says = texts(figure)
    assert says == [
        "3 of 5 test images wrong", "GIMEL\n→ ALEF\n90 %", "ALEF\n→ BET\n70 %", "BET\n→ GIMEL\n50 %",
    ]  # fmt: skip
    shown = [np.asarray(image.get_array()) for image in figure.axes[0].images]
    assert [round(255 * float(pixels[0, 0])) for pixels in shown] == [100, 150, 50]
    few = texts(mistakes_figure(images, labels, predicted, sure, HEBREW, columns=2, most=2))
    assert few == ["3 of 5 test images wrong; the 2 most confident", "GIMEL\n→ ALEF\n90 %", "ALEF\n→ BET\n70 %"]
    none = mistakes_figure(images, labels, labels, sure, HEBREW)
    assert texts(none) == ["0 of 5 test images wrong"] and not none.axes[0].images
    plots.mistakes(tmp_path / "m.png", images.expand(5, 3, 6, 6), labels, predicted, sure, HEBREW)
    assert (tmp_path / "m.png").stat().st_size > 1000


def test_captions_of_neighbours_do_not_overlap() -> None:
    names = ["W" * 40, "M" * 40 + " $x_{", "猫"]
    labels = torch.zeros(16, dtype=torch.int64)
    figure = mistakes_figure(torch.zeros(16, 1, 4, 4, dtype=torch.uint8), labels, labels + 1, torch.rand(16), names)
    figure.draw_without_rendering()
    captions = [text.get_window_extent() for text in figure.axes[0].texts[1:9]]
    assert all(a.x1 <= b.x0 + 1 for a, b in itertools.pairwise(captions))


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (HEBREW, ["ALEF", "BET", "GIMEL"]),
        (["a/x", "a/y"], ["x", "y"]),
        (["new york", "new york city"], ["york", "york city"]),
        (["only one name"], ["only one name"]),
        (["L/U+0041 A", "L/U+0391 A"], ["L/U+0041 A", "L/U+0391 A"]),
        (["", "a"], ["", "a"]),
        (["U+1234", "U+1235"], ["U+1234", "U+1235"]),
    ],
)
def test_names_become_short_while_they_stay_distinct(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short
