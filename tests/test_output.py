"""Printing decides over nothing: whatever stdout and stderr are, files are written and the status is the work's."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import IMAGES, SINUSOID, finished, one_thread, options, sinusoid, write_folder, write_target
from helpers import words as adapt_words

from metaft import evaluate, meta_train, predict
from metaft.__main__ import main as metaft
from metaft.config import AdaptConfig, MetaTrainConfig
from metaft.errors import CheckpointError, MetaftError
from metaft.runs.folder import RunFolder
from metaft.support.output import Steady, steady
from metaft.support.progress import Progress
from metaft.support.taken import check_writable


def ascii_stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", line_buffering=True)


def closed_pipe() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", encoding="utf-8")


def full_disk() -> io.TextIOWrapper:
    return open("/dev/full", "w", encoding="utf-8")


def closed_stream() -> io.TextIOWrapper:
    stream = ascii_stream()
    stream.close()
    return stream


STREAMS: dict[str, Callable[[], Any]] = {
    "ascii": ascii_stream, "closed pipe": closed_pipe, "full disk": full_disk, "closed": closed_stream,
    "none": lambda: None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished adapt run whose classes are written in Greek."""
    base = tmp_path_factory.mktemp("adapted")
    data = write_target(base / "data", {"train": 2, "test": 2}, classes=("α", "β", "$x_^{"))
    return finished(adapt_words(Path("none"), data, base / "run"))


def streams(patch: pytest.MonkeyPatch, name: str) -> tuple[Any, Any]:
    both = STREAMS[name](), STREAMS[name]()
    patch.setattr("sys.stdout", both[0])
    patch.setattr("sys.stderr", both[1])
    return both


def let_go(*both: Any) -> None:
    """What cannot be written shall not be said by the garbage collector."""
    for stream in filter(None, both):
        with contextlib.suppress(OSError):
            stream.close()


@pytest.mark.parametrize("name", STREAMS)
def test_a_run_is_finished_and_tested_whatever_it_prints_to(name: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "ü")
    with pytest.MonkeyPatch.context() as patch:
        both = streams(patch, name)
        assert meta_train.main([*options(SINUSOID), "--out", str(run.path)]) == 0
        assert evaluate.main([str(run.path), "--episodes", "2", "--out", str(tmp_path / "e.json")]) == 0
        assert (sys.stdout, sys.stderr) == both
    said = both[0].buffer.getvalue().decode("ascii") if name == "ascii" else None
    let_go(*both)
    assert {path.name for path in run.plots.iterdir()} == {"curves.png", "steps.png", "episode.png"}
    assert json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["command"] == "evaluate"
    assert said is None or "mse ? 95 % interval" in said


