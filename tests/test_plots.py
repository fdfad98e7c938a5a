"""What the pictures show: the drawn data must be the given data, and no input may raise a warning."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from metaft import plots
from metaft.plots.grid import RIGHT, WRONG, displayable, episode_figure
from metaft.plots.lines import curves_figure, steps_figure
from metaft.plots.regression import regression_figure
from metaft.types import Episode

Rows = list[dict[str, Any]]


def train_rows(count: int, metric: str = "accuracy") -> Rows:
    return [{"step": 10 * i, "loss": 2.0 / (i + 1), metric: 1.0 - 0.8 / (i + 1)} for i in range(count)]


def val_rows(figures: list[float]) -> Rows:
    return [
        {
            "step": 250 * (i + 1),
            "transductive": {"accuracy": figure, "ci95": 0.01},
            "inductive": {"accuracy": figure - 0.05, "ci95": 0.02},
        }
        for i, figure in enumerate(figures)
    ]


def one_episode(*, ways: int = 5, shots: int = 1, query_shots: int = 3, channels: int = 1, side: int = 8) -> Episode:
    """Support and query in an order that is not the order of the labels."""
    generator = torch.Generator().manual_seed(0)

    def labels(each: int) -> torch.Tensor:
        return torch.arange(ways).repeat(each).flip(0)

    def pixels(count: int) -> torch.Tensor:
        return torch.randn(count, channels, side, side, generator=generator)

    return Episode(
        support_x=pixels(ways * shots),
        support_y=labels(shots),
        query_x=pixels(ways * query_shots),
        query_y=labels(query_shots),
        class_ids=torch.arange(ways),
        key=torch.tensor(0),
    )


def line(axes: Axes, label: str) -> Line2D:
    found = [each for each in axes.lines if each.get_label() == label]
    assert len(found) == 1, f"{label!r} among {[each.get_label() for each in axes.lines]}"
    return found[0]


def xs(axes: Axes, label: str) -> np.ndarray:
    return np.asarray(line(axes, label).get_xdata(), dtype=float)


def ys(axes: Axes, label: str) -> np.ndarray:
    return np.asarray(line(axes, label).get_ydata(), dtype=float)


def bounds(axes: Axes, number: int, x: float | None = None) -> tuple[float, float]:
    """Lowest and highest value of a band, over all x or at one."""
    vertices = np.asarray(axes.collections[number].get_paths()[0].vertices)
    y = vertices[:, 1] if x is None else vertices[vertices[:, 0] == x, 1]
    return float(y.min()), float(y.max())


def labels(axes: Axes) -> list[str]:
    return [str(each.get_label()) for each in axes.lines if not str(each.get_label()).startswith("_")]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


class TestCurves:
    def test_draws_the_rows(self) -> None:
        train, val = train_rows(7), val_rows([0.6, 0.9, 0.8])
        loss, accuracy = curves_figure(train, val, "accuracy").axes
        np.testing.assert_array_equal(ys(loss, "training"), [row["loss"] for row in train])
        np.testing.assert_array_equal(ys(accuracy, "training"), [row["accuracy"] for row in train])
        np.testing.assert_array_equal(xs(accuracy, "transductive"), [250, 500, 750])
        np.testing.assert_array_equal(ys(accuracy, "transductive"), [0.6, 0.9, 0.8])
        np.testing.assert_allclose(ys(accuracy, "inductive"), [0.55, 0.85, 0.75])

    def test_bands_are_the_intervals(self) -> None:
        _, accuracy = curves_figure([], val_rows([0.6, 0.9]), "accuracy").axes
        np.testing.assert_allclose([bounds(accuracy, 0), bounds(accuracy, 1)], [(0.59, 0.91), (0.53, 0.87)])

    def test_smooths_many_rows_only(self) -> None:
        assert labels(curves_figure(train_rows(29), [], "accuracy").axes[0]) == ["training"]
        loss = curves_figure(train_rows(30), [], "accuracy").axes[0]
        smooth = ys(loss, "training, mean of 3 rows")
        raw = np.array([row["loss"] for row in train_rows(30)])
        np.testing.assert_allclose(smooth[[0, 5, 29]], [raw[:2].mean(), raw[4:7].mean(), raw[28:].mean()])

    def test_a_missing_value_leaves_its_neighbours_alone(self) -> None:
        rows = train_rows(30)
        rows[5]["loss"] = None
        smooth = ys(curves_figure(rows, [], "accuracy").axes[0], "training, mean of 3 rows")
        assert np.isfinite(smooth).all()
        np.testing.assert_allclose(smooth[5], (rows[4]["loss"] + rows[6]["loss"]) / 2)

    @pytest.mark.parametrize(
        ("best_step", "label"),
        [
            (None, "best: 90.0% at step 500"),
            (750, "best: 80.0% at step 750"),
        ],
    )
    def test_marks_the_best_validation(self, best_step: int | None, label: str) -> None:
        figure = curves_figure(train_rows(2), val_rows([0.6, 0.9, 0.8]), "accuracy", best_step)
        assert (xs(figure.axes[1], label)[0], ys(figure.axes[1], label)[0]) == (
            (500, 0.9) if best_step is None else (750, 0.8)
        )

    def test_the_best_error_is_the_lowest(self) -> None:
        val = [{"step": step, "mse": mse, "ci95": 0.1} for step, mse in ((1, 3.0), (2, 0.5), (3, 1.0))]
        axes = curves_figure(train_rows(3, "mse"), val, "mse").axes[1]
        assert labels(axes) == ["training", "validation", "best: 0.5 at step 2"]
        assert axes.get_ylabel() == "mean squared error"

    def test_modes_that_agree_are_one_line(self) -> None:
        same = {"mse": 1.0, "ci95": 0.1}
        val = [{"step": 1, "transductive": same, "inductive": same}]
        assert labels(curves_figure([], val, "mse").axes[1])[0] == "both modes (they agree)"

    def test_a_mode_that_some_validations_lack_is_no_line(self) -> None:
        both = {norm: {"mse": 1.0 + i, "ci95": 0.1} for i, norm in enumerate(("transductive", "inductive"))}
        val = [{"step": 1, **both}, {"step": 2, "transductive": both["transductive"]}]
        assert labels(curves_figure([], val, "mse").axes[1])[0] == "transductive"

    def test_accuracy_is_in_percent_and_ends_at_100(self) -> None:
        axes = curves_figure(train_rows(5), val_rows([0.999]), "accuracy").axes[1]
        assert axes.yaxis.get_major_formatter()(0.5) == "50%"
        assert axes.get_ylim()[1] <= 1.01

    @pytest.mark.parametrize("train", [0, 1, 2, 500])
    @pytest.mark.parametrize("val", [[], [0.5], [math.nan, 0.5], [math.nan]])
    def test_writes_a_picture_whatever_the_rows(self, tmp_path: Path, train: int, val: list[float]) -> None:
        path = tmp_path / "plots" / "curves.png"
        plots.curves(path, train_rows(train), val_rows(val), "accuracy")
        assert size_of(path) == (1800, 720)
        assert list(path.parent.iterdir()) == [path]

    def test_an_empty_run_says_so(self) -> None:
        figure = curves_figure([], [], "accuracy")
        assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["not measured"] * 2


def scores(values: list[float], metric: str = "accuracy") -> dict[str, Any]:
    return {
        metric: values[-1],
        "ci95": 0.01,
        "episodes": 1000,
        f"{metric}_per_step": values,
        "ci95_per_step": [0.01 * (i + 1) for i in range(len(values))],
    }


class TestSteps:
    TEST: ClassVar[dict[str, Any]] = {
        "ways": 5,
        "shots": 1,
        "transductive": scores([0.2, 0.9, 0.95]),
        "inductive": scores([0.2, 0.8, 0.85]),
    }

    def test_draws_both_modes_over_the_steps(self) -> None:
        axes = steps_figure(self.TEST).axes[0]
        np.testing.assert_array_equal(xs(axes, "transductive"), [0, 1, 2])
        np.testing.assert_array_equal(ys(axes, "transductive"), [0.2, 0.9, 0.95])
        np.testing.assert_array_equal(ys(axes, "inductive"), [0.2, 0.8, 0.85])
        np.testing.assert_allclose(bounds(axes, 0, x=2), (0.92, 0.98))

    def test_states_task_and_number_of_episodes(self) -> None:
        assert steps_figure(self.TEST).axes[0].get_title() == "5-way 1-shot: mean of 1,000 tasks, 95% CI"

    def test_shows_chance_and_the_pixel_baseline(self) -> None:
        test = {**self.TEST, "ways": 20, "pixel_nearest_neighbour": {"accuracy": 0.39, "ci95": 0.01}}
        figure = steps_figure(test)
        assert texts(figure) == ["chance 5%", "pixel nearest\nneighbour 39%"]
        levels = [
            float(np.asarray(each.get_ydata(), dtype=float)[0])
            for each in figure.axes[0].lines
            if each.get_linestyle() == ":"
        ]
        assert levels == [0.05, 0.39]

    def test_regression_has_no_chance_level(self) -> None:
        modes = {mode: scores([3.1, 0.48, 0.13], "mse") for mode in ("transductive", "inductive")}
        figure = steps_figure({"ways": 1, "shots": 10, **modes})
        assert labels(figure.axes[0]) == ["both modes (they agree)"]
        assert texts(figure) == []
        assert figure.axes[0].get_title().startswith("10-shot regression")

    def test_regression_without_modes(self) -> None:
        figure = steps_figure({"ways": 1, "shots": 10, **scores([3.1, 0.48], "mse")})
        np.testing.assert_array_equal(ys(figure.axes[0], "mean"), [3.1, 0.48])

    @pytest.mark.parametrize("count", [1, 2, 11, 101])
    def test_writes_a_picture_for_any_number_of_steps(self, tmp_path: Path, count: int) -> None:
        values = [0.2 + 0.7 * i / count for i in range(count)]
        plots.steps(tmp_path / "steps.png", {**self.TEST, "transductive": scores(values), "inductive": scores(values)})
        assert min(size_of(tmp_path / "steps.png")) >= 700

    def test_a_single_task_has_no_interval(self, tmp_path: Path) -> None:
        one = {**scores([0.2, 0.9]), "ci95_per_step": [None, math.nan]}
        plots.steps(tmp_path / "steps.png", {**self.TEST, "transductive": one, "inductive": one})
        assert min(size_of(tmp_path / "steps.png")) >= 700


def frames(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


class TestEpisode:
    def test_frames_tell_right_from_wrong(self) -> None:
        task = one_episode(ways=2, query_shots=2)  # query labels 1, 0, 1, 0
        predicted = torch.tensor([1, 1, 0, 0])
        figure = episode_figure(task, predicted)
        # Row by row: class 0 has queries 1 and 3, class 1 has queries 0 and 2.
        assert [to_hex(frame.get_edgecolor()).upper() for frame in frames(figure)] == [WRONG, RIGHT, RIGHT, WRONG]
        assert RIGHT != WRONG
        assert len({frame.get_linestyle() == "-" for frame in frames(figure)}) == 2, "not by colour alone"
        under = [text.get_text() for text in figure.axes[0].texts if text.get_fontsize() == 9]
        assert under == ["B", "A", "B", "A"]
        assert any(text.startswith("2 of 4 query images right") for text in texts(figure))

    def test_every_image_stands_in_the_row_of_its_class(self) -> None:
        task = one_episode(ways=3, shots=2, query_shots=4)
        of_class = torch.arange(3.0).view(-1, 1, 1, 1).expand(3, 1, 8, 8)  # an image is as bright as its label
        task = task._replace(support_x=of_class[task.support_y], query_x=of_class[task.query_y])
        rows: dict[float, set[float]] = {}
        for image in episode_figure(task, task.query_y).axes[0].images:
            rows.setdefault(round(image.get_extent()[3], 3), set()).add(float(np.mean(np.asarray(image.get_array()))))
        assert [rows[y] for y in sorted(rows)] == [{0.0}, {0.5}, {1.0}]

    def test_query_stands_right_of_support_after_a_gap(self) -> None:
        axes = episode_figure(one_episode(ways=2, shots=3, query_shots=2), torch.zeros(4, dtype=torch.long)).axes[0]
        left = sorted({round(image.get_extent()[0], 3) for image in axes.images})
        np.testing.assert_allclose(np.diff(left), [1, 1, 1.5, 1])

    def test_shows_at_most_ten_queries_per_class(self) -> None:
        task = one_episode(ways=2, query_shots=13)
        figure = episode_figure(task, task.query_y)
        assert len(frames(figure)) == 20
        assert any("10 of 13" in text.replace("\n", " ") for text in texts(figure))
        assert any(text.startswith("26 of 26") for text in texts(figure)), "all queries count, shown or not"

    def test_names_that_the_font_lacks_become_numbers(self, tmp_path: Path) -> None:
        names = ["عربي", "猫", "$x_{", "Ω/alpha\u200d", "\udce9", "", "a" * 90]
        task = one_episode(ways=7)
        plots.episode(tmp_path / "episode.png", task, task.query_y, names)  # a warning would be an error
        shown = texts(episode_figure(task, task.query_y, names))
        assert [
            name for name in ("عربي", "class 2", "$x_{", "Ω/alpha", "class 5", "class 6") if name not in shown
        ] == []

    @pytest.mark.parametrize(
        ("ways", "shots", "query_shots", "channels"),
        [(1, 1, 1, 1), (5, 5, 7, 3), (27, 1, 1, 1), (3, 2, 1, 2), (2, 25, 3, 4)],
    )
    def test_writes_a_picture(self, tmp_path: Path, ways: int, shots: int, query_shots: int, channels: int) -> None:
        task = one_episode(ways=ways, shots=shots, query_shots=query_shots, channels=channels)
        path = tmp_path / "episode.png"
        plots.episode(path, task, (task.query_y + 1) % ways)
        width, height = size_of(path)
        assert width >= 790
        assert height >= 200 + ways * 100

    def test_shows_tensors_that_carry_gradients(self, tmp_path: Path) -> None:
        task = one_episode()
        task = task._replace(query_x=task.query_x.clone().requires_grad_())
        plots.episode(tmp_path / "episode.png", task, task.query_y)

    def test_refuses_what_does_not_fit(self) -> None:
        task = one_episode()
        with pytest.raises(ValueError, match=r"predicted must be \[15\] like query_y, got \[14\]"):
            episode_figure(task, task.query_y[1:])
        with pytest.raises(ValueError, match="class_names must name 5 classes, got 2"):
            episode_figure(task, task.query_y, ["a", "b"])


class TestDisplayable:
    def test_undoes_a_normalisation(self) -> None:
        pixels = torch.rand(6, 3, 4, 4)
        pixels[0, :, 0, 0], pixels[0, :, 0, 1] = 0.0, 1.0
        mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.1]).view(3, 1, 1)
        support, query = displayable((pixels[:2] - mean) / std, (pixels[2:] - mean) / std)
        np.testing.assert_allclose(support, pixels[:2].permute(0, 2, 3, 1), atol=1e-6)
        np.testing.assert_allclose(query, pixels[2:].permute(0, 2, 3, 1), atol=1e-6)

    @pytest.mark.parametrize("value", [0.0, 7.0, math.nan])
    def test_flat_images_stay_in_range(self, value: float) -> None:
        support, query = displayable(torch.full((1, 1, 4, 4), value), torch.full((2, 1, 4, 4), value))
        assert support.shape == (1, 4, 4)
        assert query.shape == (2, 4, 4)
        assert not support.any()
        assert not query.any()


class TestRegressionEpisode:
    def figure(self) -> Figure:
        grid = torch.tensor([[1.0], [-1.0], [0.0]])  # not in order
        predictions = {"before": torch.zeros(3, 1), "after 1 step": 2 * grid}
        return regression_figure(torch.tensor([0.5]), torch.tensor([0.7]), grid, 3 * grid, predictions)

    def test_draws_truth_predictions_and_support_in_order_of_x(self) -> None:
        axes = self.figure().axes[0]
        assert labels(axes) == ["truth", "before", "after 1 step", "support points"]
        for label, y in (("truth", [-3, 0, 3]), ("before", [0, 0, 0]), ("after 1 step", [-2, 0, 2])):
            np.testing.assert_array_equal(xs(axes, label), [-1, 0, 1])
            np.testing.assert_array_equal(ys(axes, label), y)
        np.testing.assert_allclose(ys(axes, "support points"), [0.7])

    @pytest.mark.parametrize("count", [0, 1, 7])
    def test_writes_a_picture_for_any_number_of_predictions(self, tmp_path: Path, count: int) -> None:
        x = torch.linspace(-5, 5, 50)
        predictions = {f"after {i} steps": torch.sin(x) * i for i in range(count)}
        path = tmp_path / "task.png"
        plots.regression_episode(path, x[::5], torch.sin(x[::5]), x, torch.sin(x), predictions)
        assert min(size_of(path)) >= 700
