"""The benchmark of TPE against random search."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import one_thread, write_target

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import search
from metaft import adapt
from metaft.config import AdaptConfig
from metaft.runs.folder import RunFolder
from metaft.trials.over import OVER

Text = pytest.CaptureFixture[str]


def test_of_equal_trials_the_lower_loss_is_chosen() -> None:
    rows = [{"value": v, "loss": loss} for v, loss in ((0.5, 1.0), (None, None), (0.7, 3.0), (0.7, 2.0), (0.7, 2.0))]
    assert search.chosen(rows) is rows[3]


def test_the_bowl_is_measured_once_and_a_second_call_goes_on(in_tmp: Path, capsys: Text) -> None:
    pytest.importorskip("optuna")
    argv = ["--objective", "bowl", "--trials", "4", "--seeds", "2", "--out", "b.jsonl"]
    best = {"lr": 3e-3, "optimizer": "adam", "epochs": 40, "dropout": 0.2}
    assert search.bowl(best) == {"value": 1.0, "loss": 0.0, "test": 1.0}
    assert search.main(argv) == 0
    said, rows = capsys.readouterr().out, Path("b.jsonl").read_text().splitlines()
    assert len(rows) == 16 and [line.count("|") for line in said.splitlines()[2:]] == [8] * 5
    assert search.main(argv) == 0
    assert capsys.readouterr().out == said and Path("b.jsonl").read_text().splitlines() == rows
    assert search.main(["--out", "b.jsonl"]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_trial_of_images_is_one_of_adapt(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    data = f"folder:{write_target(in_tmp / 'data', {'train': 10, 'test': 4}, noise=90)}"
    argv = ["--data", data, "--init", "none", "--trials", "1", "--seeds", "1", "--draws", "2", "--out", "b.jsonl"]
    monkeypatch.setitem(search.SEARCHED, "epochs", [3])
    with one_thread():
        assert search.main(argv) == 0
        row = json.loads(Path("b.jsonl").read_text().splitlines()[0])
        config = AdaptConfig(
            **row["values"], init="none", data=data, seeds=2, strategy="head", patience=10, device="cpu", out="run"
        )
        result = adapt.run(config)
    assert OVER["adapt"].validated(RunFolder(Path("run"))) == (row["value"], row["loss"])
    assert result["starts"][0]["mean"]["accuracy"] == row["test"]
