"""Gradient descent: where training went, in planes through the space of its parameters, and its loss on them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from metaft.config import AdaptConfig
from metaft.errors import MetaftError
from metaft.finetune.journal import read
from metaft.finetune.retraced import Retraced, retraced
from metaft.finetune.setup import prepared
from metaft.inner import at_step
from metaft.metrics import loss_value
from metaft.plots.landscape import landscape_figure
from metaft.runs.assemble import Parts, fill
from metaft.runs.opened import open_run
from metaft.runs.snapshot import Snapshot
from metaft.runs.trail import FEWEST, read_trail
from metaft.runs.training import META
from metaft.starts.none import OWN
from metaft.support.progress import Progress
from metaft.types import Episode, Params
from metaft.views.base import Column, Missing, Of, Part, Table, View
from metaft.views.images import chart
from metaft.views.planes import principal_plane, span, surface
from metaft.views.scenes import Scene, onto, path_scene, random_scene
from metaft.views.subject import Subject

GRID, IMAGES, TASKS = 17, 64, 4
"""Points along an axis, and what a loss is of: images of a fine-tuning, tasks of a meta-training."""

INNER = "Inner paths from one initialisation"


def landscape(subject: Subject) -> View | Missing:
    if subject.command == "start":
        return Missing("a start is not trained here")
    if not subject.landscape:
        return Missing("it takes minutes: python -m metaft.look RUN --landscape draws it")
    try:
        scenes, notes = _of_meta_training(subject) if subject.command == "meta_train" else _of_fine_tuning(subject)
    except MetaftError as error:
        return Missing(f"the run's data, or what else it was made with, are not at hand or changed ({error})")
    if not scenes:
        return Missing("; ".join(note.rstrip(".") for note in notes))
    bar = Progress("landscape", GRID * GRID * len(scenes), "point")
    try:
        drawn = [_drawn(scene, bar) for scene in scenes]
    finally:
        bar.close()
    rows = [_row(scene, losses) for scene, (_, losses) in zip(scenes, drawn, strict=True)]
    columns = [Column("plane"), Column("points"), Column("along the first", ".1%"), Column("along the second", ".1%")]
    columns += [Column("in neither", ".3%"), Column("lowest loss", ".4g"), Column("highest loss", ".4g")]
    parts: list[Part] = [part for part, _ in drawn]
    return View(_said(subject, scenes, notes), [*parts, Table("What the planes hold", columns, rows)])


def _said(subject: Subject, scenes: Sequence[Scene], notes: Sequence[str]) -> str:
    said = (
        "Grey lines join parameters of equal loss; each small mark is a snapshot or an inner step, the large one the "
    )
    said += "end. "
    if any(scene.title == INNER for scene in scenes):
        said += "Contours below inner paths are of the mean loss of these tasks: one alone may seem to climb. "
    if any(scene.projected for scene in scenes):
        said += (
            "The plane of a path is that of its first two principal directions, unscaled; what lies in neither "
            "direction is not seen, and the loss is that of the plane. "
        )
    said += (
        "In the random plane each filter of a direction is as long as the filter where training ended; biases, scales "
        "and shifts stay. "
    )
    for scene in scenes:
        if scene.projected:
            said += (
                f"{scene.title}: {100 * scene.projected.residual:.3g} % of the squared distance is not in the plane. "
            )
    what = "meta-parameters" if subject.command == "meta_train" else "parameters that fine-tuning moved"
    said += f"All {what} are looked at; stored statistics and all else are those of the end."
    return " ".join([said, *notes])


def _drawn(scene: Scene, bar: Progress) -> tuple[Part, np.ndarray]:
    xs, ys = span(scene.around, GRID)
    with torch.no_grad():
        losses = surface(scene.loss, scene.plane, xs, ys, lambda: bar.update(bar.done + 1))
    figure = landscape_figure(xs, ys, losses, scene.axes, scene.paths, scene.marks)
    return chart(scene.title, figure, scene.says, scene.of), losses


def _row(scene: Scene, losses: np.ndarray) -> list[str | int | float | None]:
    finite = losses[np.isfinite(losses)]
    ends = [float(finite.min()), float(finite.max())] if finite.size else [None, None]
    count = sum(len(path) for path in scene.paths.values())
    if scene.projected is None:
        return [scene.title, None, None, None, None, *ends]
    return [scene.title, count, *scene.projected.shares, scene.projected.residual, *ends]


# ---- meta-training --------------------------------------------------------------------------------------------------


def _of_meta_training(subject: Subject) -> tuple[list[Scene], list[str]]:
    assert subject.folder is not None
    parts, best = subject.assembled
    last = fill(parts, open_run(subject.folder.path, which="last")[2])
    c = parts.config
    scenes: list[Scene] = []
    notes: list[str] = []
    tasks = subject.tasks("val", TASKS)
    queries = sum(len(task.query_y) for task in tasks)
    loss = _meta_loss(parts, last, tasks)
    how = f"{len(tasks)} fixed validation tasks, {queries} queries, after {c.test.test_inner_steps} inner steps"
    of = Of(how, c.learner.batch_norm, f"meta-step {last.position.step:,}")
    trail = read_trail(subject.folder.snapshots, META)
    steps = {waypoint.step: waypoint.params for waypoint in trail} | {last.position.step: last.meta}
    projected = principal_plane([*steps.values()], last.meta) if len(steps) >= FEWEST else None
    if projected is None:
        notes.append(_no_path(len(trail), "meta_train"))
    else:
        marks = {}
        if best.position.step != last.position.step:
            marks = {f"best on validation, step {best.position.step:,}": onto(projected.plane, best.meta)}
        of_path = of._replace(step=f"{len(steps)} meta-steps, 0 to {last.position.step:,}")
        scenes.append(
            path_scene("The path of meta-training", projected, {"snapshots": projected.points}, loss, of_path, marks)
        )
    scene = random_scene(last.meta, [name for name in parts.model.params if name in last.meta], loss, of)
    scenes += [scene] if scene else []
    inner = _inner_scene(parts, best, subject.tasks("test", TASKS))
    if isinstance(inner, str):
        notes.append(inner)
    else:
        scenes.append(inner)
    return scenes, notes


def _meta_loss(
    parts: Parts, snapshot: Snapshot, tasks: Sequence[Episode], steps: int | None = None
) -> Callable[[Params], float]:
    """The mean loss of the tasks' queries after `steps` inner steps (None: as many as in the meta-test)."""
    algorithm, c = parts.algorithm, parts.config
    steps, norm = c.test.test_inner_steps if steps is None else steps, c.learner.batch_norm

    @torch.no_grad()
    def loss(meta: Params) -> float:
        values = []
        for task in tasks:
            fast = algorithm.adapt(
                {**snapshot.meta, **meta}, snapshot.state, task.support_x, task.support_y, task.key,
                ways=c.test.test_ways, steps=steps, moments=norm == "inductive",
            )  # fmt: skip
            values.append(float(loss_value(algorithm.loss, algorithm.predict(fast, task.query_x, norm), task.query_y)))
        return sum(values) / len(values)

    return loss


