"""`python -m metaft.predict RUN IMAGE|FOLDER...`: label images with the classifier that an adapt run left."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from metaft.cli import guarded, parse
from metaft.config import PredictConfig
from metaft.errors import DataError, MetaftError

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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, though some files may be unreadable; 2 bad input, or no file that can be read."""
    return guarded(_command, argv)


def _command(argv: Sequence[str]) -> None:
    given = parse(Arguments, argv, prog="python -m metaft.predict")
    if not given.images:
        raise MetaftError("images: name at least one picture file or folder")
    files = list_files(given.images)

    from metaft.defaults import device_of
    from metaft.finetune.classifier import load

    classifier = load(given.run, device=device_of(given.device))
    classes = len(classifier.class_names)
    if given.top > classes:
        raise MetaftError(f"top must be at most the {classes} classes of {given.run}, got {given.top}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name need not be text
        sys.stdout.reconfigure(errors="surrogateescape")
    labels = []
    for label in label_files(classifier, files, given.top):
        labels.append(label)
        if label.error:
            print(f"metaft: unreadable: {label.error}", file=sys.stderr)
        else:
            pairs = zip(label.names, label.probabilities, strict=True)
            print(f"{label.file}\t" + "\t".join(f"{name}\t{p:.4f}" for name, p in pairs), flush=True)
    if given.csv is not None:
        write_csv(Path(given.csv), labels, given.top)
    bad = sum(bool(label.error) for label in labels)
    if bad == len(labels):
        raise DataError(f"images: none of the {bad} files can be read")
    if bad:
        print(f"metaft: {bad} of {len(labels)} files cannot be read; the others are labelled", file=sys.stderr)


def list_files(images: Sequence[str]) -> list[Path]:
    """The picture files that arguments name, folders searched to the bottom, each file once.

    A file that is named is taken whatever its ending. Raises DataError for a path that does not exist and for a folder
    without pictures.
    """
    from metaft.tasks.images import list_images, subfolders

    def below(folder: Path) -> Iterator[Path]:
        yield from list_images(folder)
        for sub in subfolders(folder):
            yield from below(sub)

    files: list[Path] = []
    for name in images:
        path = Path(name)
        if not path.exists():
            raise DataError(f"images: {path} does not exist")
        found = list(below(path)) if path.is_dir() else [path]
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
        pictures = [picture for picture in found if not isinstance(picture, DataError)]
        best = iter(())
        if pictures:
            probabilities, classes = classifier.probabilities(torch.cat(pictures)).topk(top)
            best = zip(classes.tolist(), probabilities.tolist(), strict=True)
        for file, picture in zip(some, found, strict=True):
            if isinstance(picture, DataError):
                yield Label(file, (), (), str(picture))
            else:
                numbers, values = next(best)
                yield Label(file, tuple(classifier.class_names[n] for n in numbers), tuple(values), "")


def _read(classifier: Classifier, file: Path) -> Tensor | DataError:
    try:
        return classifier.read(file)
    except DataError as error:
        return error


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
