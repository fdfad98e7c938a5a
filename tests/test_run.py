"""The run folder: rows that survive a crash, folders that are never written over; and what is seen of a run."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import time
from pathlib import Path

import pytest

from metaft.errors import CheckpointError, MetaftError
from metaft.runs import folder as module
from metaft.runs.folder import RunFolder, append_row, cut_back, read_rows
from metaft.support.progress import Progress, duration
from metaft.support.taken import fresh_folder


def test_a_new_run_has_its_settings_and_its_folders(tmp_path: Path):
    run = RunFolder.create(tmp_path / "a" / "b", "ways = 5\n")
    assert run.config.read_text() == "ways = 5\n"
    assert run.checkpoints.is_dir()
    assert run.plots.is_dir()
    assert RunFolder.open(tmp_path / "a" / "b").last == run.last


def test_an_empty_folder_may_be_used(tmp_path: Path):
    RunFolder.create(tmp_path, "")


def test_what_is_there_is_never_written_over(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(MetaftError, match=rf"^out: {tmp_path} already exists; choose another --out$"):
        RunFolder.create(tmp_path, "")
    with pytest.raises(MetaftError, match=r"^out: .* already exists"):
        RunFolder.create(tmp_path / "mine.txt", "")
    with pytest.raises(MetaftError, match=r"^out: cannot make .*Not a directory"):
        RunFolder.create(tmp_path / "mine.txt" / "run", "")
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_opening_what_is_no_run(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"is not a run folder: it has no config\.toml"):
        RunFolder.open(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        RunFolder.open(tmp_path / "none")


def test_default_folders_are_numbered(tmp_path: Path):
    base = tmp_path / "run"
    names = []
    for _ in range(4):
        path = fresh_folder(base)
        names.append(path.name)
        path.mkdir()
    assert names == ["run", "run-2", "run-3", "run-4"]


def test_rows_come_back(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    rows = [{"kind": "train", "step": 1, "loss": 0.1 + 0.2}, {"kind": "val", "step": 1, "name": "ü", "list": [1.5, 2]}]
    for row in rows:
        append_row(path, row, sync=True)
    assert read_rows(path) == rows
    assert len(path.read_text().splitlines()) == 2


def test_not_a_number_becomes_null(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    append_row(path, {"step": 1, "ci95": math.nan, "per_step": [1.0, math.nan], "deep": {"x": (math.nan,)}})
    assert read_rows(path) == [{"step": 1, "ci95": None, "per_step": [1.0, None], "deep": {"x": [None]}}]
    RunFolder(tmp_path).write_json(tmp_path / "deep" / "r.json", {"ci95": math.nan})
    assert json.loads((tmp_path / "deep" / "r.json").read_text()) == {"ci95": None}


def test_no_file_has_no_rows(tmp_path: Path):
    assert read_rows(tmp_path / "none") == []
    cut_back(tmp_path / "none", 1, 1)
    assert not (tmp_path / "none").exists()


def test_a_last_row_cut_off_anywhere_is_left_out(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    append_row(path, {"step": 1})
    append_row(path, {"step": 2, "name": "ü", "value": 12.5})
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for length in range(first, len(data) - 1):
        path.write_bytes(data[:length])
        assert read_rows(path) == [{"step": 1}]
    path.write_bytes(data[:-1])  # only the newline is missing: nothing is lost
    assert [r["step"] for r in read_rows(path)] == [1, 2]


def test_rows_go_on_cleanly_after_a_cut_off_one(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    cut_back(path, 5, 5)
    append_row(path, {"kind": "train", "step": 2})
    assert [r["step"] for r in read_rows(path)] == [1, 2]


def test_a_broken_row_in_the_middle_is_an_error(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"m\.jsonl, line 2: not JSON"):
        read_rows(path)


def test_cut_back_knows_training_and_validation_apart(tmp_path: Path):
    """A checkpoint of step 4 may have been written before or after the validation of step 4."""
    path = tmp_path / "m.jsonl"
    rows = [{"kind": kind, "step": step, "x": 1e-7 * step} for step in (2, 4, 6) for kind in ("train", "val")]
    for row in rows:
        append_row(path, row)
    data = path.read_bytes()
    cut_back(path, 6, 6)
    assert path.read_bytes() == data
    cut_back(path, 4, 2)
    assert [(r["kind"], r["step"]) for r in read_rows(path)] == [("train", 2), ("val", 2), ("train", 4)]
    cut_back(path, 0, 0)
    assert path.read_bytes() == b""


def test_rows_on_a_full_disk_are_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "open", full, raising=False)
    with pytest.raises(CheckpointError, match=r"m\.jsonl: cannot be written \(No space left on device\)"):
        append_row(tmp_path / "m.jsonl", {"step": 1})


def test_a_result_that_cannot_be_written_is_a_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "r.json", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be written"):
            RunFolder(tmp_path).write_json(path, {})
    assert os.listdir(tmp_path) == ["file"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watch(file: io.StringIO) -> str:
    bar = Progress("work", 100, "step", done=40, per_unit=3, file=file)
    for done in range(41, 101):
        bar.update(done, loss="0.5")
        if done == 60:
            bar.say("a line")
    bar.close()
    return file.getvalue()


def test_progress_off_a_terminal_is_a_plain_line_for_each_twentieth():
    lines = watch(io.StringIO()).splitlines()
    assert [line.split()[1] for line in lines if line != "a line"] == [f"{n}/100" for n in range(45, 101, 5)]
    assert lines[4] == "a line"
    assert all("loss 0.5 · tasks per s" in line and line.endswith("left") for line in lines if line != "a line")


def test_progress_on_a_terminal_is_one_bar():
    shown = watch(Terminal())
    assert "\r" in shown
    assert "a line\n" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("file", [io.StringIO(), Terminal()])
def test_nothing_shows_of_what_is_done_soon(file: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    bar = Progress("read", 40, "picture", after=3.0, file=file)
    bar.update(20)
    assert file.getvalue().strip() == ""
    now[0] = 4.0
    bar.update(40)
    assert "40/40" in file.getvalue()
    bar.close()


def test_durations():
    assert [duration(s) for s in (0, 59.4, 59.6, 309, 3909, 360000)] == [
        *("0:00", "0:59", "1:00", "5:09", "1:05:09", "100:00:00"),
    ]


@pytest.mark.parametrize("row", ["3", "null", "[1]", "{}", '{"step": "4"}', '{"step": null}', "[" * 9999])
def test_a_row_that_no_run_writes_is_an_error(tmp_path: Path, row: str):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1}}\n{row}\n{{"step": 2}}\n')
    with pytest.raises(CheckpointError, match=r"m\.jsonl, line 2: not "):
        cut_back(path, 1, 1)


def test_rows_that_cannot_be_read_are_an_error(tmp_path: Path):
    (tmp_path / "m.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"m\.jsonl: cannot be read \(Is a directory\)"):
        read_rows(tmp_path / "m.jsonl")