def _inner_scene(parts: Parts, best: Snapshot, tasks: Sequence[Episode]) -> Scene | str:
    """The ways of a few test tasks from the one initialisation; a sentence where there are none."""
    c, algorithm, name = parts.config, parts.algorithm, parts.algorithm.name
    steps = c.test.test_inner_steps
    if steps == 0:
        return f"{name} has no inner steps, so there are no inner paths."
    paths: list[list[Params]] = []
    with torch.no_grad():
        for task in tasks:
            every = algorithm.adapt(
                best.meta, best.state, task.support_x, task.support_y, task.key, ways=c.test.test_ways, steps=steps,
                trajectory=True, moments=False,
            )  # fmt: skip
            paths.append([at_step(every, step).params for step in range(steps + 1)])
    begin = paths[0][0]
    moving = [k for k, v in begin.items() if any(not torch.equal(v, path[-1][k]) for path in paths)]
    known = {k for k in moving if k in best.meta and best.meta[k].shape == begin[k].shape}
    if set(moving) != known or any(not torch.equal(path[0][k], begin[k]) for path in paths for k in moving):
        return f"Each task of {name} begins with a head of its own, so inner paths have no start in common."
    origin = {k: begin[k] for k in moving}
    points = [{k: p[k] for k in moving} for path in paths for p in path[1:]]
    projected = principal_plane(points, origin) if moving else None
    if projected is None:
        return f"The inner loop of {name} moved in fewer than two directions, so there is no plane of its paths."
    ends = np.split(projected.points, len(paths))
    named = {f"task {i + 1}": np.concatenate([np.zeros((1, 2)), end]) for i, end in enumerate(ends)}
    of = Of(
        f"the queries of {len(tasks)} test tasks, no further inner steps", c.learner.batch_norm,
        f"inner steps 0 to {steps} at meta-step {best.position.step:,}",
    )  # fmt: skip
    loss = _meta_loss(parts, best, tasks, 0)
    return path_scene(INNER, projected, named, loss, of, {"initialisation": (0.0, 0.0)})


