"""A checkpoint that is cut, flipped or replaced is refused, the good one beside it is named, and no code runs."""

from __future__ import annotations

import io
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import finished, meta_trained, one_line, one_thread, words
from victims import DONE, FULL

from metaft import adapt, evaluate, meta_train, predict
from metaft.errors import CheckpointError
from metaft.finetune import journal, study
from metaft.finetune.classifier import load
from metaft.runs import checkpoint
from metaft.runs.folder import RunFolder
from metaft.runs.opened import open_run
from metaft.runs.snapshot import load_snapshot
from metaft.support import cache

FLIPS = 200 if FULL else 20
EVERY = 4096 if FULL else 65536


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, squares: Path) -> Path:
    """A run of Conv-4 at its usual width, whose checkpoints are of a megabyte."""
    with one_thread():
        out = tmp_path_factory.mktemp("runs") / "wide"
        return meta_trained(out, squares, width=64, iterations=4, engine="threads")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, trained: Path, target: Path) -> Path:
    """A run that was stopped in the middle of a fit, so that its checkpoint holds tensors; and its classifier."""
    out = tmp_path_factory.mktemp("runs") / "adapted"
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        finished(words(trained, target, out, epochs=1))
        assert checkpoint.load(RunFolder(out).last)[0] == {}
        patch.setattr(journal, "SAVE_EVERY", -1.0)
        patch.setattr(study, "test", lambda *_, **__: 1 / 0)  # after the fit, and before it is done
        with pytest.raises(ZeroDivisionError):
            adapt.main(["--resume", str(out), "--seeds", "2"])
    return out


def cut(data: bytes) -> list[bytes]:
    return [data[:size] for size in range(0, len(data), EVERY)]


def flipped(data: bytes) -> list[bytes]:
    rng, copies = random.Random(len(data)), []
    for _ in range(FLIPS):
        place = rng.randrange(len(data))
        copies.append(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
    return copies


HARMS: list[Callable[[bytes], list[bytes]]] = [cut, flipped]


def refused(file: Path, harm: Callable[[bytes], list[bytes]], read: Callable[[], Any], good: str) -> int:
    """Every harmed copy is refused in one line that ends with the good one; returns how many there were."""
    data = file.read_bytes()
    try:
        copies = harm(data)
        for copy in copies:
            file.write_bytes(copy)
            with pytest.raises(CheckpointError) as caught:
                read()
            said = str(caught.value)
            assert said.startswith(f"checkpoint {file}: damaged"), said
            assert good in said
            assert "\n" not in said
    finally:
        file.write_bytes(data)
    read()
    DONE["flipped bits" if harm is flipped else "cut files"] += len(copies)
    return len(copies)


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS)
def test_of_a_meta_training_run(harm: Callable[[bytes], list[bytes]], trained: Path) -> None:
    run = RunFolder(trained)
    size = run.last.stat().st_size
    assert size > 1_000_000
    good = f"previous.safetensors of step {load_snapshot(run.previous).position.step} is good, to use it: cp "
    many = refused(run.last, harm, lambda: open_run(trained, which="last"), good)
    assert many == (FLIPS if harm is flipped else -(-size // EVERY))
    if FULL:
        refused(run.best, harm, lambda: open_run(trained), "last.safetensors of step 4 is good")


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS)
def test_of_an_adapt_run(harm: Callable[[bytes], list[bytes]], adapted: Path) -> None:
    run = RunFolder(adapted)
    epochs = len(checkpoint.load(run.previous)[1]["rows"])
    good = f"previous.safetensors after {epochs} epochs is good, to use it: cp "
    refused(run.last, harm, lambda: journal.read(run), good)


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.filterwarnings("ignore:run folder .* has no result.json")
def test_of_a_classifier(harm: Callable[[bytes], list[bytes]], adapted: Path) -> None:
    refused(RunFolder(adapted).classifier, harm, lambda: load(adapted), "")


# ---- code that waits to be loaded ---------------------------------------------------------------------------------


class Payload:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def trap(kind: str, file: Path, mark: Path) -> None:
    held = {"meta": torch.ones(3), "x": Payload(mark)}
    if kind == "torch.save":
        torch.save(held, file)
    else:
        file.write_bytes(pickle.dumps(held))


COMMANDS: list[tuple[str, Any, str, str, Sequence[str]]] = [
    ("meta_train --resume", meta_train, "trained", "checkpoints/last.safetensors", ["--resume", "{run}"]),
    ("evaluate", evaluate, "trained", "checkpoints/best.safetensors", ["{run}"]),
    ("evaluate the last", evaluate, "trained", "checkpoints/last.safetensors", ["{run}", "--checkpoint", "last"]),
    ("adapt", adapt, "trained", "checkpoints/best.safetensors", ["--init", "{run}", "--data", "folder:{target}"]),
    ("adapt --resume", adapt, "adapted", "checkpoints/last.safetensors", ["--resume", "{run}"]),
    ("predict", predict, "adapted", "classifier.safetensors", ["{run}", "{target}"]),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:run folder .* has no result.json")
@pytest.mark.parametrize("kind", ["torch.save", "pickle"])
@pytest.mark.parametrize(("command", "which", "file", "argv"), [c[1:] for c in COMMANDS], ids=[c[0] for c in COMMANDS])
def test_a_pickle_in_its_place_is_refused_and_not_executed(
    kind: str, command: Any, which: str, file: str, argv: list[str],
    request: pytest.FixtureRequest, target: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, mark = in_tmp / "run", in_tmp / "executed"
    shutil.copytree(request.getfixturevalue(which), run)
    if command is predict:
        (run / "result.json").touch()  # of a run that is finished: nothing else is to be said of it
    trap(kind, run / file, mark)
    capsys.readouterr()
    assert command.main([word.format(run=run, target=target) for word in argv]) == 2
    one_line(capsys, run / file, "damaged or not a metaft checkpoint")
    assert not mark.exists()
    DONE["pickles"] += 1
    data = (run / file).read_bytes()
    torch.load(io.BytesIO(data), weights_only=False) if kind == "torch.save" else pickle.loads(data)
    assert mark.exists(), "the trap itself does not work"


def test_a_pickle_in_the_cache_is_built_again_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path / "cache"))
    arrays = {"images": np.arange(3)}
    cache.cached("x", "key", lambda: arrays)
    [file] = (tmp_path / "cache").iterdir()
    np.savez(file, images=np.array([Payload(tmp_path / "executed")], dtype=object))
    assert cache.cached("x", "key", lambda: arrays)["images"].tolist() == [0, 1, 2]
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_command_is_named(
    trained: Path, adapted: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is whole, and its place is another one."""
    shutil.copytree(trained, in_tmp / "trained")
    shutil.copytree(adapted, in_tmp / "adapted")
    for mine, theirs in ((in_tmp / "trained", adapted), (in_tmp / "adapted", trained)):
        shutil.copy(RunFolder(theirs).last, RunFolder(mine).last)
    assert meta_train.main(["--resume", "trained"]) == 2
    one_line(capsys, "last.safetensors: not of a meta-training run; previous.safetensors of step ")
    assert adapt.main(["--resume", "adapted"]) == 2
    one_line(capsys, "last.safetensors: not of an adapt run; previous.safetensors after ")
