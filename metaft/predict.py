"""`python -m metaft.predict RUN IMAGE|FOLDER...`: label images with the classifier that an adapt run left."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from metaft.cli import in_one, opened_run
from metaft.config import PredictConfig
from metaft.errors import DataError, MetaftError, OutputLost
from metaft.flags import parse
from metaft.options import Option
from metaft.support import output
from metaft.support.paths import local
from metaft.support.taken import check_own, check_writable

if TYPE_CHECKING:
    from metaft.finetune.classifier import Predictor
    from metaft.inputs import Reading
    from metaft.inputs.listing import Left

AT_ONCE = 256  # images that are read, then labelled
TABLES = ("file,label_1,", "file,number,")  # what `write_csv` begins with
NAMED = 10  # files that cannot be read of which each gets a line; all are in the CSV file


@dataclasses.dataclass(frozen=True, init=False)
class Arguments(PredictConfig):
    """Label images with the classifier that an adapt run left."""

    run: Annotated[str, Option("Run folder of metaft.adapt, or of metaft.export.", metavar="RUN", positional=True)] = ""
    images: Annotated[
        tuple[str, ...],
        Option(
            "Picture files, or folders whose pictures are labelled, those in folders inside too.",
            metavar="IMAGE|FOLDER...", positional=True,
        ),
    ] = ()  # fmt: skip


class Label(NamedTuple):
    """What came out for one file."""

    reading: Reading
    """Without its raw numbers, which would be those of all files at last."""
    names: tuple[str, ...] = ()
    """The most probable classes, the best first; empty where the file cannot be read."""
    probabilities: tuple[float, ...] = ()
    number: float | None = None
    """What is predicted where it is no class."""
    flaw: str = ""
    """What it was read in spite of."""

    @property
    def file(self) -> Path:
        return self.reading.file

    @property
    def error(self) -> str:
        """Why the file cannot be read, or nothing."""
        return self.reading.error


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, though up to half of the pictures may be unreadable; 1 too little memory, or stdout is full
    and there is no --csv; 2 bad input, or more of them are."""
    return in_one(_command, argv, prog="metaft.predict", smaller="smaller images, or a machine with more")


def _command(argv: Sequence[str]) -> None:
    given = Arguments(**parse(Arguments, argv, prog="python -m metaft.predict"))
    files, ignored = list_files(given.images)
    if given.csv is not None:
        check_own(local(given.csv), "csv", TABLES, "table of this command")
        check_writable(local(given.csv), "csv", local(given.csv).parent)

    from metaft.after.exported import predictor_of
    from metaft.defaults import device_of

    device = device_of(given.compute.device)
    classifier = opened_run(lambda: predictor_of(given.run, device, given.compute.device))
    classes = max(1, len(classifier.class_names))
    if given.top > classes:
        what = f"the {classes} classes" if classifier.class_names else "the one number"
        raise MetaftError(f"top must be at most {what} of {given.run}, got {given.top}")
    labels, bad = [], 0
    for label in label_files(classifier, files, given.top):
        labels.append(label)
        if label.error:
            bad += 1
            if bad <= NAMED:
                print(f"metaft: unreadable: {label.error}", file=sys.stderr)
        else:
            pairs = zip(label.names, label.probabilities, strict=True)
            cells = [f"{name}\t{p:.4f}" for name, p in pairs] if label.number is None else [f"{label.number:.6g}"]
            print(f"{label.file}\t" + "\t".join(cells), flush=True)
        if given.csv is None and output.left(sys.stdout):  # nobody would see the others
            return
    if given.csv is not None:
        write_csv(local(given.csv), labels, given.top, numbers=not classifier.class_names)
    for note in _notes(classifier, labels, ignored):
        print(f"metaft: note: {note}", file=sys.stderr)
    if bad == len(labels):
        raise DataError(f"images: none of the {bad} files can be read")
    if given.csv is None and (why := output.lost(sys.stdout)):
        raise OutputLost(f"the labels cannot be printed ({why}), and no --csv was asked for")
    if bad:
        _say_bad(labels, bad, skip_bad=given.skip_bad)


def _notes(classifier: Predictor, labels: Sequence[Label], ignored: Sequence[Left]) -> list[str]:
    """What there is to know of how the files were read."""
    from metaft.inputs.flaws import flaws_note
    from metaft.inputs.listing import left_note

    return [
        *left_note(ignored, len(labels)),
        *classifier.inputs.notes([label.reading for label in labels]),
        *flaws_note({label.file: label.flaw for label in labels if label.flaw}),
    ]


