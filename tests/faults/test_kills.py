"""Killed at any moment, a run loses at most the steps since its last checkpoint and ends with the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from victims import DONE, FULL, Plan, Victim, Whole, go_on, same_tree, tree

KILLS = 50 if FULL else 8
NAMES = ("vmap", "processes", "adapt")


def kill(whole: Whole, argv: list[str], out: Path, rng: random.Random, *, by_time: bool) -> None:
    """Start a command and kill it, at a random time of its life or a random moment of what it does to the disk."""
    longest = whole.seconds
    while by_time:
        delay, longest = rng.uniform(0, longest), 0.8 * longest
        victim = Victim(whole.command, argv)
        time.sleep(delay)
        victim.process.kill()
        if victim.status() == -signal.SIGKILL:
            return
        shutil.rmtree(out)  # it was faster
    victim = Victim(whole.command, argv, Plan(kill_at=rng.randint(1, len(whole.moments) - 1)))
    assert victim.status() == -signal.SIGKILL, victim.said


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_moment_and_resumed_it_ends_with_the_same_bytes(
    number: int, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    """Half of the kills are at a random time, half at a random open, write, sync, rename or removal of a file."""
    whole, rng, out = wholes[NAMES[number % 3]], random.Random(number), tmp_path / "r"
    kill(whole, whole.to(out), out, rng, by_time=number // 3 % 2 == 0)
    DONE["kills"] += 1
    go_on(whole.command, whole.to(out), out)
    same_tree(tree(out), whole.left)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES if FULL else NAMES[:1])
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    name: str, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    """Each resume is killed too, after a random number of moments that is enough to get on."""
    whole, rng, out = wholes[name], random.Random(name), tmp_path / "r"
    kills = 0
    for _ in range(99):
        begun = (out / "config.toml").exists()
        argv = ["--resume", str(out)] if begun else whole.to(out)
        victim = Victim(whole.command, argv, Plan(kill_at=rng.randint(20, 60)))
        if victim.status() == 0:
            break
        assert victim.status() == -signal.SIGKILL, victim.said
        kills += 1
        DONE["kills while it resumes"] += 1
    assert kills >= 2
    same_tree(tree(out), whole.left)
