"""`python -m metaft.meta_train`: learn an initialisation from few-shot episodes, then meta-test it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaft import look
from metaft.cli import StopSignals, in_ranks
from metaft.config import Init, MetaTrainConfig, to_toml
from metaft.dist.ranks import ALONE, Ranks
from metaft.errors import MetaftError, RankLost
from metaft.options import flat
from metaft.origin import settings
from metaft.runs.following import to_go_on
from metaft.runs.from_python import brought, check_brought
from metaft.runs.recorded import check_unchanged
from metaft.settings.compute import Origin
from metaft.support import places
from metaft.support.modes import in_usual_modes
from metaft.support.output import steady
from metaft.support.taken import fresh_folder

if TYPE_CHECKING:
    from torch import nn

    from metaft.runs.assemble import Parts
    from metaft.runs.folder import RunFolder
    from metaft.runs.snapshot import Snapshot
    from metaft.types import Dataset, Loss, Source

# What may change when a run goes on: how it is computed, how long (which stretches the outer schedule too), and where
# the user's own things lie.
RESUMABLE = (
    "iterations",
    "device",
    "engine",
    "threads",
    "task_chunk",
    "inner_checkpoint",
    "checkpoint_every",
    "eval_modes",
    "test_episodes",
    "data_root",
    "plugin",
    "report",
    "snapshots",
    "log",
)


@dataclasses.dataclass(frozen=True, init=False)
class Arguments(MetaTrainConfig):
    """Learn an initialisation from few-shot episodes, then meta-test it.

    Defaults follow data, model and member: "photos" below is for --model conv4-pool and for images above 32 pixels.
    """

    origin: Origin


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a loss that is not finite, too little memory, or a process of the job lost, 2 bad input,
    130 or 143 stopped by Ctrl-C or SIGTERM."""
    return in_ranks(_command, argv, smaller="a smaller --meta-batch, --task-chunk or --threads")


def _command(argv: Sequence[str], ranks: Ranks) -> None:
    config, resume = ranks.on_first(lambda: _asked_for(argv, ranks))
    if resume is None:
        run(config, ranks=ranks)
    else:
        resume_run(resume, config, ranks=ranks)


def _asked_for(argv: Sequence[str], ranks: Ranks) -> tuple[MetaTrainConfig, Path | None]:
    before = ranks.launch if ranks.restarted else None
    config, resume = settings(Arguments, MetaTrainConfig, argv, prog="python -m metaft.meta_train", launch=before)
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if resume is None and config.output.out is None and restarts != "0":
        raise MetaftError(
            f"out: with --max-restarts {restarts} give --out, so that a restart finds the run to go on with"
        )
    return config, resume


