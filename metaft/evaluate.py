"""`python -m metaft.evaluate RUN`: meta-test a finished run, at its own or at other ways and shots."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from metaft.cli import StopSignals, in_ranks
from metaft.config import EvaluateConfig, MetaTrainConfig
from metaft.dist.ranks import ALONE, Ranks
from metaft.errors import DataError, MetaftError, check_ways
from metaft.flags import parse
from metaft.options import Option, flat
from metaft.runs.from_python import check_brought
from metaft.support import paths, places
from metaft.support.modes import in_usual_modes
from metaft.support.output import steady
from metaft.support.taken import check_own, check_writable

if TYPE_CHECKING:
    from torch import nn

    from metaft.engines import Engine
    from metaft.runs.assemble import Parts
    from metaft.runs.folder import RunFolder
    from metaft.runs.snapshot import Snapshot
    from metaft.tasks.episodes import ListedEpisodes
    from metaft.types import Dataset, Loss, Source, Split


@dataclasses.dataclass(frozen=True, init=False)
class Arguments(EvaluateConfig):
    """Meta-test a finished run, at its own or at other ways and shots. A field left out is as in the run."""

    run: Annotated[str, Option("Run folder of metaft.meta_train.", metavar="RUN", positional=True)] = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 too little memory or a process of the job lost, 2 bad input, 130 or 143 stopped
    by Ctrl-C or SIGTERM."""
    return in_ranks(_command, argv, smaller="--engine vmap with a smaller --task-chunk, or fewer --threads")


def _command(argv: Sequence[str], ranks: Ranks) -> None:
    given = ranks.on_first(lambda: parse(Arguments, argv, prog="python -m metaft.evaluate"))
    path = Path(given.pop("run"))
    config = EvaluateConfig(**given)
    run(path, config, ranks=ranks)


