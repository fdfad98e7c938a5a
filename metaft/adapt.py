"""`python -m metaft.adapt`: fine-tune a meta-learned initialisation to a target task, beside a random one."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaft import look
from metaft.cli import StopSignals, in_one, stopped_at_once
from metaft.config import AdaptConfig, Init, to_toml
from metaft.errors import MetaftError
from metaft.options import flat, options
from metaft.origin import settings
from metaft.runs.recorded import check_unchanged, of_run
from metaft.settings.compute import Origin
from metaft.settings.finetuning import Recipe
from metaft.support import places
from metaft.support.modes import in_usual_modes
from metaft.support.output import steady
from metaft.support.taken import fresh_folder

if TYPE_CHECKING:
    from torch import nn

    from metaft.finetune.journal import Position
    from metaft.finetune.setup import Setup
    from metaft.runs.folder import RunFolder

# What may change when a run goes on: how it is computed, over how many draws, and where the user's own things lie.
RESUMABLE = ("device", "seeds", "data_root", "plugin", "report", "snapshots", "log")


@dataclasses.dataclass(frozen=True, init=False)
class Arguments(AdaptConfig):
    """Fine-tune a meta-learned initialisation to a target task, and compare it with a random one."""

    origin: Origin


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a loss that is not finite or too little memory, 2 bad input, 130 or 143 stopped by Ctrl-C
    or SIGTERM."""
    return in_one(_command, argv, prog="metaft.adapt", smaller="a smaller --batch-size, or fewer images")


def _command(argv: Sequence[str]) -> None:
    config, resume = settings(Arguments, AdaptConfig, argv, prog="python -m metaft.adapt")
    if resume is None:
        run(config)
    else:
        resume_run(resume, config)


@steady()
@in_usual_modes
def run(config: AdaptConfig, *, module: nn.Module | None = None, init: Init = "seed") -> dict[str, Any]:
    """Fine-tune from both starts in a new run folder; returns what `result.json` holds.

    `module` is the user's own architecture, where the run was trained on one, or where there is none (config.start.init
    "none"): it is trained from random parameters then, and with `init="keep"` from the values that it was handed over
    with beside those. Parameters with requires_grad=False stay as they are. Raises MetaftError for settings, data or a
    run that do not fit together, or a module that cannot be trained, before anything is written.
    """
    from metaft.finetune.journal import Position, write
    from metaft.finetune.setup import header, prepared
    from metaft.runs.events import check
    from metaft.runs.folder import RunFolder, file_name
    from metaft.starts.names import label_of
    from metaft.starts.run import RUNS

    check(config.output.log)
    places.note_root(config.target.data_root, config.target.data, *config.also)
    with stopped_at_once("stopped; nothing was written"):
        setup = prepared(config, module, init)
    settled = setup.config
    data, init_name = file_name(places.typed(config.target.data)), file_name(label_of(setup.start.name))
    name = f"adapt-{data}-{init_name}-{settled.draws.seed}"
    path = Path(settled.output.out) if settled.output.out is not None else fresh_folder(RUNS / name)
    folder = RunFolder.create(path, to_toml(dataclasses.replace(settled, out=None)))
    with folder.held("out"):
        position, head = Position(), header(setup)
        if setup.ranked or setup.range_test:  # which a resume does not look for again
            write(folder, position, head)
        return _fit_all(folder, setup, head, position)


@steady()
@in_usual_modes
def resume_run(
    path: Path, config: AdaptConfig | None = None, *, module: nn.Module | None = None, init: Init = "seed"
) -> dict[str, Any]:
    """Go on with a run from its last checkpoint. `config` may differ from the run's in RESUMABLE fields alone; `module`
    and `init` are what the run began with.

    Raises MetaftError for another difference, where the images or the initialisation are no longer those that the run
    began with, and where another process is at this run; CheckpointError where no checkpoint can be read.
    """
    from metaft.runs.folder import RunFolder

    folder = RunFolder.open(path)
    with folder.held("resume"):
        return _resume(folder, config, module, init)


