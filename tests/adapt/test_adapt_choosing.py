"""`--strategy chosen`: by cross-validation inside the training images, and by nothing else."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from adapting import each, result_of
from helpers import words, write_target
from torch import Tensor, nn

from metaft import adapt
from metaft.config import AdaptConfig
from metaft.errors import NonFiniteError
from metaft.finetune import choose as choosing
from metaft.finetune import deciding, journal, report, study
from metaft.finetune.choose import candidates_of, choose
from metaft.finetune.examples import Part
from metaft.finetune.fit import Fitted, fit
from metaft.finetune.recipes import as_settled, settled
from metaft.finetune.setup import Setup, rows_of
from metaft.inputs import ImageInputs
from metaft.settings.finetuning import Recipe
from metaft.targets import Target
from metaft.targets.draws import fold

INPUTS = ImageInputs(1, 4, 4)
RECIPE = Recipe(epochs=6, batch_size=8)
ALONE = np.arange(30)
"""Groups of images without duplicates."""


class Guarded:
    """A tensor of which some rows may not be read."""

    def __init__(self, whole: Tensor, allowed: set[int]) -> None:
        self.whole, self.allowed = whole, allowed

    def __getitem__(self, rows: Tensor) -> Tensor:
        assert set(rows.tolist()) <= self.allowed, "a test row was read"
        return self.whole[rows]


def data() -> tuple[Tensor, Tensor]:
    labels = torch.arange(30) % 3
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (40, 1, 4, 4)).astype(np.uint8))
    images[:30] += (labels * 60).to(torch.uint8).view(-1, 1, 1, 1)
    return images, labels


def body() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh())


def test_only_the_training_images_are_read_and_the_choice_is_a_function_of_its_arguments() -> None:
    images, labels = data()
    part = Part(Guarded(images, set(range(30))), torch.arange(30))  # type: ignore[arg-type]
    candidates = candidates_of(RECIPE, published=False, images=30)
    one, other = (choose(body(), INPUTS, part, labels, 3, candidates, groups=ALONE, seed=4) for _ in range(2))
    assert one == other
    assert [row["strategy"] for row in one.table] == ["head", "head", "full"]
    assert one.recipe.passes <= 6
    best = max(one.table, key=lambda row: row["accuracy"])
    assert (one.recipe.trains, one.recipe.rate, one.recipe.epochs) == (best["strategy"], best["lr"], best["epochs"])


def test_a_row_of_the_table_is_the_mean_over_the_folds() -> None:
    images, labels = data()
    candidate = dataclasses.replace(RECIPE, strategy="full", lr=0.01)
    part = Part(images, torch.arange(30))
    [row] = choose(body(), INPUTS, part, labels, 3, [candidate], groups=ALONE, seed=1).table
    curves = []
    for number in range(5):
        train, test = map(torch.from_numpy, fold(labels.numpy(), np.arange(30), 5, number, 1))
        fitted = fit(
            body(), INPUTS, images[train], labels[train], 3, dataclasses.replace(candidate, patience=6), seed=1,
            val_examples=images[test], val_labels=labels[test],
        )  # fmt: skip
        curves.append([(r["val_loss"], r["val_accuracy"]) for r in fitted.curve])
    mean = np.mean(curves, axis=0)  # all folds have six images
    assert row["epochs"] == 6
    assert (row["loss"], row["accuracy"]) == pytest.approx(tuple(mean[-1]))


def test_a_better_candidate_wins_and_one_that_diverges_is_none() -> None:
    images, labels = data()
    nothing = dataclasses.replace(RECIPE, strategy="head", lr=1e-12)
    good = dataclasses.replace(RECIPE, strategy="full", lr=0.03)
    wild = dataclasses.replace(RECIPE, strategy="full", lr=1e30)
    part = Part(images, torch.arange(30))
    made = choose(body(), INPUTS, part, labels, 3, [nothing, wild, good], groups=ALONE, seed=0)
    assert made.recipe.trains == "full" and made.recipe.rate == 0.03
    assert made.table[1]["accuracy"] < made.table[2]["accuracy"]


def test_a_candidate_whose_loss_is_not_finite_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **more: Any) -> Fitted:
        if args[5].strategy == "full":
            raise NonFiniteError("epoch 1: the training loss is nan")
        return fit(*args, **more)

    monkeypatch.setattr(choosing, "fit", failing)
    images, labels = data()
    head, full = (dataclasses.replace(RECIPE, strategy=strategy) for strategy in ("head", "full"))
    made = choose(body(), INPUTS, Part(images, torch.arange(30)), labels, 3, [full, head], groups=ALONE[:30], seed=0)
    assert made.recipe.trains == "head" and made.table[0]["loss"] is None
    assert report.candidate(made.table[0]) == "full at 0.003, 6 epochs: diverged"


def test_published_weights_move_as_was_asked_for_or_by_a_recipe_of_their_own() -> None:
    def moving(**given: Any) -> list[tuple[Any, ...]]:
        recipe = Recipe(batch_size=8, **given)
        _, _, *rest = candidates_of(recipe, published=True, images=30)
        return [(r.trains, r.rate, r.passes, r.anneals, r.clip_norm, r.batch_size) for r in rest]

    assert moving() == [("lp-ft:rise=0.2", lr, 12, "cosine", 1.0, 8) for lr in (3e-4, 1e-3)]
    asked = moving(epochs=50, schedule="linear", clip_norm=2.0)
    assert asked == [("lp-ft:rise=0.2", lr, 50, "linear", 2.0, 8) for lr in (3e-4, 1e-3)]
    heads = candidates_of(Recipe(), published=True, images=30)[:2]
    assert [(r.trains, r.anneals, r.clip_norm) for r in heads] == [("head", "constant", None)] * 2
    for published, strategies in ((True, ["head", "lp-ft:rise=0.2"]), (False, ["head", "full"])):
        one = candidates_of(Recipe(lr=0.02), published=published, images=30)
        assert [(r.trains, r.rate) for r in one] == [(strategy, 0.02) for strategy in strategies]


def test_a_candidate_is_judged_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loss is lowest, a head may have learned little yet."""
    curve = [{"epoch": i + 1.0, "loss": 1.0, "val_loss": v, "val_accuracy": v} for i, v in enumerate([0.5, 0.2, 0.4])]
    monkeypatch.setattr(choosing, "fit", lambda *args, **more: Fitted(body(), nn.Linear(8, 3), curve))
    images, labels = data()
    candidate = dataclasses.replace(RECIPE, strategy="full", epochs=3)
    made = choose(body(), INPUTS, Part(images, torch.arange(30)), labels, 3, [candidate], groups=ALONE, seed=1)
    assert made.table[0]["loss"] == pytest.approx(0.4)
    assert made.recipe == candidate


