"""`--extra`: what reaches the fits, what is written and said of it, and a run that is stopped and goes on."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from adapting import Seen, Text, result_of
from helpers import adapted, finished, one_line, words, write_target
from test_adapt_resuming import stop_at

from metaft import adapt
from metaft.config import read_toml

EXTRAS = ["l2-sp:alpha=1/8,beta=0", "mixup", "cutmix:alpha=0.5"]


def test_extras_reach_the_fits_and_what_is_said_of_them(
    runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen]
) -> None:
    out = finished(["--extra", *EXTRAS, *words(runs["maml"], data, tmp_path / "o", compare="none")])
    assert [seen.recipe.extra for seen in fits] == [tuple(EXTRAS), tuple(EXTRAS[1:]), tuple(EXTRAS[1:])]
    assert read_toml(out / "config.toml")["extra"] == EXTRAS
    result, report = result_of(out), (out / "report.txt").read_text(encoding="utf-8")
    assert result["extra"] == EXTRAS
    assert (
        ", pulled to its start (l2-sp:alpha=1/8,beta=0), images and labels mixed in pairs (mixup), boxes of other "
        "images pasted in (cutmix:alpha=0.5), batches of 7" in report
    )
    lacking = "trains without l2-sp:alpha=1/8,beta=0: it has no knowledge of a start to keep"
    for label in ("none", "random"):
        assert f"{label} {lacking}" in result["notes"] and f"note: {label} {lacking}" in report
    assert "fitted: the training loss" not in report, "beside that of chance it tells nothing"


def test_a_run_that_is_stopped_goes_on_with_the_same_extras(
    runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    argv = ["--extra", *EXTRAS, *words(runs["maml"], data, tmp_path / "whole")]
    expected, out = adapted(finished(argv)), tmp_path / "o"
    stop_at(monkeypatch, 0, 6, signal.SIGINT)
    assert adapt.main([*argv[:-1], str(out)]) == 130
    copy = shutil.copytree(out, tmp_path / "copy")
    assert adapt.main(["--resume", str(out)]) == 0
    assert adapted(out) == expected
    capsys.readouterr()
    assert adapt.main(["--resume", str(copy), "--extra", "mixup"]) == 2
    one_line(capsys, "extra: a resumed run keeps its settings", "'mixup'", "'cutmix:alpha=0.5'")


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--init", "none", "--extra", "l2-sp"], ["extra: l2-sp is about what a start knows, and a random one"]),
        (["--method", "inner", "--extra", "mixup"], ["extra: --method inner has no such setting", "mixup"]),
    ],
    ids=" ".join,
)
def test_what_an_extra_does_not_go_with_is_said_before_anything_is_written(
    more: list[str], parts: list[str], runs: dict[str, Path], data: Path, tmp_path: Path, capsys: Text
) -> None:
    nothing = {"lr": None, "batch_size": None, "epochs": None} if "inner" in more else {}
    assert adapt.main([*words(runs["maml"], data, tmp_path / "o", **nothing), *more]) == 2
    one_line(capsys, *parts)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("seeds", [1, 2])
def test_accuracy_under_attack_is_reported_of_each_start(
    seeds: int, runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    argv = words(runs["maml"], data, tmp_path / "o", epochs=1, seeds=seeds)
    assert adapt.main(["--robust", "8/255", "2/255", "--extra", "adversarial:eps=2/255,steps=1", *argv]) == 0
    result, report = result_of(tmp_path / "o"), (tmp_path / "o/report.txt").read_text(encoding="utf-8")
    lines = report.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("accuracy, %, on test images that PGD of 10 steps")]
    assert lines[at + 1].split() == ["eps", "0", "2/255", "8/255"]
    for start, line in zip(result["starts"], lines[at + 2 :], strict=False):
        rows = start["robust"]
        assert [row["eps"] for row in rows] == [0.0, 2 / 255, 8 / 255]
        assert rows[0]["accuracy"] == start["accuracy"] >= rows[1]["accuracy"] >= rows[2]["accuracy"]
        assert line.startswith(f"  {start['name']} start ")
        assert f"{100 * start['mean']['robust'][1]['accuracy']:.2f}" in line
        assert ("±" in line) == (seeds > 1)
    assert ", images attacked in each step (adversarial:eps=2/255,steps=1), batches" in report


def test_where_there_is_no_test_part_the_folds_are_attacked(runs: dict[str, Path], tmp_path: Path) -> None:
    target = write_target(tmp_path / "d", {".": 6})
    assert adapt.main(["--robust", "1/255", *words(runs["maml"], target, tmp_path / "o", epochs=1)]) == 0
    for start in result_of(tmp_path / "o")["starts"]:
        assert [row["images"] for row in start["robust"]] == [18, 18]
        assert start["robust"][0]["accuracy"] == pytest.approx(start["accuracy"])


def test_a_teacher_is_another_run_and_the_same_when_the_run_goes_on(
    runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    teacher = finished(words(runs["maml"], data, tmp_path / "teacher", epochs=1))
    other = finished(words(runs["fomaml"], data, tmp_path / "other", epochs=1))
    monkeypatch.chdir(tmp_path)
    argv = ["--extra", "distil:teacher=teacher,t=3", *words(runs["maml"], data, tmp_path / "whole")]
    whole = finished(argv)
    kept = f"distil:teacher={teacher},t=3"
    assert result_of(tmp_path / "whole")["extra"] == [kept]
    assert f", following a teacher ({kept}), batches" in (tmp_path / "whole/report.txt").read_text(encoding="utf-8")
    out = tmp_path / "o"
    stop_at(monkeypatch, 0, 6)
    assert adapt.main([*argv[:-1], str(out)]) == 143
    copy = shutil.copytree(out, tmp_path / "copy")
    monkeypatch.chdir("/")  # from where a report shows other paths
    assert adapt.main(["--resume", str(out)]) == 0
    for file in ("metrics.jsonl", "classifier.safetensors"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    shutil.copy(other / "classifier.safetensors", teacher / "classifier.safetensors")
    capsys.readouterr()
    assert adapt.main(["--resume", str(copy)]) == 2
    one_line(capsys, f"extra: the teacher of {copy} changed since it began")
    assert adapt.main([*words(runs["maml"], data, tmp_path / "no"), "--extra", "distil:teacher=/none/x"]) == 2
    one_line(capsys, "extra: teacher: ", "/none/x")
    assert not (tmp_path / "no").exists()
