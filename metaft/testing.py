"""Meta-test: a fixed list of episodes, both normalisation modes, every inner step, with intervals."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaft.algorithms.base import Algorithm
from metaft.dist.ranks import ALONE, Ranks
from metaft.engines.base import Engine
from metaft.engines.batching import each
from metaft.engines.trees import unstacked
from metaft.errors import MetaftError, check_count, check_ways
from metaft.inner import at_step
from metaft.metrics import figure, figure_name, mean_ci95, nearest_neighbour
from metaft.models.fused import first_layer_once
from metaft.support.modes import in_usual_modes_but_type, ordinary
from metaft.types import NORMS, Episode, Fast, Norm, Params, Source, Split

Starts = tuple[tuple[Params, Params], ...]
"""(meta, state) of each member of an ensemble."""


class How(NamedTuple):
    """What of a task is scored: in which modes, and after each inner step or the last one alone."""

    ways: int
    steps: int
    norms: tuple[Norm, ...] = NORMS
    each_step: bool = True


class Group(NamedTuple):
    """Tasks that adapt at once."""

    tasks: Episode
    counts: Tensor
    """[tasks] bool: whether it is one, or fills up the group."""


def task_scores(
    algorithm: Algorithm, meta: Params, state: Params, task: Episode, *, others: Starts = (), **how: Any
) -> Tensor:
    """[modes, steps + 1]: accuracy (or MSE) on one task's queries in each normalisation mode, after each inner step, or
    [modes, 1] after the last one alone; `how` as `How` has it.

    Members without inner steps give one column. With `others` it is that of an ensemble: each start adapts by itself,
    and what counts is the mean of their outputs (of logits, where there are classes: Antoniou et al. 2019, section 4
    for the ensemble, whose code averages them).
    """
    asked = How(**how)
    fasts = (_adapted(algorithm, asked, start, task) for start in ((meta, state), *others))
    return _scores(algorithm, [_outputs(algorithm, asked, fast, task) for fast in fasts], task)


def group_scores(
    algorithm: Algorithm,
    how: How,
    adapt: Callable[[tuple[Params, Params], Episode], Fast],
    starts: Starts,
    group: Group,
) -> Tensor:
    """[tasks, modes, steps + 1 or 1]: `task_scores` of a group's tasks, which adapt by `adapt` all at once, where they
    can, and 0 of what fills it up. Queries are predicted task by task, since those of one are enough for a core."""
    tasks = unstacked(group.tasks)[: int(group.counts.sum())]

    def predicted_from(start: tuple[Params, Params]) -> list[Outputs]:
        fasts = each(adapt, start, group.tasks, len(tasks))
        return [_outputs(algorithm, how, fast, task) for fast, task in zip(fasts, tasks, strict=True)]

    predicted = [predicted_from(start) for start in starts]  # the fast weights of one go before the next one adapts
    by_task = zip(tasks, zip(*predicted, strict=True), strict=True)
    scores = torch.stack([_scores(algorithm, outputs, task) for task, outputs in by_task])
    return torch.cat([scores, scores.new_zeros(len(group.counts) - len(scores), *scores.shape[1:])])


def _adapted(algorithm: Algorithm, how: How, start: tuple[Params, Params], task: Episode) -> Fast:
    """One start's fast weights for a task: of each step where they are asked for or cost nothing more."""
    return algorithm.adapt(
        *start, task.support_x, task.support_y, task.key, ways=how.ways, steps=how.steps,
        trajectory=_is_stacked(algorithm, how), moments="inductive" in how.norms,
    )  # fmt: skip


def _is_stacked(algorithm: Algorithm, how: How) -> bool:
    return how.each_step or algorithm.predict_steps is not None


Outputs = list[list[Tensor]]
"""Of one task, for each mode: what is predicted [n, outputs] after each step that is scored."""


def _scores(algorithm: Algorithm, predicted: Sequence[Outputs], task: Episode) -> Tensor:
    """[modes, steps + 1 or 1] of one task by the mean of what each member of an ensemble predicts."""
    means = [[torch.stack(same).mean(0) for same in zip(*rows, strict=True)] for rows in zip(*predicted, strict=True)]
    rows = [torch.stack([figure(algorithm.loss, mean, task.query_y) for mean in row]) for row in means]
    return torch.stack(rows).detach()


