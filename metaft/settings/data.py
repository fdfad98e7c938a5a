"""What there is to learn from."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from metaft.options import Group, Option
from metaft.settings.bounds import MOST_PIXELS

SkipBad = Annotated[bool, Option("Leave out picture files that cannot be read, and say which, instead of stopping.")]
DataRoot = Annotated[
    str | None,
    Option("Folder of the data sets, and of folders that moved (auto: the variable METAFT_DATA).", metavar="FOLDER"),
]


@dataclasses.dataclass(frozen=True)
class DataSource(Group):
    """Data."""

    dataset: Annotated[
        str | None,
        Option("Another data set than the run's, with inputs of the same shape (auto: the run's).", metavar="NAME"),
    ] = None
    data_root: DataRoot = None
    download: Annotated[bool, Option("Fetch the data set first, where that is possible (omniglot, l2l:NAME).")] = False
    split: Annotated[
        str | None, Option("How classes are split. omniglot: finn (default), vinyals, alphabets.", metavar="NAME")
    ] = None


@dataclasses.dataclass(frozen=True)
class DataSettings(DataSource):
    """Data."""

    dataset: Annotated[
        str,
        Option(
            "glyphs (built in), omniglot, mini-imagenet, sinusoid, folder:PATH (class folders), csv:PATH (train.csv, "
            "val.csv and test.csv beside the images), l2l:NAME (learn2learn's, e.g. cifarfs), or unlabelled:PATH "
            "(any pictures, or a named set without its training labels).",
            metavar="NAME",
        ),
    ] = "glyphs"
    image_size: Annotated[
        int | None,
        Option(
            "folder, csv, l2l, mini-imagenet: pixels per side (auto: 28 for grey images, 84 for colour; l2l: their own "
            "where all are squares).",
            at_least=1,
            at_most=MOST_PIXELS,
        ),
    ] = None
    channels: Annotated[
        int | None,
        Option("folder, csv, l2l: grey or colour (auto: grey where a sample of the images is).", one_of=(1, 3)),
    ] = None
    rotate: Annotated[
        bool | None, Option("One random quarter turn per class and task (auto: on for omniglot's finn split).")
    ] = None
    skip_bad: SkipBad = False


@dataclasses.dataclass(frozen=True)
class EvaluateData(DataSource):
    """Data (auto: the run's)."""

    rotate: Annotated[bool | None, Option("One random quarter turn per class and task (auto: as in the run).")] = None
    skip_bad: SkipBad = False


@dataclasses.dataclass(frozen=True)
class TargetSettings(Group):
    """Target task."""

    data: Annotated[
        str,
        Option(
            "folder:PATH (class folders, with or without train/ val/ test/), csv:FILE (columns path, label and perhaps "
            "part), torchvision:NAME (CIFAR10, MNIST, ..., in --data-root), or glyphs:SCRIPT (a held-out script).",
            metavar="NAME",
        ),
    ] = "glyphs:Hebrew"
    data_root: DataRoot = None
    skip_bad: SkipBad = False
    shots_per_class: Annotated[
        int | None,
        Option(
            "Images per class to train and validate on (auto: 5 of glyphs; all of train/; without parts all, in three "
            "folds).",
            at_least=1,
        ),
    ] = None
