"""The picture at the head of the README, from a run of `metaft.meta_train` on images of classes.

    python -m metaft.meta_train --iterations 2000 --test-episodes 200 --threads 1 --out runs/picture
    python examples/picture.py runs/picture --out docs/picture.png

One test task: its support images, one query of each class with the probability of its own class before and after the
inner steps; and the accuracy over the inner steps of all test tasks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaft.plots.grid import displayable, letter
from metaft.plots.style import BLUE, GREY, VERMILLION, decorate, percent, save
from metaft.testing import ordinary
from metaft.types import NORMS, Episode
from metaft.views.episode import outputs_of
from metaft.views.subject import Subject, open_subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    given = parser.parse_args()
    save(drawn(open_subject(given.run)), given.out)
    print(f"{given.out}: {given.out.stat().st_size / 1000:.0f} kB")


def drawn(subject: Subject) -> Figure:
    parts, best = subject.assembled
    test, c = subject.result["test"], parts.config
    source = parts.dataset.source(ways=test["ways"], shots=test["shots"], query_shots=test["query_shots"])
    task = Episode(*(t[0] for t in ordinary(source.episodes(test["eval_seed"], "test", [0]))))
    norm, steps = c.learner.batch_norm, test["inner_steps"]
    with torch.no_grad():
        outputs = outputs_of(parts.algorithm, best.meta, best.state, task, ways=source.ways, steps=steps, norm=norm)
    rows = [int((task.query_y == k).nonzero()[0]) for k in range(source.ways)]
    own = outputs.softmax(-1)[:, rows, list(range(source.ways))].numpy()
    support, query = displayable(task.support_x, task.query_x)
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    panels: Any = figure.subfigures(1, 3, width_ratios=(1.1, 4, 3.6))
    left, middle, right = panels

    left.suptitle("one example\nof each class", fontsize=10)
    for k, axes in enumerate(left.subplots(source.ways, 1, squeeze=False)[:, 0]):
        image(axes, support[int((task.support_y == k).nonzero()[0])], letter(k))
    middle.suptitle(f"new images: how sure of the right class,\nbefore and after {steps} inner steps", fontsize=10)
    grid = middle.subplots(source.ways, 2, width_ratios=(1, 7))
    for k, (picture, axes) in enumerate(grid):
        image(picture, query[rows[k]], letter(k))
        for y, step, colour in ((1, 0, GREY), (0, steps, BLUE)):
            axes.barh(y, own[step, k], color=colour, height=0.8)
            axes.text(own[step, k] + 0.02, y, f"{100 * own[step, k]:.0f} %", va="center", fontsize=8)
        axes.set(xlim=(0, 1.2), xticks=[], yticks=[1, 0], yticklabels=["before", "after"])
        axes.tick_params(labelsize=8, length=0)
        axes.spines[:].set_visible(False)
    axes = right.subplots()
    for name, colour, style in zip(NORMS, (BLUE, VERMILLION), ("-o", "--s"), strict=True):
        mean, ci95 = test[name]["accuracy_per_step"], test[name]["ci95_per_step"]
        axes.errorbar(range(steps + 1), mean, ci95, fmt=style, color=colour, ms=5, capsize=3, label=name)
    axes.axhline(1 / source.ways, color=GREY, lw=1, ls=":", label="chance")
    axes.set_xticks(range(steps + 1))
    percent(axes, whole=True)
    decorate(axes, "inner step", "accuracy, 95 % interval")
    right.suptitle(f"{test[norm]['episodes']} tasks of classes never seen", fontsize=10)
    return figure


def image(axes: Axes, pixels: np.ndarray, name: str) -> None:
    axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_ylabel(name, rotation=0, va="center", labelpad=8)


if __name__ == "__main__":
    main()
