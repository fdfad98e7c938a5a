"""An adapt run goes on from where it was stopped, with the same bytes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import Text, contents, result_of
from helpers import (
    adapted,
    file_size_limit,
    inner_words,
    one_line,
    words,
    write_target,
)
from PIL import Image

from metaft import adapt
from metaft.config import AdaptConfig, read_toml
from metaft.finetune import journal, study
from metaft.options import options
from metaft.runs.folder import RunFolder


def stop_at(monkeypatch: pytest.MonkeyPatch, fit: int, step: int | None, number: int = signal.SIGTERM) -> None:
    """Have a signal come in this step of this fit, or behind its last one; only once."""
    real, count = study.fit, iter(range(100))

    def stopped(*arguments: Any, should_stop: Any, **others: Any) -> Any:
        mine, steps = next(count) == fit, iter(range(1000))

        def check() -> None:
            if mine and next(steps) == step:
                signal.raise_signal(number)
            should_stop()

        fitted = real(*arguments, should_stop=check, **others)
        if mine and step is None:
            signal.raise_signal(number)
        return fitted

    monkeypatch.setattr(study, "fit", stopped)


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("fit", "step", "number", "fits", "epochs"),
    [
        (0, 0, INT, None, None),  # 24 images in batches of 7: four steps an epoch
        (0, 9, TERM, 0, 2),
        (1, 7, INT, 1, 4),
        (3, 6, TERM, 3, 10),
        (0, None, INT, 1, 3),
        (1, None, TERM, 2, 6),
        (3, None, TERM, 4, 12),
    ],
)
@pytest.mark.slow
def test_stopped_by_a_signal_and_resumed_it_ends_with_the_same_bytes(
    fit: int,
    step: int | None,
    number: int,
    fits: int | None,
    epochs: int | None,
    whole: tuple[list[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Text,
) -> None:
    settings, expected = whole
    out, former = tmp_path / "a run's", signal.getsignal(number)
    stop_at(monkeypatch, fit, step, number)
    assert adapt.main([*settings, "--out", str(out)]) == 128 + number
    assert signal.getsignal(number) == former
    said = capsys.readouterr()
    line = said.err.splitlines()[-1]
    assert line == f"metaft: stopped; go on with: python -m metaft.adapt --resume {shlex.quote(str(out))}"
    assert said.out == ""
    assert not (out / "result.json").exists()
    assert adapt.main(shlex.split(line.partition("go on with: ")[2])[3:]) == 0
    again = f"resuming {out} after {fits} fits and {epochs} epochs\n"
    assert (again in capsys.readouterr().err) == (fits is not None)
    assert adapted(out) == expected


@pytest.mark.parametrize("method", ["finetune", "inner"])
@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bytes(
    method: str, runs: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk as it is behind each renaming of a file is what a kill at that moment leaves."""
    out, real = tmp_path / "o", os.replace
    moments: list[Path] = []

    def replace(*arguments: Any, **others: Any) -> None:
        real(*arguments, **others)
        moments.append(tmp_path / f"{len(moments):02d}")
        shutil.copytree(out, moments[-1])

    monkeypatch.setattr(journal, "SAVE_EVERY", -1.0)  # every epoch
    monkeypatch.setattr(os, "replace", replace)
    argv = inner_words(runs["maml"], data, out) if method == "inner" else words(runs["maml"], data, out, epochs=2)
    assert adapt.main(argv) == 0
    monkeypatch.setattr(os, "replace", real)
    expected = adapted(out)
    assert len(moments) >= (11 if method == "inner" else 27)
    for moment in moments:
        assert adapt.main(["--resume", str(moment)]) == 0
        assert adapted(moment) == expected, f"{moment.name} of {len(moments)}"


