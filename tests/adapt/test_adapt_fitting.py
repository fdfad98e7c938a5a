"""What a fit is given: settings, parts of a target, preprocessing; and what is said of a target."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapting import Seen, Text, each, result_of
from helpers import (
    ONE_PASS,
    TARGET,
    files_of,
    one_line,
    options,
    pixels_of,
    same,
    words,
    write_target,
)
from PIL import Image
from torch import nn

import metaft
from metaft import adapt, targets
from metaft.config import AdaptConfig, read_toml
from metaft.errors import MetaftError
from metaft.finetune.recipes import lasting, of_whole
from metaft.finetune.setup import Setup, rows_of
from metaft.inputs import ImageInputs
from metaft.runs import checkpoint
from metaft.runs.folder import read_rows
from metaft.settings.finetuning import Recipe


def test_the_settings_reach_the_fit(runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen]) -> None:
    given = {
        "lr": 0.01,
        "epochs": 2,
        "batch_size": 9,
        "head": "cosine",
        "freeze": "backbone",
        "augment": "basic",
        "balance": "weights",
        "accumulate": 2,
        "dropout": 0.25,
        "ema": 0.9,
        "label_smoothing": 0.1,
    }
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", seed=4, patience=7, **given)) == 0
    recipe = {**dataclasses.asdict(Recipe(schedule="constant")), **given, "patience": 7}
    whole = {**recipe, "freeze": "none", "strategy": "full"}  # frozen random features are nothing to be better than
    assert [(dataclasses.asdict(seen.recipe), seen.seed) for seen in fits] == [(recipe, 4), (whole, 4)]
    assert {k: result_of(tmp_path / "o")[k] for k in given} == given


@pytest.mark.parametrize("strategy", ["bitfit", "lp-ft:then=bitfit"])
def test_a_strategy_that_could_train_nothing_is_refused_before_anything_is_written(
    strategy: str, data: Path, tmp_path: Path
) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 26 * 26, 3))
    config = AdaptConfig(init="none", data=f"folder:{data}", strategy=strategy, device="cpu", out=str(tmp_path / "o"))
    said = f"bitfit trains biases, and the backbone has none that could train (given '{strategy}', from module)"
    with pytest.raises(MetaftError, match=f"^strategy: {re.escape(said)}$"):
        adapt.run(config, module=module, init="keep")
    assert not (tmp_path / "o").exists()


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
        "optimizer": "adam",
        "schedule": "constant",
        "batch_size": 32,
        "head": "linear",
        "freeze": "none",
        "augment": "none",
        "loss": "cross_entropy",
        "balance": "none",
        "accumulate": 1,
        "dropout": 0.0,
        "label_smoothing": 0.0,
        "skip_bad": False,
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
    assert float(F.cross_entropy(logits, torch.from_numpy(labels[val]))) == pytest.approx(kept, abs=ONE_PASS)


def target_rows(data: Path, runs: dict[str, Path], out: Path) -> Any:
    """The parts of the first draw of a run, as numbers into `files_of(data)`."""
    config = AdaptConfig(**read_toml(out / "config.toml"))
    found = targets.load(config.target.data, ImageInputs(1, 8, 8, polarity="bright-on-black"))
    places = {str(file): i for i, file in enumerate(files_of(data)[0])}
    rows = rows_of(Setup(config, (), found), 0)
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
        "dark": [f"images were fitted to what the start takes: {turned}"],
        "large": [f"images were fitted to what the start takes: resized from 12x12 to 8x8, {turned}"],
    }
    assert torch.equal(fits[0].images, fits[2].images)
    assert torch.equal(fits[0].images, pixels_of(files_of(bright / "train")[0]))
    first = Image.open(files_of(large / "train")[0][0])
    resized = 255 - np.asarray(first.resize((8, 8), Image.Resampling.LANCZOS))
    assert np.array_equal(fits[4].images[0, 0].numpy(), resized)
    tensors = [checkpoint.load(tmp_path / f"{name}-run/classifier.safetensors") for name in ("bright", "dark")]
    assert same(tensors[0][0], tensors[1][0])
    assert [header["inputs"]["invert"] for _, header in tensors] == [False, True]


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
    assert targets.shape_of(f"folder:{data}") == ([3, 84, 84], True)
    made = targets.load(f"folder:{data}")
    assert made.examples.shape == (390, 3, 84, 84)
    assert made.changes == ("resized from 8x8 to 84x84", "388 of 390 from grey to colour")
    Image.open(odd[0]).resize((9, 9)).save(odd[0])
    assert targets.load(f"folder:{data}").changes[0] == "resized from several sizes to 84x84"


def test_training_images_alone_decide_the_polarity(runs: dict[str, Path], tmp_path: Path, capsys: Text) -> None:
    data = write_target(tmp_path / "d", {"train": 2})
    write_target(tmp_path / "d", {"test": 9}, dark=True)
    made = targets.load(f"folder:{data}", ImageInputs(1, 8, 8, polarity="bright-on-black"))
    assert (made.inputs.plain()["invert"], made.changes, made.notes) == (False, (), ())
    assert torch.equal(made.examples, pixels_of(list(map(Path, made.files))))


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


def test_training_images_that_are_there_twice_are_counted_and_so_are_two_labels_of_one(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    data = write_target(tmp_path / "d", {"train": 5, "test": 3})
    for label, copies in ((TARGET[0], 2), (TARGET[2], 1)):
        for number in range(copies):
            shutil.copy(data / "train" / TARGET[0] / f"0{number}.png", data / "train" / label / f"copy{number}.png")
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", epochs=1, shots_per_class=None)) == 0
    notes = result_of(tmp_path / "o")["notes"]
    assert "3 of the 18 images to train on are others again, to the pixel or nearly" in notes
    assert "1 images have another label than the one that they are again" in notes


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
    assert result_of(tmp_path / "o")["notes"] == ["images were fitted to what the start takes: grey to colour"]
    assert fits[0].images.shape == (24, 3, 8, 8)
    assert metaft.load(tmp_path / "o").inputs.plain()["std"] == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(("images", "batch", "epochs"), [(6, 32, 600), (50, 32, 300), (200, 32, 86), (1000, 32, 40)])
def test_a_head_alone_takes_six_hundred_steps_unless_epochs_are_given(images: int, batch: int, epochs: int) -> None:
    alone = Recipe(strategy="head", batch_size=batch)
    assert lasting(alone, images).epochs == epochs
    assert lasting(dataclasses.replace(alone, epochs=7), images).epochs == 7
    assert lasting(dataclasses.replace(alone, augment="basic"), images).epochs == 40, "which is not on kept features"
    assert lasting(Recipe(), images).epochs == 40 and lasting(Recipe(strategy="chosen"), images).epochs is None
    whole = of_whole(lasting(alone, images), images)
    assert (whole.trains, whole.epochs) == ("full", 40), "what was left open is left open for all of it too"
    assert of_whole(dataclasses.replace(alone, epochs=7), images).epochs == 7


@pytest.mark.slow
def test_what_is_compared_with_a_head_has_the_epochs_of_its_own(
    runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen]
) -> None:
    """And a resume, whose settings hold the numbers, has them too."""
    argv = words(runs["maml"], data, tmp_path / "o", strategy="head", epochs=None, batch_size=None, lr=None)
    assert adapt.main(argv) == 0
    expected = [("head", 600, 0.01), ("full", 40, 0.003)]
    assert [(seen.recipe.trains, seen.recipe.epochs, seen.recipe.lr) for seen in fits] == expected
    assert adapt.main(["--resume", str(tmp_path / "o"), "--seeds", "2"]) == 0
    assert [(seen.recipe.trains, seen.recipe.epochs, seen.recipe.lr) for seen in fits[2:]] == expected
