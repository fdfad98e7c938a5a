"""Every example runs, in a short form."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from helpers import images, write_folder

from metaft import meta_train

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, *argv: str) -> int | str | None:
    """Its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *argv])
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        except SystemExit as done:
            return done.code
    return 0


def test_every_example_is_tried() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"custom_model", "adapt_notmnist"}


def test_custom_model(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_example("custom_model", "--iterations", "2", "--episodes", "4") == 0
    assert "transductive" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["finetune", "inner"])
def test_runs_of_one_kind_are_lines_of_their_own(method: str, in_tmp: Path) -> None:
    write_folder(in_tmp / "data")
    for seed in (0, 1):
        meta_train.run(images(in_tmp / f"seed {seed}", dataset="folder:data", image_size=8, iterations=2, seed=seed))
    words = ["--data", "folder:data/test", "--shots", "1", "2", "--seeds", "2", "--out", "out", "--method", method]
    words += ["--epochs", "1"] if method == "finetune" else []
    assert run_example("adapt_notmnist", *words, "--init", "seed 0", "--init", "seed 1") == 0
    rows = json.loads(Path("out/shots.json").read_text())
    learned = [f"maml on folder:data (seed {seed})" for seed in (0, 1)]
    random = ["random"] if method == "finetune" else [f"random, for {start}" for start in learned]
    lines = runpy.run_path(str(EXAMPLES / "adapt_notmnist.py"))["figure"](rows, "folder:data").axes[0]
    labels = lines.get_legend_handles_labels()[1]
    assert sorted(labels) == sorted([*learned, *([f"{random[0]} start"] if method == "finetune" else random)])
    assert sorted({row["start"] for row in rows}) == sorted([*learned, *random])


def test_adapt_notmnist(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(in_tmp / "data")
    for name, algorithm in (("one", "maml"), ("two", "protonet")):
        meta_train.run(images(in_tmp / name, dataset="folder:data", image_size=8, iterations=2, algorithm=algorithm))
    words = ("--data", "folder:data/test", "--shots", "1", "3", "--seeds", "2", "--epochs", "2", "--out", "out")
    assert run_example("adapt_notmnist", *words, "--init", "one", "--init", "two") == 0
    rows = json.loads(Path("out/shots.json").read_text())
    assert [(row["start"], row["shots"], row["draws"]) for row in rows] == [
        (start, shots, 2)
        for learned in ("maml on folder:data", "protonet on folder:data")
        for shots in (1, 3)
        for start in (learned, "random")
    ]
    for row in rows[::2]:
        run = "one" if "maml" in row["start"] else "two"
        result = json.loads(Path(f"out/{run}-finetune-{row['shots']}/result.json").read_text())
        assert row["accuracy"] == result["mean"]["accuracy"]
        assert (row["gain"], row["gain_ci95"]) == (result["gain"]["accuracy"], result["gain"]["ci95"])
    assert Path("out/shots.png").stat().st_size > 1000
    capsys.readouterr()
    before = Path("out/shots.json").read_bytes()
    assert run_example("adapt_notmnist", *words, "--init", "one", "--init", "two") == 0  # goes on with what is there
    assert Path("out/shots.json").read_bytes() == before
    capsys.readouterr()
    assert run_example("adapt_notmnist", *words, "--init", "none") == 2
    assert capsys.readouterr().err.startswith("adapt_notmnist: init: ")
    assert run_example("adapt_notmnist", *words, "--init", "nowhere") == 2
    assert "run folder nowhere does not exist" in capsys.readouterr().err