def _resume(folder: RunFolder, config: AdaptConfig | None, module: nn.Module | None, init: Init) -> dict[str, Any]:
    from metaft.finetune.journal import Position, read
    from metaft.finetune.recipes import as_settled
    from metaft.finetune.setup import header, prepared
    from metaft.runs.checkpoint import write_atomically
    from metaft.runs.events import check
    from metaft.runs.machine import say_what_changed
    from metaft.starts.names import in_full

    path = folder.path
    if folder.compress.exists():
        raise MetaftError(f"resume: {path} is of metaft.compress; go on with that command's own --resume")
    folder.make_folders()
    folder.mend()
    position, before = read(folder) if folder.last.exists() else (Position(), None)
    was = before or {}
    recorded = in_full(of_run(AdaptConfig, folder.config, "resume"))
    given = {} if config is None else {k: v for k, v in flat(config).items() if v is not None}
    if config is not None and config.recipe is not None:
        recipe, searched = config.recipe, "range_test" in was
        recipe = recipe if recorded.recipe is None else as_settled(recipe, recorded.recipe, searched=searched)
        given = {k: v for k, v in given.items() if k not in options(Recipe)} | {"recipe": recipe}
    config = in_full(dataclasses.replace(recorded, **{**given, "out": None}))
    classes = [was.get("classes", ()), *was.get("also_classes", [()] * len(config.also))]
    known = [recorded.target.data, *recorded.also]
    names = [config.target.data, *config.also]
    if len(names) == len(known):
        named = zip(names, known, classes, strict=True)
        names = [places.as_run_names(name, own, config.target.data_root, of) for name, own, of in named]
    config = dataclasses.replace(config, data=names[0], also=tuple(names[1:]))
    check_unchanged(config, recorded, path, except_for=RESUMABLE)
    check(config.output.log)
    setup = prepared(config, module, init, before)
    settled, now = setup.config, header(setup)
    if before is not None:
        for field, what in (("data_sha256", "data: the images of"), ("init_sha256", "init: the checkpoint of")):
            if before[field] != now[field]:
                raise MetaftError(f"{what} {before[field[:4]]} changed since {path} began")
        if before.get("compared_sha256", now["compared_sha256"]) != now["compared_sha256"]:
            raise MetaftError(f"compare: a start that {path} compares changed since it began")
        if before.get("teachers_sha256") != now.get("teachers_sha256"):
            raise MetaftError(f"extra: the teacher of {path} changed since it began")
        digests = zip(settled.also, before.get("also_sha256", ()), now.get("also_sha256", ()), strict=True)
        for name, then, today in digests:
            if then != today:
                raise MetaftError(f"also: the images of {name} changed since {path} began")
        say_what_changed(before["environment"], now["environment"])
        begun = len(position.fits) + (position.current is not None)
        folds = before.get("folds", 1)
        draws = -(-(begun - (folds > 1)) // (len(before["starts"]) * folds))
        if settled.auto is not None and settled.draws.seeds != recorded.draws.seeds:
            raise MetaftError(
                f"seeds: the draws of a run share the minutes of --auto, and {path} was started with "
                f"{recorded.draws.seeds}, given {settled.draws.seeds}"
            )
        if settled.draws.seeds < draws:
            raise MetaftError(f"seeds must be at least the {draws} already begun, got {settled.draws.seeds}")
        print(f"resuming {path} after {len(position.fits)} fits and {len(position.rows)} epochs", file=sys.stderr)
    if config != recorded or (settled.target.data, settled.also) != (recorded.target.data, recorded.also):
        folder.result.unlink(missing_ok=True)  # of fewer draws; it would not be this run's
        write_atomically(folder.config, to_toml(settled).encode())
    return _fit_all(folder, setup, now, position)


def _fit_all(folder: RunFolder, setup: Setup, header: Mapping[str, Any], position: Position) -> dict[str, Any]:
    from metaft.defaults import device_of
    from metaft.finetune.report import candidate, kind
    from metaft.finetune.study import study
    from metaft.runs.events import events_of
    from metaft.starts.base import said_of
    from metaft.support.progress import Progress

    config, target = setup.config, setup.target
    device = device_of(config.compute.device)
    epochs = [1 if fit.contender.recipe is None else fit.contender.recipe.passes for fit in setup.fits]
    print(
        f"{places.shown(target.name)} · {kind(target.class_names)} · {config.method} from "
        f"{places.shown(setup.start.name)}{said_of(setup.start)} on {device} · run folder {folder.path}",
        file=sys.stderr,
    )
    bar = Progress("adapt", sum(epochs), "epoch", done=sum(epochs[: len(position.fits)]))
    resume_hint = f"python -m metaft.adapt --resume {shlex.quote(str(folder.path))}"

    def progress(number: int, row: Mapping[str, float], passes: int) -> None:
        if passes != epochs[number]:  # which a choice decides
            epochs[number] = passes
            bar.expect(sum(epochs), sum(epochs[:number]))
        bar.update(sum(epochs[:number]) + int(row["epoch"]), loss=f"{row['loss']:.3f}")

    with StopSignals() as signals, events_of(config.output.log, folder) as events:
        try:
            position = study(
                folder, setup, position, header, device=device, progress=progress,
                on_candidate=lambda row: bar.say(f"to choose from: {candidate(row)}"),
                should_stop=lambda: signals.check(f"stopped; go on with: {resume_hint}"), events=events,
            )  # fmt: skip
        finally:
            bar.close()
        result = finish(folder, setup, position, device)
        if events is not None:
            events.end(sorted(folder.plots.glob("*.png")), max(int(row["epoch"]) for row in position.rows))
        return result


def finish(folder: RunFolder, setup: Setup, position: Position, device: str) -> dict[str, Any]:
    """Write result.json, report.txt and the pictures; say what came out."""
    import torch

    from metaft.finetune import report
    from metaft.finetune.classifier import load
    from metaft.finetune.results import result_of
    from metaft.finetune.setup import rows_of
    from metaft.finetune.suspects import suspects_of
    from metaft.finetune.words import plainly
    from metaft.runs.checkpoint import write_atomically
    from metaft.support.pictures import listed

    result, module = result_of(folder, setup, position, device), setup.start.module
    result["suspects"] = suspects_of(setup, device)
    folder.write_json(folder.result, result)
    text = report.text(result)
    whole = f"{text}\n\n{plainly(result)}\n"
    write_atomically(folder.path / "report.txt", whole.encode(errors="backslashreplace"))
    classifier = load(folder.classifier, module=module)
    # Where there are folds the classifier has seen all images, and its mistakes are none of a test.
    test = torch.from_numpy(rows_of(setup, 0).test) if setup.folds == 1 else None
    pictures = report.draw_pictures(folder, result, classifier, setup.target, test)
    print(text)
    print(f"\n{listed(pictures)}")
    print(f"result:   {folder.result}, {folder.path / 'report.txt'}")
    if setup.config.output.report is not False:
        look.at_end(folder.path, module=module)
    if module is None:
        print(f"next:     python -m metaft.predict {shlex.quote(str(folder.path))} IMAGE_OR_FOLDER...")
    print(plainly(result))
    return result


if __name__ == "__main__":
    sys.exit(main())
