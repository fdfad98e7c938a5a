"""The benchmark of float32 digits: what it counts, what it refuses, and what it writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import one_thread

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import precision
from metaft.models import fused
from metaft.models.fused import passes


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def small(folder: Path, *more: str) -> list[str]:
    few = ["--cases", "glyphs-5w1s", "--tasks", "2", "--threads", "1", "--chunks", "1", "2", "--orders", "first"]
    return [*few, "--out", str(folder / "p.json"), *more]


def test_it_writes_every_tasks_error_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precision.main(small(tmp_path))
    results = json.loads((tmp_path / "p.json").read_text())
    assert [(row["threads"], row["chunk"], len(row["fused"]["errors"])) for row in results["rows"]] == [
        (1, 1, 2), (1, 2, 2),
    ]  # fmt: skip
    assert all(0 < row[path]["median"] < 0.1 for row in results["rows"] for path in ("fused", "composed"))
    assert results["machine"]["cpu"] and results["commit"]
    table = (tmp_path / "p.md").read_text()
    assert table.count("| `glyphs-5w1s` | first | 1 |") == 2
    assert table.count("| 75x64x14x14 |") == 2 and table in capsys.readouterr().out


@pytest.mark.slow
def test_errors_of_bf16_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    precision.main(small(tmp_path, "--chunks", "1", "--bf16"))
    (row,) = json.loads((tmp_path / "p.json").read_text())["rows"]
    of = {path: row["bf16"][path]["median"] for path in ("fused", "composed")}
    assert all(1e-3 < error < 1 for error in of.values()), "8 bits"
    assert (
        f"| `glyphs-5w1s` | first | 1 | {of['fused']:.2f} | {of['composed']:.2f} |" in (tmp_path / "p.md").read_text()
    )


def test_nothing_is_measured_where_the_two_differ_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fused.moments
    monkeypatch.setattr(passes, "moments", lambda rows: (real(rows)[0] + 1e-6, real(rows)[1]))
    assert precision.main(small(tmp_path)) == 2
    assert "in float64 the fused gradient is off by" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_an_error_is_over_all_parameters_together_and_a_row_passes_by_both_rules() -> None:
    assert precision.errors([torch.tensor([3.0, 5.0])], [torch.tensor([3.0, 4.0]).double()]) == [0.2]
    few = precision.summary([1e-6, 2e-6, 4e-6, float("nan")])
    assert few["above"] == 0.25 and len(few["errors"]) == 4

    def row(median: float, above: float) -> dict[str, float]:
        return {"median": median, "above": above}

    assert precision.passes(row(3e-5, 0.2), row(1e-5, 0.1)) and precision.passes(row(1e-5, 0.0), row(1e-9, 0.0))
    assert not precision.passes(row(3.1e-5, 0.0), row(1e-5, 0.0)) and not precision.passes(row(0, 0.21), row(0, 0.1))


@pytest.mark.parametrize("wrong", [["--tasks", "0"], ["--chunks", "0"], ["--out", "p.txt"]])
def test_bad_input(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert precision.main([*small(tmp_path), *wrong]) == 2
    assert capsys.readouterr().err.startswith("precision: ")
