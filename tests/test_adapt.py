"""Fine-tuning as a user runs it: what it starts from, what it leaves, what its figures mean, and how it ends."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from helpers import (
    ADAPT,
    IMAGES,
    TARGET,
    adapted,
    file_size_limit,
    files_of,
    finished,
    inner_words,
    meta_trained,
    one_line,
    one_thread,
    options,
    pixels_of,
    same,
    sinusoid,
    timeless,
    words,
    write_folder,
    write_target,
)
from PIL import Image
from torch import Tensor, nn

import metaft
from metaft import adapt, checkpoint, meta_train, models
from metaft.__main__ import main as command_line
from metaft.algorithms import ALGORITHMS, hyper_parameters
from metaft.config import AdaptConfig, read_toml
from metaft.errors import MetaftError, MetaftWarning
from metaft.finetune import report, study, target
from metaft.finetune.classifier import Classifier
from metaft.finetune.scores import mean_t95
from metaft.models.stored import StoredNorm
from metaft.run import RunFolder, read_rows
from metaft.tasks.pool import Preprocessing
from metaft.training import load_snapshot
from metaft.types import Fast, Params

Text = pytest.CaptureFixture[str]

OWN: dict[str, dict[str, Any]] = {
    "maml": {"inner_lr": 0.3, "test_inner_steps": 2},
    "fomaml": {"inner_lr": 0.2, "inner_optimizer": "nesterov", "adapt_norm": False, "test_inner_steps": 4},
    "anil": {"inner_lr": 0.3, "inner_augment": "shift", "test_inner_steps": 2},
    "boil": {"inner_lr": 0.3, "adapt_norm": False, "test_inner_steps": 2},
    "meta-sgd": {"inner_lr": 0.2, "test_inner_steps": 2},
    "maml++": {"inner_lr": 0.3, "inner_steps": 2, "test_inner_steps": 3},
    "meta-curvature": {"inner_lr": 0.2, "test_inner_steps": 2},
    "reptile": {"inner_lr": 0.01, "inner_steps": 3, "test_inner_steps": 3},
    "imaml": {"inner_lr": 0.1, "inner_steps": 3, "test_inner_steps": 2},
    "cavia": {"test_inner_steps": 2},
    "unicorn-maml": {"inner_lr": 0.3, "inner_steps": 2, "test_inner_steps": 2},
    "proto-maml": {"inner_lr": 0.05, "test_inner_steps": 2},
    "protonet": {},
    "matching-net": {},
    "baseline": {"inner_lr": 0.3, "test_inner_steps": 20},
    "baseline++": {"inner_lr": 0.3, "test_inner_steps": 20},
}
"""Settings of the runs that are no algorithm's defaults."""

GREY = Preprocessing(1, 8, 8)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest of a small run."""
    monkeypatch.setattr("metaft.report.draw_pictures", lambda *_: [])
    monkeypatch.setattr(report, "draw_pictures", lambda *_: [])


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, squares: Path) -> dict[str, Path]:
    """Finished meta-training runs: one per algorithm, one on colour images, one that takes no images."""
    base = tmp_path_factory.mktemp("runs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetaftWarning)  # of iMAML, whose default is not made for eight pixels
        made = {name: meta_trained(base / name, squares, algorithm=name, **OWN[name]) for name in ALGORITHMS}
    made["colour"] = meta_trained(base / "colour", squares, channels=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.report.draw_pictures", lambda *_: [])
        meta_train.run(sinusoid(base / "curve"))
    return {**made, "curve": base / "curve"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of each of three classes to train and validate on; six, three and six to test."""
    path = write_target(tmp_path_factory.mktemp("data") / "Ziel ü", {"train": 10, "test": 6})
    for file in sorted((path / "test" / TARGET[1]).iterdir())[:3]:
        file.unlink()
    return path


def result_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Path], data: Path) -> Path:
    """A finished run over three draws of eight images each. Tests copy it before they change it."""
    return finished(words(runs["maml"], data, tmp_path_factory.mktemp("runs") / "läuft", shots_per_class=8, seeds=3))


@pytest.fixture
def copy(tmp_path: Path, done: Path) -> Path:
    """A finished run of one's own to break."""
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one fit was given, and what it made of it."""

    body: Params
    images: Tensor
    labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    recipe: Any
    fitted: Any


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Fills up with the fits of a run while it goes."""
    seen: list[Seen] = []
    real = study.fit

    def fit(body: nn.Module, preprocessing: Any, images: Tensor, labels: Tensor, n: int, recipe: Any, **k: Any) -> Any:
        before = {name: p.detach().clone() for name, p in body.named_parameters()}
        fitted = real(body, preprocessing, images, labels, n, recipe, **k)
        seen.append(Seen(before, images, labels, k["val_images"], k["val_labels"], recipe, fitted))
        return fitted

    monkeypatch.setattr(study, "fit", fit)
    return seen


def each(images: Tensor) -> set[bytes]:
    return {one.numpy().tobytes() for one in images}


def learned(run: Path) -> Params:
    """What a meta-training run learned, as its best checkpoint holds it."""
    return load_snapshot(run / "checkpoints/best.safetensors").meta


# ---- what it starts from ------------------------------------------------------------------------------------------


def put(run: Path, place: Path, age: float) -> None:
    """A copy of a run in a folder of runs, whose best checkpoint is so many seconds old."""
    shutil.copytree(run, place)
    now = time.time() - age
    os.utime(place / "checkpoints/best.safetensors", (now, now))


def test_the_newest_run_that_fits_is_taken(in_tmp: Path, runs: dict[str, Path], data: Path, capsys: Text) -> None:
    for name, age in (("fomaml", 300), ("protonet", 100), ("maml", 200), ("curve", 50)):
        put(runs[name], in_tmp / "runs" / name, age)
    put(runs["maml"], in_tmp / "runs/unfinished", 10)
    (in_tmp / "runs/unfinished/checkpoints/best.safetensors").unlink()
    put(runs["maml"], in_tmp / "runs/damaged", 10)
    (in_tmp / "runs/damaged/checkpoints/best.safetensors").write_bytes(b"nothing")
    (in_tmp / "runs/empty").mkdir()
    (in_tmp / "runs/note.txt").write_text("")
    argv = [word for word in words(runs["maml"], data, in_tmp / "o") if word not in ("--init", str(runs["maml"]))]
    assert adapt.main([*argv, "--epochs", "1"]) == 0
    assert "init: runs/protonet, the newest run that fits\n" in capsys.readouterr().err
    newest = str(in_tmp / "runs/protonet")  # in full, so that it can be opened from elsewhere
    assert result_of(in_tmp / "o")["init"] == read_toml(in_tmp / "o/config.toml")["init"] == newest
    put(runs["colour"], in_tmp / "runs/colour", 0)  # grey images can be made colour ones, not the other way round
    assert adapt.newest_run([1, 8, 8], any_size=True) == Path("runs/colour")
    assert adapt.newest_run([1, 8, 8], any_size=False) == Path("runs/protonet")
    assert adapt.newest_run([3, 50, 50], any_size=True) == Path("runs/colour")
    with pytest.raises(MetaftError, match=r"no run in runs/ takes images of shape \[3, 50, 50\]"):
        adapt.newest_run([3, 50, 50], any_size=False)


def test_adapt_runs_are_no_initialisations(in_tmp: Path, runs: dict[str, Path], data: Path, done: Path) -> None:
    put(runs["maml"], in_tmp / "runs/old", 10)
    shutil.copytree(done, in_tmp / "runs/adapted")
    assert adapt.newest_run([1, 8, 8], any_size=True) == Path("runs/old")


@pytest.mark.parametrize("init", ["auto", "named"])
def test_a_run_on_inputs_of_another_kind_is_refused_with_both_shapes(
    init: str, in_tmp: Path, runs: dict[str, Path], capsys: Text
) -> None:
    put(runs["curve"], in_tmp / "runs/curve", 0)
    assert adapt.main([] if init == "auto" else ["--init", "runs/curve"]) == 2
    one_line(capsys, "init: ", "runs/curve", "[1]", "[1, 28, 28]")
    assert os.listdir(in_tmp / "runs") == ["curve"]


def test_without_any_run_it_says_how_to_make_one(in_tmp: Path, capsys: Text) -> None:
    assert adapt.main([]) == 2
    one_line(capsys, "init: no run in runs/ ", "[1, 28, 28]", "python -m metaft.meta_train", "--init none")
    assert list(in_tmp.iterdir()) == []


def test_both_starts_share_all_but_the_backbones_parameters(
    runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen]
) -> None:
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", seed=6, augment="basic", lr=1e-30, epochs=1)) == 0
    start, random = fits
    assert start.recipe == random.recipe
    for field in ("images", "labels", "val_images", "val_labels"):
        assert torch.equal(getattr(start, field), getattr(random, field)), field
    meta = learned(runs["maml"])
    assert same(start.body, {k: v for k, v in meta.items() if not k.startswith("head.")})
    fresh = models.build("conv4", ways=3, shape=(1, 8, 8), width=4, seed=6).params
    assert same(random.body, {k: v for k, v in fresh.items() if not k.startswith("head.")})
    assert not torch.equal(random.body["blocks.0.weight"], start.body["blocks.0.weight"])
    # At this rate nothing has moved but the zeros.
    assert torch.equal(start.fitted.head.weight, random.fitted.head.weight)
    assert same(dict(start.fitted.body.named_parameters()), start.body)
    assert start.fitted.head.weight.shape == meta["head.weight"].shape
    assert not torch.equal(start.fitted.head.weight, meta["head.weight"]), "the head is to be a fresh one"


