"""Runs beside one another: paired where their tests are the same, and no difference where they are not."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import sinusoid
from scipy import stats

from metaft import compare, meta_train
from metaft.after import compared, comparing
from metaft.config import AdaptConfig, CompareConfig, to_toml
from metaft.errors import CheckpointError
from metaft.plots import compared as picture
from metaft.runs.folder import RunFolder, read_rows, write_rows
from metaft.support import tables
from metaft.types import NORMS

Text = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in a rate alone, and one of other tasks."""
    base = tmp_path_factory.mktemp("runs")
    for name, changes in {"a": {}, "b": {"outer_lr": 0.03}, "c": {"shots": 4, "test_shots": 4}}.items():
        meta_train.run(sinusoid(base / name, **changes))
    return [base / name for name in "abc"]


def adapted(path: Path, accuracies: Sequence[float], *, seed: int = 0, **changes: Any) -> Path:
    """The files of a run of metaft.adapt that comparing reads."""
    mean, ci95 = float(np.mean(accuracies)), None
    if len(accuracies) > 1:
        half = stats.t.interval(0.95, len(accuracies) - 1, mean, stats.sem(accuracies))
        ci95 = float(half[1]) - mean
    path.mkdir()
    (path / "config.toml").write_text(to_toml(AdaptConfig(data="glyphs:Hebrew", seed=seed, seeds=len(accuracies))))
    result = {
        "command": "adapt", "data": "glyphs:Hebrew", "classes": ["a", "b"], "train_images": 10, "val_images": 0,
        "test_images": 40, "folds": 1, "method": "finetune", "strategy": "full",
        "starts": [{"name": "x", "mean": {"accuracy": mean, "ci95": ci95, "draws": len(accuracies)}}],
        "draws": [{"seed": seed + i, "accuracy": value} for i, value in enumerate(accuracies)],
    }  # fmt: skip
    (path / "result.json").write_text(json.dumps({**result, **changes}))
    epochs = [{"draw": d, "start": s, "epoch": e, "loss": 1 / e} for d in (0, 1) for s in ("x", "y") for e in (1.0, 2)]
    write_rows(path / "metrics.jsonl", epochs)
    return path


def test_each_test_episode_is_kept_and_its_mean_is_the_figure(trained: list[Path]) -> None:
    rows, test = read_rows(trained[0] / "episodes.jsonl"), RunFolder(trained[0]).read_result()["test"]
    assert [row["episode"] for row in rows] == list(range(40))
    for mode in NORMS:
        assert np.mean([row[mode] for row in rows]) == pytest.approx(test[mode]["mse"], rel=1e-12)


def test_meta_tests_on_the_same_episodes_are_paired(trained: list[Path]) -> None:
    first, other = comparing.opened(trained[:2])
    each = [[row["inductive"] for row in read_rows(path / "episodes.jsonl")] for path in trained[:2]]
    pairs = np.subtract(each[1], each[0])
    difference = comparing.differences(first, other)[NORMS.index("inductive")]
    assert (difference.figure, difference.paired, difference.why) == ("inductive", 40, "")
    assert difference.value == pytest.approx(pairs.mean(), rel=1e-12)
    assert difference.ci95 == pytest.approx(1.96 * pairs.std(ddof=1) / math.sqrt(40), rel=1e-12)
    # An interval of the pairs, not of two unrelated means.
    apart = math.hypot(first.figures["inductive"].ci95 or 0, other.figures["inductive"].ci95 or 0)
    assert difference.ci95 != pytest.approx(apart, rel=0.01)