@steady()
@in_usual_modes
def run(
    config: MetaTrainConfig,
    *,
    dataset: Dataset | None = None,
    module: nn.Module | None = None,
    init: Init = "keep",
    loss: Loss | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train and meta-test in a new run folder; returns what `result.json` holds.

    `dataset`, `module` and `loss` bring your own data, model (its head must have `ways` outputs) and loss (a function
    or a `metaft.Objective`, whose figure chooses the checkpoint). The module is copied; training begins at the values
    that it has, or with `init="seed"` at others drawn from the run's seed. Parameters with requires_grad=False stay as
    they are in inner and outer loop. `ranks` (of `metaft.dist.group.join`) shares the work with other processes that
    call this too. Raises MetaftError for settings that do not fit together, and for a module that cannot be trained,
    before anything is written.
    """
    from metaft.runs.assemble import assemble
    from metaft.runs.compute import with_engine
    from metaft.runs.events import check
    from metaft.runs.folder import RunFolder, file_name

    check_brought(config, dataset=dataset, module=module, init=init)
    places.note_root(config.data.data_root, config.data.dataset)
    ranks.on_first(lambda: check(config.output.log))
    parts = ranks.in_turn(lambda: assemble(config, dataset=dataset, module=module, init=init, loss=loss))
    sources = _sources(parts)
    parts = with_engine(parts, sources[0], ranks)
    c = parts.config

    def create() -> RunFolder:
        data = places.typed(config.data.dataset) if dataset is None else dataset.name
        name = f"{file_name(data)}-{c.learner.algorithm}-{c.task.ways}w{c.task.shots}s-{c.compute.seed}"
        path = Path(c.output.out) if c.output.out is not None else fresh_folder(Path("runs") / name)
        return RunFolder.create(path, to_toml(dataclasses.replace(c, out=None)), launch=ranks.launch)

    folder = ranks.on_first(create)
    from_python = brought(dataset=dataset, module=module, init=init, loss=loss)
    with _held(folder, "out", from_python, ranks):
        result = _train_and_test(folder, parts, sources, None, from_python, ranks)
        return _with_page(result, folder, parts, module, ranks)


@steady()
@in_usual_modes
def resume_run(
    path: Path,
    config: MetaTrainConfig | None = None,
    *,
    dataset: Dataset | None = None,
    module: nn.Module | None = None,
    init: Init = "keep",
    loss: Loss | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Go on with a run from its last checkpoint. `config` may differ from the run's in RESUMABLE fields alone; what it
    leaves open is as in the run.

    All values of a `module` come from the checkpoint, those of frozen parameters and buffers too; `init`, as the run
    had it, matters alone where the run was stopped before its first one.

    Raises MetaftError for another difference and where another process is at this run, CheckpointError where no
    checkpoint can be read.
    """
    from metaft.runs.folder import RunFolder

    check_brought(config, dataset=dataset, module=module, init=init)
    folder = ranks.on_first(lambda: RunFolder.open(path))
    with _held(folder, "resume", brought(dataset=dataset, module=module, init=init, loss=loss), ranks):
        return _resume(folder, config, dataset, module, init, loss, ranks)


@contextlib.contextmanager
def _held(run: RunFolder, field: str, from_python: Sequence[str], ranks: Ranks) -> Iterator[None]:
    """The lock on a run folder, held by rank 0. Raises MetaftError, on all ranks, where another process has it.

    What ends because a rank was lost is told how to go on.
    """
    with contextlib.ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(run.held(field)))
        try:
            yield
        except RankLost as lost:
            step = "" if lost.kept is None else f" of step {lost.kept}"
            how = to_go_on(run.path, from_python, ranks.count)
            lost.hint = f"; the last checkpoint is {run.last}{step}, go on with: {how}"
            raise


def _resume(
    folder: RunFolder,
    config: MetaTrainConfig | None,
    dataset: Dataset | None,
    module: nn.Module | None,
    init: Init,
    loss: Loss | None,
    ranks: Ranks,
) -> dict[str, Any]:
    from metaft.runs.assemble import assemble
    from metaft.runs.checkpoint import write_atomically
    from metaft.runs.compute import with_engine
    from metaft.runs.events import check
    from metaft.runs.starting import check_split, reopened, resumed_settings
    from metaft.starts.names import in_full

    before, snapshot = ranks.on_first(lambda: reopened(folder))
    before = in_full(before)
    classes = snapshot and snapshot.header.get("classes")
    config = resumed_settings(before, config, dataset, classes or {})
    check_unchanged(config, before, folder.path, except_for=RESUMABLE)
    ranks.on_first(lambda: check(config.output.log))
    if (
        snapshot is not None
        and config.outer.iterations is not None
        and config.outer.iterations < snapshot.position.step
    ):
        raise MetaftError(
            f"iterations must be at least the {snapshot.position.step} already done, got {config.outer.iterations}"
        )
    begun = {"init": init, "loss": loss, "snapshot": snapshot, "classes": classes}
    parts = ranks.in_turn(lambda: assemble(config, dataset=dataset, module=module, **begun))
    if snapshot is not None:
        check_split(folder, snapshot, parts)  # before anything of the run is touched
    sources = _sources(parts)
    engine = None
    if snapshot is not None and config.compute.task_chunk == before.compute.task_chunk:
        engine = snapshot.header["environment"]["engine"]
    parts = with_engine(parts, sources[0], ranks, before=engine)
    if ranks.rank == 0:
        if snapshot is None or snapshot.position.step < parts.config.outer.iterations:
            folder.result.unlink(missing_ok=True)  # of a shorter run; it would not be this one's
        if flat(config) != flat(before) or parts.config.data.dataset != before.data.dataset:
            write_atomically(folder.config, to_toml(parts.config).encode())
    from_python = brought(dataset=dataset, module=module, init=init, loss=loss)
    result = _train_and_test(folder, parts, sources, snapshot, from_python, ranks)
    return _with_page(result, folder, parts, module, ranks)