def _no_path(snapshots: int, command: str, of: str = "") -> str:
    said = "no snapshots of its training" if snapshots == 0 else f"{snapshots} snapshots, too few for two directions"
    return (
        f"There is no path{of}: the run has {said}; python -m metaft.{command} --snapshots 25 --out NEW, with --config "
        "and the config.toml of its folder, trains it again with some, where three of them take 200 MB or less."
    )


# ---- fine-tuning ----------------------------------------------------------------------------------------------------


def _of_fine_tuning(subject: Subject) -> tuple[list[Scene], list[str]]:
    assert subject.folder is not None and isinstance(subject.config, AdaptConfig)
    if subject.result["method"] == "inner":
        return [], ["the run's own inner loop is in the page of that run"]
    if subject.folder.compress.exists():
        return [], ["a classifier that was made smaller leaves no snapshots on its way"]
    position, header = read(subject.folder)
    values = "keep" if header["init"] == OWN else "seed"
    config = subject.config
    if subject.data_root is not None:
        config = dataclasses.replace(config, data_root=subject.data_root)
    setup = prepared(config, subject.module, values, header)
    kept = int(subject.result["starts"][0]["kept_epoch"] or 0)
    fits = retraced(subject.folder, setup, position, subject.classifier, kept, most=IMAGES)
    if not fits:
        return [], [_no_path(0, "adapt")]
    scenes: list[Scene] = []
    notes: list[str] = []
    begun = setup.contenders[0].label
    if begun not in [fit.label for fit in fits]:
        notes.append(_no_path(0, "adapt", f" of the {begun} start"))
    for fit in fits:
        points = [w.params for w in fit.waypoints]
        projected = principal_plane(points, fit.end.params) if len(points) >= FEWEST else None
        of = _of_fit(fit)
        if projected is None:
            notes.append(_no_path(len(points), "adapt", f" of the {fit.label} start"))
        else:
            title = f"The path of the {fit.label} start"
            scenes.append(path_scene(title, projected, {fit.label: projected.points}, fit.loss, of))
        if fit is fits[0]:
            end = fit.end
            when = f"epoch {end.step}" if fit.waypoints else "the classifier that was kept"
            random = random_scene(end.params, [*end.params], fit.loss, of._replace(step=when))
            scenes += (
                [random._replace(title=f"A random plane through the end of the {fit.label} start")] if random else []
            )
    first = fits[0]
    for other in fits[1:] if first.waypoints else ():
        joint = _joint(first, other)
        if joint is None:
            notes.append(f"{first.label} and {other.label} are not the same model, so no plane holds both.")
        else:
            scenes.append(joint)
    return scenes, notes


def _of_fit(fit: Retraced) -> Of:
    images = f"{fit.images} training images of the first draw, as they are and without extras"
    return Of(images, fit.mode, f"{len(fit.waypoints)} epochs, 0 to {fit.end.step}")


def _joint(one: Retraced, other: Retraced) -> Scene | None:
    """Both paths in the plane of all their points; None where the models are not the same but for what moves."""
    a, b = one.waypoints[-1].params, other.waypoints[-1].params
    alike = a.keys() == b.keys() and all(a[k].shape == b[k].shape for k in a)
    if not alike or one.still.keys() != other.still.keys():
        return None
    if not all(torch.equal(v, other.still[k]) for k, v in one.still.items()):
        return None
    points = [w.params for w in itertools.chain(one.waypoints, other.waypoints)]
    projected = principal_plane(points, a)
    if projected is None:
        return None
    count = len(one.waypoints)
    paths = {one.label: projected.points[:count], other.label: projected.points[count:]}
    of = _of_fit(one)._replace(step=f"epochs 0 to {one.waypoints[-1].step} and 0 to {other.waypoints[-1].step}")
    return path_scene(f"{one.label} and {other.label} in one plane", projected, paths, one.loss, of)
