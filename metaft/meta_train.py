"""`python -m metaft.meta_train`: learn an initialisation from few-shot episodes, then meta-test it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaft import paths
from metaft.cli import StopSignals, check_unchanged, fresh_folder, in_ranks, settings
from metaft.config import Init, MetaTrainConfig, from_mapping, read_toml, to_toml
from metaft.errors import DataError, MetaftError, RankLost
from metaft.modes import in_usual_modes
from metaft.output import steady
from metaft.ranks import ALONE, Ranks
from metaft.torchrun import launcher

if TYPE_CHECKING:
    from torch import nn

    from metaft.assemble import Parts
    from metaft.engines.base import Engine
    from metaft.run import RunFolder
    from metaft.snapshot import Snapshot
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
    "test_episodes",
    "data_root",
    "plugin",
)


@dataclasses.dataclass(frozen=True)
class Arguments(MetaTrainConfig):
    """Learn an initialisation from few-shot episodes, then meta-test it.

    Defaults follow data, model and member: "photos" below is for --model conv4-pool and for images above 32 pixels.
    """

    config: str | None = None
    """TOML file with any of these fields; the command line wins."""
    resume: str | None = None
    """Run folder to go on with; its own settings apply."""
    auto_resume: bool = False
    """Go on with the run in --out where there is one already, and start it where there is none."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a loss that is not finite, too little memory, or a process of the job lost, 2 bad input,
    130 or 143 stopped by Ctrl-C or SIGTERM."""
    return in_ranks(_command, argv, smaller="a smaller --meta-batch, --task-chunk or --threads")


def _command(argv: Sequence[str], ranks: Ranks) -> None:
    config, resume = ranks.on_first(lambda: _asked_for(argv, ranks))

    from metaft.allocator import keep_freed_memory

    keep_freed_memory()
    if resume is None:
        run(config, ranks=ranks)
    else:
        resume_run(resume, config, ranks=ranks)


def _asked_for(argv: Sequence[str], ranks: Ranks) -> tuple[MetaTrainConfig, Path | None]:
    before = ranks.launch if ranks.restarted else None
    config, resume = settings(Arguments, MetaTrainConfig, argv, prog="python -m metaft.meta_train", launch=before)
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if resume is None and config.out is None and restarts != "0":
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
    they are in inner and outer loop. `ranks` (of `metaft.group.join`) shares the work with other processes that call
    this too. Raises MetaftError for settings that do not fit together, and for a module that cannot be trained, before
    anything is written.
    """
    from metaft.assemble import assemble
    from metaft.run import RunFolder, file_name

    parts = ranks.in_turn(lambda: assemble(config, dataset=dataset, module=module, init=init, loss=loss))
    sources = _sources(parts)
    parts = _with_engine(parts, sources[0], ranks)
    c = parts.config

    def create() -> RunFolder:
        data = paths.typed(config.dataset) if dataset is None else dataset.name
        name = f"{file_name(data)}-{c.algorithm}-{c.ways}w{c.shots}s-{c.seed}"
        folder = Path(c.out) if c.out is not None else fresh_folder(Path("runs") / name)
        return RunFolder.create(folder, to_toml(dataclasses.replace(c, out=None)), launch=ranks.launch)

    made = ranks.on_first(create)
    with _held(made, "out", ranks):
        return _go(made, parts, sources, None, ranks)


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
    from metaft.run import RunFolder

    folder = ranks.on_first(lambda: RunFolder.open(path))
    with _held(folder, "resume", ranks):
        return _resume(folder, config, dataset, module, init, loss, ranks)


@contextlib.contextmanager
def _held(run: RunFolder, field: str, ranks: Ranks) -> Iterator[None]:
    """The lock on a run folder, held by rank 0. Raises MetaftError, on all ranks, where another process has it.

    What ends because a rank was lost is told how to go on.
    """
    with contextlib.ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(run.held(field)))
        try:
            yield
        except RankLost as lost:
            step = "" if lost.kept is None else f" of step {lost.kept}"
            lost.hint = f"; the last checkpoint is {run.last}{step}, go on with: {_go_on(run, ranks)}"
            raise


