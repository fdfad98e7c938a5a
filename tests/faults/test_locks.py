"""Of two commands on one run folder the second is refused, and no kill leaves a lock behind."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from helpers import SINUSOID, options
from victims import FULL, Victim, Whole, completed, one_error, same_tree, tree

from metaft.errors import CheckpointError, MetaftError
from metaft.runs.folder import RunFolder
from metaft.runs.lock import held

FOREVER = options(SINUSOID, iterations=10**6, checkpoint_every=5, eval_every=10**6)


def wait_until_at_work(victim: Victim, out: Path) -> None:
    victim.wait_for(lambda: (out / "checkpoints/last.safetensors").exists())


def holder(victim: Victim) -> str:
    return f"is in use by process {victim.process.pid} on {socket.gethostname()}; wait"


@pytest.mark.slow
@pytest.mark.parametrize("again", ["out", "resume"])
def test_a_second_command_on_a_run_is_refused_and_names_the_first(again: str, tmp_path: Path) -> None:
    out = tmp_path / "r"
    first = Victim("meta_train", [*FOREVER, "--out", str(out)])
    wait_until_at_work(first, out)
    second = Victim("meta_train", [*FOREVER, "--out", str(out)] if again == "out" else ["--resume", str(out)])
    assert second.status() == 2
    one_error(second.said, f"{again}: {out} {holder(first)}")
    first.process.kill()
    assert first.status() == -signal.SIGKILL
    completed("meta_train", ["--resume", str(out), "--iterations", str(3 + last_step(out))])


def last_step(out: Path) -> int:
    from metaft.runs.snapshot import load_snapshot

    folder = RunFolder(out)
    folder.mend()
    return load_snapshot(folder.last).position.step


@pytest.mark.slow
def test_a_second_adapt_on_a_run_is_refused(wholes: dict[str, Whole], tmp_path: Path) -> None:
    """The first one is stopped in the middle, so that the second one meets it for sure."""
    whole, out = wholes["adapt"], tmp_path / "r"
    first = Victim(whole.command, whole.to(out))
    first.wait_for(lambda: (out / "checkpoints/last.safetensors").exists())
    os.kill(first.process.pid or 0, signal.SIGSTOP)
    for argv, field in ((whole.to(out), "out"), (["--resume", str(out)], "resume")):
        second = Victim(whole.command, argv)
        assert second.status() == 2
        one_error(second.said, f"{field}: {out} {holder(first)}")
    os.kill(first.process.pid or 0, signal.SIGCONT)
    assert first.status() == 0, first.said
    same_tree(tree(out), whole.left)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10 if FULL else 1))
def test_of_several_started_at_once_one_runs(attempt: int, wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole, out = wholes["vmap"], tmp_path / "r"
    rivals = [Victim(whole.command, whole.to(out)) for _ in range(4)]
    assert sorted(rival.status() for rival in rivals) == [0, 2, 2, 2], [rival.said for rival in rivals]
    for rival in rivals:
        if rival.status() == 2:
            one_error(rival.said, f"out: {out} ")
    same_tree(tree(out), whole.left)


@pytest.mark.slow
def test_workers_that_outlive_a_killed_run_hold_nothing(wholes: dict[str, Whole], tmp_path: Path) -> None:
    """They are stopped first, so that they cannot end by themselves before the run is resumed."""
    whole, out = wholes["processes"], tmp_path / "r"
    victim = Victim(whole.command, whole.to(out))
    children = Path(f"/proc/{victim.process.pid}/task/{victim.process.pid}/children")
    victim.wait_for(lambda: (out / "metrics.jsonl").exists() and len(children.read_text().split()) >= 2)
    workers = [int(word) for word in children.read_text().split()]
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        victim.process.kill()
        victim.status()
        assert all(Path(f"/proc/{worker}").exists() for worker in workers)
        assert (out / ".metaft.lock").exists()
        completed(whole.command, ["--resume", str(out)])
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
    same_tree(tree(out), whole.left)


# ---- the lock by itself -------------------------------------------------------------------------------------------


def test_it_holds_while_it_is_held_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    for _ in range(2):
        with held(file, "out: x"):
            assert file.read_text() == f"{os.getpid()} {socket.gethostname()}"
            with (
                pytest.raises(MetaftError, match=f"^out: x is in use by process {os.getpid()} on "),
                held(file, "out: x"),
            ):
                pass
            assert file.exists()
        assert os.listdir(tmp_path) == []


def test_a_file_that_a_killed_run_left_locks_nothing(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    file.write_text("1 elsewhere" * 9)
    with held(file, "out: x"):
        assert file.read_text() == f"{os.getpid()} {socket.gethostname()}"
    assert not file.exists()


def test_one_that_was_removed_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run ended between our opening of its file and our lock on it."""
    file, real, times = tmp_path / "lock", fcntl.flock, []

    def flock(number: int, how: int) -> None:
        if not times:
            file.unlink()
        times.append(number)
        real(number, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(file, "out: x"):
        assert len(times) == 2
        with pytest.raises(MetaftError), held(file, "out: x"):
            pass


def test_a_run_that_began_between_look_and_lock_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunFolder.held

    def late(self: RunFolder, field: str) -> Any:
        self.config.write_text("theirs")
        return real(self, field)

    monkeypatch.setattr(RunFolder, "held", late)
    with pytest.raises(MetaftError, match=r"^out: .* already exists"):
        RunFolder.create(tmp_path / "r", "mine")
    assert (tmp_path / "r/config.toml").read_text() == "theirs"


def test_a_forked_process_does_not_hold_it(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    with held(tmp_path / "lock", "out: x"):
        child = os.fork()
        if not child:
            os.read(reads, 1)
            os._exit(0)
    try:
        with held(tmp_path / "lock", "out: x"):
            pass
    finally:
        os.write(writes, b"x")
        os.waitpid(child, 0)
        os.close(reads)
        os.close(writes)


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with held(tmp_path / "lock", "out: x"):
        pass
    assert capsys.readouterr().err == "note: out: x is on a file system without locks; start no second run there\n"


def test_a_folder_that_takes_no_file_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"^out: x cannot be written \(No such file"),
        held(tmp_path / "a/b", "out: x"),
    ):
        pass
