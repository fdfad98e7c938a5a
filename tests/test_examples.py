"""Every example runs, in a short form."""

from __future__ import annotations

import inspect
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
from helpers import images, meta_trained, one_thread, sinusoid, write_folder

from metaft import MetaTrainConfig, engines, meta_train, outer
from metaft.types import NORMS, Params

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
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "adapt_notmnist", "compare_algorithms", "custom_dataset", "custom_model", "new_algorithm", "omniglot",
        "omniglot_runs", "picture", "sinusoid",
    }  # fmt: skip


@pytest.mark.usefixtures("own_algorithms")
def test_the_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        limit = {"adapt_notmnist": 133, "picture": 90}.get(path.stem, 80)
        assert len(path.read_text(encoding="utf-8").splitlines()) < limit, path.name
    member = inspect.getsource(runpy.run_path(str(EXAMPLES / "new_algorithm.py"))["sign_maml"])
    assert len(member.splitlines()) <= 40


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("runs", "finetune"):
        monkeypatch.setattr(f"metaft.{kind}.report.draw_pictures", lambda *_: [])


@pytest.mark.usefixtures("_no_pictures", "own_algorithms")
@pytest.mark.slow
def test_new_algorithm(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_example("new_algorithm", "--iterations", "2", "--episodes", "4") == 0
    said = capsys.readouterr().out
    assert re.search(r"^sign-maml: [\d.]+ ± [\d.]+ %$", said, re.MULTILINE)
    assert re.search(r"^maml: [\d.]+ ± [\d.]+ %$", said, re.MULTILINE)
    assert Path("runs/new-sign-maml/result.json").exists()


@pytest.mark.usefixtures("own_algorithms")
def test_the_new_algorithm_has_the_exact_gradient() -> None:
    """The sign's derivative is 0: against finite differences of the query loss, in parameters and rates."""
    make = runpy.run_path(str(EXAMPLES / "new_algorithm.py"))["sign_maml"]
    member = make(scenarios.model("mlp"), loss="cross_entropy", inner_steps=2)
    meta, state = member.init(0)
    data = scenarios.episodes(tasks=2)

    def value(at: Params) -> float:
        tasks = (scenarios.one(data, i) for i in range(2))
        return sum(float(member.task_loss(at, state, {}, task)[0].detach()) for task in tasks) / 2

    with engines.engine("vmap") as engine:
        grads = outer.meta_gradient(engine, member, meta, state, data).grads
    g, h = torch.Generator().manual_seed(0), 1e-8
    v = {k: torch.randint(2, p.shape, generator=g).double() * 2 - 1 for k, p in meta.items()}
    ends = [value({k: p + sign * h * v[k] for k, p in meta.items()}) for sign in (1, -1)]
    exact = sum(float((grads[k] * v[k]).sum()) for k in v)
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(exact, rel=1e-5)
    assert all(float(grads[f"{k}.rate"].abs()) > 0 for k in meta if not k.endswith(".rate"))


def test_sinusoid(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_example("sinusoid", "--iterations", "2", "--episodes", "4", "--shots", "5") == 0
    said = capsys.readouterr().out
    assert "test mse of 4 curves, each from 5 points" in said
    assert re.search(r"after 10 steps [\d.]+ ± [\d.]+", said)
    assert Path("runs/curve.png").stat().st_size > 1000


@pytest.mark.usefixtures("_no_pictures")
def test_custom_dataset(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_example("custom_dataset", "--iterations", "2", "--episodes", "4") == 0
    said = capsys.readouterr().out
    named = [line.partition(": ")[2].split(", ") for line in said.splitlines()[:3]]
    assert [len(classes) for classes in named] == [6, 2, 2]
    assert "2-way 5-shot" in said


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.slow
def test_compare_algorithms(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(in_tmp / "data")
    names = ("protonet", "matching-net")
    for name in names:  # it takes the runs that are there
        meta_train.run(images(Path(f"runs/compare/{name}"), dataset="folder:data", image_size=8, algorithm=name))
    capsys.readouterr()
    words = ["--algorithms", *names, "--dataset", "folder:data", "--episodes", "6", "--iterations", "5", "--width", "4"]
    assert run_example("compare_algorithms", *words) == 0
    *_, title, _, first, second = capsys.readouterr().out.splitlines()
    assert "folder:data, accuracy in %, 6 episodes" in title
    rows = {line.split()[0]: line for line in (first, second)}
    assert set(rows) == set(names)
    assert rows["protonet"].count("(+0.0 ± 0.0)") == 2
    found = runpy.run_path(str(EXAMPLES / "compare_algorithms.py"))["scores"]
    a, b = (100 * found(Path(f"runs/compare/{name}"), 6, {})[0] for name in names)
    for mode in range(2):
        apart = (b - a)[:, mode].numpy()
        interval = 1.96 * apart.std(ddof=1) / 6**0.5
        assert f"{b[:, mode].mean():.1f} ± " in rows["matching-net"]
        assert f"({apart.mean():+.1f} ± {interval:.1f})" in rows["matching-net"]
    assert run_example("compare_algorithms", "--algorithms", "mamml", "--dataset", "folder:data") == 2
    assert capsys.readouterr().err.startswith("compare_algorithms: algorithm: no 'mamml'")
    for field, here, asked in (("iterations", 5, 6), ("width", 4, 8), ("dataset", "folder:data", "folder:other")):
        assert run_example("compare_algorithms", *words, f"--{field}", str(asked)) == 2
        said = capsys.readouterr()
        line = f"{field}: runs/compare/protonet has {here!r}, not {asked!r}; take another --out"
        assert said.err == f"compare_algorithms: {line}\n"
        assert "±" not in said.out
    shutil.rmtree("runs/compare/matching-net")
    other = {"dataset": "folder:data", "image_size": 8, "algorithm": "matching-net", "test_query_shots": 3}
    meta_train.run(images(Path("runs/compare/matching-net"), **other))
    capsys.readouterr()
    assert run_example("compare_algorithms", *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("compare_algorithms: test_query_shots: runs/compare/matching-net has 3, not 2; ")


def test_compare_algorithms_of_curves(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By squared errors as they are, not as percent."""
    names = ("maml", "anil")
    for name in names:
        meta_train.run(sinusoid(Path(f"runs/compare/{name}"), algorithm=name))
    words = ["--dataset", "sinusoid", "--episodes", "40", "--iterations", "7", "--width", "4"]
    capsys.readouterr()
    assert run_example("compare_algorithms", "--algorithms", *names, *words) == 0
    *_, title, _, first, second = capsys.readouterr().out.splitlines()
    assert "sinusoid, mse (less is better), 40 episodes" in title
    for name, line in zip(names, (first, second), strict=True):
        test = json.loads(Path(f"runs/compare/{name}/result.json").read_text())["test"]
        for mode in NORMS:
            assert f" {test[mode]['mse']:.3f} ± {test[mode]['ci95']:.3f}  (" in line


@pytest.mark.slow
@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.skipif(not os.environ.get("METAFT_DATA"), reason="METAFT_DATA names no folder with omniglot/")
def test_omniglot(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--settings", "5w1s", "20w1s", "--iterations", "1", "--episodes", "2", "--width", "4")
    assert run_example("omniglot", *words) == 0
    *_, five, twenty = capsys.readouterr().out.splitlines()
    assert re.match(r"5w1s +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+ +98.7 ± 0.4$", five)
    assert re.match(r"20w1s +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+ +95.8 ± 0.3$", twenty)


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "maml++"])
def test_omniglots_inner_loop_is_the_papers_for_maml_alone(
    name: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[MetaTrainConfig] = []

    def run(config: MetaTrainConfig) -> dict[str, Any]:
        asked.append(config)
        return {"test": {mode: {"accuracy": 0.5, "ci95": 0.01} for mode in NORMS}}

    monkeypatch.setattr(meta_train, "run", run)
    assert run_example("omniglot", "--settings", "5w1s", "20w1s", "--algorithm", name) == 0
    assert capsys.readouterr().out.count("50.0 ± 1.0") == 4
    loops = [(c.inner.inner_steps, c.inner.inner_lr, c.test.test_inner_steps) for c in asked]
    assert loops == ([(1, 0.4, 3), (5, 0.1, 5)] if name in ("maml", "fomaml") else [(None, None, None)] * 2)
    assert {(c.learner.algorithm, c.data.dataset, c.test.test_query_shots) for c in asked} == {(name, "omniglot", 1)}


def test_omniglot_says_what_is_wrong_in_one_line(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_example("omniglot", "--data-root", "nowhere") == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"omniglot: .*nowhere.*\n", said.err)
    assert not said.out


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.slow
def test_custom_model(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_example("custom_model", "--iterations", "2", "--episodes", "4") == 0
    assert "transductive" in capsys.readouterr().out


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("method", ["finetune", "inner"])
@pytest.mark.slow
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


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.slow
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
    assert "no run folder or start 'nowhere'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_picture_of_the_readme(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with one_thread():
        meta_trained(in_tmp / "run", write_folder(in_tmp / "squares"))
        assert run_example("picture", "run", "--out", "picture.png") == 0
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    assert "picture.png: " in capsys.readouterr().out
