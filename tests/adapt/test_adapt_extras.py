"""`--extra`: what reaches the fits, what is written and said of it, and a run that is stopped and goes on."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from adapting import Seen, Text, result_of
from helpers import adapted, finished, one_line, words
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
