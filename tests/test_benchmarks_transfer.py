"""The benchmark of what scores tell of fine-tuning."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import meta_trained, one_thread, write_folder, write_target
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import transfer
from metaft import adapt
from metaft.config import AdaptConfig

Text = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_rank_correlation() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, (2, 9)).astype(float)
        found: Any = spearmanr(a, b)
        assert transfer.spearman(a, b) == pytest.approx(found.statistic)
    assert math.isnan(transfer.spearman([1, 1, 1], [1, 2, 3]))
    assert transfer.mean([1.0, 2.0]) == 1.5 and transfer.mean([1.0, None]) is None


@pytest.mark.slow
def test_accuracy_is_that_of_adapt_and_a_second_call_goes_on(
    in_tmp: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares = write_folder(in_tmp / "squares")
    runs = [meta_trained(in_tmp / name, squares, seed=seed) for seed, name in enumerate(("one", "two"))]
    data = f"folder:{write_target(in_tmp / 'target', {'train': 8, 'test': 6}, noise=90)}"
    argv = ["--data", f"t={data}", "--shots", "6", "--seeds", "2", "--starts", *map(str, runs), "none"]
    assert transfer.main([*argv, "--out", "t.jsonl"]) == 0
    capsys.readouterr()  # the run's own lines
    assert transfer.main([*argv, "--out", "t.jsonl"]) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in Path("t.jsonl").read_text().splitlines()]
    assert [(row["start"], row["seed"]) for row in rows] == [(n, s) for n in ("one", "two", "none") for s in (0, 1)]
    result = adapt.run(AdaptConfig(init=str(runs[1]), data=data, shots_per_class=6, seed=1, probe=False, out="o"))
    assert rows[3]["accuracy"] == result["accuracy"]
    assert "| *rank correlation* | |" in said and "t, 6 images per class, 3 starts" in said
    capsys.readouterr()
    monkeypatch.setattr(transfer, "one", lambda *_: pytest.fail("measured again"))
    assert transfer.main([*argv, "--out", "t.jsonl"]) == 0
    assert capsys.readouterr().out == said
    monkeypatch.undo()
    assert transfer.main(["--data", f"x=folder:{in_tmp}/none", "--starts", "none", "--out", f"{in_tmp}/t.jsonl"]) == 2
