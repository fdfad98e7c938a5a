"""The command line, default folders and progress of metaft.adapt."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import numpy as np
import torch
from adapting import Text
from helpers import (
    adapted,
    inner_words,
    words,
)

from metaft import adapt
from metaft.__main__ import main as command_line
from metaft.config import read_toml
from metaft.options import options as options_of


def test_the_command_line_wins_over_the_file_whose_run_it_makes_again(
    tmp_path: Path, done: Path, runs: dict[str, Path], data: Path
) -> None:
    file = done / "config.toml"
    assert adapt.main(["--config", str(file), "--out", str(tmp_path / "again")]) == 0
    assert adapted(tmp_path / "again") == adapted(done)
    argv = ["--config", str(file), "--epochs", "1", "--seeds", "1", "--head", "cosine", "--out", str(tmp_path / "o")]
    assert adapt.main(argv) == 0
    config = read_toml(tmp_path / "o/config.toml")
    assert config == {**read_toml(file), "epochs": 1, "seeds": 1, "head": "cosine"}


def test_default_folders_are_numbered_and_tell_runs_apart(in_tmp: Path, runs: dict[str, Path], data: Path) -> None:
    argv = words(runs["maml"], data, in_tmp, epochs=1)[:-2]
    for extra in ([], [], ["--seed", "3"]):
        assert adapt.main([*argv, *extra]) == 0
    (name,) = {re.sub(r"-maml-\d(-2)?$", "", path.name) for path in (in_tmp / "runs").iterdir()}
    assert name.startswith("adapt-folder-")
    assert "/" not in name
    ends = [path.name.removeprefix(f"{name}-") for path in sorted((in_tmp / "runs").iterdir())]
    assert ends == ["maml-0", "maml-0-2", "maml-3"]


def test_progress_is_plain_lines_off_a_terminal(
    runs: dict[str, Path], data: Path, tmp_path: Path, capsys: Text
) -> None:
    assert adapt.main(words(runs["maml"], data, tmp_path / "r")) == 0
    said = capsys.readouterr()
    assert "\r" not in said.err
    assert "\x1b" not in said.err
    for pattern in (
        r"^folder:.*Ziel ü · 3 classes · finetune from .*/maml on cpu · run folder .*/r$",
        r"^adapt 6/6 · loss \d+\.\d{3} · \d+:\d\d left$",
    ):
        assert re.search(pattern, said.err, re.MULTILINE), pattern
    (line,) = re.findall(r"^next: +(.*) IMAGE_OR_FOLDER\.\.\.$", said.out, re.MULTILINE)
    assert shlex.split(line) == ["python", "-m", "metaft.predict", str(tmp_path / "r")]


def test_help_lists_every_field(capsys: Text) -> None:
    assert command_line(["adapt", "--help"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for name in options_of(adapt.Arguments):
        assert re.search(rf"^  --{name.replace('_', '-')}\b", said.out, re.MULTILINE), name


def test_a_whole_run_leaves_the_global_state_alone(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Random generators, threads, grad mode, default type: as the user's process had them; and none of it matters."""

    def state() -> tuple[object, ...]:
        numpy_state = np.random.get_state()  # noqa: NPY002
        flags = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), os.getcwd())
        return (*(repr(part) for part in numpy_state), torch.get_rng_state().tolist(), *flags)

    made = []
    for seed in (3, 4):
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        before = state()
        for method in (words, inner_words):
            out = tmp_path / f"{seed}{method.__name__}"
            changes = {"augment": "basic", "head": "cosine"} if method is words else {}
            assert adapt.main(method(runs["maml"], data, out, **changes)) == 0
            made.append(adapted(out))
        assert state() == before
    assert made[:2] == made[2:]