def test_the_random_start_knows_nothing_of_the_run(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    results = []
    for init in ("maml", "fomaml"):
        assert adapt.main(words(runs[init], data, tmp_path / init)) == 0
        results.append(result_of(tmp_path / init))
    a, b = results
    assert timeless(a["scratch"]) == timeless(b["scratch"])
    rows = [read_rows(tmp_path / init / "metrics.jsonl") for init in ("maml", "fomaml")]
    random, first = ([[r for r in some if (r["start"] == "random") is want] for some in rows] for want in (True, False))
    assert random[0] == random[1]
    assert first[0] != first[1]


def test_from_none_there_is_a_random_start_alone(
    runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen], capsys: Text
) -> None:
    out = tmp_path / "o"
    config = AdaptConfig(**{**ADAPT, "init": "none", "data": f"folder:{data}", "out": str(out), "seed": 3})
    result = adapt.run(dataclasses.replace(config, epochs=1))
    assert (result["init"], result["scratch"], result["gain"], result["init_about"]) == ("none", None, None, {})
    assert len(fits) == 1
    fresh = models.build("conv4", ways=2, shape=(1, 28, 28), width=64, seed=3).params
    assert same(fits[0].body, {k: v for k, v in fresh.items() if not k.startswith("head.")})
    said = capsys.readouterr().out
    assert "random start" in said
    assert "meta-learned" not in said
    assert metaft.load(out).preprocessing == Preprocessing(1, 28, 28, polarity="bright-on-black")
    assert result["notes"] == ["images were fitted to the run's: resized from 8x8 to 28x28"]


# ---- fine-tuning --------------------------------------------------------------------------------------------------


def test_the_settings_reach_the_fit(runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen]) -> None:
    given = {"lr": 0.01, "epochs": 2, "batch_size": 9, "head": "cosine", "freeze": "backbone", "augment": "basic"}
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", seed=4, patience=7, **given)) == 0
    for seen in fits:
        assert dataclasses.asdict(seen.recipe) == {**given, "patience": 7, "seed": 4}
    assert {k: result_of(tmp_path / "o")[k] for k in given} == given


def test_what_is_left_open_is_written_down(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    settings = {"init": runs["maml"], "data": f"folder:{data}", "device": "cpu", "out": tmp_path / "o"}
    assert adapt.main(options(settings)) == 0
    config = read_toml(tmp_path / "o/config.toml")
    assert config == {
        "init": str(runs["maml"]),
        "data": f"folder:{data}",
        "method": "finetune",
        "seed": 0,
        "seeds": 1,
        "device": "cpu",
        "epochs": 40,
        "patience": 10,
        "lr": 0.003,
        "batch_size": 32,
        "head": "linear",
        "freeze": "none",
        "augment": "none",
    }


def test_the_validation_part_is_stratified_and_apart(
    runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen], capsys: Text
) -> None:
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", epochs=1)) == 0
    result = result_of(tmp_path / "o")
    train, _ = files_of(data / "train")
    test, _ = files_of(data / "test")
    for seen in fits:
        assert torch.bincount(seen.labels).tolist() == [8, 8, 8]
        assert torch.bincount(seen.val_labels).tolist() == [2, 2, 2]
        assert each(seen.images) | each(seen.val_images) == each(pixels_of(train))
        assert len(each(seen.images)) + len(each(seen.val_images)) == len(train)
        assert not (each(seen.images) | each(seen.val_images)) & each(pixels_of(test))
    assert [result[f"{part}_images"] for part in ("train", "val", "test")] == [24, 6, 15]
    assert (result["train_images_per_class"], result["val_images_per_class"]) == (8, 2)
    assert result["notes"] == []
    assert "\nWith 8 images per class to train on and 2 to validate, " in capsys.readouterr().out


def test_a_val_folder_is_the_validation_part(
    runs: dict[str, Path], tmp_path: Path, fits: list[Seen], capsys: Text
) -> None:
    data = write_target(tmp_path / "d", {"train": 12, "val": 1, "test": 2})
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", epochs=1)) == 0
    assert each(fits[0].images) == each(pixels_of(files_of(data / "train")[0]))
    assert each(fits[0].val_images) == each(pixels_of(files_of(data / "val")[0]))
    result = result_of(tmp_path / "o")
    assert [result[f"{part}_images"] for part in ("train", "val", "test")] == [36, 3, 6]
    assert (result["train_images_per_class"], result["val_images_per_class"]) == (12, 1)
    assert "\nWith 12 images per class to train on and 1 to validate, " in capsys.readouterr().out


def test_with_few_images_all_of_them_train_for_the_fixed_epochs_and_a_note_says_so(
    runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen], capsys: Text
) -> None:
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", shots_per_class=9, patience=1, lr=0.3, epochs=6)) == 0
    result = result_of(tmp_path / "o")
    assert [result[f"{part}_images"] for part in ("train", "val", "test")] == [27, 0, 15]
    assert (result["epochs_run"], result["kept_epoch"]) == (6, 6)
    (note,) = result["notes"]
    assert re.search(r"fewer than 10 images .* none .* validation: all images train, for the fixed 6 epochs$", note)
    assert f"note: {note}\n" in capsys.readouterr().out
    assert [len(seen.val_images) for seen in fits] == [0, 0]
    assert not any("val_loss" in row for row in read_rows(tmp_path / "o/metrics.jsonl"))