def test_the_report_says_the_schedule_that_was_chosen(
    runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_moving(recipe: Recipe, **of: Any) -> list[Recipe]:
        return candidates_of(recipe, **{**of, "published": True})[-1:]

    seen = []

    def look(*args: Any, **more: Any) -> Fitted:
        seen.append(args[5])
        return fit(*args, **more)

    monkeypatch.setattr(deciding, "candidates_of", only_moving)
    monkeypatch.setattr(study, "fit", look)
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", strategy="chosen", epochs=3, lr=None)) == 0
    made = result_of(tmp_path / "o")["starts"][0]["chosen"]
    assert (made["schedule"], made["clip_norm"], made["epochs"]) == ("cosine", 1.0, 3)
    first, random = seen
    assert (first.trains, first.rate, first.schedule, first.clip_norm) == ("lp-ft:rise=0.2", 1e-3, "cosine", 1.0)
    assert (random.trains, random.anneals, random.clip_norm) == ("full", "constant", None)
    said = (tmp_path / "o/report.txt").read_text().splitlines()[1]
    assert ", linear head, cosine rate, gradients clipped to 1, batches" in said


def test_with_fewer_than_five_images_of_a_class_the_head_alone_trains() -> None:
    images, labels = data()
    made = choose(
        body(), INPUTS, Part(images, torch.arange(12)), labels[:12], 3,
        candidates_of(RECIPE, published=True, images=12), groups=ALONE[:12], seed=0,
    )  # fmt: skip
    assert made.table == () and made.recipe.trains == "head" and made.recipe.epochs == 6


def chosen(runs: dict[str, Path], data: Path, out: Path, **more: Any) -> list[str]:
    return words(runs["maml"], data, out, strategy="chosen", epochs=3, lr=None, seeds=2, **more)


def test_the_command_says_what_was_chosen(
    runs: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapt.main(chosen(runs, data, tmp_path / "o")) == 0
    result = result_of(tmp_path / "o")
    made = result["starts"][0]["chosen"]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("to choose from: ")]
    assert said[:3] == [f"to choose from: {report.candidate(row)}" for row in made["table"]] and len(said) == 6
    assert result["strategy"] == "chosen" and len(made["table"]) == 3
    assert result["epochs_run"] == made["epochs"]
    assert result["val_images"] == 0, "all that is drawn trains"
    text = (tmp_path / "o/report.txt").read_text()
    how = text.splitlines()[1]
    assert how.startswith(f"fine-tuned ({made['strategy']}, chosen) on images of 8x8 by adam at {made['lr']:g}, ")
    assert f" at {made['lr']:g}, linear head, batches of 7," in how
    assert f" {made['epochs']} epochs, from" in how and "none are set aside" not in text
    assert f"chosen: {made['strategy']} at {made['lr']:g}, {made['epochs']} epochs, by 5-fold cross-validation" in text


def test_duplicates_stay_in_one_fold(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is best at learning images by heart would win where an image is judged that has been learned from."""
    data, parts = write_target(tmp_path / "d", {"train": 8, "test": 2}), []
    for file in sorted((data / "train").rglob("0[0-5].png")):  # a class has 8 images and 14 files
        shutil.copy(file, file.with_name(f"copy of {file.name}"))

    def look(*args: Any, val_examples: Any, **more: Any) -> Fitted:
        parts.append([each(x[torch.arange(len(x))]) for x in (args[2], val_examples)])
        return fit(*args, val_examples=val_examples, **more)

    monkeypatch.setattr(choosing, "fit", look)
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", strategy="chosen", epochs=1, lr=None)) == 0
    assert len(parts) == 3 * 5, "three candidates, five folds; a random start is trained whole, without a choice"
    for train, val in parts:
        assert val and not train & val and len(train | val) == 24


def test_what_is_left_open_from_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No epoch is picked by a few images; gradients are clipped where the weights move, and `lp-ft` probes first."""

    class Librarys:
        architecture: ClassVar = {"name": "torchvision:resnet18"}
        meta: ClassVar = {}

    class Runs:
        architecture: ClassVar = {"name": "conv4"}
        meta: ClassVar = {}

    def of(start: Any, **given: Any) -> tuple[Any, ...]:
        r = settled(Recipe(**given), start)
        return r.trains, r.lr, r.epochs, r.schedule, r.clip_norm, r.patience

    assert of(Librarys) == ("head", 0.003, None, "constant", None, None)
    assert of(Librarys, strategy="full") == ("full", 1e-4, None, "cosine", 1.0, None)
    assert of(Librarys, strategy="lp-ft") == ("lp-ft:share=0.9,rise=0.05", 1e-4, 240, "constant", 1.0, None)
    for few in ("bitfit", "lora:rank=2", "lp-ft:then=lora"):
        assert of(Librarys, strategy=few) == (few, 1e-3, None, "cosine", 1.0, None)
        assert of(Runs, strategy=few) == (few, 0.003, None, "constant", None, 10)
    assert of(Librarys, strategy="lp-ft:then=gradual") == ("lp-ft:then=gradual", 1e-4, None, "cosine", 1.0, None)
    for changed in ({"augment": "basic"}, {"extra": ("mixup",)}):  # of which no features are kept
        assert of(Librarys, strategy="lp-ft", **changed) == ("lp-ft", 1e-4, None, "cosine", 1.0, None)
    assert of(Librarys, strategy="lp-ft", extra=("l2-sp",))[:3] == ("lp-ft:share=0.9,rise=0.05", 1e-4, 240)
    given = {"epochs": 7, "schedule": "linear", "clip_norm": 2.0, "patience": 3, "lr": 0.02}
    for strategy in ("full", "lp-ft"):
        assert of(Librarys, strategy=strategy, **given) == (strategy, 0.02, 7, "linear", 2.0, 3)
    old = Recipe(strategy="full", lr=1e-4, epochs=12, schedule="constant", patience=10)
    assert settled(old, Librarys, resumed=True) == old, "one that began before there was clipping goes on without"  # type: ignore[arg-type]
    lp_ft = Recipe(strategy="lp-ft")
    for asked in (Recipe(), Recipe(strategy="full"), lp_ft, dataclasses.replace(lp_ft, epochs=3)):
        own = settled(asked, Librarys)  # type: ignore[arg-type]
        assert as_settled(asked, own) == own, "the words that began a run go on with it"
        assert as_settled(dataclasses.replace(asked, lr=0.5), own) != own
    assert as_settled(Recipe(strategy="lp-ft"), Recipe(strategy="lp-ft:share=0.5")).strategy == "lp-ft"
    assert of(Runs) == ("full", 0.003, None, "constant", None, 10)
    assert of(Runs, strategy="lp-ft") == ("lp-ft", 0.003, None, "constant", None, 10)


@pytest.mark.parametrize(("patience", "part"), [(None, False), (4, True), (None, True)])
def test_images_are_set_aside_where_they_are_to_judge(patience: int | None, part: bool) -> None:
    """By a recipe's patience, or since the data have such a part."""
    rows, labels = np.arange(60), torch.arange(60) % 3
    parts = {"train": rows[:40], "test": rows[40:50]} | ({"val": rows[50:]} if patience is None and part else {})
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (60, 1, 4, 4)).astype(np.uint8))
    target = Target("t", ("a", "b", "c"), images, labels, parts, (), INPUTS, ())
    config = AdaptConfig(strategy="full", patience=patience, data="folder:x")
    assert (len(rows_of(Setup(config, (), target), 0).val) > 0) == part


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 4])
def test_a_resume_does_not_choose_again_and_ends_with_the_same_bytes(
    after: int, runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert adapt.main(chosen(runs, data, tmp_path / "whole")) == 0
    epochs, real, calls = [0], journal.Journal.epoch, [0]

    def count(self: journal.Journal, *args: Any) -> None:
        real(self, *args)
        epochs[0] += 1
        if epochs[0] == after:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "epoch", count)
        assert adapt.main(chosen(runs, data, tmp_path / "stopped")) == 143

    def counted(*args: Any, **more: Any) -> choosing.Choice:
        calls[0] += 1
        return choose(*args, **more)

    monkeypatch.setattr(deciding, "choose", counted)
    assert adapt.main(["--resume", str(tmp_path / "stopped")]) == 0
    assert calls[0] == (1 if after == 1 else calls[0])
    for name in ("metrics.jsonl", "classifier.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    assert result_of(tmp_path / "whole")["draws"] == result_of(tmp_path / "stopped")["draws"]
