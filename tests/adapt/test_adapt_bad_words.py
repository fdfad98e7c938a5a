"""Words and folders that an adapt run cannot use: one line, status 2, nothing written."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from adapting import Text, contents
from helpers import (
    TARGET,
    one_line,
    words,
    write_target,
)

import metaft
from metaft import adapt

BAD = [
    (["--epoch", "3"], ["--epoch", "did you mean '--epochs'"]),
    (["--epochs", "three"], ["epochs must", "'three'"]),
    (["--epochs", "0"], ["epochs must be at least 1, got 0"]),
    (["--epochs", "2.5"], ["epochs must", "'2.5'"]),
    (["--lr", "0"], ["lr must be above 0, got 0"]),
    (["--lr", "nan"], ["lr must be finite, got nan"]),
    (["--batch-size", "1"], ["batch_size must be at least 2, got 1"]),
    (["--patience", "0"], ["patience must be at least 1, got 0"]),
    (["--shots-per-class", "0"], ["shots_per_class must be at least 1, got 0"]),
    (["--inner-steps", "-1"], ["inner_steps must be at least 0, got -1"]),
    (["--seed", "-1"], ["seed must be at least 0, got -1"]),
    (["--seed", str(2**63)], ["seed must be below 2**63", str(2**63)]),
    (["--seeds", "0"], ["seeds must be at least 1, got 0"]),
    (["--head", "lineer"], ["head must", "'lineer'", "linear"]),
    (["--freeze", "all"], ["freeze must", "'all'", "backbone"]),
    (["--augment", "much"], ["augment must", "'much'", "basic"]),
    (["--method", "tune"], ["method must", "'tune'", "finetune"]),
    (["--device", "gpu"], ["device must be", "'gpu'"]),
    (["--device", "cuda:77"], ["device", "'cuda:77'"]),
    (
        ["--data", "glyph:Hebrew"],
        ["data: no 'glyph:Hebrew', known are folder:PATH, csv:FILE, ", "glyphs:SCRIPT"],
    ),
    (["--data", "glyphs:Hebrwe"], ["data: ", "'Hebrwe'", "did you mean 'Hebrew'"]),
    (["--data", "glyphs:Latin"], ["data: ", "no held-out script 'Latin'"]),
    (["--data", "folder:/none/x"], ["data: folder /none/x does not exist"]),
    (["--data", "folder:/none/x", "--init", "none"], ["data: folder /none/x does not exist"]),
    (["--data", ""], ["data: no '', known are folder:PATH, csv:FILE, torchvision:NAME, glyphs:SCRIPT"]),
    (["--init", "/none/x"], ["init: ", "/none/x does not exist"]),
    (["--init", ""], ["init: ", "none", "''"]),
    (["--init", "none", "--method", "inner"], ["method: ", "--init RUN", "none"]),
    (["--method", "inner", "--epochs", "3"], ["epochs: --method inner has no such setting (given 3)"]),
    (["--method", "inner", "--lr", "0.1"], ["lr: --method inner has no such setting (given 0.1)"]),
    (["--method", "inner", "--head", "linear"], ["head: --method inner", "linear"]),
    (["--method", "inner", "--freeze", "backbone"], ["freeze: --method inner", "backbone"]),
    (["--method", "inner", "--augment", "none"], ["augment: --method inner", "none"]),
    (["--method", "inner", "--batch-size", "4"], ["batch_size: --method inner", "4"]),
    (["--method", "inner", "--patience", "4"], ["patience: --method inner", "4"]),
    (["--inner-steps", "3"], ["inner_steps: --method finetune has no such setting (given 3)"]),
    (["--config", "none.toml"], ["config", "none.toml", "No such file"]),
    (["--resume", "/none/x"], ["/none/x does not exist"]),
    (["stray"], ["stray"]),
]


@pytest.mark.parametrize(("argv", "parts"), BAD, ids=lambda value: " ".join(value))
def test_bad_input_is_one_line_status_2_and_writes_nothing(
    in_tmp: Path, capsys: Text, argv: list[str], parts: list[str]
) -> None:
    assert adapt.main(argv) == 2
    one_line(capsys, *parts)
    assert list(in_tmp.iterdir()) == []


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Path], data: Path, done: Path) -> dict[str, Path]:
    """Data and runs that something is wrong with, by name; and some with which nothing is."""
    base = tmp_path_factory.mktemp("schlecht ß")
    (base / "empty").mkdir()
    (base / "hollow/a").mkdir(parents=True)
    write_target(base / "hollow", {".": 3}, classes="bc")
    (base / "file").write_text("")
    write_target(base / "one", {".": 4}, classes="a")
    write_target(base / "few", {".": 3}, classes="ab")
    write_target(base / "untested", {"train": 3})
    write_target(base / "colour", {"train": 3, "test": 2}, channels=3)
    for name, content in (("text", b"no picture"), ("cut", None)):
        write_target(base / name, {"train": 3, "test": 2})
        file = base / name / "train" / TARGET[2] / "01.png"
        file.write_bytes(file.read_bytes()[:60] if content is None else content)
    write_target(base / "lone", {"train": 3, "test": 2})
    shutil.rmtree(base / "lone/test" / TARGET[1])
    shutil.copytree(runs["maml"], base / "damaged")
    (base / "damaged/checkpoints/best.safetensors").write_bytes(b"nothing")
    shutil.copytree(runs["maml"], base / "early")
    (base / "early/checkpoints/best.safetensors").unlink()
    texts = {
        "unknown": "epoch = 3",
        "mistaken": "epochs = 'three'",
        "choice": "head = 'lineer'",
        "malformed": "epochs = ",
        "table": "[fit]\nlr = 0.1",
        "other": "method = 'inner'\nepochs = 3",
    }
    for name, text in texts.items():
        (base / f"{name}.toml").write_text(text)
    found = {path.name: path for path in base.iterdir()}
    return {
        **found,
        **{f"{k}_run": runs[k] for k in ("colour", "curve", "maml", "protonet")},
        "data": data,
        "done": done,
    }


UNFIT = [
    ("--data folder:{empty}", ["data: {empty} holds 0 class folders, fewer than 2"]),
    ("--data folder:{hollow}", ["data: ", "{hollow}/a holds no images"]),
    ("--data folder:{one}", ["data: {one} holds 1 class folders, fewer than 2"]),
    ("--data folder:{few} --shots-per-class 3", ["class 'a' has 3 images", "shots_per_class + 1 for the test = 4"]),
    ("--data folder:{data} --shots-per-class 11", ["class 'apple' has 10 images", "shots_per_class = 11"]),
    ("--data folder:{untested}", ["{untested}/test is missing"]),
    ("--data folder:{lone}", ["'c d' is not in every part of {lone}"]),
    ("--data folder:{colour}", ["data: 15 of the 15 images of {colour} are in colour, [3, 8, 8]", "[1, 8, 8]"]),
    ("--data folder:{text}", ["data: image {text}/train/βητα/01.png"]),
    ("--data folder:{text} --init none", ["data: image {text}/train/βητα/01.png"]),
    ("--data folder:{cut}", ["data: image {cut}/train/βητα/01.png"]),
    ("--data folder:{file}", ["data: {file} is not a folder"]),
    ("--data glyphs:Hebrew", ["[1, 28, 28]", "[1, 8, 8]"]),
    ("--init {colour_run} --data glyphs:Hebrew", ["[1, 28, 28]", "[3, 8, 8]"]),
    ("--init {curve_run}", ["init: {curve_run}", "[1]", "the images of folder:{data} are [1, "]),
    ("--init {curve_run} --method inner", ["init: {curve_run}", "[1]", "the images of folder:{data} are [1, "]),
    ("--init {data}", ["init: run folder {data} is not a run folder"]),
    ("--init {done}", ["init: {done} is a run of metaft.adapt, not of metaft.meta_train"]),
    ("--init {damaged}", ["init: checkpoint {damaged}/checkpoints/best.", "last.safetensors of step 5 is good"]),
    ("--init {early}", ["{early}/checkpoints/best.safetensors: cannot be read"]),
    ("--init {protonet_run} --method inner --inner-steps 3", ["inner_steps: protonet has no inner steps (given 3)"]),
    ("--out {done}", ["out: {done} already exists", "--resume {done}"]),
    ("--out {file}", ["out: {file} already exists"]),
    ("--out {file}/x", ["out: ", "{file}/x", "Not a directory"]),
    ("--config {unknown.toml}", ["{unknown.toml}: unknown field 'epoch'; did you mean 'epochs'?"]),
    ("--config {mistaken.toml}", ["{mistaken.toml}: epochs must be int or nothing, got 'three'"]),
    ("--config {choice.toml}", ["{choice.toml}: head must be one of linear", "'lineer'; did you mean 'linear'?"]),
    ("--config {malformed.toml}", ["{malformed.toml} is not valid TOML"]),
    ("--config {table.toml}", ["{table.toml}: 'fit' must be one value, got a table"]),
    ("--config {other.toml}", ["epochs: --method inner has no such setting (given 3)"]),
]


@pytest.mark.parametrize(("line", "parts"), UNFIT, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_together_likewise(
    in_tmp: Path, capsys: Text, bad: dict[str, Path], line: str, parts: list[str]
) -> None:
    def filled(text: str) -> str:
        return re.sub(r"\{(.+?)\}", lambda found: str(bad[found[1]]), text)

    argv = [filled(word) for word in line.split()]
    for name, value in (("--init", bad["maml_run"]), ("--data", f"folder:{bad['data']}")):
        argv += [name, str(value)] if name not in argv else []
    before = contents(bad["done"])
    assert adapt.main(argv) == 2
    one_line(capsys, *map(filled, parts))
    assert list(in_tmp.iterdir()) == []
    assert contents(bad["done"]) == before


@pytest.mark.parametrize("what", ["a meta-training run", "no run", "a run of nothing"])
def test_only_an_adapt_run_is_resumed(
    what: str, runs: dict[str, Path], data: Path, tmp_path: Path, capsys: Text
) -> None:
    path = shutil.copytree(runs["maml"] if what == "a meta-training run" else data, tmp_path / "r")
    if what == "a run of nothing":
        (path / "config.toml").write_bytes(b"\xff")
    before = contents(path)
    assert adapt.main(["--resume", str(path)]) == 2
    kind = f"resume: {path} is a run of metaft.meta_train, not of metaft.adapt"
    part = {"a meta-training run": kind, "no run": "is not a run folder"}
    one_line(capsys, path, part.get(what, "not valid TOML"))
    assert contents(path) == before


def test_a_run_killed_before_its_settings_were_written_leaves_a_folder_free_to_use(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".config.toml.tmp").write_text("epochs =")
    assert adapt.main(words(runs["maml"], data, tmp_path / "r", epochs=1)) == 0


def test_names_that_are_not_utf_8(runs: dict[str, Path], tmp_path: Path, capsys: Text) -> None:
    """Linux allows any bytes in a name. They may be refused, in one line, or taken."""
    name = os.fsdecode(b"caf\xe9")
    try:
        data = write_target(tmp_path / "d", {"train": 3, "test": 2}, classes=("a", name))
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    status = adapt.main(words(runs["maml"], data, tmp_path / "o", epochs=1))
    if status == 0:
        assert metaft.load(tmp_path / "o").class_names == ("a", name)
        assert adapt.main(["--resume", str(tmp_path / "o")]) == 0
    else:
        assert status == 2
        one_line(capsys, "caf")
        assert not (tmp_path / "o").exists()
