"""The commands that faults befall, and what they leave where none does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import IMAGES, SINUSOID, meta_trained, options, words, write_folder, write_target
from victims import DONE, Whole, completed, end_all, tree

MANY = {"iterations": 60, "checkpoint_every": 3, "eval_every": 20, "log_every": 4}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much of each fault there was: the number of tests says little."""
    if DONE:
        terminalreporter.write_line("faults: " + ", ".join(f"{count} {what}" for what, count in sorted(DONE.items())))


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Each test ends what it started, however it ends itself: a failure is to be seen, and not to hang."""
    yield
    end_all()


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("data") / "target", {"train": 10, "test": 6})


@pytest.fixture(scope="session")
def init(tmp_path_factory: pytest.TempPathFactory, squares: Path) -> Path:
    """A finished meta-training run to adapt."""
    return meta_trained(tmp_path_factory.mktemp("runs") / "init", squares)


@pytest.fixture(scope="session")
def wholes(tmp_path_factory: pytest.TempPathFactory, squares: Path, target: Path, init: Path) -> dict[str, Whole]:
    """One command of each kind: dense tasks under vmap, images in two worker processes, fine-tuning."""
    base = tmp_path_factory.mktemp("wholes")
    in_processes = {"engine": "processes", "threads": 2, "task_chunk": 1, "iterations": 20, "eval_every": 6}
    commands = {
        "vmap": ("meta_train", options(SINUSOID, **MANY)),
        "processes": ("meta_train", options(IMAGES, dataset=f"folder:{squares}", image_size=8, **in_processes)),
        "adapt": ("adapt", words(init, target, base, seeds=3, epochs=5)[:-2]),
    }
    wholes = {}
    completed("meta_train", ["--help"])  # the first one waits for torch to be loaded
    for name, (command, argv) in commands.items():
        out, begin = base / name, time.monotonic()
        victim = completed(command, [*argv, "--out", str(out)])
        wholes[name] = Whole(command, tuple(argv), tree(out), time.monotonic() - begin, victim.moments)
    return wholes
