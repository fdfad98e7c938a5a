"""Run folders of commit 3f9ae62 are opened, resumed, evaluated, adapted from and used to predict, as it did itself.

`fixtures/make_old_runs.py` made them, and says what was recorded and how.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fixtures import make_old_runs as old
from helpers import SAME_RUN, in_float64, rounded_alike

from metaft import adapt, evaluate, meta_train, predict
from metaft.config import read_toml
from metaft.runs.folder import RunFolder
from metaft.runs.opened import open_run
from metaft.starts.run import from_run

RECORDS: dict[str, Any] = json.loads(old.RECORDS.read_text(encoding="utf-8"))
FLOAT32_RUN = 1e-5
"""What a run in float32 and one in float64 from the middle on may differ by, over the steps of these fixtures: they
differ by up to 2e-6. Adam's moments, or a step, that are lost on the way move the third digit."""

FINETUNED = 1e-4
"""The same where all is float32, for a dozen steps of fine-tuning or inner loop. There is no bound from roundings
alone: Adam may move an entry by the rate wherever the sign of its gradient is one. Kernels for other processors moved
these losses by 2e-6 of themselves. Without the optimiser's moments they move by per cent after a resume."""

MARGIN = 0.05
"""Between the two most probable classes, from which on a label is clear: a hundred times what kernels of other
processors move a probability by."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the old commands ran: runs/, pictures/ and target/. Nobody writes here."""
    place = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(old.ARCHIVE) as archive:
        archive.extractall(place)
    old.write_pictures(place)
    return place


@pytest.fixture
def here(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them that is the working folder, since paths in old run folders are as they were typed."""
    place = tmp_path / "moved"
    shutil.copytree(folders, place)
    monkeypatch.chdir(place)
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    monkeypatch.setattr("metaft.finetune.report.draw_pictures", lambda *_: [])
    return place


@pytest.fixture
def wide() -> Iterator[None]:
    """What the recorded figures of meta-training runs were computed in."""
    with in_float64(), old.float64_files():
        yield


def alike(found: Any, recorded: Any, rel: float = SAME_RUN) -> bool:
    """Whether plain data has all that was recorded, to rounding; it may have more."""
    if isinstance(recorded, dict):
        return all(key in found and alike(found[key], value, rel) for key, value in recorded.items())
    if isinstance(recorded, list):
        return len(found) == len(recorded) and all(alike(*pair, rel) for pair in zip(found, recorded, strict=True))
    return rounded_alike(found, recorded, rel)


def test_the_archive_is_small_and_names_no_place() -> None:
    assert old.ARCHIVE.stat().st_size + old.RECORDS.stat().st_size < 300_000
    with zipfile.ZipFile(old.ARCHIVE) as archive:
        for name in archive.namelist():
            assert not re.search(rb'(?:"|folder:)/\w', archive.read(name)), name


@pytest.mark.parametrize("name", old.META_TRAIN)
def test_meta_training_runs_open_with_the_settings_they_had(folders: Path, name: str) -> None:
    toml = read_toml(folders / "runs" / name / "config.toml")
    for which in ("last", "best"):
        folder, config, snapshot = open_run(folders / "runs" / name, which=which)
        settings = flat(dataclasses.asdict(config))
        assert {key: settings[key] for key in toml} == toml
        assert {f"meta/{key}" for key in snapshot.meta} == {k for k in _names(folder, which) if k.startswith("meta/")}
        if which == "last":
            assert snapshot.position.step == RECORDS["meta_train"][name]["step"]


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as one level of plain data, however they are grouped."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value) if isinstance(value, dict) else {key: list(value) if isinstance(value, tuple) else value}
    return found


def _names(folder: RunFolder, which: str) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder.last if which == "last" else folder.best, "pt") as file:
        return set(file.keys())


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", old.META_TRAIN)
def test_meta_training_runs_go_on_and_come_to_the_figures(here: Path, name: str) -> None:
    run, record = here / "runs" / name, RECORDS["meta_train"][name]
    done = old.rows(run)
    assert done == record["never_stopped"][: len(done)]
    # as they did, before validation measured no more than what the checkpoint is chosen by
    assert meta_train.main(["--resume", f"runs/{name}", "--eval-modes", "both"]) == 0
    assert alike(old.rows(run), record["rows"])
    assert alike(old.rows(run), record["never_stopped"], FLOAT32_RUN)
    assert alike(old.figures(run / "result.json"), record["test"])


@pytest.mark.usefixtures("wide", "here")
@pytest.mark.parametrize("which", ["last", "best"])
@pytest.mark.parametrize("name", old.META_TRAIN)
def test_evaluation_gives_the_same_figures(name: str, which: str) -> None:
    _, command, *words = ["", *old.evaluate_words(name, which, "test.json")]
    assert command == "evaluate"
    assert evaluate.main(words) == 0
    assert alike(old.figures(Path("test.json")), RECORDS["meta_train"][name]["evaluate"][which])


@pytest.mark.parametrize("name", ["adapt-finetune", "adapt-inner"])
def test_adapting_from_an_old_run_comes_to_the_figures(here: Path, name: str) -> None:
    _, settings = old.ADAPT[name]
    assert adapt.main([*settings.split(), "--no-probe", "--device", "cpu", "--out", "runs/again"]) == 0
    compare_adapted(here / "runs" / "again", RECORDS["adapt"][name])


def test_adapt_runs_go_on_from_the_middle(here: Path) -> None:
    run = here / "runs" / "adapt-stopped"
    begun = len(old.rows(run))
    assert 0 < begun < len(RECORDS["adapt"]["adapt-stopped"]["rows"])
    assert adapt.main(["--resume", "runs/adapt-stopped"]) == 0
    compare_adapted(run, RECORDS["adapt"]["adapt-stopped"])


def compare_adapted(run: Path, record: Any) -> None:
    assert alike(old.rows(run), record["rows"], FINETUNED)
    fits = old.adapted(run)
    assert [fit["start"] for fit in fits] == [fit["start"] for fit in record["fits"]]
    for fit, before in zip(fits, record["fits"], strict=True):
        assert fit["accuracy"] == pytest.approx(before["accuracy"], abs=0.01)


@pytest.mark.parametrize("name", ["adapt-finetune", "adapt-inner"])
def test_old_classifiers_predict_the_same_labels(here: Path, name: str) -> None:
    assert predict.main([f"runs/{name}", "target/test", "--top", "2", "--csv", "labels.csv"]) == 0
    found, recorded = old.labels(here / "labels.csv"), RECORDS["predict"][name]
    assert [line["file"] for line in found] == [line["file"] for line in recorded]
    clear = 0
    for line, before in zip(found, recorded, strict=True):
        assert line["probabilities"] == pytest.approx(before["probabilities"], abs=MARGIN / 100)
        if before["probabilities"][0] - before["probabilities"][1] > MARGIN:
            clear += 1
            assert line["labels"][0] == before["labels"][0]
    assert clear >= len(recorded) // 2


def test_old_runs_are_starts_with_all_their_parameters(folders: Path) -> None:
    for name in ("glyphs-conv4", "folder-conv4-pool"):
        start = from_run(folders / "runs" / name)
        _, _, snapshot = open_run(folders / "runs" / name)
        assert start.meta is not None
        assert start.meta.keys() == snapshot.meta.keys()
        assert start.architecture["width"] == 4