def test_other_episodes_are_not_paired_and_other_tasks_not_compared(trained: list[Path], tmp_path: Path) -> None:
    first, other, third = comparing.opened(trained)
    assert {d.value for d in comparing.differences(first, third)} == {None}
    assert "test.shots" in comparing.differences(first, third)[0].why
    assert compared.plainly(first, third) == ["c and a cannot be compared: other tests: test.shots differ"]

    def without(change: str) -> comparing.Difference:
        copy = tmp_path / change
        copy.mkdir()
        for name in ("config.toml", "result.json", "metrics.jsonl", "episodes.jsonl"):
            (copy / name).write_bytes((trained[1] / name).read_bytes())
        if change == "older":
            (copy / "episodes.jsonl").unlink()
        else:
            result = json.loads((copy / "result.json").read_text())
            result["test"]["eval_seed"] += 1
            (copy / "result.json").write_text(json.dumps(result))
        return comparing.differences(first, comparing.opened([trained[0], copy])[1])[0]

    a, b = (run.figures[NORMS[0]] for run in (first, other))
    for change, why in (("older", "older kept no figures of single test episodes"), ("seed", "other test episodes")):
        difference = without(change)
        assert (difference.paired, difference.why) == (0, f"not paired: {why}")
        assert difference.value == pytest.approx(b.value - a.value)
        assert difference.ci95 == pytest.approx(math.hypot(a.ci95 or 0, b.ci95 or 0))
        assert compared.cell(difference, "mse").startswith("(")


def test_draws_are_paired_by_their_seeds(tmp_path: Path) -> None:
    one = adapted(tmp_path / "one", [0.5, 0.6, 0.8])
    two = adapted(tmp_path / "two", [0.7, 0.75, 0.9], seed=1)  # seeds 1, 2 and 3: two of them are in both
    first, other = comparing.opened([one, two])
    (difference,) = comparing.differences(first, other)
    pairs = [0.7 - 0.6, 0.75 - 0.8]
    low, high = stats.t.interval(0.95, 1, np.mean(pairs), stats.sem(pairs))
    assert difference.paired == 2 and difference.value == pytest.approx(np.mean(pairs))
    assert difference.ci95 == pytest.approx((high - low) / 2)
    assert compared.cell(difference, "accuracy") == f"+2.50 ± {50 * (high - low):.2f}"
    assert compared.plainly(first, other)[0].endswith("paired over 2 draws: no difference that can be told from chance")
    alone = comparing.opened([adapted(tmp_path / "three", [0.5]), adapted(tmp_path / "four", [0.4])])
    assert compared.plainly(*alone)[0].endswith("paired over 1 draw: one alone, which tells nothing of the next")
    assert compared.table(alone)[1][-4:] == ["10", "50.00 %", "1", ""]


def test_images_set_aside_for_validation_do_not_make_another_test(tmp_path: Path) -> None:
    one, two = (
        adapted(tmp_path / "one", [0.5, 0.6]),
        adapted(tmp_path / "two", [0.7, 0.75], train_images=8, val_images=2),
    )
    (difference,) = comparing.differences(*comparing.opened([one, two]))
    assert difference.paired == 2
    three = adapted(tmp_path / "three", [0.5, 0.6], train_images=12)
    (difference,) = comparing.differences(*comparing.opened([one, three]))
    assert difference.value is None and difference.why == "other tests: labelled_images differ"


@pytest.mark.parametrize(
    ("values", "measure", "said"),
    [
        ((0.05, 0.01), "accuracy", "better by more than chance"),
        ((-0.05, 0.01), "accuracy", "worse, and not by chance"),
        ((0.05, 0.01), "mse", "worse, and not by chance"),
        ((-0.05, 0.01), "rmse", "better by more than chance"),
        ((-0.05, 0.01), "own", "a difference, and not by chance"),
        ((0.01, 0.01), "accuracy", "no difference that can be told from chance"),
        ((0.0, 0.0), "accuracy", "no difference that can be told from chance"),
        ((-0.07, 0.0), "accuracy", "all happen to agree, which tells nothing of the next"),
    ],
)
def test_what_is_better_depends_on_the_figure(values: tuple[float, float], measure: str, said: str) -> None:
    assert compared._sure(comparing.Difference("x", *values, 9, ""), measure) == said


