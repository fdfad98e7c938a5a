"""`python -m metaft.compress RUN`: make the classifier that an adapt run left smaller and faster."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from metaft.cli import StopSignals, in_one, opened_run, stopped_at_once
from metaft.config import AdaptConfig, CompressConfig, Init, read_toml, to_toml
from metaft.errors import MetaftError
from metaft.flags import parse
from metaft.options import Option, from_mapping
from metaft.runs.recorded import check_unchanged, of_run
from metaft.support.modes import in_usual_modes
from metaft.support.output import steady
from metaft.support.paths import local
from metaft.support.places import check_root

if TYPE_CHECKING:
    from torch import nn

    from metaft.after.shrinking import Work
    from metaft.finetune.journal import Position
    from metaft.runs.folder import RunFolder

RESUMABLE = ("data_root", "out")


@dataclasses.dataclass(frozen=True, init=False)
class Arguments(CompressConfig):
    """Make the classifier that an adapt run left smaller and faster."""

    run: Annotated[str, Option("Run folder of metaft.adapt.", metavar="RUN", positional=True)] = ""
    resume: Annotated[bool, Option("Go on with what lies in --out, by its own settings.")] = False


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, with a note where what was asked for is not reached; 1 a loss that is not finite or too
    little memory, 2 bad input, 130 or 143 stopped by Ctrl-C or SIGTERM."""
    return in_one(_command, argv, prog="metaft.compress", smaller="a machine with more")


def _command(argv: Sequence[str]) -> None:
    given = parse(Arguments, argv, prog="python -m metaft.compress")
    source, resume = given.pop("run"), given.pop("resume", False)
    config = CompressConfig(**given)
    if resume:
        recorded = _recorded(_out(config, local(source)))
        config = dataclasses.replace(recorded, **given)
        check_unchanged(config, recorded, _out(config, local(source)), except_for=RESUMABLE)
    run(source, config, resume=resume)


@steady()
@in_usual_modes
def run(
    path: Path | str,
    config: CompressConfig | None = None,
    *,
    resume: bool = False,
    module: nn.Module | None = None,
    init: Init = "seed",
) -> dict[str, Any]:
    """Write the folder of a smaller classifier, or go on with it; returns what its `result.json` holds.

    `path` is a finished run folder of metaft.adapt; `module` and `init` are what that run was handed over. Raises
    MetaftError, before anything is written, for a run whose data or start are not at hand or changed, that predicts
    numbers, or whose network cannot be pruned.
    """
    from metaft.after.pruning import check_installed, check_prunable
    from metaft.finetune.journal import Position, read
    from metaft.runs.checkpoint import write_atomically
    from metaft.runs.folder import RunFolder
    from metaft.support.whole import whole_or_nothing

    config, source = config or CompressConfig(), local(path)
    check_root(config.data_root)
    if config.into is None:
        check_installed()
    out = _out(config, source)
    if not resume:
        _check_new(out)
    elif RunFolder(out).result.exists():
        raise MetaftError(f"resume: {out} is finished already")
    with stopped_at_once("stopped; nothing was written"):
        work, header = _opened(source, config, module, init)
        if config.into is None:
            check_prunable(work.original)
        _check_judged(work, begun=resume)
    if resume:
        folder = RunFolder.open(out)
    else:
        with whole_or_nothing(out) as new:  # since without compress.toml nobody could go on with it
            began = RunFolder.create(new, work.run.config.read_text(encoding="utf-8"))
            write_atomically(began.compress, to_toml(dataclasses.replace(config, out=None)).encode())
        folder = RunFolder(out)
    with folder.held("out"):
        folder.make_folders()
        folder.mend()
        position, own = read(folder) if folder.last.exists() else (Position(), header)
        if own["classifier_sha256"] != header["classifier_sha256"]:
            raise MetaftError(f"resume: {out} began with another classifier than that of {source}")
        return _shrink(folder, work, position, header)


def _out(config: CompressConfig, source: Path) -> Path:
    return source / "compressed" if config.out is None else local(config.out)


def _check_new(out: Path) -> None:
    """Raises MetaftError for a place where there is something, which may be what a kill left to go on with."""
    from metaft.runs.folder import RunFolder
    from metaft.support.taken import check_new

    folder = RunFolder(out)
    if os.path.exists(folder.compress) and not os.path.exists(folder.result):  # of a name that is too long, too
        raise MetaftError(
            f"out: {out} is begun and not finished; go on with it by --resume, or name another folder with --out"
        )
    check_new(out)


def _recorded(out: Path) -> CompressConfig:
    """The settings of a folder that is gone on with. Raises MetaftError for one that this command did not make."""
    from metaft.runs.folder import RunFolder

    file = RunFolder(out).compress
    if not os.path.lexists(out):
        raise MetaftError(f"resume: {out} does not exist, so there is nothing to go on with; leave --resume away")
    if not os.path.isfile(file):
        raise MetaftError(f"resume: {out} is no folder that metaft.compress made: it has no {file.name}")
    return from_mapping(CompressConfig, read_toml(file), origin=str(file))