@steady()
@in_usual_modes
def run(
    path: Path,
    config: EvaluateConfig | None = None,
    *,
    dataset: Dataset | None = None,
    module: nn.Module | None = None,
    loss: Loss | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Meta-test a run; writes and returns what `RUN/evaluations/NAME.json` holds.

    `dataset`, `module`, `loss` and `ranks` as in `metaft.meta_train.run`. Raises MetaftError where the run cannot be
    tested so: other ways than its head has outputs, inputs of another shape, too few classes or images.
    """
    from metaft.runs.assemble import assemble, fill
    from metaft.runs.compute import check_ranks, engine_for
    from metaft.runs.opened import open_run, read_kept
    from metaft.runs.report import print_test
    from metaft.support.progress import Progress
    from metaft.testing import meta_test

    check_brought(config, dataset=dataset, module=module)
    config = places.in_full(config or EvaluateConfig())
    folder, trained, snapshot = ranks.on_first(lambda: open_run(path, which=config.checkpoint))
    trained = places.in_full(trained)
    wanted = _settings(config, trained, snapshot.header)
    classes = snapshot.header.get("classes") if wanted.data.dataset == trained.data.dataset else None
    handed = {"dataset": dataset, "module": module, "loss": loss, "snapshot": snapshot, "classes": classes}
    listed = _listed_episodes(config, snapshot.header, dataset)
    if listed is not None:
        handed["dataset"], wanted = listed, dataclasses.replace(wanted, split=None, rotate=False)
    parts = ranks.in_turn(lambda: assemble(wanted, **handed))
    check_ranks(parts, ranks)
    snapshot = fill(parts, snapshot)
    kept = []
    if config.checkpoint == "ensemble":
        kept = [fill(parts, one) for one in ranks.on_first(lambda: read_kept(folder))]
    starts = tuple((one.meta, one.state) for one in kept) or ((snapshot.meta, snapshot.state),)
    if config.out is not None:  # before the work
        out = paths.local(config.out)
        parent = next((p for p in out.absolute().parents if os.path.isdir(p)), out)
        ranks.on_first(lambda: check_own(out, "out", ['{\n  "command": "evaluate"'], "result of this command"))
        ranks.on_first(lambda: check_writable(out, "out", parent))
    protocol = _protocol(config, parts, listed)
    if listed is None and config.data.dataset is None and config.data.split in (None, trained.data.split):
        _check_same_split(path, snapshot.header, parts.dataset)
    seen = _seen_in_training(snapshot.header, parts.dataset, config.episode.set)
    source = _source(path, parts, protocol)
    bar = Progress("meta-test", protocol.episodes, "episode")
    with StopSignals(ranks, "stopped; nothing was written") as signals, engine_for(parts) as mapped:

        def progress(done: int) -> None:
            bar.update(done)
            signals.check(signals.message)

        test = meta_test(
            mapped, parts.algorithm, *starts[0], source,
            split=protocol.split, seed=protocol.seed, episodes=protocol.episodes, steps=protocol.steps,
            others=starts[1:], ranks=ranks, progress=progress,
        )  # fmt: skip
    bar.close()
    result = _result(path, config, parts, mapped, snapshot, seen, test, ranks)
    if kept:
        result["ensemble_of_steps"] = [one.position.step for one in kept]
    out = paths.local(config.out) if config.out is not None else _default_file(folder, parts, protocol, config, test)
    ranks.on_first(lambda: folder.write_json(out, result))
    print_test(test)
    if seen and config.episode.set != "train":
        print(f"  (note: {seen} of these classes were trained on, so this is not a test on new classes)")
    print(f"result:   {out}")
    return result


class _Protocol(NamedTuple):
    """On what a run is tested."""

    split: Split
    ways: int
    shots: int
    queries: int
    steps: int
    episodes: int
    seed: int


def _settings(config: EvaluateConfig, trained: MetaTrainConfig, header: Mapping[str, Any]) -> MetaTrainConfig:
    """The run's settings, with what is asked for in their place."""
    from metaft.inputs import ImageInputs, of_header
    from metaft.tasks import DATASETS, options_of

    data = config.data
    fields = {**flat(config.compute), "download": data.download}
    fields |= {k: v for k, v in (("data_root", data.data_root), ("plugin", config.plugin)) if v is not None}
    fields["skip_bad"] = data.skip_bad or trained.data.skip_bad
    if data.split is not None:
        fields |= {"split": data.split, "rotate": None if data.split != trained.data.split else trained.data.rotate}
    if data.dataset is not None and data.dataset != trained.data.dataset:
        # Nothing of the old data set's own settings is meant for the new one.
        fields |= {"dataset": data.dataset, "split": data.split, "rotate": None}
        # A folder is read as the run's own images were; a data set with its own size takes no such wish.
        name, _, path = data.dataset.partition(":")
        inputs = of_header(header) if name in DATASETS and options_of(name, path).any_size else None
        channels, side = (inputs.channels, inputs.height) if isinstance(inputs, ImageInputs) else (None, None)
        fields |= {"channels": channels, "image_size": side}
    if data.rotate is not None:
        fields["rotate"] = data.rotate
    return dataclasses.replace(trained, **fields)


_OF_DRAWN = ("ways", "shots", "query_shots", "episodes", "dataset", "data_root", "split", "rotate")
"""Settings that say which episodes are drawn."""


def _listed_episodes(
    config: EvaluateConfig, header: Mapping[str, Any], dataset: Dataset | None
) -> ListedEpisodes | None:
    """Those of `--episodes-file`. Raises MetaftError where others are asked for too."""
    from metaft.inputs import of_header
    from metaft.tasks.episodes import listed_episodes

    file = config.episode.episodes_file
    if file is None:
        return None
    values = flat(config)
    given = [name for name in _OF_DRAWN if values[name] is not None]
    given += ["set"] if config.episode.set != "test" else []
    given += ["download"] if config.data.download else []
    if given or dataset is not None:
        name = given[0] if given else "dataset"
        raise MetaftError(f"{name}: the episodes are those of {file}, so nothing else can say which")
    try:
        return listed_episodes(file, of_header(header), skip_bad=config.data.skip_bad)
    except DataError as error:
        raise DataError(f"episodes_file: {error}") from None


def _protocol(config: EvaluateConfig, parts: Parts, listed: ListedEpisodes | None) -> _Protocol:
    """What is asked for, else as in the run. Raises MetaftError for what its member or loss cannot be tested on."""
    from metaft.defaults import check_steps

    c, given = parts.config, config.episode
    ways = listed.ways if listed else given.ways or c.test.test_ways
    check_ways("ways", ways, parts.algorithm.loss)
    check_steps("inner_steps", given.inner_steps, c.learner.algorithm)
    return _Protocol(
        split=given.set,
        ways=ways,
        shots=listed.shots if listed else given.shots or c.test.test_shots,
        queries=listed.query_shots if listed else given.query_shots or c.test.test_query_shots,
        steps=c.test.test_inner_steps if given.inner_steps is None else given.inner_steps,
        episodes=len(listed) if listed else given.episodes or c.test.test_episodes,
        seed=c.test.eval_seed if given.eval_seed is None else given.eval_seed,
    )


def _check_same_split(path: Path, header: Mapping[str, Any], dataset: Dataset) -> None:
    """Raises MetaftError where the data are split otherwise than in training."""
    if header["split_hash"] != dataset.split_hash:
        raise MetaftError(
            f"dataset: the classes of {dataset.name} are no longer split as when {path} was trained, so its test "
            "classes may have been trained on; name it with --dataset to test on it all the same"
        )


def _source(path: Path, parts: Parts, protocol: _Protocol) -> Source:
    """Raises MetaftError for other ways than a head has outputs, and DataError for more than the data can give."""
    c = parts.config
    if protocol.ways != c.task.ways and not parts.algorithm.any_ways:
        raise MetaftError(
            f"ways: {c.learner.algorithm} learned a head with {c.task.ways} outputs, so {path} can only be tested "
            f"{c.task.ways}-way, not {protocol.ways}-way"
        )
    return parts.dataset.source(
        ways=protocol.ways, shots=protocol.shots, query_shots=protocol.queries, rotate=c.data.rotate,
        splits=(protocol.split,),
    )  # fmt: skip


def _result(
    path: Path,
    config: EvaluateConfig,
    parts: Parts,
    mapped: Engine,
    snapshot: Snapshot,
    seen: int,
    test: Mapping[str, Any],
    ranks: Ranks,
) -> dict[str, Any]:
    """What the file holds."""
    from metaft._version import __version__
    from metaft.runs.machine import where_measured

    return {
        "command": "evaluate",
        "version": __version__,
        "run": str(path),
        "checkpoint": config.checkpoint,
        "step": snapshot.position.step,
        "dataset": parts.dataset.name,
        "class_split": parts.config.data.split,
        "split_hash": parts.dataset.split_hash,
        "classes_seen_in_training": seen,
        "algorithm": parts.config.learner.algorithm,
        "device": parts.device,
        "engine": mapped.name,
        "ranks": ranks.count,
        "environment": where_measured(parts.device, mapped.threads),
        **({} if config.episode.episodes_file is None else {"episodes_sha256": parts.dataset.split_hash}),
        "test": test,
    }


def _default_file(
    folder: RunFolder, parts: Parts, protocol: _Protocol, config: EvaluateConfig, test: Mapping[str, Any]
) -> Path:
    from metaft.runs.folder import file_name

    c, p = parts.config, protocol
    how = f"{p.ways}w{p.shots}s{p.queries}q-{test['inner_steps']}steps-{p.episodes}x-seed{p.seed}"
    data = "-".join(
        filter(None, (places.shown(parts.dataset.name), c.data.split, p.split, "rotated" if c.data.rotate else ""))
    )
    return folder.path / "evaluations" / f"{file_name(data)}-{how}-{config.checkpoint}.json"


def _seen_in_training(header: Mapping[str, Any], dataset: Dataset, split: str) -> int:
    """How many classes of a split the run was trained on; a turned character ("name@90") counts as the character."""
    # A folder that moved is the same data set by its classes.
    if header["dataset"] != dataset.name and header.get("classes") != dataset.describe().get("classes"):
        return 0

    def names(described: Mapping[str, Any], part: str) -> set[str]:
        return {name.partition("@")[0] for name in described.get("classes", {}).get(part, ())}

    return len(names(header, "train") & names(dataset.describe(), split))


if __name__ == "__main__":
    sys.exit(main())