def _say_bad(labels: Sequence[Label], bad: int, *, skip_bad: bool) -> None:
    """A line on the files that cannot be read; where more than half of the pictures are among them, that is an error
    unless asked for."""
    from metaft.inputs.listing import Left, counted

    kinds = counted((Left(label.file, label.reading.kind, True) for label in labels if label.error), where=False)
    line = f"{bad} of {len(labels)} files cannot be read ({kinds}); the others are labelled"
    beside = sum(label.reading.beside for label in labels)
    if 2 * (bad - beside) > len(labels) - beside and not skip_bad:
        raise DataError(f"images: {line}; --skip-bad takes that for success")
    print(f"metaft: {line}", file=sys.stderr)


def list_files(images: Sequence[str], field: str = "images") -> tuple[list[Path], list[Left]]:
    """The picture files that arguments name, folders searched to the bottom, each file once; and what is ignored.

    A file that is named is taken whatever it holds. A picture in a folder that is lost (a broken link, say) and a
    folder that cannot be read are among the files too, so that they are not overlooked. Raises DataError for paths that
    do not exist and for a folder without pictures.
    """
    from metaft.inputs.listing import counted, list_below, some

    files: list[Path] = []
    ignored: list[Left] = []
    missing = [name for name in images if _missing(local(name))]
    if missing:
        several = f"{len(missing)} paths do not exist: {some(missing, NAMED)}"
        raise DataError(f"{field}: {several}" if len(missing) > 1 else f"{field}: {missing[0]} does not exist")
    for path in map(local, images):
        if not os.path.isdir(path):
            files.append(path)
            continue
        listed = list_below(path, lost=True)
        if not listed.files:
            why = f" ({counted(listed.left)})" if listed.left else ""
            raise DataError(f"{field}: folder {path} holds no pictures{why}")
        files += listed.files
        ignored += listed.left
    return list(dict.fromkeys(files)), ignored


def _missing(path: Path) -> bool:
    """Whether there is nothing of this name; what is in a locked folder, or a link to nowhere, is only unreadable."""
    try:
        path.lstat()
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    return False


def label_files(classifier: Predictor, files: Sequence[Path], top: int = 1) -> Iterator[Label]:
    """The `top` most probable classes of each file, or its number, in order; unreadable files come out with an
    error."""
    import torch

    from metaft.inputs.flaws import noted

    for first in range(0, len(files), AT_ONCE):
        with noted() as flaws:
            readings = [classifier.inputs.read(file) for file in files[first : first + AT_ONCE]]
        raw = [reading.raw for reading in readings if reading.raw is not None]
        best = iter(())
        if raw and not classifier.class_names:
            best = iter(classifier.numbers(torch.cat(raw)).tolist())
        elif raw:
            probabilities, classes = classifier.probabilities(torch.cat(raw)).topk(top)
            best = zip(classes.tolist(), probabilities.tolist(), strict=True)
        for reading in readings:
            if reading.raw is None:
                yield Label(reading)
                continue
            reading, flaw = reading._replace(raw=None), flaws.get(reading.file, "")
            if not classifier.class_names:
                yield Label(reading, number=next(best), flaw=flaw)
                continue
            numbers, values = next(best)
            yield Label(reading, tuple(classifier.class_names[n] for n in numbers), tuple(values), flaw=flaw)


def write_csv(path: Path, labels: Sequence[Label], top: int, *, numbers: bool = False) -> None:
    """file, label_1, probability_1, ..., error: a line per file; of `numbers` file, number, error. Raises
    CheckpointError where it cannot be written."""
    from metaft.runs.checkpoint import write_atomically

    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    columns = [f"{what}_{i}" for i in range(1, top + 1) for what in ("label", "probability")]
    out.writerow(["file", *(["number"] if numbers else columns), "error"])
    for label in labels:
        if numbers:
            out.writerow([label.file, "" if label.number is None else label.number, label.error])
            continue
        cells = [cell for pair in zip(label.names, label.probabilities, strict=True) for cell in pair]
        out.writerow([label.file, *(cells or [""] * 2 * top), label.error])
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    sys.exit(main())
