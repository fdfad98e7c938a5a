"""What a finished run shows: pictures and a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metaft.errors import CheckpointError
from metaft.metrics import figure_name, percent
from metaft.objective import figure_of
from metaft.runs.assemble import Parts
from metaft.runs.folder import RunFolder, read_rows
from metaft.runs.snapshot import Snapshot
from metaft.support.pictures import drawn, listed, plotting
from metaft.support.places import shown
from metaft.support.progress import duration
from metaft.types import NORMS, Episode, Source


def draw_pictures(run: RunFolder, parts: Parts, best: Snapshot, source: Source, test: Mapping[str, Any]) -> list[Path]:
    """Curves, figure against inner step, and the first test episode; returns the files that could be drawn.

    Raises CheckpointError where metrics.jsonl is damaged.
    """
    name = figure_name(parts.algorithm.loss)
    curves, steps, episode = (run.plots / f"{stem}.png" for stem in ("curves", "steps", "episode"))
    pictures = {
        curves: lambda: _draw_curves(curves, run, name, best.position.best_step),
        steps: lambda: plotting().steps(steps, test),
    }
    task = Episode(*(t[0] for t in source.episodes(parts.config.test.eval_seed, "test", [0])))
    if _is_picturable(task):
        pictures[episode] = lambda: _draw_episode(episode, parts, best, task, source.ways)
    return drawn(pictures)


def _draw_curves(path: Path, run: RunFolder, name: str, best_step: int | None) -> None:
    rows = read_rows(run.metrics)
    plots = plotting()
    try:
        train, val = ([r for r in rows if r["kind"] == kind] for kind in ("train", "val"))
        plots.curves(path, train, val, name, best_step=best_step)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{run.metrics}: a row is not one that a run writes ({error!r})") from None


def _is_picturable(task: Episode) -> bool:
    """Whether its inputs are images in classes, or points of a curve."""
    if not task.support_y.is_floating_point():
        return task.query_x[0].dim() == 3
    return task.query_x[0].numel() == task.query_y[0].numel() == 1


def _draw_episode(path: Path, parts: Parts, best: Snapshot, task: Episode, ways: int) -> None:
    c, plots, algorithm = parts.config, plotting(), parts.algorithm

    def predictions(steps: int) -> torch.Tensor:
        fast = algorithm.adapt(best.meta, best.state, task.support_x, task.support_y, task.key, ways=ways, steps=steps)
        return algorithm.predict(fast, task.query_x, c.learner.batch_norm).detach().cpu()

    if not task.support_y.is_floating_point():
        class_names = getattr(parts.dataset, "class_names", None)
        names = None if class_names is None else [class_names[int(i)] for i in task.class_ids]
        shown = Episode(*(t.cpu() for t in task))
        plots.episode(path, shown, predictions(c.test.test_inner_steps).argmax(-1), names)
        return
    order = task.query_x.flatten().argsort().cpu()
    lines = {
        "before adaptation": predictions(0).flatten()[order],
        f"after {c.test.test_inner_steps} steps": predictions(c.test.test_inner_steps).flatten()[order],
    }
    plots.regression_episode(
        path,
        task.support_x.flatten().cpu(),
        task.support_y.flatten().cpu(),
        task.query_x.flatten().cpu()[order],
        task.query_y.flatten().cpu()[order],
        lines,
    )


def print_summary(result: Mapping[str, Any], pictures: list[Path], path: Path, following: Sequence[str]) -> None:
    """The result in plain words on stdout, with the next command to type."""
    print(
        f"{shown(result['dataset'])} · {result['algorithm']} · {result['iterations']} meta-steps in "
        f"{duration(result['seconds'])} ({result['tasks_per_second']} tasks/s), "
        f"best on validation at step {result['best_step']}"
    )
    print_test(result["test"])
    print(listed(pictures))
    print(f"result:   {path / 'result.json'}")
    print(f"next:     {following[0]}")
    for other in following[1:]:
        print(f"or:       {other}")


def print_test(test: Mapping[str, Any]) -> None:
    """A meta-test's protocol and figures, a line per mode."""
    name = figure_of(test[NORMS[0]])
    n = test[NORMS[0]]["episodes"]
    per_class = f"{test['query_shots']} {'query points' if name == 'mse' else 'queries per class'}"
    ways = "" if name == "mse" else f"{test['ways']}-way "
    print(
        f"{test['split']}: {ways}{test['shots']}-shot, {per_class}{', rotated' if test['rotated'] else ''}, "
        f"{test['inner_steps']} inner steps, {n} episodes of seed {test['eval_seed']}, {name} ± 95 % interval"
    )
    for mode in NORMS:
        figures = test[mode]
        per_step = figures[f"{name}_per_step"]
        stride = max(1, (len(per_step) - 1) // 10)  # of a hundred steps every tenth
        steps = ", ".join(f"{100 * v:.1f}" if name == "accuracy" else f"{v:.3f}" for v in per_step[::stride])
        which = "each step" if stride == 1 else f"every {stride} steps"
        tail = f"   after {which} from 0: {steps}" if len(per_step) > 1 else ""
        print(f"  {mode:<24}{percent(name, figures[name], figures['ci95'])}{tail}")
    if "pixel_nearest_neighbour" in test:
        floor = test["pixel_nearest_neighbour"]
        print(f"  {'pixel nearest neighbour':<24}{percent(name, floor['accuracy'], floor['ci95'])}")
    if n < 600:
        print(f"  ({n} episodes: too few to compare with published figures, which use 600 or more)")
