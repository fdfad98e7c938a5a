"""Several draws of one run, and the gain over the random start."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import scipy.stats
import torch
from adapting import MACRO, Seen, Text, each, result_of
from helpers import (
    inner_words,
    same,
    words,
    write_target,
)

from metaft import adapt
from metaft.finetune import study
from metaft.metrics import mean_t95
from metaft.runs.folder import read_rows


def test_the_gain_is_paired_with_students_interval(
    runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    """Draws of 90, 60 and 75 % beside 50, 40 and 20 %, by hand and by scipy; 4.3027 is Student's t of two degrees."""
    ours, theirs, real = [0.9, 0.6, 0.75], [0.5, 0.4, 0.2], study.test
    figures = iter([0.9, 0.5, 0.6, 0.4, 0.75, 0.2])
    monkeypatch.setattr(study, "test", lambda *a, **k: {**real(*a, **k), "accuracy": next(figures)})
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
    assert [seen.seed for seen in fits] == [2, 2, 3, 3, 4, 4]