def _outputs(algorithm: Algorithm, how: How, fast: Fast, task: Episode) -> Outputs:
    with first_layer_once(len(how.norms) > 1):  # the modes of a step come one after the other
        if not _is_stacked(algorithm, how):
            return [[algorithm.predict(fast, task.query_x, norm)] for norm in how.norms]
        steps = list(zip(*(predictions(algorithm, fast, task, norm) for norm in how.norms), strict=True))
    return [list(of_norm) for of_norm in zip(*steps[0 if how.each_step else -1 :], strict=True)]


def predictions(algorithm: Algorithm, trajectory: Fast, task: Episode, norm: Norm) -> Iterable[Tensor]:
    """The task's queries as predicted before the first step and after each one, [n, outputs] each."""
    if algorithm.predict_steps is not None:
        return algorithm.predict_steps(trajectory, task.query_x, norm).unbind()
    length = next(iter(trajectory.params.values())).shape[0]
    return (algorithm.predict(at_step(trajectory, s), task.query_x, norm) for s in range(length))


@functools.lru_cache(maxsize=16)
def _scores_of(algorithm: Algorithm, how: How, several: bool) -> Callable[[Starts, Any], Tensor]:
    """`task_scores`, or `group_scores` of `several`, as engines want them: one object for all calls."""
    if several:
        adapt = functools.partial(_adapted, algorithm, how)
        return lambda starts, group: group_scores(algorithm, how, adapt, starts, group)
    return lambda starts, task: task_scores(algorithm, *starts[0], task, others=starts[1:], **how._asdict())


