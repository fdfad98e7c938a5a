"""Meta-test: a fixed list of episodes, both normalisation modes, every inner step, with intervals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from metaft.algorithms.base import Algorithm
from metaft.dist.ranks import ALONE, Ranks
from metaft.engines.base import Engine
from metaft.errors import check_ways
from metaft.inner import at_step
from metaft.metrics import figure, figure_name, mean_ci95, nearest_neighbour
from metaft.support.modes import in_usual_modes_but_type, ordinary
from metaft.types import NORMS, Episode, Fast, Norm, Params, Source, Split

Starts = tuple[tuple[Params, Params], ...]
"""(meta, state) of each member of an ensemble."""


def task_scores(
    algorithm: Algorithm, meta: Params, state: Params, task: Episode, *, others: Starts = (), **how: Any
) -> Tensor:
    """[modes, steps + 1]: accuracy (or MSE) on one task's queries in each normalisation mode, after each inner step, or
    [modes, 1] after the last one alone; `how` as `outputs_of` takes it.

    Members without inner steps give one column. With `others` it is that of an ensemble: each start adapts by itself,
    and what counts is the mean of their outputs (of logits, where there are classes: Antoniou et al. 2019, section 4
    for the ensemble, whose code averages them).
    """
    each = [outputs_of(algorithm, *start, task, **how) for start in ((meta, state), *others)]
    means = [[torch.stack(same).mean(0) for same in zip(*rows, strict=True)] for rows in zip(*each, strict=True)]
    rows = [torch.stack([figure(algorithm.loss, mean, task.query_y) for mean in row]) for row in means]
    return torch.stack(rows).detach()


def outputs_of(
    algorithm: Algorithm,
    meta: Params,
    state: Params,
    task: Episode,
    *,
    ways: int,
    steps: int,
    norms: Sequence[Norm] = NORMS,
    each_step: bool = True,
) -> list[list[Tensor]]:
    """The predictions [n, outputs] that `task_scores` scores: for each mode those after each step."""
    stacked = each_step or algorithm.predict_steps is not None
    fast = algorithm.adapt(
        meta, state, task.support_x, task.support_y, task.key,
        ways=ways, steps=steps, trajectory=stacked, moments="inductive" in norms,
    )  # fmt: skip
    if stacked:
        return [list(predictions(algorithm, fast, task, norm))[0 if each_step else -1 :] for norm in norms]
    return [[algorithm.predict(fast, task.query_x, norm)] for norm in norms]


def predictions(algorithm: Algorithm, trajectory: Fast, task: Episode, norm: Norm) -> Iterable[Tensor]:
    """The task's queries as predicted before the first step and after each one, [n, outputs] each."""
    if algorithm.predict_steps is not None:
        return algorithm.predict_steps(trajectory, task.query_x, norm).unbind()
    length = next(iter(trajectory.params.values())).shape[0]
    return (algorithm.predict(at_step(trajectory, s), task.query_x, norm) for s in range(length))


@functools.lru_cache(maxsize=16)
def _scores_of(
    algorithm: Algorithm, ways: int, steps: int, norms: tuple[Norm, ...], each_step: bool
) -> Callable[[Starts, Episode], Tensor]:
    """`task_scores` as engines want it: one object for all calls."""
    how: Any = {"ways": ways, "steps": steps, "norms": norms, "each_step": each_step}
    return lambda starts, task: task_scores(algorithm, *starts[0], task, others=starts[1:], **how)


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
    at_once: int = 32,
    ranks: Ranks = ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """float64 [episodes, modes, steps + 1], or [episodes, modes, 1] without `each_step`: `task_scores` of episodes 0 ..
    episodes-1 of a split, shared out among ranks; with `others` those of the ensemble of all.

    Only scores are kept from one chunk of `at_once` episodes to the next, so memory does not grow with their number.
    `progress` is called after each chunk; it may raise to stop.
    """
    check_ways("ways", source.ways, algorithm.loss)
    scores_of = _scores_of(algorithm, source.ways, steps, tuple(norms), each_step)
    starts = ((meta, state), *others)

    def score(indices: range) -> Tensor:
        tasks = ordinary(source.episodes(seed, split, indices))
        scores = engine.map(scores_of, starts, tasks)
        return torch.stack(list(scores)).double().cpu()

    return _in_chunks(score, episodes, at_once, ranks, progress)


def _in_chunks(
    score: Callable[[range], Tensor],
    episodes: int,
    at_once: int,
    ranks: Ranks,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """[episodes, ...]: `score` of chunk after chunk of `at_once` episodes per rank, in the episodes' order."""
    rows: list[Tensor] = []
    for first in range(0, episodes, at_once * ranks.count):
        chunk = range(first, min(first + at_once * ranks.count, episodes))
        share = ranks.share(chunk)
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