@pytest.mark.parametrize("name", STREAMS)
def test_a_run_from_python_likewise(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    with pytest.MonkeyPatch.context() as patch:
        both = streams(patch, name)
        assert meta_train.run(sinusoid(tmp_path / "r"))["command"] == "meta_train"
    let_go(*both)


@pytest.mark.parametrize("name", STREAMS)
def test_labels_are_in_the_file_whatever_becomes_of_the_printed_ones(name: str, adapted: Path, tmp_path: Path) -> None:
    pictures, out = adapted.parent / "data/test", tmp_path / "labels.csv"
    with pytest.MonkeyPatch.context() as patch:
        both = streams(patch, name)
        assert predict.main([str(adapted), str(pictures), "--csv", str(out)]) == 0
    let_go(*both)
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 6
    assert all(row["label_1"] in ("α", "β", "$x_^{") for row in rows)


@pytest.mark.parametrize(("name", "status"), [("closed pipe", 0), ("full disk", 1), ("ascii", 0)])
def test_without_a_file_a_reader_may_leave_but_a_full_disk_is_an_error(
    name: str, status: int, adapted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []
    label_files = predict.label_files
    monkeypatch.setattr(predict, "label_files", lambda *how: (asked.append(1) or one for one in label_files(*how)))
    with pytest.MonkeyPatch.context() as patch:
        stream = STREAMS[name]()
        patch.setattr("sys.stdout", stream)
        assert predict.main([str(adapted), str(adapted.parent / "data/test")]) == status
    let_go(stream)
    assert len(asked) == (1 if name == "closed pipe" else 6)  # nobody would see the others
    lines = capsys.readouterr().err.splitlines()
    reason = "the labels cannot be printed (No space left on device), and no --csv was asked for"
    assert lines == ([f"metaft: error: {reason}"] if status else [])


def test_file_names_that_are_no_text_leave_as_they_came(adapted: Path, tmp_path: Path) -> None:
    """Its bytes for the next command, also where stdout takes less than the rest of the line holds."""
    picture = tmp_path / os.fsdecode(b"\xe9\xff.png")
    picture.write_bytes(next((adapted.parent / "data/test/α").iterdir()).read_bytes())
    for encoding in ("utf-8", "ascii"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", stream)
            assert predict.main([str(adapted), str(picture)]) == 0
        assert stream.buffer.getvalue().startswith(os.fsencode(picture))  # type: ignore[attr-defined]


# ---- where files are written --------------------------------------------------------------------------------------


WRITERS: dict[str, Callable[[Path], None]] = {
    "csv": lambda path: predict.write_csv(path, [], 1),
    "json": lambda path: RunFolder(Path("none")).write_json(path, {}),
}
WRITTEN = {"csv": b"file,label_1,probability_1,error\n", "json": b"{}\n"}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_link_stays_and_the_file_behind_it_is_written(kind: str, there: bool, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    target, link, chain = tmp_path / "deep/real", tmp_path / "link", tmp_path / "chain"
    link.symlink_to("deep/real")
    chain.symlink_to("link")
    if there:
        target.write_text("former")
    check_writable(chain, "csv", tmp_path)
    WRITERS[kind](chain)
    assert chain.is_symlink() and link.is_symlink() and not target.is_symlink()
    assert target.read_bytes() == WRITTEN[kind]
    assert [path.name for path in target.parent.iterdir()] == ["real"]
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "link", "chain"}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_pipe_is_written_to_and_stays_one(kind: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe, "csv", tmp_path)  # which does not wait for a reader
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        WRITERS[kind](pipe)
        assert stat.S_ISFIFO(pipe.lstat().st_mode)
        assert os.read(reader, 100) == WRITTEN[kind]
    finally:
        os.close(reader)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_device_is_written_to_and_stays_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link stands for the device, so that no machine loses one to this test where it fails."""
    null, full = tmp_path / "null", tmp_path / "full"
    null.symlink_to("/dev/null")
    full.symlink_to("/dev/full")

    def replace(*_: Any) -> None:
        raise AssertionError("nothing takes a device's place")

    monkeypatch.setattr("os.replace", replace)
    WRITERS[kind](null)
    with pytest.raises(CheckpointError, match=r"full: cannot be written \(No space left on device\)"):
        WRITERS[kind](full)
    assert {path.name for path in tmp_path.iterdir()} == {"null", "full"}


def test_neither_folders_nor_sockets_nor_links_in_a_circle_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    for name, why in (
        ("folder", "Is a directory"), ("one", "Too many levels of symbolic links"), ("socket", "Operation not support"),
    ):  # fmt: skip
        before = (tmp_path / name).lstat()
        with pytest.raises(CheckpointError, match=f"^csv: .*{name} cannot be written \\({why}"):
            check_writable(tmp_path / name, "csv", tmp_path)
        with pytest.raises(CheckpointError, match=f"{name}: cannot be written \\({why}"):
            predict.write_csv(tmp_path / name, [], 1)
        assert os.path.samestat(before, (tmp_path / name).lstat())


@pytest.mark.parametrize("line", ["{command} | cat > out", "{command} > out", "{command} 2> out", "{command} >> out"])
@pytest.mark.slow
def test_stdout_by_its_name_keeps_what_was_printed(line: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("first\n" if ">>" in line else "")
    name = "err" if "2>" in line else "out"
    code = (
        f"import sys; from pathlib import Path; from metaft.runs.checkpoint import write_atomically; s = sys.std{name};"
        f"s.write('before '); write_atomically(Path('/dev/std{name}'), b'written '); s.write('after')"
    )
    command = f"{sys.executable} -c {shlex.quote(code)}"
    done = subprocess.run(["bash", "-c", line.format(command=command)], cwd=tmp_path, timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "out").read_text().removeprefix("first\n") == "before written after"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_results_hold_paths_that_are_no_text(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / os.fsdecode(b"r\xe9"), "")
    run.write_json(run.result, {"run": str(run.path)})
    assert json.loads(run.result.read_text(encoding="utf-8"))["run"] == str(run.path)


@pytest.mark.slow
def test_class_names_that_are_no_text_or_in_no_font_are_read_tested_and_drawn(in_tmp: Path) -> None:
    odd = os.fsdecode(b"\xe9x")
    write_folder(in_tmp / "data")
    for split, names in (
        ("train", ("猫", odd, "$x_^{")),
        ("val", ("a$b$", "😀", "c")),
        ("test", (odd + "2", "猫 2", "_")),
    ):
        for folder, name in zip(sorted((in_tmp / "data" / split).iterdir()), names, strict=False):
            folder.rename(folder.with_name(name))
    words = options(IMAGES, dataset="folder:data", image_size=8, iterations=1, out="run")
    assert meta_train.main(words) == 0
    assert len(list(Path("run/plots").iterdir())) == 3
    assert evaluate.main(["run", "--episodes", "2"]) == 0
    assert meta_train.main(["--resume", "run", "--iterations", "2"]) == 0


def test_settings_that_a_run_keeps_must_be_text() -> None:
    odd = os.fsdecode(b"\xe9x")
    for make in (lambda: MetaTrainConfig(dataset=f"folder:{odd}"), lambda: AdaptConfig(init=odd)):
        with pytest.raises(MetaftError, match=r"(dataset|init): '.*udce9x' is not text"):
            make()
    assert MetaTrainConfig(out=odd).output.out == odd


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_progress_bar_outlives_its_terminal() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", Terminal())
        with steady():
            bar = Progress("x", 3, "step")
            assert bar.bar is not None
            bar.update(1, loss="±")
            bar.say("a line")
            bar.close()


def test_what_is_put_in_a_streams_place_meanwhile_stays() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", io.StringIO())
        with steady(), steady():
            assert isinstance(sys.stdout, Steady)
            mine = sys.stdout = io.StringIO()
        assert sys.stdout is mine


@pytest.mark.parametrize("words", [[], ["--version"], ["nonsense"], ["meta_train", "--help"], ["predict", "--help"]])
@pytest.mark.parametrize("name", STREAMS)
def test_help_and_usage_likewise(name: str, words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        both = streams(patch, name)
        assert metaft(words) == (2 if words == ["nonsense"] else 0)
    let_go(*both)


@pytest.mark.parametrize(
    "line", ["{command} >&-", "{command} 2>&-", "{command} >&- 2>&-", "{command} | true", "{command} > /dev/full"]
)
def test_a_shell_hears_nothing_of_it(line: str) -> None:
    """To the end of the process, when Python writes what is left. PYTHONIOENCODING is that of `LANG=C` of old."""
    command = f"{sys.executable} -m metaft adapt --help"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    environment.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line.format(command=command)}; exit $?"], capture_output=True, timeout=60,
        env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_files_never_get_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Else what a library writes to stderr would go into a checkpoint."""
    words = " ".join(options(SINUSOID, out=tmp_path / "r"))
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m metaft meta_train {words} <&- >&- 2>&-"], timeout=100, check=False
    )
    assert done.returncode == 0
    lines = (tmp_path / "r/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["step"] for line in lines)
    assert (tmp_path / "r/result.json").exists()