def _with_page(
    result: dict[str, Any], folder: RunFolder, parts: Parts, module: nn.Module | None, ranks: Ranks
) -> dict[str, Any]:
    """The result, when the run's page is written; no rank ends before the first one is done with it."""
    if parts.config.output.report is not False:
        ranks.on_first(lambda: look.at_end(folder.path, module=module))
    return result


def _sources(parts: Parts) -> tuple[Source, Source, Source]:
    """Episodes for training, validation and test; none can draw from another's classes.

    Raises MetaftError where the data cannot give them.
    """
    from metaft.algorithms import parse_hyper
    from metaft.defaults import train_classes

    c = parts.config
    if c.test.test_ways != c.task.ways and not parts.algorithm.any_ways:
        raise MetaftError(
            f"test_ways: {c.learner.algorithm} learns a head with one output per class, so {c.test.test_ways} ways at "
            f"test cannot follow {c.task.ways} in training"
        )
    rows, classes = parse_hyper(c.learner.algorithm, c.inner.hyper).get("classes"), train_classes(parts.dataset)
    if isinstance(rows, int) and rows < classes:
        raise MetaftError(
            f"hyper: classes={rows} are fewer than the {classes} that {parts.dataset.name} has to train on"
        )
    train = parts.dataset.source(
        ways=c.task.ways, shots=c.task.shots, query_shots=c.task.query_shots, rotate=c.data.rotate, splits=("train",)
    )
    val, test = (
        parts.dataset.source(
            ways=c.test.test_ways,
            shots=c.test.test_shots,
            query_shots=c.test.test_query_shots,
            rotate=c.data.rotate,
            splits=(split,),
        )
        for split in ("val", "test")
    )
    return train, val, test


def _train_and_test(
    run: RunFolder,
    parts: Parts,
    sources: tuple[Source, Source, Source],
    snapshot: Snapshot | None,
    from_python: Sequence[str],
    ranks: Ranks,
) -> dict[str, Any]:
    from metaft.models.convolution import by_key, forms
    from metaft.runs.compute import engine_for
    from metaft.runs.events import events_of
    from metaft.runs.finish import finish
    from metaft.runs.starting import start_of
    from metaft.runs.training import train

    c = parts.config
    how = to_go_on(run.path, from_python, ranks.count)
    stop = f"stopped; a checkpoint is in {run.checkpoints}, go on with: {how}"
    with (
        StopSignals(ranks, stop) as signals,
        engine_for(parts) as mapped,
        events_of(None if ranks.rank else c.output.log, run) as events,
    ):
        start, chosen = start_of(run, parts, mapped, sources[0], snapshot, ranks)
        print(
            f"{places.shown(parts.dataset.name)} · {c.learner.algorithm} · {c.task.ways}-way {c.task.shots}-shot · "
            f"{c.learner.model}{parts.module_note} · {mapped.name} on {parts.device}"
            f"{f', {ranks.count} processes' if ranks.count > 1 else ''} · run folder {run.path}",
            file=sys.stderr,
        )

        def should_stop() -> None:
            signals.check(stop)

        with forms(by_key(chosen) if chosen else None):
            train(
                run, c, parts.algorithm, mapped, sources[0], sources[1], start, ranks=ranks, should_stop=should_stop,
                events=events,
            )  # fmt: skip
        result = finish(run, parts, mapped, sources[2], from_python=from_python, ranks=ranks, should_stop=should_stop)
        if events is not None:
            events.end(sorted(run.plots.glob("*.png")), c.outer.iterations)
        return result


if __name__ == "__main__":
    sys.exit(main())
