"""Figures, pictures and report of an adapt run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapting import KEYS, MACRO, Seen, Text, each, figures, result_of
from helpers import (
    ADAPT,
    ONE_PASS,
    TARGET,
    adapted,
    files_of,
    inner_words,
    pixels_of,
    words,
    write_target,
)
from PIL import Image

import metaft
from metaft import adapt
from metaft.finetune import report, results, study
from metaft.finetune.classifier import Classifier
from metaft.finetune.words import plainly
from metaft.runs.folder import read_rows
from metaft.runs.machine import where_measured


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
    assert result["environment"] == where_measured("cpu", torch.get_num_threads())
    assert result["seconds"] == pytest.approx(sum(row["seconds"] for row in read_rows(done / "timing.jsonl")), abs=1e-3)
    assert 0 < result["scratch"]["seconds"] < result["seconds"]


@pytest.mark.parametrize("method", ["finetune", "inner"])
def test_the_figures_of_the_random_start(
    method: str, runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Classifier] = []
    real = study.test
    monkeypatch.setattr(study, "test", lambda classifier, *a, **k: made.append(classifier) or real(classifier, *a, **k))
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
        images = arguments[1]
        assert torch.equal(images[torch.arange(len(images))], pixels_of(files))
        assert arguments[2].tolist() == labels.tolist()
        assert torch.equal(arguments[3], predicted)
        torch.testing.assert_close(arguments[4], probabilities.detach(), rtol=0, atol=ONE_PASS)
        assert arguments[5] == TARGET


def test_starts_and_gains_are_lists_of_which_the_other_figures_are_views(done: Path) -> None:
    result = result_of(done)
    first, second = result["starts"]
    assert [first["name"], second["name"]] == ["meta-learned", "random"]
    for name in (*MACRO, "per_class", "confusion"):
        assert result[name] == first[name]
    for name in (*MACRO, "epochs", "kept_epoch", "seconds"):
        assert result["scratch"][name] == second[name]
    draws = result["draws"]
    gained = [draw["accuracy"] - draw["scratch"]["accuracy"] for draw in draws]
    assert first["mean"]["accuracy"] == pytest.approx(float(np.mean([draw["accuracy"] for draw in draws])))
    assert second["mean"]["accuracy"] == result["mean"]["scratch_accuracy"]
    [gain] = result["gains"]
    assert {k: gain[k] for k in ("of", "over", "draws")} == {"of": "meta-learned", "over": "random", "draws": 3}
    assert gain["mean"] == pytest.approx(float(np.mean(gained)))
    half = 4.302653 * float(np.std(gained, ddof=1)) / 3**0.5  # Student's t of 2 degrees of freedom
    assert gain["ci95"] == pytest.approx(half, rel=1e-5)
    assert (result["gain"]["accuracy"], result["gain"]["ci95"]) == (gain["mean"], gain["ci95"])


def test_a_report_of_three_starts(done: Path) -> None:
    """Nothing is hard-wired to two."""
    result = result_of(done)
    first, second = result["starts"]
    third = {**second, "name": "own values", "accuracy": 0.125}
    gains = [*result["gains"], {"of": "meta-learned", "over": "own values", "mean": -0.25, "ci95": 0.5, "draws": 3}]
    three = {**result, "starts": [first, second, third], "gains": gains}
    text, sentence = report.text(three), plainly(three)
    for line in (
        r"handed over start +12\.50",
        r"gain over random +[+-]",
        r"paired gain over handed over +-25.00 ± 50.00",
    ):
        assert re.search(line, text), line
    assert "A random start, all of it trained, gets" in sentence
    lost = "25.0 points lost (mean of 3 draws, ± 50.0), no difference that these draws can tell from chance."
    assert sentence.endswith(lost)
    assert "The handed over start gets" in sentence
    sure = {**three, "gains": [result["gains"][0], {**gains[1], "ci95": 0.2}]}
    assert plainly(sure).endswith("± 20.0), less, and not by chance.")
    probe, better = {**gains[1], "over": "probe", "ci95": 0.2}, "the probe is the better one here"
    assert plainly({**three, "gains": [gains[0], probe]}).endswith(f"less, and not by chance: {better}.")
    for other in ({"mean": 0.25}, {"ci95": 0.5}):
        assert better not in plainly({**three, "gains": [gains[0], {**probe, **other}]})
    equal = {**three, "gains": [result["gains"][0], {**gains[1], "ci95": 0.0}]}
    assert plainly(equal).endswith("± 0.0), which all draws happen to agree on: no interval, and no word on the next.")


def test_scratch_is_the_last_start() -> None:
    fits = [[{"accuracy": a, "seed": 0, "macro_f1": a, "epochs": 1, "kept_epoch": 1} for a in (0.1, 0.2, 0.3)]]
    entries = [results.entry(name, [fit]) for name, fit in zip(("a", "b", "random"), fits[0], strict=True)]
    gains = [results.gain("a", name, [fits[0][0]], [fits[0][i]]) for i, name in ((1, "b"), (2, "random"))]
    seen = results.views(entries, gains, fits)
    assert (seen["accuracy"], seen["scratch"]["accuracy"]) == (0.1, 0.3)
    assert seen["gain"]["accuracy"] == pytest.approx(-0.2)
    assert seen["draws"][0]["scratch"]["accuracy"] == 0.3


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
        f"{100 * mean['accuracy']:.0f} of 100 new images get the right label from the meta-learned start by strategy",
        f"A random start, all of it trained, gets {100 * mean['scratch_accuracy']:.0f}: ",
        f"{abs(100 * gain['accuracy']):.1f} points {'gained' if gain['accuracy'] >= 0 else 'lost'}",
        "mean of 3 draws",
    ):
        assert part in sentence
    assert adapt.main(["--resume", str(copy)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(text.splitlines()[0])
    assert said.splitlines()[-1] == sentence


def test_a_long_name_has_room(done: Path) -> None:
    result = result_of(done)
    named = [{**start, "name": f"a-start-with-a-long-name-{i}"} for i, start in enumerate(result["starts"])]
    lines = report.text({**result, "starts": named}).splitlines()
    for start in named:
        mean = start["mean"]
        rows = [line for line in lines if line.startswith(f"  {start['name']} start ")]
        assert len(rows) == 2 and rows[1].split("start", 2)[2].split()[0] == f"{100 * mean['accuracy']:.2f}"


def test_the_report_says_how_it_was_fine_tuned(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    assert adapt.main(words(runs["maml"], data, tmp_path / "plain")) == 0
    plain = (tmp_path / "plain/report.txt").read_text(encoding="utf-8").splitlines()[1]
    assert plain.startswith(
        "fine-tuned (full) on images of 8x8 by adam at 0.02, linear head, batches of 7, 3 of at most 3 epochs, from"
    )
    more = {"schedule": "cosine:warmup=0.5", "clip_norm": 2.5, "augment": "basic", "balance": "weights"}
    more |= {"label_smoothing": 0.1, "accumulate": 2, "dropout": 0.25, "ema": 0.9}
    assert adapt.main(words(runs["maml"], data, tmp_path / "more", **more)) == 0
    said = (tmp_path / "more/report.txt").read_text(encoding="utf-8").splitlines()[1]
    assert (
        ", cosine:warmup=0.5 rate, gradients clipped to 2.5, basic augmentation, classes weighted alike, "
        "dropout of 0.25, parameters averaged with decay 0.9, labels smoothed by 0.1, batches of 7, 2 of them in a "
        "step, 3 of" in said
    )


def test_the_confused_class_is_named_in_its_true_classs_row(done: Path) -> None:
    text, result = (done / "report.txt").read_text(encoding="utf-8"), result_of(done)
    for true, row in enumerate(result["confusion"]):
        others = [(-count, found) for found, count in enumerate(row) if found != true and count]
        ending = f"{TARGET[min(others)[1]]} ({-min(others)[0]})" if others else ""
        (line,) = re.findall(rf"^{TARGET[true]} .*$", text, re.MULTILINE)
        assert line.endswith(ending) and ("(" in line) == bool(others)