def test_it_stops_early_and_keeps_the_best_epoch(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", epochs=60, patience=2, lr=0.1)) == 0
    result, rows = result_of(tmp_path / "o"), read_rows(tmp_path / "o/metrics.jsonl")
    for start, figures in (("meta-learned", {**result, "epochs": result["epochs_run"]}), ("random", result["scratch"])):
        losses = [row["val_loss"] for row in rows if row["start"] == start]
        assert figures["epochs"] == len(losses) < 60
        assert figures["kept_epoch"] == 1 + int(np.argmin(losses)) == len(losses) - 2
    kept = [row["val_loss"] for row in rows if row["start"] == "meta-learned"][result["kept_epoch"] - 1]
    val = target_rows(data, runs, tmp_path / "o").val
    files, labels = files_of(data)
    logits = metaft.load(tmp_path / "o")(pixels_of([files[i] for i in val])).detach()
    assert float(F.cross_entropy(logits, torch.from_numpy(labels[val]))) == pytest.approx(kept, abs=1e-5)


def target_rows(data: Path, runs: dict[str, Path], out: Path) -> Any:
    """The parts of the first draw of a run, as numbers into `files_of(data)`."""
    config = AdaptConfig(**read_toml(out / "config.toml"))
    found = target.load(config.data, Preprocessing(1, 8, 8, polarity="bright-on-black"))
    places = {str(file): i for i, file in enumerate(files_of(data)[0])}
    rows = study.rows_of(found, config, 0)
    return types.SimpleNamespace(
        **{part: np.array([places[found.files[i]] for i in getattr(rows, part)], np.int64) for part in rows._fields}
    )


def test_the_runs_own_preprocessing_and_what_was_changed(
    runs: dict[str, Path], tmp_path: Path, fits: list[Seen]
) -> None:
    bright = write_target(tmp_path / "bright", {"train": 4, "test": 2})
    dark = write_target(tmp_path / "dark", {"train": 4, "test": 2}, dark=True)
    large = write_target(tmp_path / "large", {"train": 4, "test": 2}, side=12, dark=True)
    notes = {}
    for data in (bright, dark, large):
        assert adapt.main(words(runs["maml"], data, tmp_path / f"{data.name}-run", epochs=1)) == 0
        notes[data.name] = result_of(tmp_path / f"{data.name}-run")["notes"][:-1]  # the last is on validation
    turned = "dark on bright to bright on black"
    assert notes == {
        "bright": [],
        "dark": [f"images were fitted to the run's: {turned}"],
        "large": [f"images were fitted to the run's: resized from 12x12 to 8x8, {turned}"],
    }
    assert torch.equal(fits[0].images, fits[2].images)
    assert torch.equal(fits[0].images, pixels_of(files_of(bright / "train")[0]))
    first = Image.open(files_of(large / "train")[0][0])
    resized = 255 - np.asarray(first.resize((8, 8), Image.Resampling.LANCZOS))
    assert np.array_equal(fits[4].images[0, 0].numpy(), resized)
    tensors = [checkpoint.load(tmp_path / f"{name}-run/classifier.safetensors") for name in ("bright", "dark")]
    assert same(tensors[0][0], tensors[1][0])
    assert [header["invert"] for _, header in tensors] == [False, True]


def recolour(file: Path) -> None:
    """Make a grey picture a red one."""
    grey = np.asarray(Image.open(file).convert("L"))
    Image.fromarray(np.stack([grey, grey // 2, grey // 2], -1)).save(file)


def test_a_few_images_in_colour_are_not_overlooked(runs: dict[str, Path], tmp_path: Path, capsys: Text) -> None:
    """Those that a sample of 64 in 130 * 3 images would miss."""
    data = write_target(tmp_path / "d", {".": 130})
    odd = [data / TARGET[0] / "01.png", data / TARGET[1] / "04.png"]
    for file in odd:
        recolour(file)
    assert adapt.main(words(runs["maml"], data, tmp_path / "o")) == 2
    part = f"data: 2 of the 390 images of {data} are in colour, [3, 8, 8], such as {odd[0]}, but the run takes grey"
    one_line(capsys, part, "[1, 8, 8]")
    assert target.shape_of(f"folder:{data}") == ([3, 84, 84], True)
    made = target.load(f"folder:{data}")
    assert made.images.shape == (390, 3, 84, 84)
    assert made.changes == ("resized from 8x8 to 84x84", "388 of 390 from grey to colour")
    Image.open(odd[0]).resize((9, 9)).save(odd[0])
    assert target.load(f"folder:{data}").changes[0] == "resized from several sizes to 84x84"


def test_training_images_alone_decide_the_polarity(runs: dict[str, Path], tmp_path: Path, capsys: Text) -> None:
    data = write_target(tmp_path / "d", {"train": 2})
    write_target(tmp_path / "d", {"test": 9}, dark=True)
    made = target.load(f"folder:{data}", Preprocessing(1, 8, 8, polarity="bright-on-black"))
    assert (made.invert, made.changes, made.notes) == (False, (), ())
    assert torch.equal(made.images, pixels_of(list(map(Path, made.files))))


@pytest.mark.parametrize("dark", [False, True])
def test_classes_of_the_other_polarity_are_named(dark: bool, runs: dict[str, Path], tmp_path: Path) -> None:
    data = write_target(tmp_path / "d", {"train": 3, "test": 2}, dark=dark)
    for file in (data / "train" / TARGET[1]).iterdir():
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", epochs=1)) == 0
    ways = ("bright on dark", "dark on bright")
    note = f"{TARGET[1]}: {ways[not dark]}, but read as {ways[dark]}, as the other classes are"
    assert note in result_of(tmp_path / "o")["notes"]


def test_test_images_that_are_training_images_are_counted(runs: dict[str, Path], tmp_path: Path, capsys: Text) -> None:
    data = write_target(tmp_path / "d", {"train": 5, "test": 3})
    for number in (0, 2):
        shutil.copy(data / "train" / TARGET[0] / f"0{number}.png", data / "test" / TARGET[2] / f"0{number}.png")
    note = "of the 9 test images are also training images, to the pixel"
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", epochs=1)) == 0
    assert f"note: 2 {note}\n" in capsys.readouterr().out
    assert f"2 {note}" in result_of(tmp_path / "o")["notes"]


def test_pictures_that_nobody_looks_for_are_named(runs: dict[str, Path], tmp_path: Path) -> None:
    data = write_target(tmp_path / "d", {"train": 3, "test": 2, "banana": 1})
    write_target(data / "train" / TARGET[0], {".": 1}, classes=("more",))
    (data / "notes").mkdir()
    (data / "test" / TARGET[1] / "empty").mkdir()
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", epochs=1)) == 0
    assert result_of(tmp_path / "o")["notes"][:2] == [
        f"ignored beside train/ and test/: {data}/banana",
        f"ignored, since they are inside class folders: {data}/train/{TARGET[0]}/more",
    ]


def locked(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Have folders that nobody may list; permissions would not stop a superuser."""
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if Path(path) in folders:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


@pytest.mark.parametrize("place", [".", "train", f"train/{TARGET[1]}"])
def test_a_locked_folder_is_one_line(
    place: str, runs: dict[str, Path], data: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    locked(monkeypatch, data / place)
    assert adapt.main(words(runs["maml"], data, in_tmp / "o")) == 2
    one_line(capsys, f"data: folder {data / place} cannot be read (Permission denied)")


def test_grey_images_for_a_run_on_colour(runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen]) -> None:
    assert adapt.main(words(runs["colour"], data, tmp_path / "o", epochs=1)) == 0
    assert result_of(tmp_path / "o")["notes"] == ["images were fitted to the run's: grey to colour"]
    assert fits[0].images.shape == (24, 3, 8, 8)
    assert metaft.load(tmp_path / "o").preprocessing.std == (0.229, 0.224, 0.225)


# ---- the run's own inner loop -------------------------------------------------------------------------------------


def meta_test(name: str, meta: Params, x: Tensor, y: Tensor, *, ways: int, steps: int) -> tuple[Any, Fast]:
    """The algorithm over a model of its own, adapted to one task as in the meta-test."""
    model = models.build("conv4", ways=ways, shape=(1, 8, 8), width=4, seed=99)
    hyper = {k: v for k, v in OWN[name].items() if k != "test_inner_steps"}
    algorithm = ALGORITHMS[name](model, **hyper)
    return algorithm, algorithm.adapt(meta, {}, x, y, torch.tensor(0), ways=ways, steps=steps)


def support_and_test(data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """What the files of train/ and test/ are to a run, read without its code."""
    (train, labels), (test, _) = files_of(data / "train"), files_of(data / "test")
    x, query = (GREY.normalise(pixels_of(files)) for files in (train, test))
    return x, torch.from_numpy(labels), query


def parts_of(fast: Fast) -> tuple[Params, Params]:
    """The parameters of the backbone and of the head of a classifier that holds these fast weights."""
    body = {k: v for k, v in fast.params.items() if not k.startswith("head.")}
    head = {k.removeprefix("head."): v for k, v in fast.params.items() if k.startswith("head.")}
    learned = {"prototypes": "points", "support": "support"}
    return body, {learned[k]: v for k, v in fast.extra.items() if k in learned} if fast.extra else head


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_inner_loop_is_that_of_the_meta_test_to_the_bit(
    name: str, runs: dict[str, Path], data: Path, tmp_path: Path, capsys: Text
) -> None:
    assert adapt.main(inner_words(runs[name], data, tmp_path / "o")) == 0
    steps = OWN[name].get("test_inner_steps", 0)
    x, y, query = support_and_test(data)
    algorithm, fast = meta_test(name, learned(runs[name]), x, y, ways=3, steps=steps)
    made = metaft.load(tmp_path / "o")
    body, head = parts_of(fast)
    assert same(dict(made.body.named_parameters()), body)
    assert same(dict(made.head.named_parameters()), head)
    layers = [layer for layer in made.body.modules() if isinstance(layer, StoredNorm)]
    for layer, (mean, var) in zip(layers, fast.moments, strict=True):
        assert torch.equal(layer.mean, mean)
        assert torch.equal(layer.var, var)
    files, labels = files_of(data / "test")
    logits = made(pixels_of(files)).detach()
    torch.testing.assert_close(logits, algorithm.predict(fast, query, "inductive"), rtol=1e-5, atol=1e-5)
    assert (logits - algorithm.predict(fast, query, "transductive")).abs().max() > 1e-3
    result = result_of(tmp_path / "o")
    assert result["accuracy"] == float((logits.argmax(-1).numpy() == labels).mean())
    assert (result["method"], result["inner_steps"], result["epochs_run"], result["notes"]) == (
        *("inner", steps, steps),
        [],
    )
    assert [result[f"{part}_images"] for part in ("train", "val", "test")] == [30, 0, 15]
    assert f"adapted by {steps} steps of the run's own inner loop" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_losses_along_the_inner_loop(name: str, runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    steps = 3 if "inner_lr" in hyper_parameters(name) else 0
    given = {"inner_steps": steps} if steps else {}
    assert adapt.main(inner_words(runs[name], data, tmp_path / "o", **given)) == 0
    rows = [row for row in read_rows(tmp_path / "o/metrics.jsonl") if row["start"] == "meta-learned"]
    x, y, _ = support_and_test(data)
    expected = []
    for step in range(steps + 1):
        algorithm, fast = meta_test(name, learned(runs[name]), x, y, ways=3, steps=step)
        expected.append(float(F.cross_entropy(algorithm.predict(fast, x, "transductive"), y)))
    assert [row["epoch"] for row in rows] == list(range(steps + 1))
    assert [row["loss"] for row in rows] == pytest.approx(expected, abs=1e-6)
    assert result_of(tmp_path / "o")["inner_steps"] == steps


@pytest.mark.parametrize("name", ["maml", "fomaml", "anil", "meta-sgd", "maml++", "meta-curvature"])
@pytest.mark.parametrize("classes", [2, 5])
def test_with_another_number_of_classes_each_starts_from_the_mean_head_row(
    name: str, classes: int, runs: dict[str, Path], tmp_path: Path
) -> None:
    data = write_target(tmp_path / "d", {"train": 3, "test": 2}, classes="abcde"[:classes])
    meta = learned(runs[name])
    rows = {k: v.double().numpy().mean(0) for k, v in meta.items() if k.startswith("head.") and len(v) == 3}
    assert np.abs(rows["head.weight"] - meta["head.weight"][0].numpy()).max() > 0.01
    assert adapt.main(inner_words(runs[name], data, tmp_path / "0", inner_steps=0)) == 0
    start = dict(metaft.load(tmp_path / "0").head.named_parameters())
    for part in (k for k in rows if k in ("head.weight", "head.bias")):
        row = rows[part]
        found = start[part.removeprefix("head.")].detach().numpy()
        assert found.shape == (classes, *row.shape)
        for own in found:
            np.testing.assert_allclose(own, row, rtol=0, atol=1e-7)
    assert adapt.main(inner_words(runs[name], data, tmp_path / "2", inner_steps=2)) == 0
    whole = meta | {k: torch.from_numpy(np.stack([row] * classes)).float() for k, row in rows.items()}
    x, y, query = support_and_test(data)
    algorithm, fast = meta_test(name, whole, x, y, ways=classes, steps=2)
    made = metaft.load(tmp_path / "2")
    for part, expected in parts_of(fast)[1].items():
        torch.testing.assert_close(made.head.get_parameter(part).detach(), expected, rtol=0, atol=1e-5)
    logits = made(pixels_of(files_of(data / "test")[0]))
    torch.testing.assert_close(logits.detach(), algorithm.predict(fast, query, "inductive"), rtol=0, atol=1e-4)
    (note,) = result_of(tmp_path / "2")["notes"]
    assert note == f"the run learned 3-way tasks: each of the {classes} classes starts from its mean head row"


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_moments_that_reptile_kept_of_head_rows_are_the_mean_ones_too(
    optimizer: str, squares: Path, tmp_path: Path
) -> None:
    hyper: dict[str, Any] = {"inner_lr": 0.01, "inner_steps": 3, "inner_optimizer": optimizer}
    run = meta_trained(tmp_path / "r", squares, algorithm="reptile", hyper="keep_moments=true", **hyper)
    data = write_target(tmp_path / "d", {"train": 3, "test": 2}, classes="abcde")
    assert adapt.main(inner_words(run, data, tmp_path / "o", inner_steps=2)) == 0
    snapshot = load_snapshot(run / "checkpoints/best.safetensors")
    kept = {k: v for k, v in snapshot.state.items() if k.startswith("head.")}
    assert kept and all(len(v) == 3 and bool((v != v[0]).any()) for v in kept.values())

    def five(tensors: Params) -> Params:
        return {k: torch.stack([v.mean(0)] * 5) if k.startswith("head.") else v for k, v in tensors.items()}

    model = models.build("conv4", ways=5, shape=(1, 8, 8), width=4, seed=99)
    algorithm = ALGORITHMS["reptile"](model, keep_moments=True, **hyper)
    x, y, _ = support_and_test(data)
    meta, state = five(snapshot.meta), five(snapshot.state)
    fast = algorithm.adapt(meta, state, x, y, torch.tensor(0), ways=5, steps=2)
    made = metaft.load(tmp_path / "o")
    for part, expected in parts_of(fast)[1].items():
        torch.testing.assert_close(made.head.get_parameter(part).detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["boil", "cavia"])
def test_a_head_that_stays_as_it_is_cannot_learn_another_number_of_classes(
    name: str, runs: dict[str, Path], data: Path, tmp_path: Path, capsys: Text
) -> None:
    other = write_target(tmp_path / "d", {"train": 3, "test": 2}, classes="abcde")
    assert adapt.main(inner_words(runs[name], other, tmp_path / "o")) == 2
    message = f"{name} keeps the head of its 3-way tasks as it is, so its inner loop cannot learn the 5 classes"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert adapt.main(words(runs[name], other, tmp_path / "o", epochs=1)) == 0


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"maml", "fomaml", "protonet"}))
def test_every_run_is_fine_tuned_from_its_backbone(
    name: str, runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen]
) -> None:
    assert adapt.main(words(runs[name], data, tmp_path / "o", epochs=1)) == 0
    assert fits[0].body
    assert same(fits[0].body, {k: learned(runs[name])[k] for k in fits[0].body})


@pytest.mark.parametrize("name", ["proto-maml", "unicorn-maml", "protonet", "matching-net", "baseline", "baseline++"])
def test_members_without_a_learned_head_need_no_head_rows(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    steps = 5 if "inner_lr" in hyper_parameters(name) else 0
    data = write_target(tmp_path / "d", {"train": 3, "test": 2}, classes="abcde")
    assert adapt.main(inner_words(runs[name], data, tmp_path / "o", **({"inner_steps": steps} if steps else {}))) == 0
    assert result_of(tmp_path / "o")["notes"] == []
    x, y, query = support_and_test(data)
    algorithm, fast = meta_test(name, learned(runs[name]), x, y, ways=5, steps=steps)
    logits = metaft.load(tmp_path / "o")(pixels_of(files_of(data / "test")[0]))
    torch.testing.assert_close(logits.detach(), algorithm.predict(fast, query, "inductive"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_random_start_of_the_inner_loop_is_the_algorithms_own_initialisation(
    name: str, runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = study.inner
    monkeypatch.setattr(study, "inner", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    assert adapt.main(inner_words(runs[name], data, tmp_path / "o", seed=8)) == 0
    fresh = models.build("conv4", ways=3, shape=(1, 8, 8), width=4, seed=8).params
    own = {k: v for k, v in OWN[name].items() if k != "test_inner_steps"}
    first, _ = ALGORITHMS[name](models.build("conv4", ways=3, shape=(1, 8, 8), width=4, seed=99), **own).init(8)
    assert first.keys() == learned(runs[name]).keys()
    fresh = {k: fresh[k][: len(v)] if k in fresh else v for k, v in first.items()}
    x, y, _ = support_and_test(data)
    _, fast = meta_test(name, fresh, x, y, ways=3, steps=OWN[name].get("test_inner_steps", 0))
    body, head = parts_of(fast)
    assert len(made) == 2
    assert same(dict(made[1].body.named_parameters()), body)
    assert same(dict(made[1].head.named_parameters()), head)


# ---- figures ------------------------------------------------------------------------------------------------------


MACRO = ("accuracy", "macro_precision", "macro_recall", "macro_f1")


def figures(labels: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, Any]:
    """Confusion, precision, recall and F1 from their definitions."""
    confusion = np.zeros((classes, classes), int)
    for true, found in zip(labels, predicted, strict=True):
        confusion[true, found] += 1
    per_class = []
    for c in range(classes):
        right, called, there = confusion[c, c], confusion[:, c].sum(), confusion[c].sum()
        per_class.append((there, right / called if called else 0.0, right / there, 2 * right / (called + there)))
    macro = np.mean([row[1:] for row in per_class], axis=0)
    accuracy = np.trace(confusion) / len(labels)
    return {
        "confusion": confusion.tolist(),
        "per_class": per_class,
        **dict(zip(MACRO, (accuracy, *macro), strict=True)),
    }


KEYS = """
command version init data classes train_images test_images accuracy macro_f1 macro_precision macro_recall
confusion scratch seconds per_class gain draws notes
"""


def test_the_figures_are_those_of_the_classifier_on_the_test_images(done: Path, data: Path, runs: dict[str, Path]):
    result = result_of(done)
    assert result.keys() >= set(KEYS.split())
    files, labels = files_of(data / "test")
    predicted = metaft.load(done)(pixels_of(files)).argmax(-1).numpy()
    expected = figures(labels, predicted, 3)
    assert 1 / 3 < expected["accuracy"] < 1, "figures that say nothing"
    assert not np.array_equal(expected["confusion"], np.transpose(expected["confusion"])), "likewise"
    assert result["confusion"] == expected["confusion"]
    for name in MACRO:
        assert result[name] == pytest.approx(expected[name], abs=1e-12), name
    for row, (count, *values), name in zip(result["per_class"], expected["per_class"], TARGET, strict=True):
        assert (row["class"], row["test_images"]) == (name, count)
        assert [row[k] for k in ("precision", "recall", "f1")] == pytest.approx(values, abs=1e-12)
    assert result["classes"] == list(TARGET)
    assert [result[k] for k in ("command", "init", "data")] == ["adapt", str(runs["maml"]), f"folder:{data}"]
    assert (result["version"], result["init_about"]["algorithm"]) == (metaft.__version__, "maml")
    assert [result[f"{part}_images"] for part in ("train", "test")] == [24, 15]
    assert result["seconds"] == pytest.approx(sum(row["seconds"] for row in read_rows(done / "timing.jsonl")), abs=1e-3)
    assert 0 < result["scratch"]["seconds"] < result["seconds"]


@pytest.mark.parametrize("method", ["finetune", "inner"])
def test_the_figures_of_the_random_start(
    method: str, runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Classifier] = []
    real = study.test
    monkeypatch.setattr(study, "test", lambda classifier, *a: made.append(classifier) or real(classifier, *a))
    argv = (inner_words if method == "inner" else words)(runs["maml"], data, tmp_path / "o")
    assert adapt.main(argv) == 0
    result = result_of(tmp_path / "o")
    files, labels = files_of(data / "test")
    for classifier, said in zip(made, (result, result["scratch"]), strict=True):
        expected = figures(labels, classifier(pixels_of(files)).argmax(-1).numpy(), 3)
        for name in MACRO:
            assert said[name] == pytest.approx(expected[name], abs=1e-12), name
    assert result["gain"]["accuracy"] == pytest.approx(result["accuracy"] - result["scratch"]["accuracy"])
    assert result["gain"]["ci95"] is None


def test_what_is_not_trained_on_is_the_test_where_the_folder_has_no_parts(
    runs: dict[str, Path], tmp_path: Path, fits: list[Seen]
) -> None:
    data = write_target(tmp_path / "d", {".": 15})
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", seeds=2, shots_per_class=12)) == 0
    result = result_of(tmp_path / "o")
    assert [result[f"{part}_images"] for part in ("train", "val", "test")] == [30, 6, 9]
    files, labels = files_of(data)
    x = pixels_of(files)
    seen = each(fits[0].images) | each(fits[0].val_images)
    test = [i for i in range(len(files)) if x[i].numpy().tobytes() not in seen]
    assert len(test) == 9
    predicted = metaft.load(tmp_path / "o")(x[test]).argmax(-1).numpy()
    assert result["confusion"] == figures(labels[test], predicted, 3)["confusion"]
    assert each(fits[2].images) | each(fits[2].val_images) != seen


def test_classes_of_different_sizes_are_counted_as_images(runs: dict[str, Path], tmp_path: Path, capsys: Text) -> None:
    data = write_target(tmp_path / "d", {"train": 4, "test": 2})
    (data / "train" / TARGET[1] / "00.png").unlink()
    (data / "test" / TARGET[0] / "00.png").unlink()
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", epochs=1)) == 0
    result = result_of(tmp_path / "o")
    assert (result["train_images"], result["train_images_per_class"]) == (11, None)
    assert [row["test_images"] for row in result["per_class"]] == [1, 2, 2]
    assert "\nWith 11 images to train on, " in capsys.readouterr().out


def test_a_run_folder_holds_what_it_should(done: Path) -> None:
    names = {str(p.relative_to(done)) for p in done.rglob("*") if p.is_file()}
    assert names >= {
        *("config.toml", "metrics.jsonl", "timing.jsonl", "result.json", "report.txt", "classifier.safetensors"),
        *(f"checkpoints/{name}.safetensors" for name in ("last", "previous")),
    }
    for row in read_rows(done / "metrics.jsonl"):
        assert row.keys() == {"draw", "start", "epoch", "loss"}
    assert len(read_rows(done / "metrics.jsonl")) == 3 * 2 * ADAPT["epochs"]


def test_the_pictures(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text) -> None:
    """They are drawn from the finished run, in which nothing else changes."""
    before = adapted(copy)
    monkeypatch.undo()
    assert adapt.main(["--resume", str(copy)]) == 0
    said = capsys.readouterr().out
    for name in ("confusion", "learning", "mistakes"):
        with Image.open(copy / f"plots/{name}.png") as picture:
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 5
        assert f"{copy}/plots/{name}.png" in said
    assert adapted(copy) == before


@pytest.mark.parametrize("which", ["confusion", "learning", "mistakes"])
def test_what_is_drawn(which: str, done: Path, copy: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.undo()
    for name in ("confusion", "learning", "mistakes"):
        monkeypatch.setattr(f"metaft.plots.{name}", lambda *a, name=name, **k: given.update({name: (a, k)}))
    assert adapt.main(["--resume", str(copy)]) == 0
    result, (arguments, options) = result_of(copy), given[which]
    assert arguments[0] == copy / f"plots/{which}.png"
    if which == "confusion":
        assert arguments[1:] == (result["confusion"], TARGET)
    if which == "learning":
        rows = [row for row in read_rows(copy / "metrics.jsonl") if row["draw"] == 0]
        assert list(arguments[1]) == ["meta-learned", "random"]
        assert [row for curve in arguments[1].values() for row in curve] == rows
        assert options["kept"] == {"meta-learned": 3, "random": 3}
    if which == "mistakes":
        files, labels = files_of(data / "test")
        probabilities, predicted = metaft.load(done)(pixels_of(files)).softmax(-1).max(-1)
        assert torch.equal(arguments[1], pixels_of(files))
        assert arguments[2].tolist() == labels.tolist()
        assert torch.equal(arguments[3], predicted)
        torch.testing.assert_close(arguments[4], probabilities.detach(), rtol=0, atol=1e-5)
        assert arguments[5] == TARGET


def test_the_report(done: Path, copy: Path, capsys: Text) -> None:
    text, result = (done / "report.txt").read_text(encoding="utf-8"), result_of(done)
    for name in MACRO:
        assert f"{100 * result[name]:.2f}" in text
        assert f"{100 * result['scratch'][name]:.2f}" in text
        assert f"{100 * (result[name] - result['scratch'][name]):+.2f}" in text
    gain, mean = result["gain"], result["mean"]
    assert re.search(rf"paired gain +{100 * gain['accuracy']:.2f} ± {100 * gain['ci95']:.2f} points\n", text)
    assert "of 3 draws, seeds 0 to 2" in text
    for name, row in zip(TARGET, result["per_class"], strict=True):
        line = rf"^{name} +{row['test_images']} +{row['precision']:.3f} +{row['recall']:.3f} +{row['f1']:.3f}( |$)"
        assert re.search(line, text, re.MULTILINE)
    sentence = text.rstrip("\n").splitlines()[-1]
    for part in (
        "With 8 images per class to train on",
        f"{100 * mean['accuracy']:.0f} of 100 new images get the right label after starting from the meta-learned",
        f"{100 * mean['scratch_accuracy']:.0f} of 100 after the same training from a random one",
        f"{abs(100 * gain['accuracy']):.1f} points {'gained' if gain['accuracy'] >= 0 else 'lost'}",
        "mean of 3 draws",
    ):
        assert part in sentence
    assert adapt.main(["--resume", str(copy)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(text.splitlines()[0])
    assert said.splitlines()[-1] == sentence


def test_the_confused_class_is_named_in_its_true_classs_row(done: Path) -> None:
    text, result = (done / "report.txt").read_text(encoding="utf-8"), result_of(done)
    for true, row in enumerate(result["confusion"]):
        others = [(-count, found) for found, count in enumerate(row) if found != true and count]
        ending = f"{TARGET[min(others)[1]]} ({-min(others)[0]})" if others else ""
        (line,) = re.findall(rf"^{TARGET[true]} .*$", text, re.MULTILINE)
        assert line.endswith(ending) and ("(" in line) == bool(others)


# ---- several draws ------------------------------------------------------------------------------------------------


def test_the_gain_is_paired_with_students_interval(
    runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    """Draws of 90, 60 and 75 % beside 50, 40 and 20 %, by hand and by scipy; 4.3027 is Student's t of two degrees."""
    ours, theirs, real = [0.9, 0.6, 0.75], [0.5, 0.4, 0.2], study.test
    figures = iter([0.9, 0.5, 0.6, 0.4, 0.75, 0.2])
    monkeypatch.setattr(study, "test", lambda *a: {**real(*a), "accuracy": next(figures)})
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", epochs=1, seeds=3, seed=5)) == 0
    result, text = result_of(tmp_path / "o"), capsys.readouterr().out
    draws = [
        (draw["seed"], draw["accuracy"], draw["scratch"]["seed"], draw["scratch"]["accuracy"])
        for draw in result["draws"]
    ]
    assert draws == [(5, 0.9, 5, 0.5), (6, 0.6, 6, 0.4), (7, 0.75, 7, 0.2)]
    assert result["gain"]["draws"] == result["mean"]["draws"] == 3
    gains = (0.4, 0.2, 0.55)
    spread = math.sqrt(sum((gain - 1.15 / 3) ** 2 for gain in gains) / 2)
    assert result["gain"]["accuracy"] == pytest.approx(1.15 / 3)
    assert result["gain"]["ci95"] == pytest.approx(4.302652729749464 * spread / math.sqrt(3))
    low, high = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert result["gain"]["ci95"] == pytest.approx((high - low) / 2)
    assert re.search(r"of 3 draws, seeds 5 to 7;.*\n.*\n.*\n +paired gain +38\.33 ± 43\.62 points\n", text)
    for name, some in (("accuracy", ours), ("scratch_accuracy", theirs)):
        low, high = scipy.stats.ttest_1samp(some, 0).confidence_interval(0.95)
        assert result["mean"][name] == pytest.approx((low + high) / 2)
        assert result["mean"][f"{name}_ci95"] == pytest.approx((high - low) / 2)


@pytest.mark.parametrize("method", ["finetune", "inner"])
def test_draws_of_the_same_images_are_said_to_be_that(
    method: str, runs: dict[str, Path], tmp_path: Path, capsys: Text
) -> None:
    data = write_target(tmp_path / "d", {"train": 4, "test": 2})
    line, noted = words if method == "finetune" else inner_words, {}
    for name, changes in (
        ("same", {"seeds": 4}),
        ("all of them", {"seeds": 2, "shots_per_class": 4}),
        ("drawn", {"seeds": 2, "shots_per_class": 3}),
        ("one", {}),
    ):
        assert adapt.main(line(runs["maml"], data, tmp_path / name, **changes)) == 0
        noted[name] = "every draw holds the same images; the interval is of the seeds alone" in capsys.readouterr().out
    assert noted == {"same": True, "all of them": True, "drawn": False, "one": False}
    if method == "inner":
        result = result_of(tmp_path / "same")
        assert len({draw["accuracy"] for draw in result["draws"]}) == 1
        assert result["mean"]["accuracy_ci95"] == 0.0


def test_the_interval_of_equal_figures_is_nothing() -> None:
    assert mean_t95([0.1] * 3) == (0.1, 0.0)
    assert mean_t95([0.7, 0.7, 0.7, 0.7, 0.7, 0.7]) == (0.7, 0.0)


def test_each_draw_is_the_run_of_its_own_seed(
    runs: dict[str, Path], data: Path, tmp_path: Path, done: Path, fits: list[Seen]
) -> None:
    whole = result_of(done)
    singles = []
    for seed in range(3):
        assert adapt.main(words(runs["maml"], data, tmp_path / str(seed), shots_per_class=8, seed=seed)) == 0
        singles.append(result_of(tmp_path / str(seed)))
    for draw, single in zip(whole["draws"], singles, strict=True):
        assert [draw] == single["draws"]
    shared = ("confusion", "per_class", "notes", *MACRO)
    assert {k: whole[k] for k in shared} == {k: singles[0][k] for k in shared}
    assert (done / "classifier.safetensors").read_bytes() == (tmp_path / "0/classifier.safetensors").read_bytes()
    rows = [row for row in read_rows(done / "metrics.jsonl") if row["draw"] == 0]
    assert rows == read_rows(tmp_path / "0/metrics.jsonl")
    sets = [each(seen.images) for seen in fits[::2]]
    assert all(len(some) == 24 for some in sets)
    assert sets[0] != sets[1] != sets[2] != sets[0]
    heads = [seen.fitted.head.weight for seen in fits]
    assert not torch.equal(heads[0], heads[2])


def test_the_draws_of_one_run_differ_in_images_head_and_random_start(
    runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen]
) -> None:
    argv = words(runs["maml"], data, tmp_path / "o", shots_per_class=5, seeds=3, seed=2, epochs=1, lr=1e-30)
    assert adapt.main(argv) == 0
    assert len(fits) == 6
    for one, other in ((0, 2), (2, 4), (0, 4)):
        assert each(fits[one].images) != each(fits[other].images)
        assert not torch.equal(fits[one].fitted.head.weight, fits[other].fitted.head.weight)
        assert same(fits[one].body, fits[other].body)
        assert not same(fits[one + 1].body, fits[other + 1].body)
    for one in (0, 2, 4):
        assert torch.equal(fits[one].images, fits[one + 1].images)
        assert torch.equal(fits[one].fitted.head.weight, fits[one + 1].fitted.head.weight)
    assert [seen.recipe.seed for seen in fits] == [2, 2, 3, 3, 4, 4]


# ---- resume -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Path], data: Path) -> tuple[list[str], Any]:
    """(settings, what is left) of a run over two draws with validation that nobody disturbed."""
    argv = words(runs["maml"], data, tmp_path_factory.mktemp("runs") / "whole", seeds=2)
    return argv[:-2], adapted(finished(argv))


def stop_at(monkeypatch: pytest.MonkeyPatch, fit: int, step: int | None, number: int = signal.SIGTERM) -> None:
    """Have a signal come in this step of this fit, or behind its last one; only once."""
    real, count = study.fit, iter(range(100))

    def stopped(*arguments: Any, should_stop: Any, **others: Any) -> Any:
        mine, steps = next(count) == fit, iter(range(1000))

        def check() -> None:
            if mine and next(steps) == step:
                signal.raise_signal(number)
            should_stop()

        fitted = real(*arguments, should_stop=check, **others)
        if mine and step is None:
            signal.raise_signal(number)
        return fitted

    monkeypatch.setattr(study, "fit", stopped)


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("fit", "step", "number", "fits", "epochs"),
    [
        (0, 0, INT, None, None),  # 24 images in batches of 7: four steps an epoch
        (0, 9, TERM, 0, 2),
        (1, 7, INT, 1, 4),
        (3, 6, TERM, 3, 10),
        (0, None, INT, 1, 3),
        (1, None, TERM, 2, 6),
        (3, None, TERM, 4, 12),
    ],
)
def test_stopped_by_a_signal_and_resumed_it_ends_with_the_same_bytes(
    fit: int,
    step: int | None,
    number: int,
    fits: int | None,
    epochs: int | None,
    whole: tuple[list[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Text,
) -> None:
    settings, expected = whole
    out, former = tmp_path / "a run's", signal.getsignal(number)
    stop_at(monkeypatch, fit, step, number)
    assert adapt.main([*settings, "--out", str(out)]) == 128 + number
    assert signal.getsignal(number) == former
    said = capsys.readouterr()
    line = said.err.splitlines()[-1]
    assert line == f"metaft: stopped; go on with: python -m metaft.adapt --resume {shlex.quote(str(out))}"
    assert said.out == ""
    assert not (out / "result.json").exists()
    assert adapt.main(shlex.split(line.partition("go on with: ")[2])[3:]) == 0
    again = f"resuming {out} after {fits} fits and {epochs} epochs\n"
    assert (again in capsys.readouterr().err) == (fits is not None)
    assert adapted(out) == expected


@pytest.mark.parametrize("method", ["finetune", "inner"])
def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bytes(
    method: str, runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk as it is behind each renaming of a file is what a kill at that moment leaves."""
    out, real = tmp_path / "o", os.replace
    moments: list[Path] = []

    def replace(*arguments: Any, **others: Any) -> None:
        real(*arguments, **others)
        moments.append(tmp_path / f"{len(moments):02d}")
        shutil.copytree(out, moments[-1])

    monkeypatch.setattr(study, "SAVE_EVERY", -1.0)  # every epoch
    monkeypatch.setattr(os, "replace", replace)
    argv = inner_words(runs["maml"], data, out) if method == "inner" else words(runs["maml"], data, out, epochs=2)
    assert adapt.main(argv) == 0
    monkeypatch.setattr(os, "replace", real)
    expected = adapted(out)
    assert len(moments) >= (11 if method == "inner" else 27)
    for moment in moments:
        assert adapt.main(["--resume", str(moment)]) == 0
        assert adapted(moment) == expected, f"{moment.name} of {len(moments)}"


def test_resume_of_a_finished_run_gives_the_same(copy: Path, done: Path) -> None:
    for name in ("report.txt", "result.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "plots")
    assert adapt.main(["--resume", str(copy)]) == 0
    assert adapted(copy) == adapted(done)


@pytest.mark.parametrize("before", [1, 2])
def test_more_seeds_on_resume_are_a_run_with_that_many(
    before: int, runs: dict[str, Path], data: Path, tmp_path: Path, done: Path
) -> None:
    out = tmp_path / "o"
    assert adapt.main(words(runs["maml"], data, out, shots_per_class=8, seeds=before)) == 0
    assert len(result_of(out)["draws"]) == before
    assert adapt.main(["--resume", str(out), "--seeds", "3"]) == 0
    assert adapted(out) == adapted(done)


def test_more_seeds_drop_the_result_of_fewer_before_they_are_drawn(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would pass for this run's, whose config.toml says more."""
    stop_at(monkeypatch, 0, 0)
    assert adapt.main(["--resume", str(copy), "--seeds", "4"]) == 143
    assert read_toml(copy / "config.toml")["seeds"] == 4
    assert not (copy / "result.json").exists()


def contents(path: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_fewer_seeds_than_have_been_begun_are_refused(copy: Path, capsys: Text) -> None:
    before = contents(copy)
    assert adapt.main(["--resume", str(copy), "--seeds", "2"]) == 2
    one_line(capsys, "seeds must be at least the 3 already begun, got 2")
    assert contents(copy) == before


def test_a_draw_that_has_been_begun_counts(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text) -> None:
    stop_at(monkeypatch, 0, 6)
    assert adapt.main(["--resume", str(copy), "--seeds", "4"]) == 143  # in the second epoch of the fourth draw
    capsys.readouterr()
    assert adapt.main(["--resume", str(copy), "--seeds", "3"]) == 2
    one_line(capsys, "seeds must be at least the 4 already begun, got 3")


def change_a_pixel(folder: Path) -> None:
    file = next(folder.rglob("*.png"))
    pixels = np.asarray(Image.open(file)).copy()
    pixels[4, 4] ^= 1
    Image.fromarray(pixels).save(file)


@pytest.mark.parametrize("change", ["a pixel", "one more", "a name", "init"])
def test_what_has_changed_since_is_refused(
    change: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    data, out = write_target(tmp_path / "d", {"train": 3, "test": 2}), tmp_path / "o"
    init = shutil.copytree(runs["maml"], tmp_path / "init")
    stop_at(monkeypatch, 1, 2)
    assert adapt.main(words(init, data, out)) == 143
    if change == "a pixel":
        change_a_pixel(data)
    elif change == "one more":
        shutil.copy(next((data / "train/apple").iterdir()), data / "train/apple/more.png")
    elif change == "a name":
        for part in ("train", "test"):
            (data / part / "apple").rename(data / part / "apples")
    else:
        best = "checkpoints/best.safetensors"
        shutil.copy(runs["fomaml"] / best, init / best)
    before = contents(out)
    capsys.readouterr()
    assert adapt.main(["--resume", str(out)]) == 2
    one_line(capsys, *(("init: ", init) if change == "init" else ("data: ", data)), "changed since", out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["--epochs", "4"], ["epochs", "3", "4"]),
        (["--lr", "0.5"], ["lr", "0.02", "0.5"]),
        (["--batch-size", "9"], ["batch_size", "7", "9"]),
        (["--seed", "1"], ["seed", "0", "1"]),
        (["--head", "cosine"], ["head", "'linear'", "'cosine'"]),
        (["--freeze", "backbone"], ["freeze", "'none'", "'backbone'"]),
        (["--augment", "basic"], ["augment", "'none'", "'basic'"]),
        (["--method", "inner"], ["method", "'finetune'", "'inner'"]),
        (["--inner-steps", "2"], ["inner_steps", "None", "2"]),
        (["--patience", "2"], ["patience", "10", "2"]),
        (["--shots-per-class", "2"], ["shots_per_class", "8", "2"]),
        (["--data", "glyphs:Hebrew"], ["data", "folder:", "'glyphs:Hebrew'"]),
        (["--init", "none"], ["init", "maml", "'none'"]),
        (["--out", "elsewhere"], ["out", "stays in its folder", "elsewhere"]),
        (["--config", "c.toml"], ["config", "--resume or --config, not both"]),
    ],
    ids=" ".join,
)
def test_a_resumed_run_keeps_its_settings(copy: Path, capsys: Text, changes: list[str], parts: list[str]) -> None:
    before = contents(copy)
    assert adapt.main(["--resume", str(copy), *changes]) == 2
    one_line(capsys, *parts)
    assert contents(copy) == before


def test_every_setting_but_three_is_kept() -> None:
    assert set(adapt.RESUMABLE) == {"device", "seeds", "plugin"}
    assert set(adapt.RESUMABLE) < {f.name for f in dataclasses.fields(AdaptConfig)}


def test_a_damaged_last_checkpoint_is_refused_and_the_previous_one_offered(
    whole: tuple[list[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    """The command that it prints is run as it stands; the run then ends as if nothing had happened."""
    settings, expected = whole
    out = tmp_path / "a run's"
    monkeypatch.setattr(study, "SAVE_EVERY", -1.0)
    stop_at(monkeypatch, 1, 9)
    assert adapt.main([*settings, "--out", str(out)]) == 143
    last = out / "checkpoints/last.safetensors"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 16
    last.write_bytes(data)
    capsys.readouterr()
    assert adapt.main(["--resume", str(out)]) == 2
    line = one_line(capsys, last, "damaged", "previous.safetensors after ", " epochs is good")
    subprocess.run(shlex.split(line.partition("to use it: ")[2]), check=True)
    assert adapt.main(["--resume", str(out)]) == 0
    assert adapted(out) == expected


def test_without_any_good_checkpoint_it_says_so(copy: Path, capsys: Text) -> None:
    for path in (copy / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert adapt.main(["--resume", str(copy)]) == 2
    one_line(capsys, "last.safetensors", "no other checkpoint of this run can be read")


def test_a_full_disk_is_one_line_and_leaves_the_checkpoints(copy: Path, capsys: Text) -> None:
    before = contents(copy / "checkpoints")
    with file_size_limit((copy / "checkpoints/last.safetensors").stat().st_size - 1):
        assert adapt.main(["--resume", str(copy), "--seeds", "4"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"metaft: error: .*/checkpoints/.*: cannot be written \(File too large\)$", line)
    assert contents(copy / "checkpoints") == before
    assert adapt.main(["--resume", str(copy)]) == 0  # with room again it goes on


# ---- bad input ----------------------------------------------------------------------------------------------------

BAD = [
    (["--epoch", "3"], ["--epoch", "did you mean '--epochs'"]),
    (["--epochs", "three"], ["--epochs", "'three'"]),
    (["--epochs", "0"], ["epochs must be at least 1, got 0"]),
    (["--epochs", "2.5"], ["--epochs", "'2.5'"]),
    (["--lr", "0"], ["lr must be above 0, got 0"]),
    (["--lr", "nan"], ["lr must be finite, got nan"]),
    (["--batch-size", "1"], ["batch_size must be at least 2, got 1"]),
    (["--patience", "0"], ["patience must be at least 1, got 0"]),
    (["--shots-per-class", "0"], ["shots_per_class must be at least 1, got 0"]),
    (["--inner-steps", "-1"], ["inner_steps must be at least 0, got -1"]),
    (["--seed", "-1"], ["seed must be at least 0, got -1"]),
    (["--seed", str(2**63)], ["seed must be below 2**63", str(2**63)]),
    (["--seeds", "0"], ["seeds must be at least 1, got 0"]),
    (["--head", "lineer"], ["--head", "'lineer'", "linear"]),
    (["--freeze", "all"], ["--freeze", "'all'", "backbone"]),
    (["--augment", "much"], ["--augment", "'much'", "basic"]),
    (["--method", "tune"], ["--method", "'tune'", "finetune"]),
    (["--device", "gpu"], ["device must be", "'gpu'"]),
    (["--device", "cuda:77"], ["device", "'cuda:77'"]),
    (["--data", "glyph:Hebrew"], ["data: ", "folder:PATH or glyphs:SCRIPT", "'glyph:Hebrew'"]),
    (["--data", "glyphs:Hebrwe"], ["data: ", "'Hebrwe'", "did you mean 'Hebrew'"]),
    (["--data", "glyphs:Latin"], ["data: ", "no held-out script 'Latin'"]),
    (["--data", "folder:/none/x"], ["data: folder /none/x does not exist"]),
    (["--data", "folder:/none/x", "--init", "none"], ["data: folder /none/x does not exist"]),
    (["--data", ""], ["data: ", "folder:PATH or glyphs:SCRIPT", "''"]),
    (["--init", "/none/x"], ["init: ", "/none/x does not exist"]),
    (["--init", ""], ["init: ", "none", "''"]),
    (["--init", "none", "--method", "inner"], ["method: ", "--init RUN", "none"]),
    (["--method", "inner", "--epochs", "3"], ["epochs: --method inner has no such setting (given 3)"]),
    (["--method", "inner", "--lr", "0.1"], ["lr: --method inner has no such setting (given 0.1)"]),
    (["--method", "inner", "--head", "linear"], ["head: --method inner", "linear"]),
    (["--method", "inner", "--freeze", "backbone"], ["freeze: --method inner", "backbone"]),
    (["--method", "inner", "--augment", "none"], ["augment: --method inner", "none"]),
    (["--method", "inner", "--batch-size", "4"], ["batch_size: --method inner", "4"]),
    (["--method", "inner", "--patience", "4"], ["patience: --method inner", "4"]),
    (["--inner-steps", "3"], ["inner_steps: --method finetune has no such setting (given 3)"]),
    (["--config", "none.toml"], ["config", "none.toml", "No such file"]),
    (["--resume", "/none/x"], ["/none/x does not exist"]),
    (["stray"], ["stray"]),
]


@pytest.mark.parametrize(("argv", "parts"), BAD, ids=lambda value: " ".join(value))
def test_bad_input_is_one_line_status_2_and_writes_nothing(
    in_tmp: Path, capsys: Text, argv: list[str], parts: list[str]
) -> None:
    assert adapt.main(argv) == 2
    one_line(capsys, *parts)
    assert list(in_tmp.iterdir()) == []


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Path], data: Path, done: Path) -> dict[str, Path]:
    """Data and runs that something is wrong with, by name; and some with which nothing is."""
    base = tmp_path_factory.mktemp("schlecht ß")
    (base / "empty").mkdir()
    (base / "hollow/a").mkdir(parents=True)
    write_target(base / "hollow", {".": 3}, classes="bc")
    (base / "file").write_text("")
    write_target(base / "one", {".": 4}, classes="a")
    write_target(base / "few", {".": 3}, classes="ab")
    write_target(base / "untested", {"train": 3})
    write_target(base / "colour", {"train": 3, "test": 2}, channels=3)
    for name, content in (("text", b"no picture"), ("cut", None)):
        write_target(base / name, {"train": 3, "test": 2})
        file = base / name / "train" / TARGET[2] / "01.png"
        file.write_bytes(file.read_bytes()[:60] if content is None else content)
    write_target(base / "lone", {"train": 3, "test": 2})
    shutil.rmtree(base / "lone/test" / TARGET[1])
    shutil.copytree(runs["maml"], base / "damaged")
    (base / "damaged/checkpoints/best.safetensors").write_bytes(b"nothing")
    shutil.copytree(runs["maml"], base / "early")
    (base / "early/checkpoints/best.safetensors").unlink()
    texts = {
        "unknown": "epoch = 3",
        "mistaken": "epochs = 'three'",
        "choice": "head = 'lineer'",
        "malformed": "epochs = ",
        "table": "[fit]\nlr = 0.1",
        "other": "method = 'inner'\nepochs = 3",
    }
    for name, text in texts.items():
        (base / f"{name}.toml").write_text(text)
    found = {path.name: path for path in base.iterdir()}
    return {**found, **{f"{k}_run": v for k, v in runs.items()}, "data": data, "done": done}


UNFIT = [
    ("--data folder:{empty}", ["data: {empty} holds 0 class folders, fewer than 2"]),
    ("--data folder:{hollow}", ["data: ", "{hollow}/a holds no images"]),
    ("--data folder:{one}", ["data: {one} holds 1 class folders, fewer than 2"]),
    ("--data folder:{few} --shots-per-class 3", ["class 'a' has 3 images", "shots_per_class + 1 for the test = 4"]),
    ("--data folder:{data} --shots-per-class 11", ["class 'apple' has 10 images", "shots_per_class = 11"]),
    ("--data folder:{untested}", ["{untested}/test is missing"]),
    ("--data folder:{lone}", ["'c d' is not in every part of {lone}"]),
    ("--data folder:{colour}", ["data: 15 of the 15 images of {colour} are in colour, [3, 8, 8]", "[1, 8, 8]"]),
    ("--data folder:{text}", ["data: image {text}/train/βητα/01.png"]),
    ("--data folder:{text} --init none", ["data: image {text}/train/βητα/01.png"]),
    ("--data folder:{cut}", ["data: image {cut}/train/βητα/01.png"]),
    ("--data folder:{file}", ["data: {file} is not a folder"]),
    ("--data glyphs:Hebrew", ["[1, 28, 28]", "[1, 8, 8]"]),
    ("--init {colour_run} --data glyphs:Hebrew", ["[1, 28, 28]", "[3, 8, 8]"]),
    ("--init {curve_run}", ["init: {curve_run}", "[1]", "the images of folder:{data} are [1, "]),
    ("--init {curve_run} --method inner", ["init: {curve_run}", "[1]", "the images of folder:{data} are [1, "]),
    ("--init {data}", ["init: run folder {data} is not a run folder"]),
    ("--init {done}", ["init: {done} is a run of metaft.adapt, not of metaft.meta_train"]),
    ("--init {damaged}", ["init: checkpoint {damaged}/checkpoints/best.", "last.safetensors of step 5 is good"]),
    ("--init {early}", ["{early}/checkpoints/best.safetensors: cannot be read"]),
    ("--init {protonet_run} --method inner --inner-steps 3", ["inner_steps: protonet has no inner steps (given 3)"]),
    ("--out {done}", ["out: {done} already exists", "--resume {done}"]),
    ("--out {file}", ["out: {file} already exists"]),
    ("--out {file}/x", ["out: ", "{file}/x", "Not a directory"]),
    ("--config {unknown.toml}", ["{unknown.toml}: unknown field 'epoch'; did you mean 'epochs'?"]),
    ("--config {mistaken.toml}", ["{mistaken.toml}: epochs must be int or nothing, got 'three'"]),
    ("--config {choice.toml}", ["{choice.toml}: head must be one of linear", "'lineer'; did you mean 'linear'?"]),
    ("--config {malformed.toml}", ["{malformed.toml} is not valid TOML"]),
    ("--config {table.toml}", ["{table.toml}: unknown field 'fit'"]),
    ("--config {other.toml}", ["epochs: --method inner has no such setting (given 3)"]),
]


@pytest.mark.parametrize(("line", "parts"), UNFIT, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_together_likewise(
    in_tmp: Path, capsys: Text, bad: dict[str, Path], line: str, parts: list[str]
) -> None:
    def filled(text: str) -> str:
        return re.sub(r"\{(.+?)\}", lambda found: str(bad[found[1]]), text)

    argv = [filled(word) for word in line.split()]
    for name, value in (("--init", bad["maml_run"]), ("--data", f"folder:{bad['data']}")):
        argv += [name, str(value)] if name not in argv else []
    before = contents(bad["done"])
    assert adapt.main(argv) == 2
    one_line(capsys, *map(filled, parts))
    assert list(in_tmp.iterdir()) == []
    assert contents(bad["done"]) == before


@pytest.mark.parametrize("what", ["a meta-training run", "no run", "a run of nothing"])
def test_only_an_adapt_run_is_resumed(
    what: str, runs: dict[str, Path], data: Path, tmp_path: Path, capsys: Text
) -> None:
    path = shutil.copytree(runs["maml"] if what == "a meta-training run" else data, tmp_path / "r")
    if what == "a run of nothing":
        (path / "config.toml").write_bytes(b"\xff")
    before = contents(path)
    assert adapt.main(["--resume", str(path)]) == 2
    kind = f"resume: {path} is a run of metaft.meta_train, not of metaft.adapt"
    part = {"a meta-training run": kind, "no run": "is not a run folder"}
    one_line(capsys, path, part.get(what, "not valid TOML"))
    assert contents(path) == before


def test_a_run_killed_before_its_settings_were_written_leaves_a_folder_free_to_use(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".config.toml.tmp").write_text("epochs =")
    assert adapt.main(words(runs["maml"], data, tmp_path / "r", epochs=1)) == 0


def test_names_that_are_not_utf_8(runs: dict[str, Path], tmp_path: Path, capsys: Text) -> None:
    """Linux allows any bytes in a name. They may be refused, in one line, or taken."""
    name = os.fsdecode(b"caf\xe9")
    try:
        data = write_target(tmp_path / "d", {"train": 3, "test": 2}, classes=("a", name))
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    status = adapt.main(words(runs["maml"], data, tmp_path / "o", epochs=1))
    if status == 0:
        assert metaft.load(tmp_path / "o").class_names == ("a", name)
        assert adapt.main(["--resume", str(tmp_path / "o")]) == 0
    else:
        assert status == 2
        one_line(capsys, "caf")
        assert not (tmp_path / "o").exists()


# ---- losses that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [1, 2, 10])
@pytest.mark.parametrize("start", ["meta-learned", "random"])
def test_a_last_step_that_is_not_finite_is_status_1(
    start: str, shots: int, runs: dict[str, Path], data: Path, tmp_path: Path, capsys: Text
) -> None:
    """One step, whose loss is that before it: alone the parameters, the stored moments or the outputs show it."""
    init, out = runs["maml"] if start == "meta-learned" else Path("none"), tmp_path / "o"
    assert adapt.main(words(init, data, out, shots_per_class=shots, epochs=1, lr=1e30, batch_size=99)) == 1
    said = capsys.readouterr()
    assert re.match(
        r"metaft: error: (after the last step: not finite: .*|epoch 1: the validation loss is .*); try a smaller --lr$",
        said.err.splitlines()[-1],
    )
    assert said.out == ""
    for name in ("result.json", "classifier.safetensors"):
        assert not (out / name).exists()
    assert adapt.main(["--resume", str(out)]) == 1  # likewise


@pytest.mark.parametrize("method", ["finetune", "inner"])
@pytest.mark.parametrize("start", [0, 1])
def test_outputs_that_are_not_finite_are_status_1(
    start: int, method: str, runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Text,
) -> None:  # fmt: skip
    """Every parameter is finite, and the outputs on test images overflow; from either start."""
    real, count = getattr(study, "fit" if method == "finetune" else "inner"), iter(range(9))

    def fit(*given: Any, **others: Any) -> Any:
        fitted = real(*given, **others)
        if next(count) == start:
            with torch.no_grad():
                fitted.head.weight.fill_(3e38)
        return fitted

    monkeypatch.setattr(study, "fit" if method == "finetune" else "inner", fit)
    argv = (words if method == "finetune" else inner_words)(runs["maml"], data, tmp_path / "o")
    assert adapt.main(argv) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    advice = "try a smaller --lr" if method == "finetune" else "try fewer --inner-steps"
    assert line == f"metaft: error: after the last step: not finite: the logits of the test images; {advice}"
    assert not (tmp_path / "o/result.json").exists()


@pytest.mark.parametrize("lr", [1e20, 1e30])
def test_a_loss_that_is_not_finite_is_status_1(
    lr: float, runs: dict[str, Path], data: Path, tmp_path: Path, capsys: Text
) -> None:
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", lr=lr)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"metaft: error: epoch \d: .*; try a smaller --lr$", line)
    assert not (tmp_path / "o/result.json").exists()


def test_fits_that_were_done_before_a_loss_that_is_not_finite_stay(
    whole: tuple[list[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    (settings, expected), out, count = whole, tmp_path / "o", iter(range(9))
    real = study.fit

    def fit(*given: Any, **others: Any) -> Any:
        recipe = given[-1] if next(count) < 3 else dataclasses.replace(given[-1], lr=1e30)
        return real(*given[:-1], recipe, **others)  # type: ignore[call-arg]

    monkeypatch.setattr(study, "fit", fit)
    assert adapt.main([*settings, "--out", str(out)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("metaft: error: epoch ")
    assert len(study.read(RunFolder(out))[0].fits) == 3
    with pytest.warns(UserWarning, match=r"has no result\.json"):
        assert metaft.load(out).class_names == TARGET
    monkeypatch.setattr(study, "fit", real)
    assert adapt.main(["--resume", str(out)]) == 0
    assert adapted(out) == expected


def test_an_inner_loop_that_is_not_finite_is_status_1(squares: Path, data: Path, tmp_path: Path, capsys: Text) -> None:
    wild = meta_trained(tmp_path / "wild", squares, inner_lr=1e30, inner_steps=0, test_inner_steps=0)
    capsys.readouterr()
    assert adapt.main(inner_words(wild, data, tmp_path / "o", inner_steps=3)) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("metaft: error: ")
    assert said.out == ""
    for row in read_rows(tmp_path / "o/metrics.jsonl"):
        assert math.isfinite(row["loss"])


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_whose_run_it_makes_again(
    tmp_path: Path, done: Path, runs: dict[str, Path], data: Path
) -> None:
    file = done / "config.toml"
    assert adapt.main(["--config", str(file), "--out", str(tmp_path / "again")]) == 0
    assert adapted(tmp_path / "again") == adapted(done)
    argv = ["--config", str(file), "--epochs", "1", "--seeds", "1", "--head", "cosine", "--out", str(tmp_path / "o")]
    assert adapt.main(argv) == 0
    config = read_toml(tmp_path / "o/config.toml")
    assert config == {**read_toml(file), "epochs": 1, "seeds": 1, "head": "cosine"}


def test_default_folders_are_numbered_and_tell_runs_apart(in_tmp: Path, runs: dict[str, Path], data: Path) -> None:
    argv = words(runs["maml"], data, in_tmp, epochs=1)[:-2]
    for extra in ([], [], ["--seed", "3"]):
        assert adapt.main([*argv, *extra]) == 0
    (name,) = {re.sub(r"-maml-\d(-2)?$", "", path.name) for path in (in_tmp / "runs").iterdir()}
    assert name.startswith("adapt-folder-")
    assert "/" not in name
    ends = [path.name.removeprefix(f"{name}-") for path in sorted((in_tmp / "runs").iterdir())]
    assert ends == ["maml-0", "maml-0-2", "maml-3"]


def test_progress_is_plain_lines_off_a_terminal(
    runs: dict[str, Path], data: Path, tmp_path: Path, capsys: Text
) -> None:
    assert adapt.main(words(runs["maml"], data, tmp_path / "r")) == 0
    said = capsys.readouterr()
    assert "\r" not in said.err
    assert "\x1b" not in said.err
    for pattern in (
        r"^folder:.*Ziel ü · 3 classes · finetune from .*/maml on cpu · run folder .*/r$",
        r"^adapt 6/6 · loss \d+\.\d{3} · \d+:\d\d left$",
    ):
        assert re.search(pattern, said.err, re.MULTILINE), pattern
    (line,) = re.findall(r"^next: +(.*) IMAGE_OR_FOLDER\.\.\.$", said.out, re.MULTILINE)
    assert shlex.split(line) == ["python", "-m", "metaft.predict", str(tmp_path / "r")]


def test_help_lists_every_field(capsys: Text) -> None:
    assert command_line(["adapt", "--help"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for field in dataclasses.fields(adapt.Arguments):
        assert re.search(rf"^\W+--{field.name.replace('_', '-')}[ ,]", said.out, re.MULTILINE), field.name


def test_a_whole_run_leaves_the_global_state_alone(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Random generators, threads, grad mode, default type: as the user's process had them; and none of it matters."""

    def state() -> tuple[object, ...]:
        numpy_state = np.random.get_state()  # noqa: NPY002
        flags = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), os.getcwd())
        return (*(repr(part) for part in numpy_state), torch.get_rng_state().tolist(), *flags)

    made = []
    for seed in (3, 4):
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        before = state()
        for method in (words, inner_words):
            out = tmp_path / f"{seed}{method.__name__}"
            changes = {"augment": "basic", "head": "cosine"} if method is words else {}
            assert adapt.main(method(runs["maml"], data, out, **changes)) == 0
            made.append(adapted(out))
        assert state() == before
    assert made[:2] == made[2:]


# ---- real processes -----------------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_without_any_argument(in_tmp: Path, runs: dict[str, Path], capsys: Text) -> None:
    """The newest run that takes glyphs, the built-in target and every default, in a process of its own."""
    glyphs = options(IMAGES, dataset="glyphs", iterations=4, eval_every=4, test_episodes=2)
    for name, age in (("old", 500), ("new", 100)):
        assert meta_train.main([*glyphs, "--seed", str(age), "--out", str(in_tmp / "made" / name)]) == 0
        put(in_tmp / "made" / name, in_tmp / "runs" / name, age)
    for name in ("curve", "colour", "maml"):
        put(runs[name], in_tmp / "runs" / name, 10)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "metaft.adapt"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert "init: runs/new, the newest run that fits\n" in done.stderr
    (out,) = (in_tmp / "runs").glob("adapt-*")
    assert out.name == "adapt-glyphs-Hebrew-new-0"
    result = result_of(out)
    assert result.keys() >= set(KEYS.split())
    classes = len(result["classes"])
    assert all(name.startswith("Hebrew/U+") for name in result["classes"])
    assert (result["data"], result["train_images"], result["test_images"]) == (
        *("glyphs:Hebrew", 5 * classes),
        15 * classes,
    )
    assert result["epochs_run"] == 40
    assert result["accuracy"] > 1.5 / classes
    assert {p.name for p in (out / "plots").iterdir()} == {"confusion.png", "learning.png", "mistakes.png"}
    for part in ("With 5 images per class to train on, ", "meta-learned start", "random start", "macro F1"):
        assert part in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_stopped_for_real_and_resumed_it_ends_with_the_same_bytes(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    long = {"seeds": 2, "epochs": 40, "patience": 40}
    assert adapt.main(words(runs["maml"], data, tmp_path / "whole", **long)) == 0
    expected = adapted(tmp_path / "whole")
    out = tmp_path / "stopped"
    argv = [sys.executable, "-m", "metaft.adapt", *words(runs["maml"], data, out, **long)]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    until = time.monotonic() + 60
    while len(read_rows(out / "metrics.jsonl")) < 80:
        assert time.monotonic() < until, "the run did not get there in a minute"
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)  # SIGKILL is sent in faults/test_kills.py
    said, error = process.communicate(timeout=60)
    assert (process.returncode, said) == (143, ""), error
    assert "Traceback" not in error
    assert not (out / "result.json").exists()
    assert adapt.main(["--resume", str(out)]) == 0
    assert adapted(out) == expected


@pytest.mark.slow
def test_errors_of_a_real_process_have_no_traceback(tmp_path: Path, runs: dict[str, Path]) -> None:
    for argv, parts in (
        (["metaft.adapt", "--epoch", "3"], ["--epoch", "did you mean '--epochs'"]),
        (["metaft.adapt", "--init", str(runs["curve"])], ["[1]", "[1, 28, 28]"]),
        (["metaft", "adpat"], ["'adpat'", "did you mean 'adapt'"]),
    ):
        done = subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        [line] = done.stderr.splitlines()
        assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from metaft import adapt\n"
        "assert adapt.main(['--help']) == 0 and adapt.main(['--nonsense']) == 2\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
