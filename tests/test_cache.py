"""A cache answers for the very content that it was made of, or not at all; and a run needs none."""

from __future__ import annotations

import logging
import mmap
import os
import pwd
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import IMAGES, base_of, options, write_folder
from PIL import Image

from metaft import meta_train
from metaft.inputs import pictures
from metaft.inputs.pictures import fingerprint
from metaft.models import convolution
from metaft.support import cache, large
from metaft.support.cache import cached, keep
from metaft.tasks import folder

Text = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_said", set())
    return tmp_path / "cache"


def draw(path: Path, level: int) -> None:
    """A picture whose file has the same size at every level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6), level, np.uint8)).save(path, compress_level=0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        draw(tmp_path / "data" / name / "0.png", 10)
    return tmp_path / "data"


def first(data: Path) -> int:
    """The level of class a, as the pool has it."""
    return int(folder(data, 6).images[0, 0, 0, 0])


def in_place(file: Path, other: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(other.read_bytes())


def renamed(file: Path, other: Path) -> None:
    shutil.copy2(other, other.with_suffix(".part"))
    os.replace(other.with_suffix(".part"), file)


def copied(file: Path, other: Path) -> None:
    shutil.copy2(other, file)


def linked(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to(other)


def swapped_folder(file: Path, other: Path) -> None:
    (other.parent / "a").mkdir()
    shutil.copy2(other, other.parent / "a" / file.name)
    file.parent.rename(other.parent / "former")
    (other.parent / "a").rename(file.parent)


@pytest.mark.parametrize("change", [in_place, renamed, linked, swapped_folder, copied])
def test_other_pixels_of_the_same_name_size_and_time_are_read(
    change: Callable[[Path, Path], object], data: Path, tmp_path: Path
) -> None:
    file, other = data / "a/0.png", tmp_path / "other/0.png"
    draw(other, 70)
    now = file.stat()
    os.utime(other, ns=(now.st_atime_ns, now.st_mtime_ns))
    assert other.stat().st_size == now.st_size
    assert (first(data), first(data)) == (10, 10)
    change(file, other)
    os.utime(file, ns=(now.st_atime_ns, now.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (now.st_size, now.st_mtime_ns)
    assert first(data) == 70
    in_place(file, other)  # without a change there is none
    assert first(data) == 70


def test_two_files_that_trade_places_are_read(data: Path, tmp_path: Path) -> None:
    draw(data / "b/0.png", 70)
    for name in ("a", "b"):
        os.utime(data / name / "0.png", ns=(1, 1))
    assert first(data) == 10
    (data / "a/0.png").rename(tmp_path / "x")
    (data / "b/0.png").rename(data / "a/0.png")
    (tmp_path / "x").rename(data / "b/0.png")
    assert first(data) == 70


def test_what_is_unchanged_is_not_read_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first(data)
    monkeypatch.setattr(sys.modules["metaft.tasks.folder"], "read_all", lambda *_: pytest.fail("read again"))
    assert first(data) == 10


def test_a_file_that_changes_while_it_is_read_is_read_the_next_time(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, read = (data / "a/0.png").stat(), pictures.read_all

    def meanwhile(*how: Any) -> Any:
        pixels = read(*how)
        draw(data / "a/0.png", 70)
        os.utime(data / "a/0.png", ns=(now.st_atime_ns, now.st_mtime_ns))
        return pixels

    monkeypatch.setattr(sys.modules["metaft.tasks.folder"], "read_all", meanwhile)
    assert first(data) == 10
    monkeypatch.setattr(sys.modules["metaft.tasks.folder"], "read_all", read)
    assert first(data) == 70


@pytest.mark.parametrize(("ago", "wait"), [(0.0, True), (3600.0, False)])
@pytest.mark.parametrize("whole", [False, True])
def test_a_fingerprint_waits_until_a_change_would_show(
    ago: float, wait: bool, whole: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two changes within a tick of the file system's clock have the same time, and some tick once a second or two."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    changed = int((time.time() - ago) * 1e9)
    changed -= changed % 10**9 if whole else 0
    monkeypatch.setattr(time, "time_ns", lambda: changed + int(ago * 1e9))

    status = types.SimpleNamespace(st_size=1, st_mtime_ns=1, st_ctime_ns=changed or 1, st_ino=1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda path: status)
        fingerprint(tmp_path, [tmp_path / "x"])
    assert slept == [pytest.approx((2.0 if whole else 0.02) if wait else 0.0)]


def test_another_decoder_may_read_other_pixels(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(data, [data / "a/0.png"])
    monkeypatch.setattr("PIL.__version__", "0.0")
    assert fingerprint(data, [data / "a/0.png"]) != before


def test_a_file_under_another_ones_name_does_not_answer(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached("x", "one", lambda: {"a": np.ones(3)})
    (one,) = own.iterdir()
    cached("x", "two", lambda: {"a": np.zeros(3)})
    (two,) = set(own.iterdir()) - {one}
    shutil.copy(one, two)
    with caplog.at_level(logging.WARNING):
        assert cached("x", "two", lambda: {"a": np.zeros(3)})["a"].sum() == 0
    assert str(two) in caplog.text


@pytest.mark.parametrize("mapped", [False, True])
def test_any_flipped_bit_of_a_cache_file_is_noticed(
    mapped: bool, own: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the container too: numpy, zipfile and zlib raise all sorts of things. In pieces, where it is mapped."""
    if mapped:
        monkeypatch.setattr(large, "MAPPED_FROM", 1)
        monkeypatch.setattr(cache, "_PIECE", 3)
    wanted = np.arange(40 if mapped else 4, dtype=np.uint8)
    cached("x", "key", lambda: {"a": wanted})
    (path,) = own.iterdir()
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        for bit in (0, 3):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            np.testing.assert_array_equal(cached("x", "key", lambda: {"a": wanted})["a"], wanted)


