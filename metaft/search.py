"""`python -m metaft.search SPACE.toml`: try settings of a command, judge them on validation alone, keep the best."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from metaft.cli import StopSignals, in_one, stopped_at_once
from metaft.config import SearchConfig
from metaft.errors import CheckpointError, MetaftError, TrialsFailed
from metaft.flags import parse
from metaft.options import Option, Settings, options
from metaft.runs.recorded import CONFIGS
from metaft.settings.compute import Compute, Device, Draws
from metaft.settings.data import DataSettings, TargetSettings
from metaft.settings.finetuning import Recipe, StartSettings, TrainingStart
from metaft.settings.meta_training import InnerSettings, LearnerSettings, MetaTestSettings, OuterSettings, TaskSettings
from metaft.support.output import steady
from metaft.support.paths import local
from metaft.support.places import shown
from metaft.support.taken import fresh_folder

if TYPE_CHECKING:
    from metaft.trials.journal import Told
    from metaft.trials.methods.base import Method
    from metaft.trials.over import Checked
    from metaft.trials.searching import Search
    from metaft.trials.space import Space


@dataclasses.dataclass(frozen=True, init=False)
class Arguments(SearchConfig):
    """Try settings of metaft.adapt or metaft.meta_train, judge them on validation alone, and keep the best. What else
    the trials share is given in the file, or by flags of that command."""

    space: Annotated[
        str | None,
        Option(
            "The first word: a TOML file of settings as --config takes it, in which lists are choices and "
            "{low, high, log, step} ranges (docs/search.md).",
            metavar="SPACE.toml",
            positional=True,
        ),
    ] = None


@dataclasses.dataclass(frozen=True, init=False)
class OverAdapt(Arguments):
    """Try settings of metaft.adapt, judge them on validation alone, and keep the best."""

    start: StartSettings
    target: TargetSettings
    recipe: Recipe
    draws: Draws
    compute: Device


@dataclasses.dataclass(frozen=True, init=False)
class OverMetaTrain(Arguments):
    """Try settings of metaft.meta_train, judge them on validation alone, and keep the best."""

    data: DataSettings
    start: TrainingStart
    task: TaskSettings
    learner: LearnerSettings
    inner: InnerSettings
    outer: OuterSettings
    test: MetaTestSettings
    compute: Compute


ARGUMENTS: dict[str, type[Arguments]] = {"adapt": OverAdapt, "meta_train": OverMetaTrain}
"""With the options of the command whose settings are searched."""

PROG = "python -m metaft.search"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 no trial came to a figure, 2 bad input, 130 or 143 stopped by Ctrl-C or SIGTERM."""
    return in_one(_command, argv, prog="metaft.search", smaller="fewer --workers")


def _command(argv: Sequence[str]) -> None:
    if not argv or argv[0].startswith("-"):
        given = parse(Arguments, argv, prog=PROG)
        if "space" in given:
            raise MetaftError(f"space: {given['space']!r} is to be the first word")
        if "resume" not in given:
            raise MetaftError("space: SPACE.toml is missing: the first word, or --resume FOLDER to go on with a search")
        run(None, SearchConfig(**given))
        return

    from metaft.trials.space import made, read

    file = local(argv[0])
    command, values = read(file, ARGUMENTS)
    given = parse(ARGUMENTS[command], argv, prog=PROG)
    given.pop("space")
    own = {name: given.pop(name) for name in options(SearchConfig) if name in given}
    searched = {dimension.name for dimension in made(command, CONFIGS[command], values, origin=str(file)).searched}
    for name, value in given.items():
        options(ARGUMENTS[command])[name].check(value)
        if name in searched:
            raise MetaftError(f"{name}: {file} searches it, and {value!r} is given; take it out of one of them")
    run({"command": command, **values, **given}, SearchConfig(**own), origin=str(file))


@steady()
def run(
    space: Mapping[str, Any] | None, config: SearchConfig | None = None, *, origin: str = "space"
) -> dict[str, Any]:
    """Search in a new folder, or go on with the search in `config.resume`; returns what its `result.json` holds.

    `space` has the settings as the TOML file has them (see `metaft.trials.space`), which errors call `origin`. Raises
    MetaftError for what cannot be searched, before anything is written, TrialsFailed where no trial came to a figure,
    Interrupted, with all kept, and CheckpointError where the folder cannot be read or written.
    """
    config = config or SearchConfig()
    path = _to_go_on(space, config)
    with contextlib.ExitStack() as stack:
        if path is None:
            search = _begun(space or {}, config, origin, stack)
        else:
            search = _again(path, space, config, origin, stack)
        return _searched(search, config)


