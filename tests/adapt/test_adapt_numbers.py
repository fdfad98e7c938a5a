"""`--loss mse`: labels of a table that are numbers."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapting import Text, result_of
from helpers import finished, one_line, words
from PIL import Image
from torch import Tensor, nn

from metaft import adapt, load, predict, targets
from metaft.errors import MetaftError
from metaft.finetune import report, study
from metaft.finetune.choose import choose
from metaft.finetune.examples import Part
from metaft.finetune.fit import fit
from metaft.finetune.numbers import number_scores, pooled_numbers
from metaft.finetune.probe import PENALTIES, probe
from metaft.finetune.report import draw_pictures
from metaft.finetune.warned import warnings_of_numbers
from metaft.inputs import ImageInputs
from metaft.settings.finetuning import Recipe
from metaft.views import VIEWS
from metaft.views.base import Missing
from metaft.views.subject import open_subject

INPUTS = ImageInputs(1, 4, 4)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """30 grey pictures of 8 x 8, as bright as their number says."""
    lines = ["path,label"]
    for i in range(30):
        number = 40 + 5 * i
        noise = np.random.default_rng(i).integers(-8, 9, (8, 8))
        Image.fromarray((number + noise).clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{number / 10}")
    file = tmp_path / "table.csv"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def command(init: Path, target: str, out: Path, **changes: Any) -> list[str]:
    """A command line for a target of numbers."""
    argv = words(init, Path("T"), out, **{"loss": "mse", "shots_per_class": None, **changes})
    return [word.replace("folder:T", target) for word in argv]


def body() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh())


def data() -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (24, 1, 4, 4)).astype(np.uint8))
    return images, 7 + 3 * images.double().mean((1, 2, 3)) / 255


def test_figures_are_their_definitions_and_folds_are_as_one_part() -> None:
    labels, predicted = np.array([1.0, 2.0, 4.0, 9.0]), np.array([2.0, 2.0, 1.0, 11.0])
    figures = number_scores(labels, predicted)
    assert figures["mae"] == pytest.approx(6 / 4)
    assert figures["rmse"] == pytest.approx((14 / 4) ** 0.5)
    assert figures["r2"] == pytest.approx(1 - 14 / 38)
    assert figures["predictions"] == [[1, 2], [2, 2], [4, 1], [9, 11]]
    parts = [number_scores(labels[i::2], predicted[i::2]) for i in range(2)]
    together = pooled_numbers(parts)
    assert {k: v for k, v in together.items() if k != "predictions"} == pytest.approx(
        {k: v for k, v in figures.items() if k != "predictions"}
    )
    assert number_scores(np.ones(3), np.zeros(3))["r2"] is None, "labels that are all alike have no spread"
    assert number_scores(np.full(6, 0.1), np.full(6, 0.2))["r2"] is None, "though their mean is another number"


@pytest.mark.slow
def test_a_head_on_fixed_features_comes_to_the_least_squares_in_units_of_the_labels() -> None:
    images, labels = data()
    recipe = Recipe(epochs=3000, batch_size=24, lr=0.02, strategy="head", schedule="cosine", loss="mse")
    fitted = fit(body(), INPUTS, images, labels, 0, recipe)
    with torch.no_grad():
        features = body()(INPUTS(images)).double()
        predicted = fitted.head(fitted.body(INPUTS(images))).squeeze(-1).double()
    design = torch.cat([features, torch.ones(24, 1)], 1)
    best = design @ torch.linalg.lstsq(design, labels[:, None]).solution
    assert float((predicted - best.squeeze(-1)).abs().max()) < 2e-3 * float(labels.std())


def test_the_units_of_the_labels_change_nothing_but_the_units() -> None:
    images, labels = data()
    recipe = Recipe(epochs=3, batch_size=8, strategy="full", loss="mse")
    some, others = images[:16], images[16:]
    fits = [
        fit(body(), INPUTS, some, y[:16], 0, recipe, val_examples=others, val_labels=y[16:])
        for y in (labels, 1000 * labels - 5)
    ]
    one, other = (fitted.head(fitted.body(INPUTS(images))).detach().double() for fitted in fits)
    assert torch.allclose(other, 1000 * one - 5, rtol=1e-4)
    for mine, theirs in zip(fits[0].curve, fits[1].curve, strict=True):
        assert theirs["val_loss"] == pytest.approx(mine["val_loss"], rel=1e-3)
        assert theirs["val_rmse"] == pytest.approx(1000 * mine["val_rmse"], rel=1e-3)
    spread = float(labels[:16].std(correction=0))
    assert fits[0].curve[0]["val_rmse"] == pytest.approx(fits[0].curve[0]["val_loss"] ** 0.5 * spread)


def test_labels_that_are_all_alike_are_no_reason_to_fail() -> None:
    images, _ = data()
    recipe = Recipe(epochs=1, batch_size=24, loss="mse")
    labels = torch.full((24,), 0.1, dtype=torch.float64)  # whose deviation is 1e-17 by rounding
    labels[-1] = 1000.0
    fitted = fit(body(), INPUTS, images[:6], labels[:6], 0, recipe, val_examples=images[6:], val_labels=labels[6:])
    assert fitted.curve[0]["val_rmse"] == pytest.approx(999.9 / 18**0.5, rel=1e-2)


def test_the_first_step_begins_at_the_mean_of_the_labels() -> None:
    images, labels = data()
    fitted = fit(body(), INPUTS, images, labels, 0, Recipe(epochs=1, batch_size=24, lr=1e-9, loss="mse"))
    assert fitted.curve[0]["loss"] == pytest.approx(1.0, rel=1e-5)  # in units of the variance


def test_the_probe_is_ridge_regression_with_the_penalty_of_the_least_leave_one_out_error() -> None:
    images, labels = data()
    fitted = probe(body(), INPUTS, images, labels, 0)
    with torch.no_grad():
        x = body()(INPUTS(images)).double().numpy()
        mine = fitted.head(fitted.body(INPUTS(images))).squeeze(-1).double().numpy()
    y = labels.numpy()

    def ridge(x: np.ndarray, y: np.ndarray, penalty: float, at: np.ndarray) -> np.ndarray:
        centre, level = x.mean(0), y.mean()
        weight = np.linalg.solve((x - centre).T @ (x - centre) + penalty * np.eye(5), (x - centre).T @ (y - level))
        return (at - centre) @ weight + level

    def left_out(penalty: float) -> float:
        rest = [np.arange(24) != i for i in range(24)]
        return sum(float((ridge(x[r], y[r], penalty, x[~r]) - y[~r])[0] ** 2) for r in rest)

    expected = ridge(x, y, min(PENALTIES, key=left_out), x)
    assert np.abs(mine - expected).max() < 1e-4 * y.std()


def test_a_choice_is_by_the_loss() -> None:
    images, _ = data()
    with torch.no_grad():
        labels = 5 * body()(INPUTS(images))[:, 0].double() + 3  # of which there is something to learn
    nothing = Recipe(epochs=40, batch_size=8, strategy="head", lr=1e-9, loss="mse")
    good = dataclasses.replace(nothing, lr=0.01)
    made = choose(
        body(), INPUTS, Part(images, torch.arange(24)), labels, 0, [nothing, good], groups=np.arange(24), seed=0
    )
    assert made.recipe.lr == 0.01
    assert made.table[1]["loss"] < made.table[0]["loss"] and "accuracy" not in made.table[0]


def test_warnings_of_numbers() -> None:
    row = {"epoch": 1.0, "loss": 0.1}

    def said(predicted: list[float], **more: float) -> list[str]:
        figures = number_scores(np.array([1.0, 2.0, 3.0]), np.array(predicted))
        return warnings_of_numbers({**figures, "kept_epoch": 1}, [{**row, **more}])

    assert said([1.0, 2.0, 3.5]) == []
    assert said([2.0, 2.0, 2.0]) == ["every test image is predicted to be 2"]
    [bad] = said([3.0, 2.0, 1.0])
    assert bad.startswith("R² is -3.00")
    [over] = said([1.0, 2.0, 3.5], val_loss=0.9)
    assert over.startswith("over-fitted")
    [under] = said([1.0, 2.0, 3.5], loss=0.95)
    assert under.startswith("under-fitted")


@pytest.mark.slow
def test_the_command_learns_numbers_and_predict_gives_them(
    runs: dict[str, Path], table: Path, tmp_path: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw_pictures", draw_pictures)
    out, file = tmp_path / "o", tmp_path / "labels.csv"
    argv = command(runs["maml"], f"csv:{table}", out, epochs=20, seeds=2)
    assert adapt.main([a for a in argv if a != "--no-probe"]) == 0
    result, shown = result_of(out), capsys.readouterr().out
    assert result["folds"] == 3 and result["test_images"] == 30 and result["classes"] == []
    assert {start["name"] for start in result["starts"]} == {"meta-learned", "probe", "random"}
    probe_of = next(start for start in result["starts"] if start["name"] == "probe")
    assert probe_of["r2"] > 0.6, "brightness is nearly a linear function of such features"
    for start in result["starts"]:
        pairs = np.array(start["predictions"])
        assert sorted(pairs[:, 0]) == [(40 + 5 * i) / 10 for i in range(30)], "each image is tested once"
        assert start["rmse"] == pytest.approx(np.sqrt(np.square(pairs[:, 0] - pairs[:, 1]).mean()))
        assert start["mean"]["draws"] == 2
    gain = result["gains"][0]
    assert gain["mean"] == pytest.approx(probe_of["mean"]["rmse"] - result["starts"][0]["mean"]["rmse"])
    assert "numbers" in shown and "MAE" in shown and "R²" in shown
    means = [start["mean"]["rmse"] for start in result["starts"]]
    assert f"predictions for new images have an RMSE of {means[0]:.4g} from" in shown
    assert f"ridge regression on the same start's features, gets an RMSE of {means[1]:.4g}:" in shown
    assert f"all of it trained, gets an RMSE of {means[2]:.4g}: {abs(means[2] - means[0]):.3g} " in shown
    assert "of 3-fold cross-validation" in shown
    assert {path.name for path in (out / "plots").iterdir()} == {"scatter.png", "learning.png"}
    pictures = [str(tmp_path / f"{i}.png") for i in (0, 29)]
    assert predict.main([str(out), *pictures, "--csv", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    classifier = load(out)
    expected = classifier.numbers(torch.cat([classifier.read(path) for path in pictures])).tolist()
    assert [float(line.split("\t")[1]) for line in lines] == pytest.approx(expected, rel=1e-5)
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row.keys() for row in rows] == [{"file", "number", "error"}] * 2
    assert [float(row["number"]) for row in rows] == expected
    with pytest.raises(MetaftError, match="predicts numbers"):
        classifier.names(classifier.read(pictures[0]))
    assert predict.main([str(out), *pictures, "--top", "2"]) == 2
    assert "top must be at most the one number" in one_line(capsys)


def test_parts_of_a_table_need_not_hold_the_same_numbers(table: Path) -> None:
    lines = table.read_text().splitlines()
    parts = ["part", *["train"] * 20, *["test"] * 10]
    table.write_text("\n".join(f"{line},{part}" for line, part in zip(lines, parts, strict=True)))
    target = targets.load(f"csv:{table}", numbers=True)
    assert target.class_names == () and target.labels.dtype == torch.float64
    rows = target.rows(shots_per_class=None, seed=0)
    assert target.labels[torch.from_numpy(rows.test)].tolist() == [(40 + 5 * i) / 10 for i in range(20, 30)]
    assert len(rows.train) == 16 and len(rows.val) == 4


@pytest.mark.parametrize(("more", "error"), [([], "loss: mse is for labels"), (["--head", "cosine"], "head: cosine")])
def test_that_it_is_for_numbers_is_said_before_a_start_is_looked_for(
    more: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no run
    assert adapt.main(["--data", "glyphs:Hebrew", "--loss", "mse", *more]) == 2
    assert error in one_line(capsys)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"label": "warm"}, "line 4: label 'warm' is no number, as --loss mse wants it"),
        ({"label": "nan"}, "line 4: label 'nan' is no number"),
        ({"label": "1e999"}, "line 4: label '1e999' is no number"),
        ({"label": "1e39"}, "line 4: label '1e39' is more than float32 holds, 3.40282e+38"),
        ({"label": "1_0"}, "line 4: label '1_0' is no number"),
        ({"label": "same"}, "1 different numbers to train on, fewer than 2"),
        ({"label": "alike"}, "1 different numbers to train on, fewer than 2"),
        ({"label": "offset"}, "differ by too little for their size in float32, 1e+09 with a deviation of 8.66; take"),
        ({"shots_per_class": 2}, "are numbers, of no class (given 2)"),
        ({"head": "cosine"}, "head: cosine is for classes, and --loss mse for numbers"),
        ({"balance": "weights"}, "balance: weights is for classes"),
        ({"label_smoothing": 0.1}, "label_smoothing: 0.1 is for classes"),
        ({"robust": "2/255"}, "robust: accuracy is of classes, and --loss mse for numbers (given '2/255')"),
        ({"extra": "cutmix:alpha=2"}, "extra: cutmix:alpha=2 is for classes"),
        ({"loss": "mae"}, "loss"),
        ({"data": "folder:PATH"}, "loss: mse is for labels that are numbers, as csv:FILE may have; folder:"),
        ({"data": "glyphs:Hebrew"}, "loss: mse is for labels that are numbers, as csv:FILE may have; glyphs:Hebrew"),
    ],
)
def test_what_goes_with_classes_alone_is_refused(
    change: dict[str, str], error: str, runs: dict[str, Path], data: Path, table: Path, tmp_path: Path, capsys: Text
) -> None:
    lines = table.read_text().splitlines()
    if (label := change.pop("label", None)) is not None:
        lines[3] = f"2.png,{label}"
        if label == "same":
            lines[1:] = [f"{i}.png,7" for i in range(30)]
        elif label == "alike":
            parts = ["train" if i < 20 else "test" for i in range(30)]
            lines = ["path,label,part", *(f"{i}.png,{max(7, i - 12)},{part}" for i, part in enumerate(parts))]
        elif label == "offset":
            lines[1:] = [f"{i}.png,{10**9 + i}" for i in range(30)]
        table.write_text("\n".join(lines))
    target = change.pop("data", f"csv:{table}").replace("PATH", str(data))
    assert adapt.main(command(runs["maml"], target, tmp_path / "o", **change)) == 2
    assert error in one_line(capsys)
    assert not (tmp_path / "o").exists()


def test_numbers_that_are_taken_for_classes_are_noted(table: Path) -> None:
    lines = ["path,label", *(f"{i}.png,{i % 15}.5" for i in range(30))]
    table.write_text("\n".join(lines))
    assert not [note for note in targets.load(f"csv:{table}").notes if "numbers" in note], "few may well be classes"
    table.write_text("\n".join(["path,label", *(f"{i}.png,{i}.5" for i in range(30))]))
    assert "its 30 labels are numbers, taken for names of classes; see --loss mse" in targets.load(f"csv:{table}").notes


def test_a_resume_ends_with_the_same_bytes(
    runs: dict[str, Path], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert adapt.main(command(runs["maml"], f"csv:{table}", tmp_path / "whole", epochs=3)) == 0
    epochs, real = [0], study.Journal.epoch

    def count(self: study.Journal, *args: Any) -> None:
        real(self, *args)
        epochs[0] += 1
        if epochs[0] == 2:  # in the first fit, whose classifier is kept
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(study.Journal, "epoch", count)
        assert adapt.main(command(runs["maml"], f"csv:{table}", tmp_path / "stopped", epochs=3)) == 143
    assert adapt.main(["--resume", str(tmp_path / "stopped")]) == 0
    for name in ("metrics.jsonl", "classifier.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    one, other = (
        [{k: v for k, v in start.items() if k != "seconds"} for start in result_of(tmp_path / name)["starts"]]
        for name in ("whole", "stopped")
    )
    assert one == other


def test_a_run_of_numbers_without_snapshots_has_no_plane_since_its_head_is_in_their_unit(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaft.finetune.report.draw_pictures", lambda *_: [])
    run = finished(command(Path("none"), f"csv:{table}", tmp_path / "run", epochs=1, snapshots=0))
    subject = open_subject(str(run))
    subject.landscape = True
    view = VIEWS["landscape"].of(subject)
    assert isinstance(view, Missing) and "no snapshots of its training" in view.why
