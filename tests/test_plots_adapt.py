"""The pictures of an adapt run: what is drawn is what was given, at any number of classes, without a warning."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from metaft import plots
from metaft.plots.confusion import confusion_figure
from metaft.plots.grid import mistakes_figure
from metaft.plots.lines import learning_figure
from metaft.plots.text import fitted, width, wrapped
from metaft.support.names import short_names

HEBREW = [f"Hebrew/U+05D{i} HEBREW LETTER {name}" for i, name in enumerate(("ALEF", "BET", "GIMEL"))]


LONG = [f"{size} {letter} WITH {first} AND {last}" for size in ("SMALL", "CAPITAL")
        for letter in ("ALPHA", "EPSILON", "UPSILON") for first in ("PSILI", "DASIA", "DIALYTIKA")
        for last in ("VARIA", "OXIA", "PERISPOMENI", "PERISPOMENI AND YPOGEGRAMMENI")]  # fmt: skip


def drawn(figure: Figure) -> Figure:
    """At the resolution of the file, on which the widths of letters depend a little."""
    figure.set_dpi(200)
    figure.draw_without_rendering()
    return figure


def overlap(labels: list[Text]) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes share more than a pixel."""
    boxes = [(label.get_text(), label.get_window_extent()) for label in labels]
    return [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


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
@pytest.mark.slow
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


@pytest.mark.parametrize("classes", [2, 25, 45, 61, 130])
@pytest.mark.slow
def test_a_confusion_matrix_lies_within_its_figure(classes: int) -> None:
    names = LONG[:classes] if classes <= len(LONG) else [f"{LONG[i % 72]} {i}" for i in range(classes)]
    counts = np.full((classes, classes), 123)
    figure = drawn(confusion_figure(counts.tolist(), names))
    axes = figure.axes[0]
    box, (wide, high) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0 and box.x1 <= wide and box.y1 <= high <= 16
    cell = (figure.bbox.width * axes.get_position().width) / classes
    assert all(0 < text.get_window_extent().width < cell for text in axes.texts)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert overlap(labels) == []
        assert len({label.get_text() for label in labels}) == classes, "cut to names that cannot be told apart"
        assert min(float(label.get_fontsize()) for label in labels) >= 4.5


@pytest.mark.slow
def test_every_name_of_a_thinned_axis_stands_at_its_class() -> None:
    axes = drawn(confusion_figure(np.eye(300, dtype=int).tolist(), [str(i) for i in range(300)])).axes[0]
    for at, labels in ((axes.get_xticks(), axes.get_xticklabels()), (axes.get_yticks(), axes.get_yticklabels())):
        assert [label.get_text() for label in labels] == [str(round(place)) for place in at]
        assert len(labels) == 150 and overlap(labels) == []


def brightness(colour: tuple[float, ...]) -> float:
    """Relative luminance of an RGB colour, as the contrast of WCAG is defined on."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_shades_of_a_confusion_matrix_can_be_read_and_told_apart() -> None:
    counts = [[100 - k, k] for k in range(101)]
    counts = [[row[0], row[1], *[0] * 99] for row in counts]  # 101 classes, all shares
    image = confusion_figure(counts, [str(i) for i in range(101)]).axes[0].images[0]
    shades = [brightness(colour) for colour in image.to_rgba(np.ma.asarray(image.get_array()))[1:, 1]]
    assert (np.diff(shades) <= 0).all() and shades[0] > 5 * shades[-1], "darker with the share, in grey too"
    assert brightness(image.to_rgba(np.ma.asarray(image.get_array()))[0, 1]) == pytest.approx(1), "none is white"
    assert 1.05 / (shades[4] + 0.05) > 1.4, "one image of 20 stands out from none"
    for share in range(0, 101, 5):
        axes = confusion_figure([[100 - share, share], [0, 1]], ["a", "b"]).axes[0]
        matrix = axes.images[0].to_rgba(np.ma.asarray(axes.images[0].get_array()))
        for text in axes.texts:
            x, y = map(round, text.get_position())
            paper, ink = brightness(matrix[y, x]), 1.0 if text.get_color() == "white" else 0.0
            assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 4.5


@pytest.mark.parametrize(
    ("counts", "title"),
    [
        ([[1, 1], [0, 0]], "1 of 2 test images right (50.0 %)\nblank rows: no test images (1 of 2 classes)"),
        ([[0, 0], [0, 0]], "0 of 0 test images right (none)\nblank rows: no test images (2 of 2 classes)"),
    ],
)
def test_classes_without_test_images_are_blank_and_said(counts: list[list[int]], title: str) -> None:
    axes = confusion_figure(counts, ["a", "b"]).axes[0]
    assert axes.get_title(loc="left") == title
    assert np.ma.getmaskarray(np.ma.asarray(axes.images[0].get_array()))[1].all()


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


def test_learning_curves_with_gaps(tmp_path: Path) -> None:
    """A start without validation beside one with it, and null, which is what JSON has for a loss that is no number."""
    first = rows([1.0, 0.05], val_loss=[1.0, 0.9], val_accuracy=[0.5, 0.6])
    first[0]["val_loss"] = None  # pyright: ignore[reportArgumentType]
    starts = {"meta-learned": first, "random": rows([3.0, 2.0])}
    loss, accuracy = learning_figure(starts, "epoch", {"meta-learned": 1, "random": 2}).axes
    found = {line.get_label(): [float(y) for y in np.asarray(line.get_ydata())] for line in loss.lines}
    assert math.isnan(found["meta-learned start, validation"][0]) and found["random start"] == [3.0, 2.0]
    assert "random start, validation" not in found
    assert [line.get_label() for line in accuracy.lines] == ["meta-learned start", "kept, meta-learned"]
    plots.learning(tmp_path / "l.png", starts, kept={"random": 1})
    plots.learning(tmp_path / "none.png", {"meta-learned": [], "random": []})
    only = learning_figure({"random": rows([1.0], val_loss=[0.9], val_accuracy=[0.5])}, "epoch", {}).axes[0]
    assert all(line.get_marker() for line in only.lines), "a line of one point is not seen"
    null = [{"epoch": 1.0, "loss": None}, {"epoch": 2.0, "loss": 0.7}]
    assert learning_figure({"random": null}, "epoch", {}).axes[0].get_yscale() == "linear"


def test_a_log_scale_has_more_than_one_number() -> None:
    for low in (0.03, 0.15, 0.004):
        axes = drawn(learning_figure({"random": rows([1.9, 1.0, low])}, "epoch", {})).axes[0]
        low_end, high_end = axes.get_ylim()
        inside = [t.get_text() for t, y in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
                  if low_end <= y <= high_end]  # fmt: skip
        assert len([text for text in inside if text]) >= 3
        assert "1" in inside and overlap(axes.get_yticklabels()) == []


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


@pytest.mark.parametrize("names", [LONG, [f"class_{i}_with_{'underscores_' * 3}{i}" for i in range(72)]])
@pytest.mark.slow
def test_captions_of_long_names_stay_within_their_cells_and_tell_the_classes_apart(names: list[str]) -> None:
    labels = torch.arange(72)
    figure = mistakes_figure(
        torch.zeros(72, 1, 4, 4, dtype=torch.uint8), labels, labels.roll(1), torch.linspace(1, 0, 72), names, most=72
    )
    captions = drawn(figure).axes[0].texts[1:]
    assert len(captions) == 72 and overlap(captions) == []
    for caption, image in zip(captions, figure.axes[0].images, strict=True):
        box, cell = caption.get_window_extent(), image.get_window_extent()
        assert box.x1 <= min(figure.bbox.width, cell.x1 + 0.1 * cell.width) and box.y0 >= 0
        assert box.y1 <= cell.y0 + 1, "beneath its image"
        true, _, given = caption.get_text().rpartition("\n")[0].partition("\n→ ")
        assert true and given and true != given
    assert not any(c.get_window_extent().y0 < image.get_window_extent().y1
                   for c, image in zip(captions, figure.axes[0].images[8:], strict=False))  # fmt: skip


@pytest.mark.parametrize(("high", "wide"), [(8, 8), (40, 64), (64, 40)])
def test_mistakes_keep_the_proportions_and_the_brightness_of_images(high: int, wide: int) -> None:
    images = torch.full((3, 3, high, wide), 100, dtype=torch.uint8)
    images[:, :, 0, 0] = 120
    labels = torch.tensor([0, 1, 2])
    figure = mistakes_figure(images, labels, labels.roll(1), torch.tensor([0.5, 0.6, 0.7]), HEBREW)
    for image in drawn(figure).axes[0].images:
        box = image.get_window_extent()
        assert box.width / box.height == pytest.approx(wide / high, rel=0.1)
        pixels = np.asarray(image.get_array())
        assert (round(255 * pixels.min()), round(255 * pixels.max())) == (100, 120)
        assert image.get_clim() == (0, 1)


def test_text_is_as_wide_as_it_is_drawn() -> None:
    figure = Figure(dpi=1000)  # where a pixel is nothing
    for text in ("SMALL ALPHA", "iiii", "→ $x_{ …"):
        label = figure.text(0, 0, text, fontsize=8, family="DejaVu Sans", parse_math=False)
        assert label.get_window_extent().width / 1000 == pytest.approx(width(text, 8), rel=0.03)


@pytest.mark.parametrize("inches", [0.0, 0.3, 0.6, 1.8, 5.0])
def test_names_are_cut_into_the_room_there_is(inches: float) -> None:
    names = [*LONG, "", "x", "W" * 50]
    cut = fitted(names, inches, 7)
    assert all(len(new) <= 1 or width(new, 7) <= inches for new in cut)
    assert all(new == old for new, old in zip(cut, names, strict=True) if width(old, 7) <= inches)
    assert inches < 1.8 or len(set(cut)) == len(names)
    lines = [wrapped(name, inches, 7) for name in names]
    assert all(len(line) <= 1 or width(line, 7) <= inches for each in lines for line in each)
    assert ["".join(each).replace(" ", "") for each in lines] == [name.replace(" ", "") for name in names]


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