def _to_go_on(space: Mapping[str, Any] | None, config: SearchConfig) -> Path | None:
    """The folder of the search that is there already, if it is to go on. Raises MetaftError."""
    if config.resume is not None:
        for name, given in (("space", space), ("out", config.out)):
            if given is not None:
                raise MetaftError(f"{name}: a search that goes on has its own; leave it away beside --resume")
        return local(config.resume)
    if config.auto_resume and config.out is None:
        raise MetaftError("auto_resume: give --out too, the folder of the search to go on with")
    out = None if config.out is None else local(config.out)
    return out if out is not None and config.auto_resume and os.path.exists(out / JOURNAL) else None


TRIED = 5
"""Trials whose settings are looked at before a search begins, until those of one go together."""

JOURNAL, LOCK = "journal.jsonl", ".metaft.lock"


def _begun(space: Mapping[str, Any], config: SearchConfig, origin: str, stack: contextlib.ExitStack) -> Search:
    """A new search, whose first trial was seen to be one that can be judged. Raises MetaftError, with nothing
    written."""
    from metaft.runs.lock import held
    from metaft.support.taken import check_new
    from metaft.trials.journal import Journal
    from metaft.trials.over import OVER, check_searched, in_full, settings_of
    from metaft.trials.searching import Search, method_of
    from metaft.trials.space import command_of, made

    values = dict(space)
    command = command_of(values, OVER, origin)
    asked = made(command, CONFIGS[command], values, origin=origin)
    check_searched(asked, origin)
    name = f"search-{command}-{config.method}-{config.search_seed}"
    out = fresh_folder(Path("runs") / name) if config.out is None else local(config.out)
    if os.path.exists(out / JOURNAL):
        raise MetaftError(f"out: {out} is a search already; go on with --resume {out}, or choose another --out")
    if not (config.auto_resume and _is_just_made(out)):
        check_new(out)
    with stopped_at_once("stopped; nothing was written"):
        asked = in_full(asked)
        measure = OVER[command].measure(asked)
        header = {"method": config.method, "seed": config.search_seed, "trials": config.trials, "measure": measure}
        method = method_of(asked, header)
        checked = _first_that_goes_together(OVER[command].check, asked, method, settings_of)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MetaftError(f"out: cannot make {out} ({error.strerror})") from None
    out = out.absolute()
    stack.enter_context(held(out / LOCK, f"out: {out}"))
    more = {"notes": list(checked.notes), "chosen": dict(checked.chosen)}
    journal = Journal.begin(out / JOURNAL, {"space": asked.plain(), **header, **more})
    return Search(out, journal, asked)


def _is_just_made(out: Path) -> bool:
    """Whether a search was killed there before it had written anything."""
    return out.is_dir() and {*os.listdir(out)} <= {LOCK}


def _first_that_goes_together(
    check: Callable[[Any, Space], Checked], space: Space, method: Method, settings_of: Callable[..., Settings]
) -> Checked:
    """What is seen of the first trial whose values go together, of the first few: another fails by itself. Raises what
    is wrong with the very first, where none is."""
    wrong: MetaftError | None = None
    for number in range(TRIED if method.size is None else min(TRIED, method.size)):
        try:
            return check(settings_of(space, method.ask(number)), space)
        except MetaftError as error:  # noqa: PERF203
            wrong = wrong or error
    assert wrong is not None, "every method has a first trial"
    raise wrong


