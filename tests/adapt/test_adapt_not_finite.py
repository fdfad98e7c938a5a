"""Losses and outputs of an adapt run that are not finite."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import Text
from helpers import (
    TARGET,
    adapted,
    inner_words,
    meta_trained,
    words,
)

import metaft
from metaft import adapt
from metaft.finetune import journal, study
from metaft.runs.folder import RunFolder, read_rows


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
    assert len(journal.read(RunFolder(out))[0].fits) == 3
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
