"""The README's Python runs as it stands, with fewer steps."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from helpers import CONFIGS, write_folder

import metaft
from metaft import adapt
from metaft.config import (
    AdaptConfig,
)
from metaft.options import options

README = Path(__file__).parent.parent / "README.md"


def python_with(word: str) -> str:
    """The one piece of the README's Python that holds a word."""
    pieces = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [piece for piece in pieces if word in piece]
    return code


def test_the_lines_about_a_classifier_run(in_tmp: Path) -> None:
    write_folder(in_tmp / "data")
    adapt.run(AdaptConfig(init="none", data="folder:data/test", epochs=1, out="runs/mine"))
    pictures = sorted((in_tmp / "data" / "test" / "class10").iterdir())
    for name in ("a.png", "b.png"):
        shutil.copy(pictures.pop(), name)
    exec(compile(python_with("metaft.load"), str(README), "exec"), {"metaft": metaft})


def test_the_example_runs_and_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    code = python_with("pool =")
    loop = code[code.index("pool =") :]
    assert len(loop.strip().splitlines()) <= 15
    short = code.replace("range(500)", "range(2)").replace("episodes=600", "episodes=3")
    assert short != code
    exec(compile(short, str(README), "exec"), {})
    assert "transductive" in capsys.readouterr().out


PAGES = [
    "README.md", "docs/running.md", "docs/adapting.md", "docs/search.md", "docs/comparison.md",
    "docs/guides/my-photos.md", "docs/guides/new-algorithm.md",
]  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_every_option_named_on_a_page_exists(page: str) -> None:
    known = {name.replace("_", "-") for c in CONFIGS for name in options(c)}
    known |= {
        f"no-{name.replace('_', '-')}" for c in CONFIGS for name, field in options(c).items() if bool in field.types
    }
    text = (README.parent / page).read_text(encoding="utf-8")
    # A scheduler's, TensorBoard's, and torchrun's up to the module.
    others = r"#SBATCH.*|tensorboard --logdir|torchrun (.*\\\n)*.*?(?= -m metaft)"
    named = set(re.findall(r"--([a-z][a-z0-9-]*)", re.sub(others, "", text)))
    torchruns = {"nproc-per-node", "max-restarts", "rdzv-id"}  # in sentences
    assert named - known <= {"help", "resume", "config", "auto-resume"} | torchruns


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_every_name_that_the_readme_uses_exists() -> None:
    for dotted in set(re.findall(r"\bmetaft((?:\.[a-z_]+)+)\(", README.read_text(encoding="utf-8"))):
        found: object = metaft
        for name in dotted.strip(".").split("."):
            found = getattr(found, name)
