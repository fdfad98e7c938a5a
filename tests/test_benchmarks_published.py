"""The rows of published figures, how one is measured, and the table of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import mini_imagenet, omniglot, published, table
from benchmarks.published import Budget, Published, Row
from metaft.config import MetaTrainConfig
from metaft.defaults import resolve
from metaft.errors import MetaftError
from metaft.options import flat


def pool_like(dataset: str) -> Any:
    """What `resolve` looks at of a data set."""
    shape = (3, 84, 84) if dataset == "mini-imagenet" else (1, 28, 28)
    classes = {"train": ["a"] * 64}
    return types.SimpleNamespace(name=dataset, loss="cross_entropy", shape=shape, describe=lambda: {"classes": classes})


Text = pytest.CaptureFixture[str]

ALL = {"omniglot": omniglot.ROWS, "mini-imagenet": mini_imagenet.ROWS}

TINY = Row(
    "tiny",
    Published(12.5, 0.5, "nobody, table 0"),
    MetaTrainConfig(
        dataset="glyphs", ways=2, shots=1, query_shots=1, meta_batch=2, width=4, iterations=6, test_query_shots=1,
        eval_every=2, eval_episodes=2, checkpoint_every=2, report=False,
    ),
)  # fmt: skip


@pytest.mark.parametrize("dataset", ALL)
def test_rows_have_names_of_their_own_and_say_where_the_figure_is_from(dataset: str) -> None:
    rows = ALL[dataset]
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.config.data.dataset.removeprefix("unlabelled:") == dataset
        assert 30 < row.published.accuracy < 100
        assert re.search(r" (et al\.|and \w+,) 20\d\d\b", row.published.source)
        assert row.config.outer.iterations is not None
        if row.config.learner.algorithm != "baseline":
            assert f"{row.config.test.test_ways or row.config.task.ways}w{row.config.task.shots}s" in row.name
        assert row.start is None or row.start in rows
        assert not row.run or row.run in {other.name for other in rows}
        given = {k: v for k, v in flat(row.config).items() if v is not None}
        resolve(dataclasses.replace(row.config, model=given.get("model", "resnet12")), pool_like(dataset))


def test_the_papers_protocol_is_in_the_row() -> None:
    (maml,) = (row for row in omniglot.ROWS if row.name == "maml-5w1s")
    values = flat(maml.config)
    shown = {k: values[k] for k in ("inner_steps", "inner_lr", "meta_batch", "iterations", "width", "test_query_shots")}
    assert shown == {
        "inner_steps": 1, "inner_lr": 0.4, "meta_batch": 32, "iterations": 60_000, "width": 64, "test_query_shots": 1,
    }  # fmt: skip
    assert values["adapt_norm"] is False


@pytest.mark.slow
def test_a_row_is_trained_tested_and_written_down_and_a_second_call_adds_to_it(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capfd: Text
) -> None:
    monkeypatch.setattr(published, "EPISODES", 3)
    out = in_tmp / "deep" / "out.jsonl"
    argv = ["--runs", "runs", "--out", str(out), "--device", "cpu"]
    assert published.main([TINY], "", [*argv, "--budget-iterations", "2"]) == 0
    assert published.main([TINY], "", argv) == 0
    assert published.main([TINY], "", argv) == 0  # the run is finished: it is tested, not trained
    short, whole, again = (json.loads(line) for line in out.read_text().splitlines())
    assert [line["iterations"] for line in (short, whole, again)] == [2, 6, 6]
    assert (short["of_iterations"], whole["of_iterations"]) == (2, 6)
    assert whole["episodes"] == 3
    best = in_tmp / "runs/glyphs-tiny-0/checkpoints/best.safetensors"
    assert whole["sha256"] == again["sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
    assert short["sha256"] != whole["sha256"]
    for mode in ("transductive", "inductive"):
        assert whole[mode] == again[mode]
        assert 0 <= whole[mode]["accuracy"] <= 100
    assert whole["seconds"] == again["seconds"] > 0
    assert whole["settings"]["ways"] == 2
    assert "published 12.5 (nobody, table 0)" in capfd.readouterr().err
    other = dataclasses.replace(TINY, config=dataclasses.replace(TINY.config, width=5))
    assert published.main([other], "", argv) == 2  # a run of the former row is not taken for this one's
    assert "width" in capfd.readouterr().err
    assert len(out.read_text().splitlines()) == 3


def test_a_run_without_a_validation_is_not_measured(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    monkeypatch.setattr(published, "command", lambda *_: 143)
    assert published.main([TINY], "", ["--runs", "runs", "--out", "out.jsonl"]) == 0
    assert "not measured" in capsys.readouterr().err
    assert not (in_tmp / "out.jsonl").read_text()


def test_a_row_that_begins_with_another_ones_run_waits_for_it(in_tmp: Path, capsys: Text) -> None:
    second = dataclasses.replace(TINY, name="second", start=TINY)
    budget = Budget()
    assert flat(published.settled(second, budget))["init"] == "runs/published/glyphs-tiny-0"
    assert published.main([second], "", ["--out", "out.jsonl"]) == 2
    assert "second begins with the run of tiny, which is not finished" in capsys.readouterr().err


def test_what_fails_or_cannot_be_asked_for_ends_with_status_2(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    def error(*argv: str) -> str:
        assert published.main([TINY], "", ["--runs", "runs", "--out", "out.jsonl", *argv]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "did you mean 'tiny'" in error("--rows", "tinny")
    assert "budget-minutes must be above 0, got -1" in error("--budget-minutes", "-1")
    monkeypatch.setattr(published, "command", lambda *_: 2)
    assert error() == "error: tiny: training failed, see above"
    assert not (in_tmp / "out.jsonl").read_text()
    assert error("--out", "out.jsonl/x").startswith("error: out: out.jsonl/x cannot be written (")


def test_a_command_is_stopped_when_its_minutes_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waits_for_a_signal.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "time.sleep(float(sys.argv[1]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert published.command(["waits_for_a_signal", "0"], 1.0) == 0
    assert published.command(["waits_for_a_signal", "500"], 0.05) == 143


def test_the_budget_changes_what_is_trained_and_where() -> None:
    budget = Budget(iterations=1, seed=3, data_root="x", runs=Path("r"))
    config = published.settled(TINY, budget)
    assert (config.outer.iterations, config.test.eval_every, flat(config)["seed"]) == (1, 1, 3)
    assert published.folder_of(TINY, budget) == Path("r/glyphs-tiny-1-3")
    assert published.folder_of(TINY, dataclasses.replace(budget, iterations=None)) == Path("r/glyphs-tiny-3")


# --- the table ---


def line(accuracy: float, **changes: Any) -> dict[str, Any]:
    figures = {"accuracy": accuracy, "ci95": 1.0}
    return {
        "dataset": "d", "row": "r", "seed": 0, "iterations": 10, "seconds": 90.0,
        "episodes": 1000, "transductive": figures, "inductive": {"accuracy": 50.0, "ci95": 2.0},
        "published": {"accuracy": 71.0, "ci95": None, "source": "s", "mode": "transductive", "iterations": 1000},
        **changes,
    }  # fmt: skip


def cells(*lines: dict[str, Any]) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.table(lines).splitlines()[2:]]


def test_the_longest_training_of_each_seed_counts() -> None:
    (row,) = cells(line(60.0), line(70.0, iterations=20), line(65.0, iterations=15))
    assert row == ["d", "`r`", "71.0 (s)", "**70.00 ± 1.00**", "50.00 ± 2.00", "20 (1,000)", "1:30", "1000", "1"]
    (row,) = cells(line(60.0), line(69.9))
    assert row[3] == "69.90 ± 1.00"  # not bold: below
    (row,) = cells(line(60.0), line(64.0, seed=1), line(62.0, seed=2), line(90.0, seed=3, iterations=5))
    assert (row[3], row[-1]) == ("62.00 ± 4.97", "3")  # 4.303 * 2 / sqrt(3)
    assert [row[1] for row in cells(line(1.0), line(1.0, row="q"), line(2.0, seed=4))] == ["`r`", "`q`"]


def test_the_mode_of_the_paper_comes_first() -> None:
    inductive = {"accuracy": 71.0, "ci95": 0.5, "source": "s", "mode": "inductive", "iterations": None}
    (row,) = cells(line(60.0, published=inductive))
    assert row[2:5] == ["71.0 ± 0.5 (s)", "50.00 ± 2.00", "60.00 ± 1.00"]


def test_the_table_and_picture_of_a_file(tmp_path: Path, capsys: Text) -> None:
    file, picture = tmp_path / "x.jsonl", tmp_path / "x.png"
    file.write_text("".join(json.dumps(each) + "\n" for each in (line(60.0), line(70.0, iterations=20, seconds=200.0))))
    assert table.main([str(file), "--picture", str(picture)]) == 0
    assert "**70.00" in capsys.readouterr().out
    assert picture.stat().st_size > 5000
    file.write_text('{"row": \n')
    assert table.main([str(file)]) == 2
    assert f"{file}, line 1, is no JSON" in capsys.readouterr().err
    for content in ('{"a": 1}', "[1]"):
        file.write_text(f"{content}\n")
        assert table.main([str(file)]) == 2
        assert f"{file}, line 1, is no measurement: it lacks dataset" in capsys.readouterr().err
    assert table.main([str(tmp_path / "none")]) == 2


def test_the_committed_measurements_are_of_rows_that_there_are() -> None:
    if not published.RESULTS.exists():
        pytest.skip("nothing is committed yet")
    lines = table.read([published.RESULTS])
    assert {line["row"] for line in lines} <= {row.name for rows in ALL.values() for row in rows}
    assert table.table(lines)


def test_a_budget_is_more_than_nothing() -> None:
    with pytest.raises(MetaftError, match="budget-iterations must be above 0, got 0"):
        Budget(iterations=0)
