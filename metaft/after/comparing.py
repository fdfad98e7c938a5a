"""Finished runs side by side: figures with intervals, paired where tests were the same, and what differs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metaft.after.settings import settings_of
from metaft.errors import CheckpointError, MetaftError
from metaft.metrics import mean_ci95, mean_t95
from metaft.objective import figure_of
from metaft.runs.folder import RunFolder, read_rows
from metaft.runs.recorded import CONFIGS, of_run
from metaft.types import NORMS

Result = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure of a run, after whatever its test took the mean of."""

    value: float
    ci95: float | None
    each: Mapping[int, float]
    """The same of each test episode, by number, or of each draw, by seed: where it was kept."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run of metaft.meta_train or metaft.adapt, as it lies in its folder."""

    label: str
    kind: str
    """The command that left it."""
    config: Mapping[str, Any]
    result: Result
    rows: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl."""
    figures: Mapping[str, Figure]
    """By name: of a meta-test the modes, of a target the figure itself, "accuracy" or "rmse"."""

    @property
    def measure(self) -> str:
        """What the figures are: "accuracy", "mse" or "rmse"."""
        return figure_of(self.result["test"][NORMS[0]]) if self.kind == "meta_train" else next(iter(self.figures))


@dataclasses.dataclass(frozen=True)
class Difference:
    """What one run is above the first in a figure, in the figure's own unit."""

    figure: str
    value: float | None
    """None where their tests have nothing in common."""
    ci95: float | None
    paired: int
    """Over so many test episodes or draws; 0: not paired."""
    why: str
    """What there is to say of a difference that is not paired, or not there."""


def opened(paths: Sequence[Path]) -> list[Finished]:
    """The runs, each called by the end of its path that tells it apart.

    Raises MetaftError, naming `runs`, for fewer than two, one that is named twice, runs of several commands, and
    CheckpointError for what is no finished run.
    """
    if len(paths) < 2:
        raise MetaftError(f"runs: name two or more to compare, got {len(paths)}")
    folders = [path.resolve() for path in paths]
    twice = next((path for i, path in enumerate(paths) if folders[i] in folders[:i]), None)
    if twice is not None:
        raise MetaftError(f"runs: {twice} is named twice")
    runs = [_opened(path, label) for path, label in zip(paths, _labels(folders), strict=True)]
    first = runs[0]
    for path, run in zip(paths, runs, strict=True):
        if (run.kind, run.measure) != (first.kind, first.measure):
            raise MetaftError(
                f"runs: {path} is {_kind(run)}, and {paths[0]} {_kind(first)}: their figures cannot be compared"
            )
    return runs


def _kind(run: Finished) -> str:
    return f"of metaft.{run.kind}, tested by {run.measure}"


def _labels(folders: Sequence[Path]) -> list[str]:
    """The last names of paths, as many as tell all apart."""
    parts = [folder.parts for folder in folders]
    count = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(p[-count:]) for p in parts]


def _opened(path: Path, label: str) -> Finished:
    try:
        run = RunFolder.open(path)
    except CheckpointError as error:
        raise CheckpointError(f"runs: {error}") from None
    result = run.read_result("runs")
    kind = result["command"]
    if kind not in [*CONFIGS]:
        raise CheckpointError(f"runs: {run.result} is of no command that leaves runs: {kind!r}")
    config = of_run(CONFIGS[kind], run.config, "runs")
    try:
        settings, figures = settings_of(run, config, result), FIGURES[kind](run, result)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"runs: {run.result} is damaged: {error!r}") from None
    return Finished(label, kind, settings, result, read_rows(run.metrics), figures)


def _of_meta_test(run: RunFolder, result: Result) -> dict[str, Figure]:
    rows = read_rows(run.episodes, ["episode", *NORMS])
    test = result["test"]
    name = figure_of(test[NORMS[0]])
    if len(rows) != test[NORMS[0]]["episodes"]:  # older runs have none
        rows = []
    return {
        mode: Figure(
            float(test[mode][name]), _number(test[mode]["ci95"]), {int(row["episode"]): row[mode] for row in rows}
        )
        for mode in NORMS
    }


def _of_target(run: RunFolder, result: Result) -> dict[str, Figure]:
    mean = result["starts"][0]["mean"]
    name = "accuracy" if "accuracy" in mean else "rmse"
    draws = result.get("draws", [])
    each = {draw["seed"]: float(draw[name]) for draw in draws} if isinstance(draws, list) else {}
    return {name: Figure(float(mean[name]), _number(mean["ci95"]), each)}


FIGURES: dict[str, Callable[[RunFolder, Result], dict[str, Figure]]] = {
    "meta_train": _of_meta_test,
    "adapt": _of_target,
}
"""Of a finished run, by its command."""


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


# ---- differences --------------------------------------------------------------------------------------------------

SAME = {
    "meta_train": ("split_hash", "test.split", "test.ways", "test.shots", "test.query_shots", "test.rotated"),
    "adapt": ("data", "classes", "labelled_images", "test_images", "folds"),
}
"""What has to be equal for two tests to be of the same tasks, or of the same images."""


def differences(first: Finished, other: Finished) -> list[Difference]:
    """What `other` is above `first` in each figure, paired over the test episodes, or over the draws, of both."""
    unlike = [name for name in SAME[first.kind] if _at(first.result, name) != _at(other.result, name)]
    return [_difference(name, first, other, unlike) for name in first.figures]


def _difference(name: str, first: Finished, other: Finished, unlike: Sequence[str]) -> Difference:
    a, b = first.figures[name], other.figures[name]
    if unlike:
        return Difference(name, None, None, 0, f"other tests: {', '.join(unlike)} differ")
    seeds = "test.eval_seed", "test.transductive.episodes"
    same = first.kind == "adapt" or all(_at(first.result, key) == _at(other.result, key) for key in seeds)
    both = sorted(a.each.keys() & b.each.keys()) if same else []
    if both:
        pairs = [b.each[key] - a.each[key] for key in both]
        if first.kind == "adapt":
            return Difference(name, *mean_t95(pairs), len(both), "")
        mean, ci95 = mean_ci95(torch.tensor(pairs, dtype=torch.float64))
        return Difference(name, float(mean), _number(float(ci95)), len(both), "")
    ci95 = None if a.ci95 is None or b.ci95 is None else math.hypot(a.ci95, b.ci95)
    without = [run.label for run in (first, other) if not run.figures[name].each]
    what = "draws" if first.kind == "adapt" else "test episodes"
    why = f"{' and '.join(without)} kept no figures of single {what}" if same and without else f"other {what}"
    return Difference(name, b.value - a.value, ci95, 0, f"not paired: {why}")


def _at(result: Result, name: str) -> Any:
    """A value by its path, "test.ways"; None where there is none."""
    value: Any = result
    if name == "labelled_images":  # some may be set aside for validation: that is for each run to say
        return result["train_images"] + result["val_images"]
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