def _opened(source: Path, config: CompressConfig, module: nn.Module | None, init: Init) -> tuple[Work, dict[str, Any]]:
    """What there is to shrink, and the header of its checkpoints."""
    import hashlib

    from metaft.after.shrinking import Work
    from metaft.finetune.choose import SETTLED
    from metaft.finetune.classifier import load
    from metaft.finetune.journal import read
    from metaft.finetune.setup import digest_of_data, prepared, rows_of
    from metaft.runs import checkpoint
    from metaft.runs.folder import RunFolder
    from metaft.starts.base import digest_of
    from metaft.starts.names import in_full

    if os.path.isfile(source):
        raise MetaftError(f"run: {source} is a classifier alone, without its run's data")
    original = opened_run(lambda: load(source, module=module))
    run = RunFolder.open(source)
    run.read_result("run")
    if not original.class_names:
        raise MetaftError(f"run: {source} predicts numbers, and compress judges by the accuracy of classes")
    architecture = checkpoint.load(run.classifier)[1]["architecture"]
    if "widths" in architecture:
        raise MetaftError(f"run: {source} is compressed already; name the run that it came from")
    position, before = read(run)
    settings = in_full(of_run(AdaptConfig, run.config, "run"))
    if settings.also:
        raise MetaftError(f"run: {source} is of several targets, and compress is for one yet")
    root = settings.target.data_root if config.data_root is None else config.data_root
    settings = dataclasses.replace(settings, compare=(), probe=None, data_root=root, device="cpu")
    setup = prepared(settings, module, init, before)
    if digest_of_data(setup.target) != before["data_sha256"]:
        raise MetaftError(f"data: the images of {setup.target.name} changed since {source} began")
    if digest_of(setup.start) != before["init_sha256"]:
        raise MetaftError(f"init: the start of {source} changed since it began")
    contender = setup.contenders[0]
    made = position.fits[0].get("chosen")
    if made is not None and contender.recipe is not None:
        decided = dataclasses.replace(contender.recipe, **{k: made[k] for k in SETTLED if k in made})
        contender = contender._replace(recipe=decided)
    rows = rows_of(setup, 0, None if setup.folds > 1 else 0)
    work = Work(run, setup, contender, rows, original, architecture, config, module=module)
    if config.into is not None:
        work = work._replace(student=_student(work, config.into))
    digest = hashlib.sha256(run.classifier.read_bytes()).hexdigest()
    kept = ("version", "init", "init_sha256", "data", "data_sha256", "classes", "folds", "environment")
    return work, {**{k: before[k] for k in kept if k in before}, "starts": ["original"], "classifier_sha256": digest}


def _student(work: Work, into: str) -> Any:
    """The start that is taught. Raises MetaftError, naming `into`, for one that cannot take the run's pictures."""
    from metaft.finetune.contenders import Images, other
    from metaft.settings.finetuning import StartSettings

    shape = work.original.inputs.shape
    start = other(into, Images(work.setup.config.target), StartSettings(image_size=shape[-1]), "into")
    if tuple(start.shape) != tuple(shape):
        raise MetaftError(f"into: {into} takes pictures {[*start.shape]}, and the run's are {[*shape]}")
    return start


def _check_judged(work: Work, *, begun: bool) -> None:
    """Raises MetaftError where nothing is there to choose by, nothing or no way to prune, or nothing to gain."""
    import torch

    from metaft.after.pruning import pruned
    from metaft.after.shrinking import images_of, shares_of, tracks_of
    from metaft.starts.base import body

    tracks_of(work)
    shares = shares_of(work)
    if not shares:
        raise MetaftError(f"run: no layer of {work.run.path} has channels to lose")
    if work.student is None and not begun:
        some = images_of(work, torch.from_numpy(work.rows.train), at_most=2)
        pruned(work.original, work.original, shares[0], some)
    if work.student is not None:
        mine, theirs = (
            sum(p.numel() for p in module.parameters()) for module in (body(work.student, 0), work.original.body)
        )
        if mine >= theirs:
            raise MetaftError(f"into: {work.config.into} has {mine:,} parameters, no fewer than the run's {theirs:,}")


def _shrink(folder: RunFolder, work: Work, position: Position, header: dict[str, Any]) -> dict[str, Any]:
    from metaft.after import measured, shrunk
    from metaft.after.shrinking import file_of, shrink, tracks_of
    from metaft.runs.checkpoint import write_atomically

    where = shlex.quote(str(folder.path))
    again = f"python -m metaft.compress {shlex.quote(str(work.run.path))} --out {where} --resume"
    print(f"compressing {work.run.path} · run folder {folder.path}", file=sys.stderr)
    with StopSignals() as signals:
        position = shrink(
            folder, work, position, header,
            should_stop=lambda: signals.check(f"stopped; go on with: {again}"),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
        rows = shrunk.steps_of(folder, work, position)
        kept = shrunk.kept_of(rows, work.config.points)
        write_atomically(folder.classifier, file_of(folder, kept, tracks_of(work)[0]).read_bytes())
        result = shrunk.result_of(folder, work, position, work.run.read_result(), rows, kept)
        folder.write_json(folder.result, result)
        text = measured.text(rows, seen=not len(work.rows.test), threads=result["environment"]["threads"])
        lines = [text, f"kept: {rows[kept]['model']}", *(f"note: {note}" for note in result["notes"])]
        write_atomically(folder.path / "report.txt", "\n".join([*lines, ""]).encode(errors="backslashreplace"))
    print("\n".join(lines))
    print(f"result:   {folder.result}, {folder.path / 'report.txt'}")
    for line in result["compressed"]["unmet"]:
        print(f"metaft: note: not reached: {line}", file=sys.stderr)
    if work.module is None:
        print(f"next:     python -m metaft.predict {where} IMAGE_OR_FOLDER...")
    return result


if __name__ == "__main__":
    sys.exit(main())
