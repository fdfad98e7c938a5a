"""The pictures that an export is checked, measured and calibrated with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from metaft.config import AdaptConfig
from metaft.errors import DataError, MetaftError
from metaft.finetune.classifier import Predictor
from metaft.finetune.examples import Part
from metaft.finetune.journal import read
from metaft.finetune.setup import Setup, digest_of_data, located, rows_of
from metaft.inputs.base import Examples
from metaft.runs.folder import RunFolder
from metaft.runs.recorded import of_run
from metaft.starts.names import in_full
from metaft.targets import Target, load
from metaft.targets.draws import Rows


class Pictures(NamedTuple):
    """Raw, as the classifier takes them."""

    test: Examples
    """To check and measure with."""
    labels: Tensor | None
    """[n] of `test`; None where nobody said."""
    train: Examples
    """To calibrate with."""
    seen: bool
    """Whether the classifier was trained on those of `test`: its data have no test part."""


def of_folder(run: RunFolder, classifier: Predictor, data_root: str | None) -> Pictures:
    """Those of the run's own data, of its first draw. Raises DataError or MetaftError where they are not to be had."""
    target, rows, whole = data_of(run, classifier, data_root)
    train = torch.from_numpy(rows.train)
    test = train if whole else torch.from_numpy(rows.test)
    parts = [Part(target.examples, part) for part in (test, train)]
    return Pictures(parts[0], target.labels[test], parts[1], whole)


def data_of(run: RunFolder, classifier: Predictor, data_root: str | None) -> tuple[Target, Rows, bool]:
    """(the run's own data, the images of its first draw, whether there is none that the classifier has not seen, for
    want of a test part). Raises DataError or MetaftError where they are not to be had, or changed."""
    config = in_full(of_run(AdaptConfig, run.config, "run"))
    if data_root is not None:
        config = dataclasses.replace(config, data_root=data_root)
    header = read(run)[1]
    config = dataclasses.replace(config, target=located(config.target, header["classes"]))
    numbers = not classifier.class_names
    target = load(
        config.target.data, classifier.inputs, skip_bad=config.target.skip_bad, data_root=config.target.data_root,
        numbers=numbers,
    )  # fmt: skip
    if target.class_names != classifier.class_names:
        raise DataError(
            f"data: {target.name} has the classes {list(target.class_names)}, and the classifier of {run.path} "
            f"{list(classifier.class_names)}"
        )
    if digest_of_data(target) != header["data_sha256"]:
        raise DataError(f"data: the images of {target.name} changed since {run.path} began")
    setup = Setup(config, (), target, header.get("folds", 1) == 1)
    return target, rows_of(setup, 0, None if setup.folds > 1 else 0), setup.folds > 1


def of_files(files: Sequence[Path], classifier: Predictor) -> Pictures:
    """Those of files, of which nobody knows the labels. Raises DataError that names those that cannot be read."""
    try:
        raw = classifier.read_all(files)
    except DataError as error:
        raise DataError(f"pictures: {error}") from None
    return Pictures(raw, None, raw, False)


def without_data(error: MetaftError) -> MetaftError:
    """What else there is to do where the run's data are not at hand."""
    return type(error)(f"{error}; or name some pictures that such a model is to label: --pictures IMAGE|FOLDER...")
