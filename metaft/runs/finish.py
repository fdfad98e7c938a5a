"""How a meta-training run ends: its meta-test, result.json, the pictures, and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from metaft._version import __version__
from metaft.dist.ranks import Ranks
from metaft.engines.base import Engine
from metaft.runs import report
from metaft.runs.assemble import Parts, fill
from metaft.runs.folder import RunFolder, read_rows, write_rows
from metaft.runs.following import to_do_next
from metaft.runs.machine import where_measured
from metaft.runs.opened import read_snapshot
from metaft.runs.snapshot import Snapshot
from metaft.support.progress import Progress
from metaft.testing import meta_test
from metaft.types import NORMS, Source


def finish(
    run: RunFolder,
    parts: Parts,
    mapped: Engine,
    source: Source,
    *,
    from_python: Sequence[str],
    ranks: Ranks,
    should_stop: Callable[[], None],
) -> dict[str, Any]:
    """Meta-test the checkpoint that was best on validation; write result.json and the pictures; say what came out.

    `from_python` is what the run was handed there (see `metaft.runs.following.brought`).
    """
    c = parts.config
    # Where no validation figure was finite there is no best one.
    best = ranks.on_first(lambda: read_snapshot(run, run.best if run.best.exists() else run.last))
    best = fill(parts, best)
    bar = Progress("meta-test", c.test.test_episodes, "episode")

    def progress(done: int) -> None:
        bar.update(done)
        should_stop()

    scores: list[Tensor] = []
    test = meta_test(
        mapped, parts.algorithm, best.meta, best.state, source,
        split="test", seed=c.test.eval_seed, episodes=c.test.test_episodes, steps=c.test.test_inner_steps,
        ranks=ranks, progress=progress, on_scores=scores.append,
    )  # fmt: skip
    bar.close()

    def conclude() -> dict[str, Any]:
        write_rows(run.episodes, _each(scores[0]))
        result = _result(run, parts, mapped, best, test, ranks.count)
        run.write_json(run.result, result)
        pictures = report.draw_pictures(run, parts, best, source, test)
        report.print_summary(result, pictures, run.path, to_do_next(run.path, parts, from_python))
        return result

    return ranks.on_first(conclude)


def _each(scores: Tensor) -> Iterator[dict[str, Any]]:
    """The rows of episodes.jsonl, from `score_episodes`: each test episode's figure after the last inner step."""
    for episode, last in enumerate(scores[..., -1].tolist()):
        yield {"episode": episode, **dict(zip(NORMS, last, strict=True))}


def _result(
    run: RunFolder, parts: Parts, mapped: Engine, best: Snapshot, test: Mapping[str, Any], ranks: int
) -> dict[str, Any]:
    """What result.json holds."""
    c = parts.config
    timing = read_rows(run.timing, ["seconds", "validation_seconds"])
    seconds = sum(row["seconds"] for row in timing)
    training = seconds - sum(row["validation_seconds"] for row in timing)
    return {
        "command": "meta_train",
        "version": __version__,
        "dataset": parts.dataset.name,
        "class_split": c.data.split,
        "split_hash": parts.dataset.split_hash,
        "algorithm": c.learner.algorithm,
        "ways": c.task.ways,
        "shots": c.task.shots,
        "iterations": c.outer.iterations,
        "best_step": best.position.step,
        "seed": c.compute.seed,
        "device": parts.device,
        "engine": mapped.name,
        "ranks": ranks,
        "environment": where_measured(parts.device, mapped.threads),
        "seconds": round(seconds, 3),
        "tasks_per_second": round(c.outer.iterations * c.task.meta_batch / training, 1) if training else None,
        "test": test,
    }