def test_resume_of_a_finished_run_gives_the_same(copy: Path, done: Path) -> None:
    for name in ("report.txt", "result.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "plots")
    assert adapt.main(["--resume", str(copy)]) == 0
    assert adapted(copy) == adapted(done)


@pytest.mark.parametrize("before", [1, 2])
def test_more_seeds_on_resume_are_a_run_with_that_many(
    before: int, runs: dict[str, Path], data: Path, tmp_path: Path, done: Path
) -> None:
    out = tmp_path / "o"
    assert adapt.main(words(runs["maml"], data, out, shots_per_class=8, seeds=before)) == 0
    assert len(result_of(out)["draws"]) == before
    assert adapt.main(["--resume", str(out), "--seeds", "3"]) == 0
    assert adapted(out) == adapted(done)


def test_more_seeds_drop_the_result_of_fewer_before_they_are_drawn(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would pass for this run's, whose config.toml says more."""
    stop_at(monkeypatch, 0, 0)
    assert adapt.main(["--resume", str(copy), "--seeds", "4"]) == 143
    assert read_toml(copy / "config.toml")["seeds"] == 4
    assert not (copy / "result.json").exists()


def test_fewer_seeds_than_have_been_begun_are_refused(copy: Path, capsys: Text) -> None:
    before = contents(copy)
    assert adapt.main(["--resume", str(copy), "--seeds", "2"]) == 2
    one_line(capsys, "seeds must be at least the 3 already begun, got 2")
    assert contents(copy) == before


def test_a_draw_that_has_been_begun_counts(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text) -> None:
    stop_at(monkeypatch, 0, 6)
    assert adapt.main(["--resume", str(copy), "--seeds", "4"]) == 143  # in the second epoch of the fourth draw
    capsys.readouterr()
    assert adapt.main(["--resume", str(copy), "--seeds", "3"]) == 2
    one_line(capsys, "seeds must be at least the 4 already begun, got 3")


def change_a_pixel(folder: Path) -> None:
    file = next(folder.rglob("*.png"))
    pixels = np.asarray(Image.open(file)).copy()
    pixels[4, 4] ^= 1
    Image.fromarray(pixels).save(file)


@pytest.mark.parametrize("change", ["a pixel", "one more", "a name", "init"])
def test_what_has_changed_since_is_refused(
    change: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    data, out = write_target(tmp_path / "d", {"train": 3, "test": 2}), tmp_path / "o"
    init = shutil.copytree(runs["maml"], tmp_path / "init")
    stop_at(monkeypatch, 1, 2)
    assert adapt.main(words(init, data, out)) == 143
    if change == "a pixel":
        change_a_pixel(data)
    elif change == "one more":
        shutil.copy(next((data / "train/apple").iterdir()), data / "train/apple/more.png")
    elif change == "a name":
        for part in ("train", "test"):
            (data / part / "apple").rename(data / part / "apples")
    else:
        best = "checkpoints/best.safetensors"
        shutil.copy(runs["fomaml"] / best, init / best)
    before = contents(out)
    capsys.readouterr()
    assert adapt.main(["--resume", str(out)]) == 2
    one_line(capsys, *(("init: ", init) if change == "init" else ("data: ", data)), "changed since", out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["--epochs", "4"], ["epochs", "3", "4"]),
        (["--lr", "0.5"], ["lr", "0.02", "0.5"]),
        (["--batch-size", "9"], ["batch_size", "7", "9"]),
        (["--seed", "1"], ["seed", "0", "1"]),
        (["--head", "cosine"], ["head", "'linear'", "'cosine'"]),
        (["--freeze", "backbone"], ["freeze", "'none'", "'backbone'"]),
        (["--augment", "basic"], ["augment", "'none'", "'basic'"]),
        (["--balance", "weights"], ["balance", "'none'", "'weights'"]),
        (["--method", "inner"], ["method", "'finetune'", "'inner'"]),
        (["--inner-steps", "2"], ["inner_steps", "None", "2"]),
        (["--patience", "2"], ["patience", "10", "2"]),
        (["--shots-per-class", "2"], ["shots_per_class", "8", "2"]),
        (["--data", "glyphs:Hebrew"], ["data", "folder:", "'glyphs:Hebrew'"]),
        (["--init", "none"], ["init", "maml", "'none'"]),
        (["--out", "elsewhere"], ["out", "stays in its folder", "elsewhere"]),
        (["--config", "c.toml"], ["config", "--resume or --config, not both"]),
    ],
    ids=" ".join,
)
def test_a_resumed_run_keeps_its_settings(copy: Path, capsys: Text, changes: list[str], parts: list[str]) -> None:
    before = contents(copy)
    assert adapt.main(["--resume", str(copy), *changes]) == 2
    one_line(capsys, *parts)
    assert contents(copy) == before


def test_every_setting_but_seven_is_kept() -> None:
    assert set(adapt.RESUMABLE) == {"device", "seeds", "data_root", "plugin", "report", "snapshots", "log"}
    assert set(adapt.RESUMABLE) < options(AdaptConfig).keys()


def test_a_damaged_last_checkpoint_is_refused_and_the_previous_one_offered(
    whole: tuple[list[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    """The command that it prints is run as it stands; the run then ends as if nothing had happened."""
    settings, expected = whole
    out = tmp_path / "a run's"
    monkeypatch.setattr(journal, "SAVE_EVERY", -1.0)
    stop_at(monkeypatch, 1, 9)
    assert adapt.main([*settings, "--out", str(out)]) == 143
    last = out / "checkpoints/last.safetensors"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 16
    last.write_bytes(data)
    capsys.readouterr()
    assert adapt.main(["--resume", str(out)]) == 2
    line = one_line(capsys, last, "damaged", "previous.safetensors after ", " epochs is good")
    subprocess.run(shlex.split(line.partition("to use it: ")[2]), check=True)
    assert adapt.main(["--resume", str(out)]) == 0
    assert adapted(out) == expected


def test_without_any_good_checkpoint_it_says_so(copy: Path, capsys: Text) -> None:
    for path in (copy / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert adapt.main(["--resume", str(copy)]) == 2
    one_line(capsys, "last.safetensors", "no other checkpoint of this run can be read")


def test_a_full_disk_is_one_line_and_leaves_the_checkpoints(copy: Path, capsys: Text) -> None:
    before = contents(copy / "checkpoints")
    with file_size_limit((copy / "checkpoints/last.safetensors").stat().st_size - 1):
        assert adapt.main(["--resume", str(copy), "--seeds", "4"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"metaft: error: .*/checkpoints/.*: cannot be written \(File too large\)$", line)
    assert contents(copy / "checkpoints") == before
    assert adapt.main(["--resume", str(copy)]) == 0  # with room again it goes on


def test_rows_are_those_of_the_fit_in_progress_and_of_all_before_it(tmp_path: Path) -> None:
    """Of two fits of the same name the second one's take the place of the first one's, however long they are."""
    kept = journal.Journal(RunFolder.create(tmp_path / "r", ""), {}, journal.Position())
    before: list[float] = []
    for start, fits in (("a", [[3.0], [2.0], [1.0, 0.5], [0.25]]), ("b", [[9.0, 8.0], [7.0, 6.0]])):
        for losses in fits:
            curve: list[dict[str, float]] = []
            for epoch, loss in enumerate(losses, 1):
                curve.append({"epoch": float(epoch), "loss": loss})
                kept.epoch(0, {"draw": 0, "start": start}, {"curve": [*curve]})
                assert [row["loss"] for row in kept.position.rows] == [*before, *losses[:epoch]]
        before += fits[-1]
    assert {row["start"] for row in kept.position.rows} == {"a", "b"}