def _again(
    path: Path, space: Mapping[str, Any] | None, config: SearchConfig, origin: str, stack: contextlib.ExitStack
) -> Search:
    """The search in a folder, to go on. Raises MetaftError for another space, method or seed than its own."""
    from metaft.runs.lock import held
    from metaft.trials.journal import Journal
    from metaft.trials.over import OVER, in_full
    from metaft.trials.searching import Search
    from metaft.trials.space import command_of, made

    path = path.absolute()
    if not os.path.exists(path / JOURNAL):
        raise CheckpointError(f"resume: {path} is no folder of a search: it has no {JOURNAL}")
    stack.enter_context(held(path / LOCK, f"resume: {path}"))
    journal = Journal(path / JOURNAL)

    def read(values: Mapping[str, Any], origin: str) -> Any:
        values = dict(values)
        command = command_of(values, OVER, origin)
        return in_full(made(command, CONFIGS[command], values, origin=origin))

    with journal.read_whole():
        begun = {key: journal.search[key] for key in ("method", "seed", "trials")}
        own = read(journal.search["space"], str(path / JOURNAL))
    if space is not None and read(space, origin).plain() != own.plain():
        raise MetaftError(f"space: the search in {path} is of another one than {origin}; take another --out")
    for name, mine, theirs in (
        ("method", config.method, begun["method"]),
        ("search_seed", config.search_seed, begun["seed"]),
    ):
        if mine != theirs and mine != options(SearchConfig)[name].default:
            raise MetaftError(f"{name}: the search in {path} has {theirs!r}, given {mine!r}")
    if config.trials is not None and config.trials != begun["trials"]:
        if config.trials < len(journal.asked):
            raise MetaftError(f"trials must be at least the {len(journal.asked)} already begun, got {config.trials}")
        journal.write({"trials": config.trials})
    return Search(path, journal, own)


def _searched(search: Search, config: SearchConfig) -> dict[str, Any]:
    """Run what is left of a search, and say what came of it."""
    from metaft.support.progress import Progress
    from metaft.trials.report import figure_words, values_words

    told, journal, measure = search.journal.told, search.journal, search.measure
    print(
        f"{search.space.command} · {journal.search['method']} over {', '.join(d.name for d in search.space.searched)} "
        f"· {search.trials} trials, {config.workers} at once · folder {shown(str(search.path))}",
        file=sys.stderr,
    )
    bar = Progress("search", search.trials, "trial", done=len(told))

    def on_trial(row: Told) -> None:
        number, best = row["told"], search.order()[:1]
        figure = f"validation {measure} {figure_words(measure, row['value'])}"
        figure = row["message"] if row["value"] is None else figure
        bar.say(f"trial {number}: {figure} · {values_words(journal.asked[number])}")
        latest = {} if not best else {"best": f"{figure_words(measure, told[best[0]]['value'])} (trial {best[0]})"}
        bar.update(len(told), **latest)

    hint = f"stopped, with all kept; go on with: {_again_by(search, config.workers)}"
    with StopSignals(message=hint) as signals:
        try:
            search.run(
                workers=config.workers,
                seconds=None if config.budget_minutes is None else 60 * config.budget_minutes,
                should_stop=lambda: signals.check(hint),
                on_trial=on_trial,
            )
        finally:
            bar.close()
        return finish(search, config.workers)


def _again_by(search: Search, workers: int) -> str:
    """The command that goes on with a search, as many trials at once."""
    at_once = f" --workers {workers}" if workers > 1 else ""
    return f"{PROG} --resume {shlex.quote(shown(str(search.path)))}{at_once}"


def finish(search: Search, workers: int = 1) -> dict[str, Any]:
    """Write best.toml, result.json, table.txt and the pictures; say what came out. Raises TrialsFailed."""
    from metaft.runs.checkpoint import write_atomically
    from metaft.runs.folder import RunFolder
    from metaft.support.pictures import listed
    from metaft.trials.report import draw_pictures, result_of, text

    order, told = search.order(), search.journal.told
    if not order:
        first = told[min(told)]
        raise TrialsFailed(f"none of {len(told)} trials came to a figure; trial {first['told']}: {first['message']}")
    best = search.folder(order[0])
    result = result_of(search, search.over.tested(best))
    toml, table = search.path / "best.toml", search.path / "table.txt"
    write_atomically(toml, search.toml(order[0]).encode())
    RunFolder(search.path).write_json(search.path / "result.json", result)
    said = text(search, result)
    write_atomically(table, f"{said}\n".encode(errors="backslashreplace"))
    pictures = draw_pictures(search)
    print(said)
    print(f"\n{listed([Path(shown(str(path))) for path in pictures])}")
    print(f"result:   {shown(str(search.path / 'result.json'))}, {shown(str(table))}")
    if len(told) < search.trials:
        print(f"the time is up after {len(told)} of {search.trials} trials; more: {_again_by(search, workers)}")
    print(f"next:     python -m metaft.{search.space.command} --config {shlex.quote(shown(str(toml)))}")
    return result


if __name__ == "__main__":
    sys.exit(main())
