"""`python -m metaft.export RUN`: write the classifier that an adapt run left as a file that runs without metaft."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from metaft.cli import in_one, opened_run, stopped_at_once
from metaft.config import ExportConfig
from metaft.errors import MetaftError
from metaft.flags import parse
from metaft.options import Option
from metaft.support.modes import in_usual_modes
from metaft.support.output import steady
from metaft.support.paths import local
from metaft.support.places import check_root
from metaft.support.taken import check_new
from metaft.support.whole import whole_or_nothing

if TYPE_CHECKING:
    from torch import nn

    from metaft.after.pictures import Pictures
    from metaft.finetune.classifier import Classifier


@dataclasses.dataclass(frozen=True, init=False)
class Arguments(ExportConfig):
    """Write the classifier that an adapt run left as a file that runs without metaft."""

    run: Annotated[str, Option("Run folder of metaft.adapt.", metavar="RUN", positional=True)] = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 too little memory, 2 bad input or a model that came out otherwise, 130 or 143 stopped by
    Ctrl-C or SIGTERM."""
    return in_one(_command, argv, prog="metaft.export", smaller="a machine with more")


def _command(argv: Sequence[str]) -> None:
    given = parse(Arguments, argv, prog="python -m metaft.export")
    run(given.pop("run"), ExportConfig(**given))


# Above 60 lines: the steps of an export, in their order.
@steady()
@in_usual_modes
def run(path: Path | str, config: ExportConfig | None = None, *, module: nn.Module | None = None) -> dict[str, Any]:
    """Write the folder of an export; returns what its `export.json` holds.

    `path` is a run folder of metaft.adapt, or a classifier's file; `module` the user's own architecture, where the run
    was trained on one. Raises MetaftError, and leaves no folder, for a run or pictures that do not serve, a model that
    cannot be exported, and one whose exported form gives other logits on real pictures.
    """
    from metaft.after import agreement, int8, measured
    from metaft.after.exported import exported_file, open_exported
    from metaft.after.formats import FORMATS, versions
    from metaft.after.script import script
    from metaft.after.whole import Whole

    config = config or ExportConfig()
    source, format = local(path), FORMATS[config.format]
    if config.int8 and config.format != "onnx":
        raise MetaftError(f"int8: is a form of onnx, and the format is {config.format}")
    format.check()
    out = _out(config, source)
    if exported_file(source) is not None:
        raise MetaftError(f"run: {source} is an export already; name the run of metaft.adapt that it came from")
    classifier, file = _classifier(source, module)
    pictures = _pictures(config, source, classifier)
    if config.int8:
        int8.check_enough(pictures.train, "the run's training part" if not config.pictures else "--pictures")
    about = {
        "versions": versions(format.needs),
        "class_names": list(classifier.class_names),
        "inputs": classifier.inputs.plain(),
        "classifier_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    with stopped_at_once("stopped; nothing was written"), whole_or_nothing(out) as folder:
        print(f"writing {out / format.file}, which takes up to a minute", file=sys.stderr)
        model = folder / format.file
        format.write(Whole(classifier), model, about)
        exported = open_exported(model)
        off = agreement.worst(classifier, exported, pictures.test)
        models = {"torch": (classifier, file), config.format: (exported, model)}
        if config.int8:
            print(f"writing {out / int8.FILE}", file=sys.stderr)
            small = folder / int8.FILE
            int8.quantise(model, small, pictures.train)
            models["int8"] = open_exported(small), small
            agreement.check_finite(models["int8"][0], pictures.test)
        rows = measured.rows_of(models, pictures)
        result = {**about, **_figures(source, config, rows, off, pictures)}
        (folder / "predict.py").write_text(script(), encoding="utf-8")
        (folder / "export.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(measured.text(rows, seen=pictures.seen, threads=result["environment"]["threads"]))
    print(f"logits differ by at most {off:.2g} of what is allowed (1e-4 of a logit, and at least 1e-4)")
    where = shlex.quote(str(out))
    print(f"result:   {', '.join(str(out / name) for name in sorted(os.listdir(out)))}")
    print(f"next:     python {where}/predict.py IMAGE_OR_FOLDER...")
    return result


def _out(config: ExportConfig, source: Path) -> Path:
    """Where the folder is to be. Raises MetaftError for one that is there."""
    beside = source if os.path.isdir(source) else source.parent
    return check_new(beside / config.format if config.out is None else local(config.out))


def _classifier(source: Path, module: nn.Module | None) -> tuple[Classifier, Path]:
    """The classifier and its file. Raises CheckpointError, naming `run`."""
    from metaft.finetune.classifier import load
    from metaft.runs.folder import RunFolder

    classifier = opened_run(lambda: load(source, module=module))
    return classifier, RunFolder(source).classifier if os.path.isdir(source) else source


def _pictures(config: ExportConfig, source: Path, classifier: Classifier) -> Pictures:
    """Raises MetaftError where there are none."""
    from metaft.after.pictures import of_files, of_folder, without_data
    from metaft.predict import list_files
    from metaft.runs.folder import RunFolder

    check_root(config.data_root)
    if config.pictures:
        return of_files(list_files(config.pictures, "pictures")[0], classifier)
    try:
        if not os.path.isdir(source):
            raise MetaftError(f"pictures: {source} is a classifier alone, without its run's data")
        return of_folder(RunFolder.open(source), classifier, config.data_root)
    except MetaftError as error:
        raise without_data(error) from None


def _figures(
    source: Path, config: ExportConfig, rows: Sequence[Mapping[str, Any]], off: float, pictures: Pictures
) -> dict[str, Any]:
    """What was measured."""
    import torch

    from metaft.runs.machine import where_measured

    return {
        "command": "export",
        "run": str(source),
        "run_is_finished": not os.path.isdir(source) or (source / "result.json").exists(),
        "format": config.format,
        "models": list(rows),
        "off_of_allowed": off,
        "seen_in_training": pictures.seen,
        "environment": where_measured("cpu", torch.get_num_threads()),
    }


if __name__ == "__main__":
    sys.exit(main())
