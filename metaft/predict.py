"""`python -m metaft.predict RUN IMAGE|FOLDER...`: label images with the classifier that an adapt run left."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from metaft import output
from metaft.cli import check_writable, in_one, parse
from metaft.config import PredictConfig
from metaft.errors import CheckpointError, DataError, MetaftError, OutputLost
from metaft.paths import local

if TYPE_CHECKING:
    from torch import Tensor

    from metaft.finetune.classifier import Classifier

AT_ONCE = 256  # images that are read, then labelled


@dataclasses.dataclass(frozen=True)
class Arguments(PredictConfig):
    """Label images with the classifier that an adapt run left."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = dataclasses.field(kw_only=True)
    """Run folder of metaft.adapt."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE|FOLDER...")] = (
        dataclasses.field(kw_only=True)
    )
    """Picture files, or folders whose pictures are labelled, those in folders inside too."""


class Label(NamedTuple):
    """What came out for one file."""

    file: Path
    names: tuple[str, ...]
    """The most probable classes, the best first; empty where the file cannot be read."""
    probabilities: tuple[float, ...]
    error: str
    """Why the file cannot be read, or nothing."""
    from_colour: bool = False
    """Whether a file in colour was turned grey, which is all that the classifier takes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, though some files may be unreadable; 1 too little memory, or stdout is full and there is no
    --csv; 2 bad input, or no file that can be read."""
    return in_one(_command, argv, prog="metaft.predict", smaller="smaller images, or a machine with more")


def _command(argv: Sequence[str]) -> None:
    given = parse(Arguments, argv, prog="python -m metaft.predict")
    if not given.images:
        raise MetaftError("images: name at least one picture file or folder")
    files = list_files(given.images)
    if given.csv is not None:
        check_writable(local(given.csv), "csv", local(given.csv).parent)

    from metaft.defaults import device_of
    from metaft.finetune.classifier import load

    device = device_of(given.device)
    with warnings.catch_warnings(record=True) as said:  # a line each, without the place in the code
        warnings.simplefilter("always")
        try:
            classifier = load(given.run, device=device)
        except CheckpointError as error:
            raise CheckpointError(f"run: {error}") from None
    for warning in said:
        print(f"metaft: note: {warning.message}", file=sys.stderr)
    classes = len(classifier.class_names)
    if given.top > classes:
        raise MetaftError(f"top must be at most the {classes} classes of {given.run}, got {given.top}")
    labels = []
    for label in label_files(classifier, files, given.top):
        labels.append(label)
        if label.error:
            print(f"metaft: unreadable: {label.error}", file=sys.stderr)
        else:
            pairs = zip(label.names, label.probabilities, strict=True)
            print(f"{label.file}\t" + "\t".join(f"{name}\t{p:.4f}" for name, p in pairs), flush=True)
        if given.csv is None and output.left(sys.stdout):  # nobody would see the others
            return
    if given.csv is not None:
        write_csv(local(given.csv), labels, given.top)
    colour = [label.file for label in labels if label.from_colour]
    if colour:
        print(
            f"metaft: note: {len(colour)} of the {len(labels)} images are in colour, such as {colour[0]}, but the run "
            "takes grey ones; they were made grey",
            file=sys.stderr,
        )
    bad = sum(bool(label.error) for label in labels)
    if bad == len(labels):
        raise DataError(f"images: none of the {bad} files can be read")
    if given.csv is None and (why := output.lost(sys.stdout)):
        raise OutputLost(f"the labels cannot be printed ({why}), and no --csv was asked for")
    if bad:
        print(f"metaft: {bad} of {len(labels)} files cannot be read; the others are labelled", file=sys.stderr)


def list_files(images: Sequence[str]) -> list[Path]:
    """The picture files that arguments name, folders searched to the bottom, each file once.

    A file that is named is taken whatever its ending; a folder that cannot be read stands for its pictures. Raises
    DataError for a path that does not exist and for a folder without pictures.
    """
    from metaft.tasks.images import list_below

    files: list[Path] = []
    for name in images:
        path = local(name)
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"images: {path} does not exist") from None
        except OSError as error:  # in a locked folder, or a link to itself: unreadable, but no reason to stop
            if error.errno == errno.ENAMETOOLONG:
                raise DataError(f"images: {path} does not exist ({error.strerror})") from None
        found = list_below(path) if os.path.isdir(path) else [path]
        if not found:
            raise DataError(f"images: folder {path} holds no pictures")
        files += found
    return list(dict.fromkeys(files))


def label_files(classifier: Classifier, files: Sequence[Path], top: int = 1) -> Iterator[Label]:
    """The `top` most probable classes of each file, in order; unreadable files come out with an error."""
    import torch

    for first in range(0, len(files), AT_ONCE):
        some = files[first : first + AT_ONCE]
        found = [_read(classifier, file) for file in some]
        pictures = [picture[0] for picture in found if not isinstance(picture, DataError)]
        best = iter(())
        if pictures:
            probabilities, classes = classifier.probabilities(torch.cat(pictures)).topk(top)
            best = zip(classes.tolist(), probabilities.tolist(), strict=True)
        for file, picture in zip(some, found, strict=True):
            if isinstance(picture, DataError):
                yield Label(file, (), (), str(picture))
            else:
                numbers, values = next(best)
                yield Label(file, tuple(classifier.class_names[n] for n in numbers), tuple(values), "", picture[1])


def _read(classifier: Classifier, file: Path) -> tuple[Tensor, bool] | DataError:
    """The picture, and whether it was in colour and is not any more."""
    from metaft.tasks.images import is_grey, list_images, open_image

    try:
        if os.path.isdir(file):
            list_images(file)  # says why not
        image = open_image(file)
    except DataError as error:
        return error
    return classifier.fitted(image), classifier.preprocessing.channels == 1 and not is_grey(image)


def write_csv(path: Path, labels: Sequence[Label], top: int) -> None:
    """file, label_1, probability_1, ..., error: a line per file. Raises CheckpointError where it cannot be written."""
    from metaft.checkpoint import write_atomically

    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["file", *(f"{what}_{i}" for i in range(1, top + 1) for what in ("label", "probability")), "error"])
    for label in labels:
        cells = [cell for pair in zip(label.names, label.probabilities, strict=True) for cell in pair]
        out.writerow([label.file, *(cells or [""] * 2 * top), label.error])
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    sys.exit(main())
