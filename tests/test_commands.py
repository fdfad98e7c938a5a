"""The commands as a user types them: what they write, what they say, and how they end."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IMAGES, SINUSOID, file_size_limit, images, options, pool, remains, write_folder
from torch import nn

from metaft import adapt, choose, evaluate, meta_train, testing
from metaft.__main__ import main as metaft
from metaft.config import EvaluateConfig, MetaTrainConfig, read_toml
from metaft.engines import workers
from metaft.errors import MetaftError, MetaftWarning
from metaft.options import options as options_of
from metaft.runs import report, training
from metaft.runs.folder import read_rows
from metaft.runs.machine import say_what_changed, where_measured
from metaft.runs.snapshot import load_snapshot
from metaft.support import places

Text = pytest.CaptureFixture[str]


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_pictures", lambda *_: [])


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the sinusoid, with pictures. Tests copy it before they change it."""
    out = tmp_path_factory.mktemp("runs") / "curve"
    assert meta_train.main([*options(SINUSOID), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def image_runs(tmp_path_factory: pytest.TempPathFactory, squares: Path) -> dict[str, Path]:
    """A finished run per algorithm on the folder of pictures."""
    base = tmp_path_factory.mktemp("runs")
    for algorithm in ("maml", "protonet"):
        argv = options(IMAGES, dataset=f"folder:{squares}", image_size=8, algorithm=algorithm, out=base / algorithm)
        assert meta_train.main(argv) == 0
    return {"maml": base / "maml", "protonet": base / "protonet"}


@pytest.fixture
def copy(tmp_path: Path, curve: Path) -> Path:
    """A finished run of one's own to break."""
    shutil.copytree(curve, tmp_path / "copy")
    return tmp_path / "copy"


def one_line(capsys: Text, *parts: object) -> str:
    """The one line that a command left on stderr, which holds all the parts."""
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("metaft: error: ")
    for part in parts:
        assert str(part) in lines[0]
    assert said.out == ""
    return lines[0]


# ---- what a run leaves --------------------------------------------------------------------------------------------

PROTOCOL = {"split", "ways", "shots", "query_shots", "rotated", "eval_seed", "inner_steps"}


def check_result(result: dict[str, Any], figure: str, episodes: int, steps: int) -> None:
    keys = "command version dataset algorithm ways shots iterations seed device engine seconds tasks_per_second test"
    assert result.keys() >= set(keys.split())
    assert result["test"].keys() >= PROTOCOL | {"transductive", "inductive"}
    for mode in ("transductive", "inductive"):
        figures = result["test"][mode]
        assert figures.keys() == {figure, "ci95", "episodes", f"{figure}_per_step", "ci95_per_step"}
        assert figures["episodes"] == episodes
        assert len(figures[f"{figure}_per_step"]) == len(figures["ci95_per_step"]) == steps + 1
        assert figures[f"{figure}_per_step"][-1] == figures[figure]
        assert figures["ci95"] >= 0


def test_a_run_folder_holds_what_it_should(curve: Path):
    names = {str(p.relative_to(curve)) for p in curve.rglob("*") if p.is_file()}
    assert names == {
        *("config.toml", "metrics.jsonl", "timing.jsonl", "updates.jsonl", "episodes.jsonl", "result.json"),
        *(f"checkpoints/{name}.safetensors" for name in ("first", "best", "last", "previous")),
        *(f"plots/{name}.png" for name in ("curves", "episode", "steps")),
        *(f"snapshots/meta-{step:08d}.safetensors" for step in (0, 2, 4, 6)),
    }
    assert all((curve / name).stat().st_size > 0 for name in names)


def test_the_result_of_a_regression(curve: Path):
    result = json.loads((curve / "result.json").read_text())
    check_result(result, "mse", 40, 2)
    assert result | {
        "version": "",
        "seconds": 0,
        "tasks_per_second": 0,
        "test": 0,
        "best_step": 0,
        "split_hash": "",
    } == {
        "command": "meta_train",
        "version": "",
        "dataset": "sinusoid",
        "class_split": None,
        "split_hash": "",
        "algorithm": "maml",
        "ways": 1,
        "shots": 5,
        "iterations": 7,
        "best_step": 0,
        "seed": 0,
        "device": "cpu",
        "engine": "vmap",
        "ranks": 1,
        "environment": where_measured("cpu", 1),
        "seconds": 0,
        "tasks_per_second": 0,
        "test": 0,
    }
    assert result["environment"].keys() >= {"torch", "processor", "cpu_capability", "threads"}
    assert all(result["environment"].values())
    assert result["seconds"] > 0
    timing = read_rows(curve / "timing.jsonl")
    assert [row["step"] for row in timing] == [2, 3, 4, 6, 6, 7]
    assert [row["step"] for row in timing if "tasks_per_second" in row] == [2, 3, 4, 6, 7]
    validating = sum(row["validation_seconds"] for row in timing)
    assert 0 < validating < result["seconds"]
    assert result["tasks_per_second"] == pytest.approx(7 * 3 / (result["seconds"] - validating), rel=0.02)


@pytest.mark.parametrize(("algorithm", "steps"), [("maml", 3), ("protonet", 0)])
def test_the_result_of_a_classification(image_runs: dict[str, Path], squares: Path, algorithm: str, steps: int):
    result = json.loads((image_runs[algorithm] / "result.json").read_text())
    check_result(result, "accuracy", 4, steps)
    engine = "processes" if workers.available() else "threads"
    assert (result["dataset"], result["engine"]) == (f"folder:{squares}", engine)
    assert result["test"]["inner_steps"] == steps
    assert 0 <= result["test"]["inductive"]["accuracy"] <= 1


def test_a_checkpoint_carries_what_is_needed_to_use_it(image_runs: dict[str, Path]):
    snapshot = load_snapshot(image_runs["maml"] / "checkpoints/best.safetensors")
    header = snapshot.header
    assert header["architecture"] == {"name": "conv4", "ways": 3, "shape": [1, 8, 8], "width": 4}
    assert header["inputs"] | {"polarity": ""} == {
        "kind": "image",
        "channels": 1,
        "height": 8,
        "width": 8,
        "polarity": "",
        "mean": [0.0],
        "std": [1.0],
        "bits": 16,
        "invert": False,
        "resize": None,
        "interpolation": "lanczos",
    }
    assert [len(header["classes"][split]) for split in ("train", "val", "test")] == [6, 4, 4]
    assert re.fullmatch("[0-9a-f]{64}", header["split_hash"])
    assert header["config"]["inner_lr"] == 0.4
    assert any(name.endswith("/exp_avg") for name in snapshot.optimizer)


@pytest.mark.usefixtures("_no_pictures")
def test_progress_is_plain_lines_off_a_terminal(tmp_path: Path, capsys: Text):
    assert meta_train.main([*options(SINUSOID), "--out", str(tmp_path / "r")]) == 0
    said = capsys.readouterr()
    assert "\r" not in said.err
    assert "\x1b" not in said.err
    for pattern in (
        r"^sinusoid · maml · 1-way 5-shot · mlp · vmap on cpu · run folder .*r$",
        r"^meta-train 2/7 · loss \d+\.\d{3} · mse \d+\.\d{3} · tasks per s \d+ · \d+:\d\d left$",
        r"^step 3: validation transductive \d+\.\d{3} ± \d+\.\d{3}$",
        r"^meta-test 40/40 · 0:00 left$",
    ):
        assert re.search(pattern, said.err, re.MULTILINE), pattern
    assert re.search(r"^  inductive +\d+\.\d{3} ± \d+\.\d{3}   after each step from 0: ", said.out, re.MULTILINE)
    assert f"{tmp_path / 'r' / 'result.json'}" in said.out


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.usefixtures("_no_pictures")
def test_a_warning_is_one_line_once(tmp_path: Path, capsys: Text) -> None:
    argv = options(SINUSOID, algorithm="imaml", out=tmp_path / "r", iterations=4)
    argv += ["--hyper", "strength=0.01"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert meta_train.main(argv) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "note" in line or "Warning" in line]
    assert len(said) == 1
    assert said[0].startswith("metaft: note: imaml: I + H / strength is not positive definite in some tasks")


def test_default_folders_are_numbered_and_tell_runs_apart(in_tmp: Path):
    quick = options(SINUSOID, iterations=1, eval_episodes=2, test_episodes=2)
    for _ in range(2):
        assert meta_train.main(quick) == 0
    assert meta_train.main([*quick, "--seed", "3"]) == 0
    assert sorted(os.listdir(in_tmp / "runs")) == [f"sinusoid-maml-1w5s-{end}" for end in ("0", "0-2", "3")]


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_pictures")
def test_the_command_line_wins_over_the_file(tmp_path: Path):
    settings = {**SINUSOID, "iterations": 3, "seed": 5, "adapt_norm": False}
    lines = [f"{k.replace('_', '-')} = {json.dumps(v)}\n" for k, v in settings.items()]
    (tmp_path / "c.toml").write_text("".join(lines))
    out = tmp_path / "r"
    assert meta_train.main(["--config", f"{tmp_path}/c.toml", "--seed", "6", "--adapt-norm", "--out", str(out)]) == 0
    config = read_toml(out / "config.toml")
    assert (config["iterations"], config["seed"], config["adapt_norm"]) == (3, 6, True)


@pytest.mark.usefixtures("_no_pictures")
def test_config_toml_of_a_run_makes_the_same_run_again(tmp_path: Path, curve: Path):
    assert meta_train.main(["--config", str(curve / "config.toml"), "--out", str(tmp_path / "r")]) == 0
    assert remains(tmp_path / "r") == remains(curve)


BAD = [
    (["--wayz", "5"], ["--wayz", "did you mean '--ways'"]),
    (["--algorithm", "maml++", "--first-order"], ["--first-order", "--hyper first_order=VALUE"]),
    (["--line-search=3"], ["--line-search=3", "--hyper line_search=VALUE"]),
    (["--line-search", "3"], ["--hyper line_search=VALUE"]),
    (["--loss", "mse"], ["--hyper loss=VALUE"]),
    (["--learned-rates", "false"], ["--learned-rates", "--hyper learned_rates=VALUE"]),
    (["--wayz=5"], ["--wayz=5", "did you mean '--ways'"]),
    (["--ways", "five"], ["ways must be a whole", "'five'"]),
    (["--ways", "2.5"], ["ways must be a whole", "'2.5'"]),
    (["--ways"], ["--ways"]),
    (["--ways", "0"], ["ways must be at least 1, got 0"]),
    (["--outer-lr", "nan"], ["outer_lr", "finite", "nan"]),
    (["--outer-schedule", "cosin"], ["outer_schedule: no 'cosin'", "did you mean 'cosine'"]),
    (["--outer-schedule", "step:every=2"], ["outer_schedule: every must be", "got 2.0", "'step:every=2'"]),
    (["--rotate=perhaps"], ["--rotate", "'perhaps'"]),
    (["stray"], ["stray"]),
    (["--dataset", "glyph"], ["dataset", "'glyph'", "did you mean 'glyphs'"]),
    (["--dataset", "folder:/none/x"], ["/none/x does not exist"]),
    (["--dataset", "folder:/" + "x" * 300], ["dataset", "xxx", "File name too long"]),
    (["--algorithm", "mam"], ["algorithm", "'mam'", "did you mean 'maml'"]),
    (["--model", "conv5", "--dataset", "sinusoid"], ["model", "'conv5'", "did you mean 'conv4'"]),
    (["--model", "conv4", "--dataset", "sinusoid"], ["model", "'conv4'", "[1]"]),
    (["--dataset", "sinusoid", "--ways", "5"], ["sinusoid", "ways must be 1", "5"]),
    (["--dataset", "sinusoid", "--algorithm", "protonet"], ["protonet", "'mse'"]),
    (["--dataset", "sinusoid", "--rotate"], ["rotate", "sinusoid"]),
    (["--dataset", "sinusoid", "--split", "finn"], ["split", "'finn'"]),
    (["--dataset", "sinusoid", "--download"], ["download", "sinusoid"]),
    (["--device", "cuda:77"], ["device", "'cuda:77'"]),
    (["--config", "none.toml"], ["config", "none.toml", "No such file"]),
    (["--config", "none.toml", "--resume", "none"], ["config", "not both"]),
    (["--resume", "none"], ["none", "does not exist"]),
    (["--algorithm", "protonet", "--test-inner-steps", "2"], ["test_inner_steps", "protonet", "2"]),
]


@pytest.mark.parametrize(("argv", "parts"), BAD, ids=lambda value: " ".join(value))
def test_bad_input_is_one_line_status_2_and_writes_nothing(in_tmp: Path, capsys: Text, argv: list[str], parts: Any):
    assert meta_train.main(argv) == 2
    one_line(capsys, *parts)
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--ways", "7"], ["split 'train' has 6 classes", "ways = 7"]),
        (["--ways", "5", "--algorithm", "protonet"], ["split 'val' has 4 classes", "ways = 5"]),
        (["--query-shots", "10"], ["10 images", "1 + 10 = 11"]),
        (["--test-ways", "4"], ["test_ways", "4 ways", "3 in training"]),
        (["--algorithm", "protonet", "--inner-lr", "0.1"], ["inner_lr", "protonet", "0.1"]),
        (["--width", "0"], ["width", "0"]),
        (["--image-size", "0"], ["image_size", "0"]),
        (["--model", "conv4-pool"], ["conv4-pool", "8x8"]),
        (["--split", "finn"], ["split", "'finn'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_settings_that_do_not_fit_the_data_likewise(
    in_tmp: Path, capsys: Text, squares: Path, extra: list[str], parts: list[str]
):
    assert meta_train.main([*options(IMAGES, dataset=f"folder:{squares}", image_size=8), *extra]) == 2
    one_line(capsys, *parts)
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ways = 'five'", ["ways", "'five'"]),
        ("inner_step = 3", ["'inner_step'", "did you mean 'inner_steps'"]),
        ("[maml]\ninner_lr = 1.0", ["'maml'"]),
        ("ways = ", ["not valid TOML"]),
        ("batch_norm = 'inductve'", ["batch_norm", "'inductve'", "did you mean 'inductive'"]),
    ],
)
def test_a_bad_file_is_named(in_tmp: Path, capsys: Text, text: str, parts: list[str]):
    (in_tmp / "c.toml").write_text(text)
    assert meta_train.main(["--config", "c.toml", "--seed", "1"]) == 2
    one_line(capsys, "c.toml", *parts)
    assert os.listdir(in_tmp) == ["c.toml"]


def test_a_folder_in_use_is_refused(copy: Path, capsys: Text):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert meta_train.main([*options(SINUSOID), "--out", str(copy)]) == 2
    one_line(capsys, "out", copy, "already exists", "--resume")
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


# ---- resume -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["--seed", "4"], ["seed", "0", "4"]),
        (["--inner-lr", "0.5"], ["inner_lr", "0.02", "0.5"]),
        (["--shots", "6"], ["shots", "5", "6"]),
        (["--outer-schedule", "linear"], ["outer_schedule", "'cosine'", "'linear'"]),
        (["--no-adapt-norm"], ["adapt_norm", "True", "False"]),
        (["--clip-norm", "3"], ["clip_norm", "None", "3.0"]),
        (["--dataset", "glyphs"], ["dataset", "'sinusoid'", "'glyphs'"]),
        (["--iterations", "6"], ["iterations", "7", "6"]),
        (["--out", "elsewhere"], ["out", "stays in its folder", "elsewhere"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_resumed_run_keeps_its_settings(copy: Path, capsys: Text, changes: list[str], parts: list[str]):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert meta_train.main(["--resume", str(copy), *changes]) == 2
    one_line(capsys, *parts)
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


def test_what_may_change_is_a_list_of_fields():
    assert set(meta_train.RESUMABLE) < options_of(MetaTrainConfig).keys()


@pytest.mark.usefixtures("_no_pictures")
def test_a_resumed_run_may_be_computed_otherwise_and_longer(copy: Path, capsys: Text):
    argv = options({"iterations": 9, "test_episodes": 6, "checkpoint_every": 1, "task_chunk": 2, "engine": "vmap"})
    assert meta_train.main(["--resume", str(copy), *argv]) == 0
    said = capsys.readouterr().err
    assert f"resuming {copy} at step 7" in said
    assert "note: chunk None -> 2: the run goes on to rounding (1e-6)" in said
    assert "processor" not in said
    result = json.loads((copy / "result.json").read_text())
    assert (result["iterations"], result["test"]["inductive"]["episodes"]) == (9, 6)
    assert read_toml(copy / "config.toml")["iterations"] == 9
    assert [r["step"] for r in read_rows(copy / "metrics.jsonl") if r["kind"] == "val"] == [3, 6, 7, 9]


def test_another_processor_is_said_but_not_what_an_older_run_did_not_note(capsys: Text):
    say_what_changed({"device": "AVX2"}, {"device": "AVX2", "processor": "of today"})
    assert capsys.readouterr().err == ""
    say_what_changed({"processor": "of then"}, {"device": "AVX2", "processor": "of today"})
    assert "note: processor of then -> of today: the run goes on to rounding" in capsys.readouterr().err


def test_a_longer_run_drops_the_result_of_the_shorter_before_it_trains(copy: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any, **__: Any) -> None:
        raise MetaftError("stopped here")

    monkeypatch.setattr(training, "meta_gradient", broken)
    assert meta_train.main(["--resume", str(copy), "--iterations", "9"]) == 2
    assert not (copy / "result.json").exists()


def test_a_run_killed_before_its_settings_were_written_leaves_a_folder_free_to_use(tmp_path: Path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".config.toml.tmp").write_text("ways =")
    assert meta_train.main([*options(SINUSOID), "--out", str(tmp_path / "r")]) == 0


@pytest.mark.usefixtures("_no_pictures")
def test_a_run_killed_before_its_first_checkpoint_starts_again(copy: Path, curve: Path):
    for name in ("checkpoints", "plots"):
        shutil.rmtree(copy / name)
    assert meta_train.main(["--resume", str(copy)]) == 0
    assert remains(copy) == remains(curve)


@pytest.mark.usefixtures("_no_pictures")
def test_resume_of_a_finished_run_gives_the_same_figures(copy: Path, curve: Path):
    assert meta_train.main(["--resume", str(copy)]) == 0
    assert remains(copy) == remains(curve)


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_the_command_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text, curve: Path, number: int
):
    real, out = training.meta_gradient, tmp_path / "r"
    former = signal.getsignal(number)

    def meta_gradient(*arguments: Any, step: int, **more: Any) -> Any:
        if step == 4:
            signal.raise_signal(number)
        return real(*arguments, step=step, **more)

    monkeypatch.setattr(training, "meta_gradient", meta_gradient)
    assert meta_train.main([*options(SINUSOID), "--out", str(out)]) == 128 + number
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("metaft: stopped; a checkpoint is in ")
    assert signal.getsignal(number) == former
    assert load_snapshot(out / "checkpoints/last.safetensors").position.step == 5  # the step in work was finished
    assert not (out / "result.json").exists()
    monkeypatch.setattr(training, "meta_gradient", real)
    words = shlex.split(line.partition("go on with: ")[2])
    assert words[:3] == ["python", "-m", "metaft.meta_train"]
    assert meta_train.main(words[3:]) == 0
    assert remains(out) == remains(curve)


def test_a_signal_before_training_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text):
    monkeypatch.setattr("metaft.runs.assemble.assemble", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may start without it
    try:
        assert meta_train.main([*options(SINUSOID), "--out", str(tmp_path / "r")]) == 130
    finally:
        signal.signal(signal.SIGINT, former)
    assert capsys.readouterr().err == "metaft: stopped\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_no_pictures")
def test_a_loss_that_is_not_finite_is_status_1(tmp_path: Path, capsys: Text):
    assert meta_train.main([*options(SINUSOID, inner_lr=1e38), "--out", str(tmp_path / "r")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    for part in ("metaft: error: step 1: ", f"{tmp_path}/r/checkpoints/last.safetensors", "--inner-lr", "--clip-norm"):
        assert part in line


# ---- damaged checkpoints ------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize(("also", "offered"), [([], "previous"), (["previous"], "best"), (["best"], "previous")])
def test_a_damaged_checkpoint_is_refused_and_the_good_one_offered(
    copy: Path, curve: Path, capsys: Text, also: list[str], offered: str
):
    """The command that it prints is run as it stands; the run then ends as if nothing had happened."""
    for name in also:
        damage(copy / f"checkpoints/{name}.safetensors")
    last = copy / "checkpoints/last.safetensors"
    damage(last)
    assert meta_train.main(["--resume", str(copy)]) == 2
    step = {"previous": 6, "best": 7}[offered]
    line = one_line(capsys, last, "damaged", f"{offered}.safetensors of step {step} is good")
    subprocess.run(shlex.split(line.partition("to use it: ")[2]), check=True)
    assert meta_train.main(["--resume", str(copy)]) == 0
    assert remains(copy) == remains(curve)


@pytest.mark.usefixtures("_no_pictures")
def test_without_any_good_checkpoint_it_says_so(copy: Path, capsys: Text):
    for path in (copy / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert meta_train.main(["--resume", str(copy)]) == 2
    one_line(capsys, "last.safetensors", "no other checkpoint of this run can be read")


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("command", ["evaluate", "resume"])
def test_a_damaged_best_checkpoint_is_refused_and_the_last_offered(copy: Path, capsys: Text, command: str):
    damage(copy / "checkpoints/best.safetensors")
    argv = [str(copy)] if command == "evaluate" else ["--resume", str(copy)]
    assert (evaluate if command == "evaluate" else meta_train).main(argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    for part in ("best.safetensors: damaged", "last.safetensors of step 7 is good", "--checkpoint last, or cp "):
        assert part in line
    assert evaluate.main([str(copy), "--checkpoint", "last"]) == 0


def test_before_the_first_validation_the_last_checkpoint_is_offered(copy: Path, capsys: Text):
    (copy / "checkpoints/best.safetensors").unlink()
    assert evaluate.main([str(copy)]) == 2
    one_line(capsys, "best.safetensors: cannot be read (No such file", "--checkpoint last")


@pytest.mark.usefixtures("_no_pictures")
def test_a_full_disk_is_one_line_and_leaves_the_checkpoints(copy: Path, capsys: Text):
    before = {p: p.read_bytes() for p in (copy / "checkpoints").iterdir()}
    with file_size_limit((copy / "checkpoints/last.safetensors").stat().st_size - 1):
        assert meta_train.main(["--resume", str(copy), "--iterations", "9"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"metaft: error: .*/checkpoints/.*: cannot be written \(File too large\)$", line)
    assert {p: p.read_bytes() for p in (copy / "checkpoints").iterdir()} == before
    assert meta_train.main(["--resume", str(copy)]) == 0  # with room again it goes on


def test_pictures_that_cannot_be_drawn_are_one_line_and_the_run_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken(*_: Any) -> None:
        raise ValueError("Axis limits cannot be\nNaN or Inf")

    out = tmp_path / "r"
    monkeypatch.setattr("metaft.plots.steps", full)
    monkeypatch.setattr("metaft.plots.regression_episode", broken)
    assert meta_train.main([*options(SINUSOID), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == (
        f"metaft: note: pictures that cannot be drawn: {out}/plots/steps.png (No space left on device), "
        f"{out}/plots/episode.png (Axis limits cannot be NaN or Inf)"
    )
    assert f"pictures: {out}/plots/curves.png\n" in said.out
    assert (out / "result.json").exists()


def test_a_row_of_metrics_that_somebody_edited_is_one_line(copy: Path, capsys: Text):
    """Its last row of training has another name for the loss; drawing the curves finds out."""
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(text.replace('"loss"', '"lots"'))
    assert meta_train.main(["--resume", str(copy)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"metaft: error: {copy}/metrics.jsonl: a row is not one that a run writes (KeyError('loss'))"


# ---- evaluate -----------------------------------------------------------------------------------------------------


def test_evaluate_at_the_runs_own_protocol_gives_its_figures(
    image_runs: dict[str, Path], curve: Path, tmp_path: Path, capsys: Text
):
    for run in (curve, *image_runs.values()):
        assert evaluate.main([str(run), "--out", str(tmp_path / "e.json")]) == 0
        result = json.loads((tmp_path / "e.json").read_text())
        trained = json.loads((run / "result.json").read_text())
        assert result["test"] == trained["test"]
        assert result["environment"] == trained["environment"]
        assert result.keys() >= {"command", "version", "run", "checkpoint", "step", "dataset", "algorithm", "test"}
        assert (result["command"], result["step"]) == ("evaluate", trained["best_step"])


def test_evaluate_at_another_protocol(image_runs: dict[str, Path], capsys: Text):
    run = image_runs["maml"]
    argv = options({"shots": 3, "query_shots": 4, "episodes": 5, "inner_steps": 1, "eval_seed": 9, "set": "val"})
    assert evaluate.main([str(run), *argv, "--rotate", "--engine", "vmap"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^val: 3-way 3-shot, 4 queries per class, rotated, 1 inner steps", said, re.MULTILINE)
    [file] = (run / "evaluations").glob("*val-rotated-3w3s4q-1steps-5x-seed9-best.json")
    test = json.loads(file.read_text())["test"]
    own = {k: test[k] for k in ("split", "ways", "shots", "query_shots", "rotated", "eval_seed", "inner_steps")}
    assert list(own.values()) == ["val", 3, 3, 4, True, 9, 1]
    assert test["transductive"]["episodes"] == 5


def test_protonet_is_tested_at_any_ways_and_maml_says_why_not(
    image_runs: dict[str, Path], tmp_path: Path, capsys: Text
):
    out = tmp_path / "e.json"
    for ways in (2, 4):
        assert evaluate.main([str(image_runs["protonet"]), "--ways", str(ways), "--out", str(out)]) == 0
        assert json.loads(out.read_text())["test"]["ways"] == ways
        out.unlink()
        capsys.readouterr()
        assert evaluate.main([str(image_runs["maml"]), "--ways", str(ways), "--out", str(out)]) == 2
        one_line(capsys, "ways", "3 outputs", f"not {ways}-way")
        assert not out.exists()
    assert evaluate.main([str(image_runs["protonet"]), "--ways", "5"]) == 2
    one_line(capsys, "split 'test' has 4 classes", "ways = 5")


def test_evaluate_on_inputs_of_another_shape_names_both(
    image_runs: dict[str, Path], curve: Path, squares: Path, capsys: Text
):
    assert evaluate.main([str(curve), "--dataset", f"folder:{squares}"]) == 2
    one_line(capsys, "[1]", "[1, 28, 28]", "squares")
    assert evaluate.main([str(image_runs["maml"]), "--dataset", "sinusoid"]) == 2
    one_line(capsys, "[1, 8, 8]", "[1]", "sinusoid")


def test_evaluate_on_another_folder_reads_it_as_the_run_read_its_own(
    image_runs: dict[str, Path], squares: Path, tmp_path: Path, capsys: Text
):
    (tmp_path / "link").symlink_to(squares)
    argv = [str(image_runs["maml"]), "--dataset", f"folder:{tmp_path}/link", "--out", str(tmp_path / "e.json")]
    assert evaluate.main(argv) == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["dataset"] == f"folder:{tmp_path}/link"
    assert result["test"] == json.loads((image_runs["maml"] / "result.json").read_text())["test"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["RUN"]),
        (["none"], ["none", "does not exist"]),
        (["."], ["is not a run folder"]),
        ([".", "--episodes", "0"], ["episodes", "0"]),
        ([".", "--episode", "1"], ["--episode", "did you mean '--episodes'"]),
        ([".", "--set", "tset"], ["set must", "'tset'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_evaluate_with_bad_input(in_tmp: Path, capsys: Text, argv: list[str], parts: list[str]):
    assert evaluate.main(argv) == 2
    one_line(capsys, *parts)
    assert list(in_tmp.iterdir()) == []


def test_evaluate_that_is_stopped_writes_nothing(
    curve: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
):
    real = testing.task_scores

    def task_scores(*arguments: Any, **options: Any) -> torch.Tensor:
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(testing, "task_scores", real)
        return real(*arguments, **options)

    monkeypatch.setattr(testing, "task_scores", task_scores)
    assert evaluate.main([str(curve), "--out", str(tmp_path / "e.json")]) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "metaft: stopped; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_evaluate_that_cannot_write_says_so(curve: Path, tmp_path: Path, capsys: Text):
    (tmp_path / "file").write_text("")
    assert evaluate.main([str(curve), "--episodes", "2", "--out", str(tmp_path / "file" / "e.json")]) == 2
    assert "e.json cannot be written" in capsys.readouterr().err.splitlines()[-1]


# ---- from Python --------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A user's network, whose batch normalisation has running statistics."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.classify = nn.Linear(4 * 6 * 6, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.body(x))


def own(outputs: int = 3) -> Own:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Own(outputs)


@pytest.mark.usefixtures("_no_pictures")
def test_a_module_of_ones_own(tmp_path: Path, capsys: Text):
    module, config = own(), images(tmp_path / "r", model=None, width=None)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    result = meta_train.run(config, dataset=pool(), module=module)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items()), "the user's module was changed"
    assert evaluate.run(tmp_path / "r", dataset=pool(), module=own())["test"] == result["test"]
    first = remains(tmp_path / "r")
    meta_train.resume_run(tmp_path / "r", dataset=pool(), module=own())
    assert remains(tmp_path / "r") == first
    snapshot = load_snapshot(tmp_path / "r/checkpoints/last.safetensors")
    assert snapshot.header["architecture"] == {"name": "custom", "class": "Own"}
    assert not torch.equal(snapshot.meta["classify.weight"], before["classify.weight"])
    for command in (
        lambda: evaluate.run(tmp_path / "r", dataset=pool()),
        lambda: meta_train.resume_run(tmp_path / "r", dataset=pool()),
    ):
        with pytest.raises(MetaftError, match=r"^model: this run was trained with a module from Python"):
            command()


@pytest.mark.usefixtures("_no_pictures")
def test_a_module_with_other_outputs_than_ways_is_refused(in_tmp: Path):
    with pytest.raises(MetaftError, match=r"^ways: the module's head has 4 outputs, but tasks have 3 classes"):
        meta_train.run(images(model=None), dataset=pool(), module=own(4))
    assert list(in_tmp.iterdir()) == []


@pytest.mark.usefixtures("_no_pictures")
def test_another_module_than_the_runs_is_refused(tmp_path: Path):
    meta_train.run(images(tmp_path / "r", model=None), dataset=pool(), module=own())
    other = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(64, 3))
    with pytest.raises(MetaftError, match="its tensors are not this model's"):
        evaluate.run(tmp_path / "r", dataset=pool(), module=other)


@pytest.mark.usefixtures("_no_pictures")
def test_a_module_of_ones_own_is_recorded_as_such(tmp_path: Path):
    meta_train.run(images(tmp_path / "r", model=None), dataset=pool(), module=own())
    with pytest.raises(MetaftError, match=r"^model: this run was trained with a module from Python"):
        evaluate.run(tmp_path / "r", dataset=pool())


def test_a_folder_of_data_sets_that_nothing_is_read_from_is_a_note(in_tmp: Path, capsys: Text) -> None:
    (in_tmp / "data").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("always", MetaftWarning)
        assert meta_train.main(options(SINUSOID, data_root="data", iterations=1, out="run", report=False)) == 0
        assert adapt.main(["--init", "nothing-such", "--data-root", "data"]) == 2
        assert choose.main(["--starts", "nothing-such", "--only", "--data-root", "data"]) == 2
    said = "metaft: note: data_root: no files belong to sinusoid, so nothing is looked for there (given 'data')"
    lines = capsys.readouterr().err.splitlines()
    assert said in lines
    assert lines.count(said.replace("sinusoid", "glyphs")) == 2
    with pytest.warns(MetaftWarning, match=r"^data_root: no files belong to glyphs and sinusoid, so"):
        places.note_root("data", "glyphs:Hebrew", "unlabelled:glyphs", "sinusoid")
    places.note_root("data", "glyphs:Hebrew", "torchvision:MNIST")
    places.note_root(None, "glyphs")


@pytest.mark.slow
def test_a_resume_that_is_refused_for_its_data_leaves_the_run_as_it_was(in_tmp: Path, capsys: Text) -> None:
    squares = write_folder(in_tmp / "squares")
    assert meta_train.main(options(IMAGES, dataset="folder:squares", image_size=8, iterations=1, out="run")) == 0
    moved = next((squares / "test").iterdir())
    moved.rename(moved.with_name("renamed"))
    before = {path: path.read_bytes() for path in (in_tmp / "run").rglob("*.*") if path.is_file()}
    capsys.readouterr()
    assert meta_train.main(["--resume", "run", "--iterations", "3"]) == 2
    one_line(capsys, "dataset: the class split of folder:", "is not the one run began with")
    assert {path: path.read_bytes() for path in (in_tmp / "run").rglob("*.*") if path.is_file()} == before


def test_evaluate_refuses_data_whose_classes_are_split_otherwise_than_in_training(
    tmp_path: Path, image_runs: dict[str, Path], squares: Path, capsys: Text
):
    """After a class was renamed the run's own training classes could be in the test."""
    moved = next((squares / "test").iterdir())
    moved.rename(moved.with_name("renamed"))
    try:
        assert evaluate.main([str(image_runs["maml"]), "--episodes", "2"]) == 2
        one_line(capsys, "dataset", squares, "no longer split")
        named = ["--dataset", f"folder:{squares}", "--out", str(tmp_path / "e.json")]
        assert evaluate.main([str(image_runs["maml"]), "--episodes", "2", *named]) == 0
    finally:
        moved.with_name("renamed").rename(moved)


def test_classes_that_were_trained_on_are_counted_and_said(image_runs: dict[str, Path], tmp_path: Path, capsys: Text):
    argv = [str(image_runs["maml"]), "--episodes", "2", "--out", str(tmp_path / "e.json")]
    for split, seen in (("test", 0), ("train", 6)):
        assert evaluate.main([*argv, "--set", split]) == 0
        assert json.loads((tmp_path / "e.json").read_text())["classes_seen_in_training"] == seen
    header = {"dataset": "o", "classes": {"train": ["a", "b"]}}

    class Other:
        name = "o"

        def describe(self) -> dict[str, Any]:
            return {"classes": {"test": ["a@0", "a@90", "c@0"]}}

    assert evaluate._seen_in_training(header, Other(), "test") == 1  # type: ignore[arg-type]
    assert evaluate._seen_in_training({**header, "dataset": "p"}, Other(), "test") == 0  # type: ignore[arg-type]


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.slow
def test_the_next_command_is_one_that_runs(in_tmp: Path, squares: Path, capsys: Text):
    argv = options(IMAGES, dataset=f"folder:{squares}", image_size=8, out="a run's")
    assert meta_train.main(argv) == 0
    (line,) = re.findall(r"^next: +python -m metaft\.evaluate (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert "--shots 5" in line
    assert evaluate.main(shlex.split(line)) == 0
    assert meta_train.main([*argv, "--test-shots", "7", "--out", "b"]) == 0
    (line,) = re.findall(r"^next: +python -m metaft\.evaluate (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert line == "b --checkpoint last", "the classes have ten images: 14 shots cannot be"


@pytest.mark.usefixtures("_no_pictures")
def test_a_run_with_a_module_says_that_the_module_is_needed_again(in_tmp: Path, capsys: Text):
    meta_train.run(images(Path("r"), model=None), dataset=pool(), module=own())
    assert re.search(r"^next: +metaft\.evaluate\.run\(Path\('r'\), module=", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.slow
def test_a_module_killed_before_its_first_step_goes_on_from_the_weights_it_began_with(tmp_path: Path):
    """The weights of a module are the user's: another call may bring other ones."""
    config = images(model=None)
    meta_train.run(dataclasses.replace(config, out=str(tmp_path / "whole")), dataset=pool(), module=own())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "meta_gradient", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            meta_train.run(dataclasses.replace(config, out=str(tmp_path / "r")), dataset=pool(), module=own())
    other = own()
    nn.init.ones_(next(other.parameters()))
    meta_train.resume_run(tmp_path / "r", dataset=pool(), module=other)
    assert remains(tmp_path / "r") == remains(tmp_path / "whole")


def test_evaluate_from_python_returns_what_it_writes(curve: Path, tmp_path: Path):
    out = tmp_path / "e.json"
    result = evaluate.run(curve, EvaluateConfig(episodes=3, out=str(out)))
    assert result == json.loads(out.read_text())
    again = evaluate.run(curve, EvaluateConfig(episodes=2, out=str(out)))
    assert again == json.loads(out.read_text())


def test_evaluate_replaces_no_result_but_its_own(curve: Path):
    before = (curve / "result.json").read_bytes()
    with pytest.raises(MetaftError, match=r"^out: .*result\.json is there, and is no result of this command"):
        evaluate.run(curve, EvaluateConfig(episodes=2, out=str(curve / "result.json")))
    assert (curve / "result.json").read_bytes() == before


# ---- metaft COMMAND -----------------------------------------------------------------------------------------------


def test_the_console_command(capsys: Text, curve: Path, tmp_path: Path):
    assert metaft(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", capsys.readouterr().out)
    for argv in ([], ["--help"], ["-h"]):
        assert metaft(argv) == 0
        said = capsys.readouterr().out
        assert "meta_train" in said
        assert "evaluate" in said
    for name in ("meta_train", "meta-train"):
        assert metaft([name, "--help"]) == 0
        assert "--inner-steps" in capsys.readouterr().out
    assert metaft(["evaluate", str(curve), "--episodes", "2", "--out", str(tmp_path / "e.json")]) == 0


@pytest.mark.parametrize(("word", "near"), [("meta-trian", "meta_train"), ("evalaute", "evaluate")])
def test_an_unknown_command_is_named_with_the_nearest(capsys: Text, word: str, near: str):
    assert metaft([word]) == 2
    one_line(capsys, repr(word), f"did you mean {near!r}")


@pytest.mark.parametrize("command", [meta_train, evaluate])
def test_help_lists_every_field(command: Any, capsys: Text):
    assert command.main(["--help"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for name in options_of(command.Arguments).keys() - {"run"}:
        assert re.search(rf"^  --{name.replace('_', '-')}\b", said.out, re.MULTILINE), name


# ---- real processes -----------------------------------------------------------------------------------------------

LONG = {**SINUSOID, "iterations": 150, "checkpoint_every": 7, "eval_every": 40, "log_every": 9}


def start(out: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "metaft.meta_train", *options(LONG), "--out", str(out)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for_rows(out: Path, number: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while len(read_rows(out / "metrics.jsonl")) < number:
        assert time.monotonic() < until, "the run did not get there in a minute"
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_pictures")
def test_stopped_for_real_and_resumed_it_ends_with_the_same_bytes(tmp_path: Path):
    """By signals that a run answers; `faults/test_kills.py` sends the one that it cannot."""
    assert meta_train.main([*options(LONG), "--out", str(tmp_path / "whole")]) == 0
    whole = remains(tmp_path / "whole")
    for number, (how, status) in enumerate([(signal.SIGTERM, 143), (signal.SIGINT, 130)]):
        out = tmp_path / str(number)
        process = start(out)
        wait_for_rows(out, 1 + 5 * number, process)
        process.send_signal(how)
        _, said = process.communicate(timeout=60)
        assert process.returncode == status, said
        assert "Traceback" not in said
        assert said.splitlines()[-1].endswith(f"go on with: python -m metaft.meta_train --resume {out}")
        assert not (out / "result.json").exists()
        assert meta_train.main(["--resume", str(out)]) == 0
        assert remains(out) == whole, how


@pytest.mark.slow
def test_errors_of_a_real_process_have_no_traceback(tmp_path: Path):
    for words, parts in (
        (["metaft.meta_train", "--wayz", "5"], ["--wayz", "did you mean '--ways'"]),
        (["metaft.evaluate", "none"], ["none does not exist"]),
        (["metaft", "evalute"], ["'evalute'", "did you mean 'evaluate'"]),
    ):
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stdout == ""
        [line] = done.stderr.splitlines()
        assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []
