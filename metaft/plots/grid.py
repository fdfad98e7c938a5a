"""Images in a grid: one episode, a row per class; and the mistakes of a classifier."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle
from torch import Tensor

from metaft.inputs.base import Examples
from metaft.plots.style import FONT, GREEN, VERMILLION, save
from metaft.plots.text import fitted, wrapped
from metaft.support.names import short_names
from metaft.types import Episode

RIGHT, WRONG = GREEN, VERMILLION

_MARGIN = 0.06  # around an image, in parts of its cell
_CHARACTER = 0.062  # inches, of the small print
_SMALL = 6.5  # points


def episode(
    path: Path,
    episode: Episode,
    predicted: Tensor,
    class_names: Sequence[str] | None = None,
    *,
    columns: int = 10,
) -> None:
    """One task's images: per class its support images, a gap, and its query images framed by whether they were right.

    `episode` has no `B` axis; `predicted` [N*Q] holds the labels given to `query_x`. Under each query image stands the
    letter of the class predicted. At most `columns` images per class are shown of either set. Raises ValueError where
    `predicted` or `class_names` does not fit the episode.
    """
    save(episode_figure(episode, predicted, class_names, columns), path)


def mistakes(
    path: Path,
    images: Examples,
    labels: Tensor,
    predicted: Tensor,
    probabilities: Tensor,
    class_names: Sequence[str],
    *,
    columns: int = 8,
    most: int = 24,
) -> None:
    """The wrong predictions of the highest probability, the most confident first, as they are on the test images.

    `images` uint8 [n, C, H, W], `labels` and `predicted` [n], `probabilities` [n] of the predicted class: all test
    images, of which at most `most` wrong ones are drawn.
    """
    save(mistakes_figure(images, labels, predicted, probabilities, class_names, columns, most), path)


class _Layout(NamedTuple):
    """Where things stand. The unit is a cell, which holds one image; x goes to the right and y downward."""

    cell: float
    """Inches per cell."""
    names: float
    """Width of the column that names the rows."""
    support: int
    """Columns of support images."""
    query: int
    rows: int

    pitch = 1.34  # an image and the letter under it
    gap = 0.5
    top = 0.6

    def support_at(self, row: int, column: int) -> tuple[float, float]:
        return self.names + column, row * self.pitch

    def query_at(self, row: int, column: int) -> tuple[float, float]:
        return self.names + self.support + self.gap + column, row * self.pitch

    @property
    def width(self) -> float:
        """At least so much that the caption does not become a column of words."""
        return max(self.names + self.support + self.gap + self.query + 0.15, 4.0 / self.cell)

    @property
    def bottom(self) -> float:
        return self.rows * self.pitch


def episode_figure(
    episode: Episode, predicted: Tensor, class_names: Sequence[str] | None = None, columns: int = 10
) -> Figure:
    support_y, query_y, predicted = (t.detach().cpu() for t in (episode.support_y, episode.query_y, predicted))
    if predicted.shape != query_y.shape:
        raise ValueError(f"predicted must be {list(query_y.shape)} like query_y, got {list(predicted.shape)}")
    ways = int(torch.cat([support_y, query_y]).max()) + 1
    if class_names is not None and len(class_names) < ways:
        raise ValueError(f"class_names must name {ways} classes, got {len(class_names)}")
    support = [(support_y == n).nonzero().flatten().tolist() for n in range(ways)]
    query = [(query_y == n).nonzero().flatten().tolist() for n in range(ways)]
    most = max(map(len, query))
    cell = 0.62 if ways <= 10 else 0.5
    layout = _Layout(
        cell=cell,
        names=(0.32 if class_names is None else 1.75) / cell,
        support=min(max(map(len, support)), columns),
        query=min(most, columns),
        rows=ways,
    )
    figure, axes = _canvas(layout, _caption(predicted == query_y, layout.query, most))
    support_x, query_x = displayable(episode.support_x, episode.query_x)
    for n in range(ways):
        _name_row(axes, layout, n, None if class_names is None else class_names[n])
        for column, i in enumerate(support[n][: layout.support]):
            _draw_image(axes, support_x[i], *layout.support_at(n, column))
        for column, i in enumerate(query[n][: layout.query]):
            x, y = layout.query_at(n, column)
            _draw_image(axes, query_x[i], x, y)
            _draw_verdict(axes, x, y, predicted=int(predicted[i]), label=n)
    return figure


def mistakes_figure(
    images: Examples,
    labels: Tensor,
    predicted: Tensor,
    probabilities: Tensor,
    class_names: Sequence[str],
    columns: int = 8,
    most: int = 24,
) -> Figure:
    wrong = (predicted != labels).nonzero().flatten()
    shown = wrong[probabilities[wrong].argsort(descending=True, stable=True)][:most]
    drawn, shown = images[shown], shown.tolist()
    inches = 1.1
    room = inches * (1 - 2 * _MARGIN)
    short = [drawable(name, i) for i, name in enumerate(short_names(class_names))]
    names = fitted(short, 1.7 * room, _SMALL)  # two lines, as words do not fill them
    captions = [
        [*_lines(names[int(labels[i])], room), *_lines(f"→\u00a0{names[int(predicted[i])]}", room),
         f"{100 * float(probabilities[i]):.0f} %"]
        for i in shown
    ]  # fmt: skip
    wide, high = (drawn.shape[axis] / max(drawn.shape[-2:]) for axis in (-1, -2))
    rows = -(-len(shown) // columns)
    pitch = high + (0.13 * max(map(len, captions), default=0) + 0.15) / inches
    figure = Figure(figsize=(inches * columns, inches * rows * pitch + 0.45))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, columns)
    axes.set_ylim(rows * pitch, -0.45 / inches)
    axes.autoscale(False)
    title = f"{len(wrong)} of {len(labels)} test images wrong"
    title += f"; the {len(shown)} most confident" if len(shown) < len(wrong) else ""
    axes.text(0.1, -0.15, title, fontsize=10, fontweight="bold", family=FONT)
    for place, lines in enumerate(captions):
        row, column = divmod(place, columns)
        pixels = drawn[place].permute(1, 2, 0).squeeze(-1).cpu().numpy() / 255
        _draw_image(axes, pixels, column, row * pitch, wide, high)
        axes.text(
            column + _MARGIN, row * pitch + high - 0.02, "\n".join(lines), fontsize=_SMALL, va="top", family=FONT,
            parse_math=False,
        )  # fmt: skip
    return figure


def _lines(name: str, room: float) -> list[str]:
    return [line.replace("\u00a0", " ") for line in wrapped(name, room, _SMALL)]


def displayable(support_x: Tensor, query_x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """[n, C, H, W] of any range to [n, H, W, 3] or [n, H, W] in 0..1; channels other than 3 are averaged to grey.

    Each channel is stretched between its extremes over the whole episode, which undoes a normalisation by mean and
    standard deviation and keeps the differences in brightness between images.
    """
    x = torch.cat([support_x, query_x]).detach().cpu().float()
    if x.shape[1] != 3:
        x = x.mean(1, keepdim=True)
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    x = ((x - low) / (high - low).clamp_min(1e-12)).nan_to_num(0.0)
    pixels = x.permute(0, 2, 3, 1).squeeze(-1).numpy()
    return pixels[: len(support_x)], pixels[len(support_x) :]


def drawable(name: str, n: int) -> str:
    """The name, or "class 3" where the font lacks one of its letters and would draw, and warn of, an empty box.

    >>> drawable("Γάτα", 0), drawable("猫", 2)
    ('Γάτα', 'class 3')
    """
    known = _code_points()
    kept = "".join(c if c.isprintable() else " " for c in name).strip()
    return kept if kept and all(ord(c) in known for c in kept) else f"class {n + 1}"


@functools.cache
def _code_points() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT)).get_charmap())


def letter(n: int) -> str:
    """A, B, ... Z, and numbers from 27 on."""
    return chr(ord("A") + n) if n < 26 else str(n + 1)


def _caption(right: Tensor, shown: int, most: int) -> str:
    text = (
        f"{int(right.sum())} of {len(right)} query images right. Letter: the class predicted. "
        "Frame: solid green where it is right, dashed orange where it is wrong."
    )
    return text if shown == most else f"{text} Shown: {shown} of {most} query images per class."


def _canvas(layout: _Layout, caption: str) -> tuple[Figure, Axes]:
    """A figure with one frameless axes whose unit is a cell: an axes per image would take seconds at 20 ways."""
    lines = textwrap.wrap(caption, int((layout.width * layout.cell - 0.2) / _CHARACTER))
    bottom = layout.bottom + (0.2 + 0.14 * len(lines)) / layout.cell
    figure = Figure(figsize=(layout.cell * layout.width, layout.cell * (bottom + layout.top)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, layout.width)
    axes.set_ylim(bottom, -layout.top)
    axes.autoscale(False)  # an image would set the limits to its own
    axes.text(0.15, layout.bottom + 0.1, "\n".join(lines), fontsize=8, va="top", family=FONT)
    for (x, _), title in ((layout.support_at(0, 0), "support"), (layout.query_at(0, 0), "query")):
        axes.text(x + _MARGIN, -0.14, title, fontsize=10, fontweight="bold", family=FONT)
    return figure, axes


def _name_row(axes: Axes, layout: _Layout, n: int, name: str | None) -> None:
    y = n * layout.pitch + 0.5
    right = layout.names - 0.07 / layout.cell
    axes.text(right, y, letter(n), fontsize=11, fontweight="bold", ha="right", va="center", family=FONT)
    if name is None:
        return
    # A space lets "alphabet/character" break after its slash.
    lines = textwrap.wrap(drawable(name, n).replace("/", "/ "), 20, max_lines=3, placeholder=" …")
    text = "\n".join(lines).replace("/ ", "/")
    axes.text(
        right - 0.27 / layout.cell, y, text, fontsize=8, ha="right", va="center", family=FONT,
        parse_math=False,  # a folder may be called "$x_{"
    )  # fmt: skip


def _draw_image(axes: Axes, pixels: np.ndarray, x: float, y: float, wide: float = 1.0, high: float = 1.0) -> None:
    extent = (x + _MARGIN, x + wide - _MARGIN, y + high - _MARGIN, y + _MARGIN)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, aspect="auto", extent=extent)


def _draw_verdict(axes: Axes, x: float, y: float, *, predicted: int, label: int) -> None:
    right = predicted == label
    colour, style = (RIGHT, "-") if right else (WRONG, (0, (2.5, 1.2)))
    side = 1 - 2 * _MARGIN
    axes.add_patch(Rectangle((x + _MARGIN, y + _MARGIN), side, side, fill=False, ec=colour, lw=2.2, ls=style))
    axes.text(
        x + 0.5, y + 0.98, letter(predicted), color=colour, fontsize=9, fontweight="normal" if right else "bold",
        ha="center", va="top", family=FONT,
    )  # fmt: skip