def _go_on(run: RunFolder, ranks: Ranks) -> str:
    launch = "python" if ranks.count == 1 else f"torchrun {launcher(ranks.count)}"
    return f"{launch} -m metaft.meta_train --resume {shlex.quote(str(run.path))}"


def _resume(
    folder: RunFolder,
    config: MetaTrainConfig | None,
    dataset: Dataset | None,
    module: nn.Module | None,
    init: Init,
    loss: Loss | None,
    ranks: Ranks,
) -> dict[str, Any]:
    from metaft.assemble import assemble
    from metaft.checkpoint import write_atomically

    path = folder.path
    own, snapshot = ranks.on_first(lambda: _reopened(folder))
    own = paths.in_full(own)
    given = {} if config is None else {k: v for k, v in dataclasses.asdict(config).items() if v not in (None, ())}
    if set(given.get("hyper", ())) <= set(own.hyper):  # a run adds what it found out itself
        given.pop("hyper", None)
    named = {} if dataset is None else {"dataset": dataset.name}
    config = paths.in_full(dataclasses.replace(own, **{**given, **named, "out": None}))
    if config.engine == "tune" and config.task_chunk == own.task_chunk:  # as it was chosen once, by it or another rule
        config = dataclasses.replace(config, task_chunk=None)
    classes = snapshot and snapshot.header.get("classes")
    names = [name for part in (classes or {}).values() for name in part]
    data = paths.as_run_names(config.dataset, own.dataset, config.data_root, names)
    config = dataclasses.replace(config, dataset=data)
    check_unchanged(config, own, path, except_for=RESUMABLE)
    if snapshot is not None and config.iterations is not None and config.iterations < snapshot.position.step:
        raise MetaftError(
            f"iterations must be at least the {snapshot.position.step} already done, got {config.iterations}"
        )
    begun = {"init": init, "loss": loss, "snapshot": snapshot, "classes": classes}
    parts = ranks.in_turn(lambda: assemble(config, dataset=dataset, module=module, **begun))
    sources = _sources(parts)
    before = None
    if snapshot is not None and config.task_chunk == own.task_chunk:
        before = snapshot.header["environment"]["engine"]
    parts = _with_engine(parts, sources[0], ranks, before=before)
    if ranks.rank == 0:
        if snapshot is None or snapshot.position.step < parts.config.iterations:
            folder.result.unlink(missing_ok=True)  # of a shorter run; it would not be this one's
        if dataclasses.asdict(config) != dataclasses.asdict(own) or parts.config.dataset != own.dataset:
            write_atomically(folder.config, to_toml(parts.config).encode())
    return _go(folder, parts, sources, snapshot, ranks)


def _reopened(folder: RunFolder) -> tuple[MetaTrainConfig, Snapshot | None]:
    """A run that was begun: its settings and last checkpoint, if it got so far."""
    from metaft.assemble import open_run

    folder.make_folders()
    folder.mend()
    if not folder.last.exists():
        return from_mapping(MetaTrainConfig, read_toml(folder.config), origin=str(folder.config)), None
    _, own, snapshot = open_run(folder.path, which="last", field="resume")
    return own, snapshot


def _with_engine(parts: Parts, train: Source, ranks: Ranks, *, before: str | None = None) -> Parts:
    """The same with engine and chunk settled, as rank 0 finds them. Raises MetaftError for too few tasks, and where the
    ranks' data or devices are not of a kind."""
    from metaft.assemble import check_ranks, with_engine
    from metaft.training import draw

    c = parts.config
    check_ranks(parts, ranks)
    if c.meta_batch < ranks.count:
        raise MetaftError(f"meta_batch must be at least the number of processes, got {c.meta_batch} for {ranks.count}")
    mine = ranks.share(range(c.meta_batch))
    chosen = with_engine(parts, lambda: draw(parts.algorithm, train, c.seed, mine), ranks=ranks.count, before=before)
    return dataclasses.replace(parts, config=ranks.on_first(lambda: chosen.config))


