"""Data that vanishes, numbers that are none, clocks that jump and memory that runs out."""

from __future__ import annotations

import importlib
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import IMAGES, options, remains, sinusoid, write_folder
from victims import DONE, FULL, Plan, Victim, Whole, completed, one_error, same_tree, tree

from metaft import meta_train
from metaft.errors import NonFiniteError
from metaft.inputs import pictures, reading
from metaft.runs import report, training
from metaft.runs.snapshot import load_snapshot
from metaft.tasks import sinusoid as sinusoids

Text = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_pictures", lambda *_: [])


# ---- data that vanishes -------------------------------------------------------------------------------------------


def test_images_that_vanish_during_a_run_are_not_missed_and_a_resume_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    """They are read once, before the first step."""
    data = write_folder(tmp_path / "data")
    argv = options(IMAGES, dataset=f"folder:{data}", image_size=8, engine="threads")
    assert meta_train.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    real = training.meta_gradient

    def meta_gradient(*given: Any, step: int, **others: Any) -> Any:
        if step == 1:
            shutil.rmtree(data)
        return real(*given, step=step, **others)

    monkeypatch.setattr(training, "meta_gradient", meta_gradient)
    assert meta_train.main([*argv, "--out", str(tmp_path / "r")]) == 0
    assert remains(tmp_path / "r") == remains(tmp_path / "whole")
    capsys.readouterr()
    assert meta_train.main(["--resume", str(tmp_path / "r")]) == 2
    one_error(capsys.readouterr().err, data, "does not exist")


