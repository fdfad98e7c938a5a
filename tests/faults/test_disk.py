"""A full disk or a read-only one is one line, and the checkpoint before it is whole."""

from __future__ import annotations

import os
import random
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from victims import DONE, FULL, Plan, Victim, Whole, go_on, one_error, same_tree, tree

from metaft.errors import CheckpointError
from metaft.runs import checkpoint
from metaft.runs.folder import RunFolder


def mount(folder: Path, *how: str) -> None:
    """A file system in memory, which only root may mount, and not in every container."""
    done = subprocess.run(["mount", "-t", "tmpfs", *how, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of so many KiB; asked again, the same one with another size."""
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def sized(kib: int) -> Path:
        mount(folder, "-o", f"size={kib}k" + (",remount" if mounted else ""))
        mounted.append(kib)
        return folder

    yield sized
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def checkpoints_are_whole(out: Path) -> None:
    run = RunFolder(out)
    for path in (run.last, run.previous, run.best, run.classifier):
        if path.exists():
            checkpoint.load(path)
    if run.best.exists() or run.previous.exists():
        assert run.last.exists()


def test_a_checkpoint_that_finds_no_room_leaves_the_last_one_where_it_is(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "r", "")
    for step in (1, 2):
        run.save_last({"x": torch.ones(99)}, {"step": step})
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, former[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            run.save_last({"x": torch.ones(99)}, {"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert [checkpoint.load(path)[1]["step"] for path in (run.last, run.previous)] == [2, 1]


KIB = range(8, 65, 4) if FULL else (16, 28)  # the runs need from 32 to 60


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vmap", "adapt"])
@pytest.mark.parametrize("kib", KIB)
def test_a_full_disk_is_one_line_and_with_room_again_it_goes_on(
    name: str, kib: int, wholes: dict[str, Whole], small: Callable[[int], Path]
) -> None:
    whole, out = wholes[name], small(kib) / "r"
    victim = Victim(whole.command, whole.to(out))
    if victim.status() == 0:
        assert kib >= 32, victim.said
    else:
        assert victim.status() == 2
        one_error(victim.said, out, "No space left on device")
        DONE["full disks"] += 1
        checkpoints_are_whole(out)
        small(4096)
        go_on(whole.command, whole.to(out), out)
    same_tree(tree(out), whole.left)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(30 if FULL else 2))
@pytest.mark.parametrize("name", ["vmap", "adapt"])
def test_a_limit_on_file_size_likewise(name: str, number: int, wholes: dict[str, Whole], tmp_path: Path) -> None:
    """What can be had without root: any file may be the one that is too large."""
    whole, out = wholes[name], tmp_path / "r"
    largest = max(len(data) for data in whole.left.values() if isinstance(data, bytes))
    limit = random.Random(number).randrange(1, largest)
    victim = Victim(whole.command, whole.to(out), Plan(largest_file=limit))
    assert victim.status() == 2, victim.said
    one_error(victim.said, out, "File too large")
    DONE["limits on file size"] += 1
    checkpoints_are_whole(out)
    go_on(whole.command, whole.to(out), out)
    same_tree(tree(out), whole.left)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.getuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    mount(folder, "-o", "ro")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("out", ["", "r", "a/b"])
def test_a_read_only_folder_is_one_line(out: str, wholes: dict[str, Whole], read_only: Path) -> None:
    for name in ("vmap", "adapt"):
        whole = wholes[name]
        victim = Victim(whole.command, whole.to(read_only / out))
        assert victim.status() == 2
        one_error(victim.said, "out: ", read_only / out, "Read-only" if os.getuid() == 0 else "Permission denied")
    assert list(read_only.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="a run folder that becomes read-only is remounted, which needs root")
@pytest.mark.parametrize("name", ["vmap", "adapt"])
def test_a_run_folder_that_is_read_only_by_now_is_not_resumed(
    name: str, wholes: dict[str, Whole], small: Callable[[int], Path]
) -> None:
    whole, disk = wholes[name], small(4096)
    go_on(whole.command, whole.to(disk / "r"), disk / "r")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    victim = Victim(whole.command, ["--resume", str(disk / "r")])
    assert victim.status() == 2
    one_error(victim.said, f"resume: {disk / 'r'} cannot be written (Read-only file system)")
    same_tree(tree(disk / "r"), whole.left)