def _sources(parts: Parts) -> tuple[Source, Source, Source]:
    """Episodes for training, validation and test; none can draw from another's classes.

    Raises MetaftError where the data cannot give them.
    """
    from metaft.algorithms import parse_hyper
    from metaft.defaults import train_classes

    c = parts.config
    if c.test_ways != c.ways and not parts.algorithm.any_ways:
        raise MetaftError(
            f"test_ways: {c.algorithm} learns a head with one output per class, so {c.test_ways} ways at test "
            f"cannot follow {c.ways} in training"
        )
    rows, found = parse_hyper(c.algorithm, c.hyper).get("classes"), train_classes(parts.dataset)
    if isinstance(rows, int) and rows < found:
        raise MetaftError(f"hyper: classes={rows} are fewer than the {found} that {parts.dataset.name} has to train on")
    train = parts.dataset.source(
        ways=c.ways, shots=c.shots, query_shots=c.query_shots, rotate=c.rotate, splits=("train",)
    )
    val, test = (
        parts.dataset.source(
            ways=c.test_ways,
            shots=c.test_shots,
            query_shots=c.test_query_shots,
            rotate=c.rotate,
            splits=(split,),
        )
        for split in ("val", "test")
    )
    return train, val, test


def _go(
    run: RunFolder, parts: Parts, sources: tuple[Source, Source, Source], start: Snapshot | None, ranks: Ranks
) -> dict[str, Any]:
    from metaft.assemble import convolution_forms, engine_for, fill, header, say_what_changed
    from metaft.models.convolution import by_key, forms
    from metaft.snapshot import begin
    from metaft.training import draw, train

    c = parts.config
    stop = f"stopped; a checkpoint is in {run.checkpoints}, go on with: {_go_on(run, ranks)}"
    with (
        StopSignals(ranks, stop) as signals,
        engine_for(parts) as mapped,
    ):
        now, before = header(parts, mapped, ranks.count), None
        if start is None:
            start = ranks.on_first(lambda: begin(parts.algorithm, c.seed, now, parts.model))
        else:
            say_what_changed(start.header["environment"], now["environment"])
            if start.header["environment"] == now["environment"]:
                before = start.header.get("convolutions")
            if start.header["split_hash"] != parts.dataset.split_hash:
                raise MetaftError(
                    f"dataset: the class split of {parts.dataset.name} is not the one {run.path} began with"
                )
            print(f"resuming {run.path} at step {start.position.step}", file=sys.stderr)
        start = begun = fill(parts, start)
        mine = ranks.share(range(c.meta_batch))

        def meta_batch() -> Any:
            return draw(parts.algorithm, sources[0], c.seed, mine)

        chosen = ranks.on_first(lambda: convolution_forms(parts, mapped, begun, meta_batch, before))
        start = dataclasses.replace(start, header={**now, "convolutions": chosen} if chosen else now)
        print(
            f"{paths.shown(parts.dataset.name)} · {c.algorithm} · {c.ways}-way {c.shots}-shot · {c.model}{parts.own} · "
            f"{mapped.name} on {parts.device}{f', {ranks.count} processes' if ranks.count > 1 else ''} · "
            f"run folder {run.path}",
            file=sys.stderr,
        )

        def should_stop() -> None:
            signals.check(stop)

        with forms(by_key(chosen) if chosen else None):
            train(run, c, parts.algorithm, mapped, sources[0], sources[1], start, ranks=ranks, should_stop=should_stop)
        return finish(run, parts, mapped, sources[2], ranks=ranks, should_stop=should_stop)