def in_groups(tasks: Episode, size: int) -> Group:
    """Tasks [n, ...] as [groups, size, ...], the last one of which the last task fills up: bits of a task may depend
    on how many adapt with it and on its place among them, and so do not depend on n.

    >>> group = in_groups(Episode(*[torch.arange(3)] * 6), 2)
    >>> group.tasks.support_x.tolist(), group.counts.tolist()
    ([[0, 1], [2, 2]], [[True, True], [True, False]])
    """
    count = len(tasks.key)
    index = torch.arange(-(-count // size) * size, device=tasks.key.device)
    filled = Episode(*(leaf[index.clamp(max=count - 1)].unflatten(0, (-1, size)) for leaf in tasks))
    return Group(filled, (index < count).unflatten(0, (-1, size)))


@in_usual_modes_but_type
def score_episodes(
    engine: Engine,
    algorithm: Algorithm,
    meta: Params,
    state: Params,
    source: Source,
    *,
    split: Split,
    seed: int,
    episodes: int,
    steps: int,
    norms: Sequence[Norm] = NORMS,
    each_step: bool = True,
    others: Starts = (),
    at_once: int | None = None,
    ranks: Ranks = ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """float64 [episodes, modes, steps + 1], or [episodes, modes, 1] without `each_step`: `task_scores` of episodes 0 ..
    episodes-1 of a split, shared out among ranks; with `others` those of the ensemble of all.

    Only scores are kept from one chunk of about `at_once` episodes (32, or as many as keep the engine busy) to the
    next, so memory does not grow with their number. `progress` is called after each chunk; it may raise to stop.

    Raises MetaftError for tasks of other ways than the head has outputs, steps below 0, and episodes below 1.
    """
    check_ways("ways", source.ways, algorithm.loss)
    if algorithm.outputs not in (None, source.ways):
        raise MetaftError(
            f"ways: {algorithm.name} learned a head with {algorithm.outputs} outputs, and tasks of {source.name} have "
            f"{source.ways} classes"
        )
    check_count("steps", steps, 0)
    check_count("episodes", episodes, 1)
    starts = ((meta, state), *others)
    how = How(source.ways, steps, tuple(norms), each_step)
    values = source.ways * (source.shots + source.query_shots) * math.prod(source.shape)
    size = group_size(engine, starts, how, values)

    def score(indices: range) -> Tensor:
        return score_tasks(engine, algorithm, starts, how, ordinary(source.episodes(seed, split, indices)), size)

    return _in_chunks(score, episodes, at_once or max(32, size * engine.threads), ranks, progress, size=size)


_KEPT = 1 << 24
"""Numbers of fast weights at most that a group holds: 64 MB in float32."""


def group_size(engine: Engine, starts: Starts, how: How, values: int) -> int:
    """How many tasks with images of so many values adapt at once. It depends on neither the number of episodes nor that
    of threads or ranks, and so bits do not."""
    weights = (how.steps + 1 if how.each_step else 1) * sum(p.numel() for p in starts[0][0].values())
    return max(1, min(engine.together(values), _KEPT // max(1, weights)))


def score_tasks(engine: Engine, algorithm: Algorithm, starts: Starts, how: How, tasks: Episode, size: int) -> Tensor:
    """float64 [tasks, modes, steps + 1 or 1]: `task_scores` of each, in groups of `size` that adapt at once."""
    if size == 1:
        scores = torch.stack(list(engine.map(_scores_of(algorithm, how, False), starts, tasks)))
    else:
        groups = engine.map(_scores_of(algorithm, how, True), starts, in_groups(tasks, size))
        scores = torch.cat(list(groups))[: len(tasks.key)]
    return scores.double().cpu()


def _in_chunks(
    score: Callable[[range], Tensor],
    episodes: int,
    at_once: int,
    ranks: Ranks,
    progress: Callable[[int], None] = lambda done: None,
    *,
    size: int = 1,
) -> Tensor:
    """[episodes, ...]: `score` of chunk after chunk of about `at_once` episodes per rank, in the episodes' order. Each
    gets whole groups of `size`, so that episode i always has place i modulo size in its group."""
    rows: list[Tensor] = []
    groups, per_rank = -(-episodes // size), -(-at_once // size)
    for first in range(0, groups, per_rank * ranks.count):
        mine = ranks.share(range(first, min(first + per_rank * ranks.count, groups)))
        share = range(mine.start * size, min(mine.stop * size, episodes))
        chunk = range(first * size, min((first + per_rank * ranks.count) * size, episodes))
        rows += [part for part in ranks.gather(score(share) if share else None) if part is not None]
        progress(chunk.stop)
    return torch.cat(rows)


def summarise(scores: Tensor, figure_name: str, norms: Sequence[Norm] = NORMS) -> dict[str, dict[str, Any]]:
    """Per mode: the figure after the last step, its 95 % half-width, n, and both for every step that there is."""
    mean, ci95 = mean_ci95(scores)
    return {
        norm: {
            figure_name: mean[i, -1].item(),
            "ci95": ci95[i, -1].item(),
            "episodes": scores.shape[0],
            f"{figure_name}_per_step": mean[i].tolist(),
            "ci95_per_step": ci95[i].tolist(),
        }
        for i, norm in enumerate(norms)
    }


@in_usual_modes_but_type
def meta_test(
    engine: Engine,
    algorithm: Algorithm,
    meta: Params,
    state: Params,
    source: Source,
    *,
    split: Split,
    seed: int,
    episodes: int,
    steps: int,
    others: Starts = (),
    ranks: Ranks = ALONE,
    progress: Callable[[int], None] = lambda done: None,
    on_scores: Callable[[Tensor], None] = lambda scores: None,
) -> dict[str, Any]:
    """The "test" object of result.json: protocol and figures, with pixel nearest neighbour on the same episodes.
    `on_scores` gets what `score_episodes` gives."""
    scores = score_episodes(
        engine, algorithm, meta, state, source,
        split=split, seed=seed, episodes=episodes, steps=steps, others=others, ranks=ranks, progress=progress,
    )  # fmt: skip
    on_scores(scores)
    result: dict[str, Any] = {
        "split": split,
        "ways": source.ways,
        "shots": source.shots,
        "query_shots": source.query_shots,
        "rotated": bool(getattr(source, "rotate", False)),
        "eval_seed": seed,
        "inner_steps": scores.shape[-1] - 1,
        **summarise(scores, figure_name(algorithm.loss)),
    }
    if algorithm.loss == "cross_entropy":
        values = _in_chunks(lambda indices: _pixel_baseline(source, split, seed, indices), episodes, 32, ranks)
        mean, ci95 = mean_ci95(values)
        result["pixel_nearest_neighbour"] = {"accuracy": mean.item(), "ci95": ci95.item(), "episodes": episodes}
    return result


def _pixel_baseline(source: Source, split: Split, seed: int, indices: range) -> Tensor:
    tasks = source.episodes(seed, split, indices)
    return torch.stack([nearest_neighbour(*four) for four in zip(*tasks[:4], strict=True)]).cpu()