def vanish(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The file is deleted just before this function looks at anything."""
    real = getattr(reading if hasattr(reading, name) else pictures, name)

    def gone(*given: Any, **others: Any) -> Any:
        path.unlink(missing_ok=True)
        return real(*given, **others)

    # `metaft.tasks.folder` is a function, too, so that the module is to be had by its name alone.
    for module in (reading, pictures, *map(importlib.import_module, ("metaft.tasks.folder", "metaft.targets.files"))):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, gone)


@pytest.mark.parametrize("name", ["fingerprint", "open_image", "read_all"])
def test_an_image_that_vanishes_while_they_are_read_is_named(
    name: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    data = write_folder(in_tmp / "data")
    gone = next((data / "train").rglob("3.png"))
    vanish(gone, monkeypatch, name)
    monkeypatch.setenv("METAFT_CACHE", str(in_tmp / "cache"))
    assert meta_train.main(options(IMAGES, dataset=f"folder:{data}", channels=1, image_size=8)) == 2
    one_error(capsys.readouterr().err, "dataset", gone, "No such file")


# ---- numbers that are none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vmap", "threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_a_task_with_a_number_that_is_none_stops_the_run_at_its_step(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value in one support set of one task is enough, and what was computed before is kept."""
    real = sinusoids.Sinusoid.source

    class Spoilt:
        def __init__(self, source: Any) -> None:
            self.source = source

        def __getattr__(self, name: str) -> Any:
            return getattr(self.source, name)

        def episodes(self, seed: int, split: Any, indices: Any) -> Any:
            found = self.source.episodes(seed, split, indices)
            if split == "train" and 13 in indices:  # the second task of the fifth step
                found.support_x[list(indices).index(13), 2] = float("nan")
            return found

    config = {"engine": engine, "threads": 2 if engine != "vmap" else 1, "task_chunk": 2}
    meta_train.run(sinusoid(tmp_path / "whole", **config))
    with monkeypatch.context() as patch:
        patch.setattr(sinusoids.Sinusoid, "source", lambda *a, **k: Spoilt(real(*a, **k)))
        with pytest.raises(
            NonFiniteError, match=r"^step 5: the loss is nan; the state before it is kept in "
        ) as caught:
            meta_train.run(sinusoid(tmp_path / "r", **config))
    last = tmp_path / "r/checkpoints/last.safetensors"
    assert str(last) in str(caught.value)
    kept = load_snapshot(last)
    assert kept.position.step == 4
    assert all(bool(t.isfinite().all()) for t in (*kept.meta.values(), *kept.optimizer.values()))
    meta_train.resume_run(tmp_path / "r")
    assert remains(tmp_path / "r") == remains(tmp_path / "whole")


# ---- clocks -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vmap", "processes", "adapt"])
def test_a_clock_that_jumps_by_years_changes_nothing(name: str, wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole, out = wholes[name], tmp_path / "r"
    completed(whole.command, whole.to(out), Plan(clock=True))
    same_tree(tree(out), whole.left)
    for row in (out / "timing.jsonl").read_text().splitlines():
        assert 0 <= float(row.partition('"seconds": ')[2].partition(",")[0].strip("}")) < 100


# ---- memory -------------------------------------------------------------------------------------------------------

WIDE = {"ways": 5, "query_shots": 15, "meta_batch": 32, "width": 64, "iterations": 4, "test_query_shots": 15}


@pytest.fixture(scope="module")
def wide(squares: Path) -> list[str]:
    """Hundreds of megabytes in one step, for want of a chunk."""
    settings = {**IMAGES, **WIDE, "ways": 4, "query_shots": 8, "test_query_shots": 8}
    return options(settings, dataset=f"folder:{squares}", image_size=28, engine="vmap")


SPARE = [n << 20 for n in (range(16, 1024, 32) if FULL else (32, 128))]


def starved(argv: list[str], tmp_path: Path, spare: int, after: int | None = None) -> tuple[Victim, Path]:
    """A run that gets so many bytes more than it has, and its folder.

    Some native code of PyTorch (oneDNN's, mostly) uses what it was not given, which no Python can catch. Where that
    happens depends on the processor, so a limit at which it does is tried again a little further on.
    """
    for attempt in range(3):
        out = tmp_path / f"starved-{attempt}"
        plan = Plan(memory=spare + (attempt * 12 << 20), memory_after=after)
        victim = Victim("meta_train", [*argv, "--out", str(out)], plan)
        if victim.status() != -signal.SIGSEGV:
            return victim, out
        assert "Segmentation fault" in victim.said
        assert "Traceback" not in victim.said
        assert re.search(r"\(most recent call first\):\n.*/torch/", victim.said), "a crash outside PyTorch"
        DONE["limits on memory that crashed PyTorch"] += 1
    raise AssertionError(f"crashed at three limits in a row from {spare >> 20} MiB")


@pytest.mark.slow
@pytest.mark.parametrize("spare", SPARE)
def test_too_little_memory_is_one_line_that_names_what_takes_less(spare: int, wide: list[str], tmp_path: Path) -> None:
    victim, _ = starved(wide, tmp_path, spare)
    if victim.status() == 0:
        assert spare > 256 << 20
    else:
        assert victim.status() == 1, victim.said
        one_error(victim.said, "not enough memory", "--meta-batch", "--task-chunk")
        DONE["limits on memory"] += 1


@pytest.mark.slow
def test_too_little_memory_in_a_later_step_keeps_what_was_computed(wide: list[str], tmp_path: Path) -> None:
    argv = [*wide, "--checkpoint-every", "99", "--eval-every", "99"]
    completed("meta_train", [*argv, "--out", str(tmp_path / "whole")])
    victim, out = starved(argv, tmp_path, 256 << 20, after=3)
    assert victim.status() == 1, victim.said
    one_error(victim.said, "not enough memory", "--meta-batch")
    assert load_snapshot(out / "checkpoints/last.safetensors").position.step == 3
    completed("meta_train", ["--resume", str(out)])
    assert remains(out) == remains(tmp_path / "whole")


@pytest.mark.slow
def test_memory_that_is_too_little_for_torch_itself_is_no_traceback(tmp_path: Path) -> None:
    """By the shell's own limit; how far the libraries get with it is theirs to say."""
    command = f"ulimit -v 200000; {sys.executable} -m metaft.meta_train --dataset sinusoid --out {tmp_path / 'r'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode not in (0, 2)
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- what is promised ---------------------------------------------------------------------------------------------


def test_every_test_that_a_promise_names_is_there() -> None:
    tests = Path(__file__).parents[1]
    promises = (tests.parent / "docs/reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]*test_\w+\.py", promises))
    assert len(named) > 10
    assert [name for name in named if not (tests / name).is_file()] == []
    files = {path.relative_to(tests).as_posix() for path in (tests / "faults").glob("test_*.py")}
    assert files <= named, "what is tested here is a promise"