def test_a_large_array_is_mapped_and_what_is_written_stays_here(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"a": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "b": np.arange(24), "c": np.empty((0, 2), np.uint8)}
    cached("x", "key", lambda: wanted)
    monkeypatch.setattr(large, "MAPPED_FROM", 1)
    for _ in range(2):
        found = cached("x", "key", lambda: pytest.fail("built again"))
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
        assert [isinstance(base_of(found[name]), mmap.mmap) for name in "ab"] == [True, False]
        found["a"] += 1
    (path,) = own.iterdir()
    path.unlink()  # what is mapped lives on
    np.testing.assert_array_equal(found["a"], wanted["a"] + 1)


@pytest.mark.parametrize("cut", [1, 100, 600])
def test_a_file_that_is_cut_short_is_built_again_and_not_mapped(
    cut: int, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "MAPPED_FROM", 1)
    wanted = np.arange(200, dtype=np.uint8)
    cached("x", "key", lambda: {"a": wanted})
    (path,) = own.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    built: list[int] = []
    np.testing.assert_array_equal(cached("x", "key", lambda: built.append(1) or {"a": wanted})["a"], wanted)
    assert built == [1]


# ---- none at all --------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home and without an entry among the users, as a container may have."""

    def unknown(*_: Any) -> None:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "METAFT_CACHE", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("nobody")
def test_without_a_home_nothing_is_cached_and_that_is_said_once(data: Path, capsys: Text) -> None:
    assert cache.cache_folder() is None
    assert (first(data), first(data)) == (10, 10)
    assert capsys.readouterr().err == (
        "metaft: note: nothing is cached: the user has no home folder for it; METAFT_CACHE can name another folder\n"
    )
    shape = convolution.Shape(1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 8, 8, 1, 1, True, False, "torch.float32")
    assert convolution.choose([shape], lambda *_: 1.0, machine="nobody's")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("place", ["file", "file/cache", "/proc/none", "x" * 300])
def test_a_folder_that_cannot_be_written_only_costs_time(
    place: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path / place))
    assert (first(data), first(data)) == (10, 10)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"metaft: note: nothing is cached: {tmp_path / place} cannot be written, ")


def test_a_full_disk_leaves_no_half_file(own: Path, capsys: Text) -> None:
    def no_room(stream: Any) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    keep("x.npz", no_room)
    assert list(own.iterdir()) == []
    assert "cannot be written, No space left on device" in capsys.readouterr().err


@pytest.mark.usefixtures("nobody")
def test_a_run_without_a_home(in_tmp: Path, capsys: Text) -> None:
    write_folder(in_tmp / "data")
    words = options(IMAGES, dataset="folder:data", image_size=8, iterations=1, out="run")
    assert meta_train.main(words) == 0
    assert capsys.readouterr().err.count("nothing is cached") == 1
    assert Path("run/plots/curves.png").exists()


@pytest.mark.parametrize("home", [None, "/proc/none"])
def test_matplotlib_says_nothing_of_a_home_that_is_missing(home: str | None, tmp_path: Path) -> None:
    code = (
        "import pwd\n"
        "def nobody(*_): raise KeyError('uid not found')\n"
        "pwd.getpwuid = nobody\n"
        "from metaft.support.drawing import font_folder\n"
        "import metaft.plots\n"
        "assert font_folder().is_dir()\n"
    )
    leave = ("HOME", "MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in leave}
    environment |= {"TMPDIR": str(tmp_path), **({} if home is None else {"HOME": home})}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
