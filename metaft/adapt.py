"""`python -m metaft.adapt`: fine-tune a meta-learned initialisation to a target task, beside a random one."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from metaft.cli import StopSignals, check_unchanged, fresh_folder, in_one, of_run, settings
from metaft.config import AdaptConfig, Init, of_other_method, to_toml
from metaft.errors import DataError, MetaftError, no_such
from metaft.options import flat, options
from metaft.settings import Origin, Recipe
from metaft.support import paths, places
from metaft.support.modes import in_usual_modes
from metaft.support.output import steady

if TYPE_CHECKING:
    from torch import nn

    from metaft.finetune.start import Start
    from metaft.finetune.study import Position
    from metaft.finetune.target import Target
    from metaft.runs.folder import RunFolder

RUNS = Path("runs")

# What may change when a run goes on: how it is computed, over how many draws, and where the user's own things lie.
RESUMABLE = ("device", "seeds", "data_root", "plugin")

GLYPH_SHOTS = 5

# Classes that start from the same head row need more steps to part than the run's own: on notMNIST, with 5 images of
# each of 10 classes, 36 % of the test images are right after 3 steps, 57 % after 10 and 69 % after 30. The number was
# chosen after seeing these test figures, so notMNIST's own figures at 30 steps are a little too good.
MEAN_HEAD_STEPS = 30


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

    from metaft.support.allocator import keep_freed_memory

    keep_freed_memory()
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
    from metaft.finetune.study import Position
    from metaft.runs.folder import RunFolder, file_name

    settled, starts, target = _prepare(config, module, init)
    data, init_name = file_name(places.typed(config.target.data)), file_name(Path(starts[0].name).name)
    name = f"adapt-{data}-{init_name}-{settled.draws.seed}"
    folder = Path(settled.output.out) if settled.output.out is not None else fresh_folder(RUNS / name)
    made = RunFolder.create(folder, to_toml(dataclasses.replace(settled, out=None)))
    with made.held("out"):
        return _fit_all(made, settled, starts, target, Position())


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
    from metaft.finetune.study import Position, read
    from metaft.runs.checkpoint import write_atomically
    from metaft.runs.machine import say_what_changed

    path = folder.path
    own = places.in_full(of_run(AdaptConfig, folder.config, "resume"))
    given = {} if config is None else {k: v for k, v in flat(config).items() if v is not None}
    if config is not None and config.recipe is not None:
        given = {k: v for k, v in given.items() if k not in options(Recipe)} | {"recipe": config.recipe}
    config = places.in_full(dataclasses.replace(own, **{**given, "out": None}))
    folder.make_folders()
    folder.mend()
    position, before = read(folder) if folder.last.exists() else (Position(), None)
    classes = (before or {}).get("classes", ())
    data = places.as_run_names(config.target.data, own.target.data, config.target.data_root, classes)
    config = dataclasses.replace(config, data=data)
    check_unchanged(config, own, path, except_for=RESUMABLE)
    settled, starts, target = _prepare(config, module, init, classes)
    if before is not None:
        now = _header(settled, starts, target)
        for field, what in (("data_sha256", "data: the images of"), ("init_sha256", "init: the checkpoint of")):
            if before[field] != now[field]:
                raise MetaftError(f"{what} {before[field[:4]]} changed since {path} began")
        say_what_changed(before["environment"], now["environment"])
        begun = len(position.fits) + (position.current is not None)
        draws = -(-begun // len(before["starts"]))
        if settled.draws.seeds < draws:
            raise MetaftError(f"seeds must be at least the {draws} already begun, got {settled.draws.seeds}")
        print(f"resuming {path} after {len(position.fits)} fits and {len(position.rows)} epochs", file=sys.stderr)
    if config != own or settled.target.data != own.target.data:
        folder.result.unlink(missing_ok=True)  # of fewer draws; it would not be this run's
        write_atomically(folder.config, to_toml(settled).encode())
    return _fit_all(folder, settled, starts, target, position)


def newest_run(shape: Sequence[int], *, any_size: bool) -> Path:
    """The newest meta-training run in `runs/` on images of this shape [C, H, W], or of any size of them.

    Raises MetaftError where there is none, naming the shapes that there are.
    """
    from metaft.finetune.start import from_run
    from metaft.runs.folder import RunFolder

    found: list[tuple[int, Path]] = []
    others: list[str] = []
    for path in sorted(RUNS.iterdir()) if RUNS.is_dir() else ():
        folder = RunFolder(path)
        try:
            if not folder.best.is_file():
                continue
            takes = from_run(path).shape
        except (MetaftError, OSError) as error:  # of another kind, damaged, locked, or with a module from Python
            others.append(f"{path}: {str(error).removeprefix('init: ')}")
            continue
        if takes == list(shape) or (any_size and len(takes) == 3 and takes[0] >= shape[0]):
            found.append((folder.best.stat().st_mtime_ns, path))
        else:
            others.append(f"{path} takes {takes}")
    if not found:
        why = f" ({'; '.join(others)})" if others else ""
        raise MetaftError(
            f"init: no run in {RUNS}/ takes images of shape {list(shape)}{why}; make one with "
            "python -m metaft.meta_train, name one with --init RUN, or start from --init none"
        )
    return max(found)[1]


def _prepare(
    config: AdaptConfig, module: nn.Module | None, values: Init, classes: Collection[str] = ()
) -> tuple[AdaptConfig, tuple[Start, ...], Target]:
    """The config with nothing open and with absolute paths, and what it names. Nothing is written.

    `classes` are those of a run that goes on, by which its data are known where they moved.
    """
    from metaft import plugin
    from metaft.defaults import check_steps, device_of
    from metaft.finetune import target as targets
    from metaft.finetune.inner import check_inner
    from metaft.finetune.start import compared, from_nothing, from_run

    device_of(config.compute.device)
    _check_method(config)
    if values not in get_args(Init):
        raise no_such("init", values, get_args(Init))
    if values == "keep" and (module is None or config.start.init != "none"):
        what = "no module was handed over" if module is None else f"the values are those of the run {config.start.init}"
        raise MetaftError(f"init: 'keep' is for a module without a run (init none), and {what}")
    init = config.start.init
    config = _with_data(places.in_full(config), classes)
    if init is None:
        shape, any_size = targets.shape_of(config.target.data)
        init = str(newest_run(shape, any_size=any_size))
        print(f"init: {init}, the newest run that fits", file=sys.stderr)
    if init == "":
        raise MetaftError("init: name a run folder of metaft.meta_train or none, not ''")
    if init == "none":
        target = targets.load(config.target.data, skip_bad=config.target.skip_bad)
        start = from_nothing(target.inputs, module, keep=values == "keep")
    else:
        start = from_run(Path(init), module)
        if start.inputs is None:
            raise MetaftError(
                f"init: {init} takes inputs of shape {start.shape} ({start.about['dataset']}), but the images of "
                f"{config.target.data} are {targets.shape_of(config.target.data)[0]}"
            )
        target = targets.load(config.target.data, start.inputs, skip_bad=config.target.skip_bad)
        start = dataclasses.replace(start, name=str(paths.absolute(init)))
    open_values: dict[str, Any] = {"init": start.name}
    if config.method == "finetune":
        config = dataclasses.replace(config, recipe=config.recipe or Recipe())
    else:
        assert start.settings is not None
        found = plugin.load(
            start.settings.learner.plugin if config.inner.plugin is None else config.inner.plugin,
            start.settings.learner.algorithm,
        )
        config = dataclasses.replace(config, plugin=found)
        check_steps("inner_steps", config.inner.inner_steps, start.settings.learner.algorithm)
        check_inner(start, len(target.class_names))
        mean_head = start.head_rows not in (None, len(target.class_names))
        open_values["inner_steps"] = MEAN_HEAD_STEPS if mean_head else start.settings.test.test_inner_steps
    if config.target.data.startswith("glyphs:"):
        open_values["shots_per_class"] = GLYPH_SHOTS
    left = flat(config)
    settled = dataclasses.replace(config, **{k: v for k, v in open_values.items() if left[k] is None})
    target.rows(
        shots_per_class=settled.target.shots_per_class, seed=settled.draws.seed
    )  # a class may have too few images
    return settled, compared(start), target


def _with_data(config: AdaptConfig, classes: Collection[str]) -> AdaptConfig:
    """The settings with the folder of images where it is. Raises DataError."""
    path = places.folder_of(config.target.data)
    if path is None:
        return config
    try:
        return dataclasses.replace(config, data=f"folder:{places.found(path, config.target.data_root, classes)}")
    except DataError as error:
        raise DataError(f"data: folder {error}") from None


def _check_method(config: AdaptConfig) -> None:
    """Raises MetaftError for settings of the other method, which would be ignored."""
    others = flat(config.inner)
    if config.method == "inner":
        recipe = {} if config.recipe is None else flat(config.recipe)
        others = {k: v for k, v in recipe.items() if v != options(Recipe)[k].default} or recipe
    for field, value in others.items():
        if value is not None:
            raise of_other_method(field, config.method, value)
    if config.method == "inner" and config.start.init == "none":
        raise MetaftError("method: inner is the loop of a run; name one with --init RUN instead of none")


def _header(config: AdaptConfig, starts: Sequence[Start], target: Target) -> dict[str, Any]:
    """The plain data that every checkpoint of an adapt run carries."""
    import numpy as np
    import torch

    from metaft._version import __version__
    from metaft.defaults import device_of
    from metaft.finetune.start import constants
    from metaft.runs.checkpoint import digest
    from metaft.runs.machine import machine

    data = hashlib.sha256(repr((target.class_names, tuple(target.examples.shape))).encode())
    for part in (target.examples, target.labels):
        data.update(np.ascontiguousarray(part.numpy()).data)
    return {
        "version": __version__,
        "init": starts[0].name,
        "init_sha256": digest("", {**(starts[0].meta or {}), **constants(starts[0])}),
        "data": target.name,
        "data_sha256": data.hexdigest(),
        "classes": list(target.class_names),
        "starts": [start.label for start in starts],
        "environment": {**machine(device_of(config.compute.device)), "threads": str(torch.get_num_threads())},
    }


def _fit_all(
    folder: RunFolder, config: AdaptConfig, starts: Sequence[Start], target: Target, position: Position
) -> dict[str, Any]:
    from metaft.defaults import device_of
    from metaft.finetune.start import said_of
    from metaft.finetune.study import study
    from metaft.support.progress import Progress

    device = device_of(config.compute.device)
    header, start = _header(config, starts, target), starts[0]
    epochs = 1 if config.recipe is None else config.recipe.epochs
    print(
        f"{places.shown(target.name)} · {len(target.class_names)} classes · {config.method} from "
        f"{places.shown(start.name)}{said_of(start)} on {device} · "
        f"run folder {folder.path}",
        file=sys.stderr,
    )
    bar = Progress("adapt", config.draws.seeds * len(starts) * epochs, "epoch", done=len(position.fits) * epochs)
    resume_hint = f"python -m metaft.adapt --resume {shlex.quote(str(folder.path))}"

    def progress(number: int, row: Mapping[str, float]) -> None:
        bar.update(number * epochs + int(row["epoch"]), loss=f"{row['loss']:.3f}")

    with StopSignals() as signals:
        try:
            position = study(
                folder, config, starts, target, position, header, device=device, progress=progress,
                should_stop=lambda: signals.check(f"stopped; go on with: {resume_hint}"),
            )  # fmt: skip
        finally:
            bar.close()
        return finish(folder, config, starts, target, position, device)


def finish(
    folder: RunFolder, config: AdaptConfig, starts: Sequence[Start], target: Target, position: Position, device: str
) -> dict[str, Any]:
    """Write result.json, report.txt and the pictures; say what came out."""
    import torch

    from metaft.finetune import report
    from metaft.finetune.classifier import load
    from metaft.finetune.results import result_of
    from metaft.finetune.study import rows_of
    from metaft.runs.checkpoint import write_atomically
    from metaft.support.pictures import listed

    result = result_of(folder, config, starts, target, position, device)
    folder.write_json(folder.result, result)
    text = report.text(result)
    whole = f"{text}\n\n{report.plainly(result)}\n"
    write_atomically(folder.path / "report.txt", whole.encode(errors="backslashreplace"))
    classifier = load(folder.classifier, module=starts[0].module)
    test = torch.from_numpy(rows_of(target, config, 0).test)
    pictures = report.draw_pictures(folder, result, classifier, target, test)
    print(text)
    print(f"\n{listed(pictures)}")
    print(f"result:   {folder.result}, {folder.path / 'report.txt'}")
    if starts[0].module is None:
        print(f"next:     python -m metaft.predict {shlex.quote(str(folder.path))} IMAGE_OR_FOLDER...")
    print(report.plainly(result))
    return result


if __name__ == "__main__":
    sys.exit(main())