def test_the_command_prints_and_writes_what_differs(trained: list[Path], in_tmp: Path, capsys: Text) -> None:
    words = [str(path) for path in trained[:2]]
    assert compare.main([*words, "--markdown", "--out", "o"]) == 0
    said = capsys.readouterr().out
    assert "| outer_lr | 0.01 | 0.03 |" in said and "| seed |" not in said and "| out |" not in said
    assert sorted(path.name for path in Path("o").iterdir()) == sorted(
        [f"{name}.{ending}" for name in ("table", "settings") for ending in compare.FORMS]
        + ["words.txt", "compare.json", "curves.png"]
    )
    held = json.loads(Path("o/compare.json").read_text())
    assert [run["settings"] for run in held["runs"]] == [{"outer_lr": 0.01}, {"outer_lr": 0.03}]
    assert [d["paired"] for d in held["differences"]] == [40, 40] and held["measure"] == "mse"
    assert compare.main(words) == 0
    assert Path("o/table.txt").read_text() in capsys.readouterr().out and [*Path().iterdir()] == [Path("o")]


def test_curves_are_of_what_was_validated_and_of_the_first_fit(trained: list[Path], tmp_path: Path) -> None:
    runs = comparing.opened(trained[:2])
    lines, x, y = compared.curves(runs)
    val = [row for row in runs[1].rows if row["kind"] == "val"]
    assert (x, y) == ("meta-step", "validation mse, transductive")
    assert [(p["x"], p["y"]) for p in lines["b"]] == [(row["step"], row["transductive"]["mse"]) for row in val]
    drawn = picture.figure(lines, x, y, "mse").axes[0]
    assert [line.get_label() for line in drawn.lines] == ["a", "b"] and len(drawn.collections) == 2
    pair = comparing.opened([adapted(tmp_path / "m", [0.5]), adapted(tmp_path / "n", [0.4])])
    lines, x, _ = compared.curves(pair)
    assert x == "epoch" and lines["m"] == [{"x": 1.0, "y": 1.0}, {"x": 2.0, "y": 0.5}]


def test_runs_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    paths = []
    for name in ("x/run", "y/run", "z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        paths.append(adapted(tmp_path / name, [0.5]))
    assert [run.label for run in comparing.opened(paths)] == ["x/run", "y/run", f"{tmp_path.name}/z"]


def test_what_is_no_finished_run_is_one_line(trained: list[Path], tmp_path: Path) -> None:
    good = trained[0]
    damaged = {"cut": "{", "list": "[]", "foreign": '{"command": "choose"}', "hollow": '{"command": "meta_train"}'}
    for name, text in {**damaged, "unfinished": None}.items():
        run = tmp_path / name
        run.mkdir()
        (run / "config.toml").write_bytes((good / "config.toml").read_bytes())
        if text is not None:
            (run / "result.json").write_text(text)
        what = {"unfinished": "is not finished", "foreign": "'choose'"}.get(name, "is damaged")
        with pytest.raises(CheckpointError, match=f"^runs: .*{name}.*{what}"):
            compare.run([good, run])


def test_a_signal_leaves_no_folder(
    trained: list[Path], in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    monkeypatch.setattr(compare, "_write", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert compare.main([*map(str, trained[:2]), "--out", "o"]) == 128 + signal.SIGTERM
    assert "nothing was written" in capsys.readouterr().err and [*in_tmp.iterdir()] == []


def test_tables_are_written_for_others_to_read() -> None:
    lines = [["a_b", "50 %"], ["x|y \\", "-1.5 ± 2 {#&$~^<>}"]]
    assert tables.markdown(lines) == "| a_b | 50 % |\n| --- | --- |\n| x\\|y \\ | -1.5 ± 2 {#&$~^<>} |"
    rows = tables.latex(lines).splitlines()
    assert rows[0] == r"\begin{tabular}{ll}" and rows[-1] == r"\end{tabular}"
    assert rows[2] == r"a\_b & 50 \% \\"
    assert rows[4] == (r"x|y \textbackslash{} & $-$1.5 $\pm$ 2 \{\#\&\$\textasciitilde{}\textasciicircum{}$<$$>$\} \\")


def test_no_settings_differ(trained: list[Path], tmp_path: Path, capsys: Text) -> None:
    copy = tmp_path / "copy"
    meta_train.run(sinusoid(copy))
    result = compare.run([trained[0], copy], CompareConfig())
    assert [d["value"] for d in result["differences"]] == [0.0, 0.0]
    assert "all settings are the same" in capsys.readouterr().out
