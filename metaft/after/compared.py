"""Runs that are compared, as people read it: tables, sentences, and points of curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from metaft.after.comparing import Difference, Finished, differences
from metaft.metrics import percent, verdict
from metaft.support.places import shown
from metaft.types import NORMS


def table(runs: Sequence[Finished]) -> list[list[str]]:
    """A line for each run, the head first: what it is, its figures, and what it is above the first."""
    first, *others = runs
    about, counted = _ABOUT[first.kind], {"meta_train": "episodes", "adapt": "draws"}[first.kind]
    titles = _titles(first)
    head = ["run", *about, *titles, counted, *(f"{title} over {first.label}" for title in titles)]
    lines = [[run.label, *(of(run) for of in about.values()), *_cells(run), _n(run)] for run in runs]
    lines[0] += [""] * len(first.figures)
    for line, run in zip(lines[1:], others, strict=True):
        line += [cell(difference, run.measure) for difference in differences(first, run)]
    return [head, *lines]


def _titles(run: Finished) -> list[str]:
    return [name if run.kind == "adapt" else f"{name} {run.measure}" for name in run.figures]


_ABOUT: dict[str, dict[str, Callable[[Finished], str]]] = {
    "meta_train": {
        "algorithm": lambda run: str(run.result["algorithm"]),
        "data": lambda run: shown(str(run.result["dataset"])),
        "task": lambda run: f"{run.result['test']['ways']}-way {run.result['test']['shots']}-shot",
        "meta-steps": lambda run: f"{run.result['iterations']:,}",
    },
    "adapt": {
        "start": lambda run: str(run.result["starts"][0]["name"]),
        "strategy": lambda run: "inner" if run.result["method"] == "inner" else str(run.result["strategy"]),
        "data": lambda run: shown(str(run.result["data"])),
        "images": lambda run: f"{run.result['train_images']:,}",
    },
}


def _n(run: Finished) -> str:
    if run.kind == "meta_train":
        return f"{run.result['test'][NORMS[0]]['episodes']:,}"
    return str(run.result["starts"][0]["mean"]["draws"])


def _cells(run: Finished) -> Iterator[str]:
    for figure in run.figures.values():
        if figure.ci95 is not None:
            yield percent(run.measure, figure.value, figure.ci95)
        else:
            yield f"{100 * figure.value:.2f} %" if run.measure == "accuracy" else f"{figure.value:.3f}"


def cell(difference: Difference, measure: str) -> str:
    """`"+1.25 ± 0.40"`, of accuracies in points; "(...)" where it is not paired, "-" where there is none."""
    if difference.value is None:
        return "-"
    scale, digits = (100, 2) if measure == "accuracy" else (1, 3)
    half = "" if difference.ci95 is None else f" ± {scale * difference.ci95:.{digits}f}"
    text = f"{scale * difference.value:+.{digits}f}{half}"
    return text if difference.paired else f"({text})"


def settings(runs: Sequence[Finished]) -> list[list[str]]:
    """A line for each setting in which the runs differ, the head first, but for what is written beside the result."""
    names = [name for name in dict.fromkeys(key for run in runs for key in run.config) if name not in _WRITING]
    lines = [[name, *(_written(run.config.get(name)) for run in runs)] for name in names]
    return [["setting", *(run.label for run in runs)], *(line for line in lines if len(set(line[1:])) > 1)]


_WRITING = frozenset({"out", "report", "snapshots", "log", "log_every"})


def _written(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else shown(str(value))


HIGHER_IS_BETTER = {"accuracy": True, "mse": False, "rmse": False}


def plainly(first: Finished, other: Finished) -> list[str]:
    """A sentence for each figure: what the difference is, over what, and whether chance can tell."""
    said = []
    for difference, title in zip(differences(first, other), _titles(first), strict=True):
        if difference.value is None:  # for all figures alike
            return [f"{other.label} and {first.label} cannot be compared: {difference.why}"]
        unit = " points" if first.measure == "accuracy" else ""
        what = "draw" if first.kind == "adapt" else "episode"
        over = f"paired over {difference.paired:,} {what}{'s' if difference.paired > 1 else ''}"
        text = cell(difference, first.measure).strip("()")
        said.append(
            f"{other.label} over {first.label}: {title} {text}{unit}, "
            f"{over if difference.paired else difference.why}: {_sure(difference, first.measure)}"
        )
    return said


def _sure(difference: Difference, measure: str) -> str:
    assert difference.value is not None
    found = verdict(difference.value, difference.ci95)
    if found not in ("above", "below"):
        return _UNSURE[found]
    if measure not in HIGHER_IS_BETTER:  # a figure of the user's own, which only they can judge
        return "a difference, and not by chance"
    better = (found == "above") == HIGHER_IS_BETTER[measure]
    return "better by more than chance" if better else "worse, and not by chance"


_UNSURE = {
    "alone": "one alone, which tells nothing of the next",
    "equal": "all happen to agree, which tells nothing of the next",
    "chance": "no difference that can be told from chance",
}


def curves(runs: Sequence[Finished]) -> tuple[dict[str, list[dict[str, float | None]]], str, str]:
    """(the points of each run's curve, the name of x, that of y): of meta-training what was validated, in the mode that
    it was chosen by, of fine-tuning the loss of the first draw from the first start."""
    if runs[0].kind == "adapt":
        lines = {run.label: [{"x": row["epoch"], "y": row["loss"]} for row in _of_first(run)] for run in runs}
        return lines, "epoch", "training loss, first draw"
    name = runs[0].measure
    modes = {run.label: next((m for row in run.rows for m in NORMS if m in row), NORMS[0]) for run in runs}
    lines = {
        run.label: [
            {"x": row["step"], "y": row[mode][name], "ci95": row[mode]["ci95"]}
            for row in run.rows
            if row.get("kind") == "val" and (mode := modes[run.label]) in row
        ]
        for run in runs
    }
    return lines, "meta-step", f"validation {name}, {' or '.join(dict.fromkeys(modes.values()))}"


def _of_first(run: Finished) -> list[Mapping[str, Any]]:
    """The epochs of a fine-tuning's first fit."""
    first = run.rows[0] if run.rows else {}
    tag = {key: first.get(key) for key in ("draw", "start", "fold")}
    return [row for row in run.rows if {key: row.get(key) for key in tag} == tag]
