"""What a meta-training run found, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metaft.objective import figure_of
from metaft.types import NORMS


def plainly(result: Mapping[str, Any]) -> str:
    """What tasks of new classes come to, beside what needs no learning."""
    test = result["test"]
    name = figure_of(test[NORMS[0]])
    first, other = (test[norm] for norm in NORMS)
    steps, shots, n = test["inner_steps"], test["shots"], first["episodes"]
    learned = f"after {steps} inner step{'s' * (steps != 1)} on" if steps else "given"
    if name != "accuracy":
        before = first[f"{name}_per_step"][0]
        points = f"{shots} point{'s' * (shots != 1)}" if name == "mse" else f"{shots} examples"
        what = "mean squared error" if name == "mse" else name
        figure = f"{_number(first[name])} ± {_number(first['ci95'])}"
        said = f"On {n:,} new tasks, {learned} {points} each, the {what} is {figure}"
        return f"{said}, from {_number(before)} before." if steps else f"{said}."
    images = f"{shots} image{'s' * (shots != 1)}"
    right = (
        f"Of tasks with {test['ways']} classes that training never saw, {learned} {images} of each, {_share(first)} of "
        f"100 query images get the right label where queries are normalised together ({NORMS[0]}), and {_share(other)} "
        f"where each task's support images alone decide that ({NORMS[1]}): means of {n:,} tasks with 95 % intervals."
    )
    floor = f"Chance gets {100 / test['ways']:.1f}"
    pixels = test.get("pixel_nearest_neighbour")
    said = [right, f"{floor}, the nearest support image in pixels {_share(pixels)}." if pixels else f"{floor}."]
    if n < 600:
        said.append(f"{n} tasks are too few to compare with published figures, which use 600 or more.")
    return " ".join(said)


def _share(figures: Mapping[str, Any]) -> str:
    if figures["accuracy"] is None:
        return "an unknown share"
    ci95 = "" if figures["ci95"] is None else f" ± {100 * figures['ci95']:.1f}"
    return f"{100 * figures['accuracy']:.1f}{ci95}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
