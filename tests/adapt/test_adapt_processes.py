"""metaft.adapt in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapting import KEYS, Text, put, result_of
from helpers import (
    IMAGES,
    adapted,
    one_thread,
    options,
    words,
)

from metaft import adapt, meta_train
from metaft.runs.folder import read_rows

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the processes: bits depend on how many there are."""
    with one_thread():
        yield


@pytest.mark.slow
def test_without_any_argument(in_tmp: Path, runs: dict[str, Path], capsys: Text) -> None:
    """The newest run that takes glyphs, the built-in target and every default, in a process of its own."""
    glyphs = options(IMAGES, dataset="glyphs", iterations=4, eval_every=4, test_episodes=2)
    assert meta_train.main([*glyphs, "--out", str(in_tmp / "made")]) == 0
    for name, age in (("old", 500), ("new", 100)):
        put(in_tmp / "made", in_tmp / "runs" / name, age)
    for name in ("curve", "colour", "maml"):
        put(runs[name], in_tmp / "runs" / name, 10)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "metaft.adapt"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert "init: runs/new, the newest run that fits\n" in done.stderr
    (out,) = (in_tmp / "runs").glob("adapt-*")
    assert out.name == "adapt-glyphs-Hebrew-new-0"
    result = result_of(out)
    assert result.keys() >= set(KEYS.split())
    classes = len(result["classes"])
    assert all(name.startswith("Hebrew/U+") for name in result["classes"])
    assert (result["data"], result["train_images"], result["test_images"]) == (
        *("glyphs:Hebrew", 5 * classes),
        15 * classes,
    )
    assert result["epochs_run"] == 40
    assert result["accuracy"] > 1.5 / classes
    assert {p.name for p in (out / "plots").iterdir()} == {
        f"{name}.png" for name in ("calibration", "confusion", "learning", "mistakes")
    }
    for part in ("With 5 images per class to train on, ", "meta-learned start", "random start", "macro F1"):
        assert part in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_stopped_for_real_and_resumed_it_ends_with_the_same_bytes(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    long = {"seeds": 2, "epochs": 20, "patience": 20}
    assert adapt.main(words(runs["maml"], data, tmp_path / "whole", **long)) == 0
    expected = adapted(tmp_path / "whole")
    out = tmp_path / "stopped"
    argv = [sys.executable, "-m", "metaft.adapt", *words(runs["maml"], data, out, **long)]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    until = time.monotonic() + 60
    while len(read_rows(out / "metrics.jsonl")) < 40:
        assert time.monotonic() < until, "the run did not get there in a minute"
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)  # SIGKILL is sent in faults/test_kills.py
    said, error = process.communicate(timeout=60)
    assert (process.returncode, said) == (143, ""), error
    assert "Traceback" not in error
    assert not (out / "result.json").exists()
    assert adapt.main(["--resume", str(out)]) == 0
    assert adapted(out) == expected


@pytest.mark.slow
def test_errors_of_a_real_process_have_no_traceback(tmp_path: Path, runs: dict[str, Path]) -> None:
    for argv, parts in (
        (["metaft.adapt", "--epoch", "3"], ["--epoch", "did you mean '--epochs'"]),
        (["metaft.adapt", "--init", str(runs["curve"])], ["[1]", "[1, 28, 28]"]),
        (["metaft", "adpat"], ["'adpat'", "did you mean 'adapt'"]),
    ):
        done = subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        [line] = done.stderr.splitlines()
        assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from metaft import adapt\n"
        "assert adapt.main(['--help']) == 0 and adapt.main(['--nonsense']) == 2\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