def finish(
    run: RunFolder, parts: Parts, mapped: Engine, source: Source, *, ranks: Ranks, should_stop: Callable[[], None]
) -> dict[str, Any]:
    """Meta-test the checkpoint that was best on validation; write result.json and the pictures; say what came out."""
    from metaft.assemble import fill, read_snapshot
    from metaft.progress import Progress
    from metaft.testing import meta_test

    c = parts.config
    # Where no validation figure was finite there is no best one.
    best = ranks.on_first(lambda: read_snapshot(run, run.best if run.best.exists() else run.last))
    best = fill(parts, best)
    bar = Progress("meta-test", c.test_episodes, "episode")

    def progress(done: int) -> None:
        bar.update(done)
        should_stop()

    test = meta_test(
        mapped, parts.algorithm, best.meta, best.state, source,
        split="test", seed=c.eval_seed, episodes=c.test_episodes, steps=c.test_inner_steps,
        ranks=ranks, progress=progress,
    )  # fmt: skip
    bar.close()
    return ranks.on_first(lambda: _report(run, parts, mapped, source, best, test, ranks.count))


def _report(
    run: RunFolder,
    parts: Parts,
    mapped: Engine,
    source: Source,
    best: Snapshot,
    test: Mapping[str, Any],
    ranks: int,
) -> dict[str, Any]:
    from metaft._version import __version__
    from metaft.assemble import where_measured
    from metaft.report import draw_pictures, print_summary
    from metaft.run import read_rows

    c = parts.config
    timing = read_rows(run.timing, ["seconds", "validation_seconds"])
    seconds = sum(row["seconds"] for row in timing)
    training = seconds - sum(row["validation_seconds"] for row in timing)
    result = {
        "command": "meta_train",
        "version": __version__,
        "dataset": parts.dataset.name,
        "class_split": c.split,
        "split_hash": parts.dataset.split_hash,
        "algorithm": c.algorithm,
        "ways": c.ways,
        "shots": c.shots,
        "iterations": c.iterations,
        "best_step": best.position.step,
        "seed": c.seed,
        "device": parts.device,
        "engine": mapped.name,
        "ranks": ranks,
        "environment": where_measured(parts.device, mapped.threads),
        "seconds": round(seconds, 3),
        "tasks_per_second": round(c.iterations * c.meta_batch / training, 1) if training else None,
        "test": test,
    }
    run.write_json(run.result, result)
    pictures = draw_pictures(run, parts, best, source, test)
    print_summary(result, pictures, run.path, _next_commands(run, parts))
    return result


def _next_commands(run: RunFolder, parts: Parts) -> list[str]:
    """What to type next: a meta-test at more shots, where data and model allow it, and adapting to a target."""
    from metaft.algorithms import is_ours

    c = parts.config
    path = str(run.path)
    if c.model == "custom":
        return [f"metaft.evaluate.run(Path({path!r}), module=...) in Python, which brings the module again"]
    adapt = f"python -m metaft.adapt --init {shlex.quote(path)} --data "
    adapt += "glyphs:Hebrew" if parts.dataset.name == "glyphs" else "folder:YOUR_IMAGES"
    test = _more_shots(path, parts)
    if c.plugin is None and not is_ours(c.algorithm):  # which adapting by fine-tuning has no need of
        test += f" --plugin YOUR_FILE.py  # registers {c.algorithm!r}, which no process but this one knows"
    return [test, *([adapt] if len(parts.dataset.shape) == 3 else [])]


def _more_shots(path: str, parts: Parts) -> str:
    c = parts.config
    more = 5 if c.test_shots < 5 else 2 * c.test_shots
    try:
        parts.dataset.source(ways=c.test_ways, shots=more, query_shots=c.test_query_shots, splits=("test",))
    except DataError:
        return f"python -m metaft.evaluate {shlex.quote(path)} --checkpoint last"
    return f"python -m metaft.evaluate {shlex.quote(path)} --shots {more}"


if __name__ == "__main__":
    sys.exit(main())
