"""The README's Python runs as it stands, with fewer steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs_and_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    loop = code[code.index("pool =") :]
    assert len(loop.strip().splitlines()) <= 15
    short = code.replace("range(500)", "range(2)").replace("episodes=600", "episodes=3")
    assert short != code
    exec(compile(short, str(README), "exec"), {})
    assert "transductive" in capsys.readouterr().out


def test_every_option_named_in_the_readme_exists() -> None:
    import dataclasses

    from metaft.config import EvaluateConfig, MetaTrainConfig

    known = {f.name.replace("_", "-") for c in (MetaTrainConfig, EvaluateConfig) for f in dataclasses.fields(c)}
    named = set(re.findall(r"--([a-z][a-z-]*)", README.read_text(encoding="utf-8")))
    assert named - known <= {"help", "resume", "config"}


def test_every_name_that_the_readme_uses_exists() -> None:
    import metaft

    for dotted in set(re.findall(r"\bmetaft((?:\.[a-z_]+)+)\(", README.read_text(encoding="utf-8"))):
        found: object = metaft
        for name in dotted.strip(".").split("."):
            found = getattr(found, name)
