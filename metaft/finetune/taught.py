"""What the teacher of a fit has seen of the images that test it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from metaft.config import AdaptConfig
from metaft.errors import MetaftError
from metaft.finetune import extras
from metaft.finetune.journal import read
from metaft.finetune.setup import Setup, digest_of_data, rows_of
from metaft.runs.folder import RunFolder
from metaft.runs.recorded import of_run
from metaft.starts.names import in_full


def seen_by_teachers(setup: Setup) -> list[str]:
    """A note on each teacher that may know images by which its students are judged: what it says of them is then
    better than it would say of new ones."""
    recipe = setup.config.recipe
    runs = [extra.run for extra in extras.all_named(() if recipe is None else recipe.extra)]
    return [note for run in runs if run is not None and (note := _note(setup, run))]


def _note(setup: Setup, run: Path) -> str:
    target = setup.target
    try:
        folder = RunFolder.open(run)
        header = read(folder)[1]
        config = in_full(of_run(AdaptConfig, folder.config, "extra"))
    except MetaftError:  # its classifier's file alone, say
        return f"the teacher {run} does not say what it was trained on: if it knows test images, figures are too good"
    if header["data_sha256"] != digest_of_data(target):
        return f"the teacher {run} was trained on other data ({header['data']}), which were not compared with the test"
    teacher = Setup(config, (), target, header.get("folds", 1) == 1)
    rows = rows_of(teacher, 0, None if teacher.folds > 1 else 0)  # of the fit whose classifier it is
    known = target.groups[np.concatenate([rows.train, rows.val])]
    tests = [rows_of(setup, draw, fold).test for draw in range(setup.config.draws.seeds) for fold in range(setup.folds)]
    seen = sum(int(np.isin(target.groups[test], known).sum()) for test in tests)
    if not seen:
        return ""
    return (
        f"the teacher {run} was trained on {seen} of the {sum(map(len, tests))} images that test its students, over "
        "all draws and folds: their figures are too good"
    )
