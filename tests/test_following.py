"""What a run says can be done next works: a command, or a line of Python that is given the same things again."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import images, pool, sinusoid
from torch import Tensor, nn

import metaft
from metaft import evaluate, meta_train
from metaft.config import MetaTrainConfig
from metaft.errors import Interrupted
from metaft.objective import Objective
from metaft.runs.following import to_go_on
from metaft.runs.from_python import brought


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def curve() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))


def smoothed(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target, label_smoothing=0.1)


CASES: list[tuple[dict[str, Any], MetaTrainConfig, list[str]]] = [
    ({}, sinusoid(), []),
    ({"module": curve()}, sinusoid(width=None), ["module=..."]),
    ({"module": curve(), "init": "seed"}, sinusoid(width=None), ["module=...", "init='seed'"]),
    ({"loss": F.l1_loss}, sinusoid(), ["loss=..."]),
    ({"loss": Objective(F.l1_loss)}, sinusoid(), ["loss=..."]),
    ({"loss": "mse"}, sinusoid(), ["loss='mse'"]),
    ({"dataset": pool()}, images(), ["dataset=..."]),
    ({"module": net(), "loss": smoothed, "dataset": pool()}, images(model=None, width=None),
     ["module=...", "loss=...", "dataset=..."]),
]  # fmt: skip


def called(line: str, given: dict[str, Any]) -> Any:
    """What a line of Python gives, with `...` filled in."""
    for name in given:
        line = line.replace(f"{name}=...", f"{name}=given[{name!r}]")
    return eval(line.partition(" in Python")[0], {"metaft": metaft, "Path": Path, "given": given})


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and are tested elsewhere."""
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize(("given", "config", "arguments"), CASES, ids=lambda case: "")
def test_what_is_offered_works(
    given: dict[str, Any], config: MetaTrainConfig, arguments: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(meta_train.StopSignals, "check", interrupt)
        with pytest.raises(Interrupted) as stopped:
            meta_train.run(dataclasses.replace(config, out="a run's"), **given)
    how = str(stopped.value).partition("go on with: ")[2]
    if arguments:
        assert how == f'metaft.meta_train.resume_run(Path("a run\'s"), {", ".join(arguments)}) in Python'
        result = called(how, given)
    else:
        assert meta_train.main(shlex.split(how)[3:]) == 0
        result = {}
    said = capsys.readouterr().out
    (line,) = re.findall(r"^next: +(.*)$", said, re.MULTILINE)
    if arguments:
        assert line.startswith("metaft.evaluate.run(")
        assert "init=" not in line
        assert called(line, given)["test"] == result["test"]
    else:
        assert evaluate.main(shlex.split(line)[3:]) == 0
    offers_adapt = "python -m metaft.adapt --init" in said
    assert offers_adapt == (config.data.dataset != "sinusoid" and "module" not in given)


def interrupt(self: Any, message: str) -> None:
    raise Interrupted(message, 15)


def test_a_dataset_that_names_no_inputs_is_none_to_adapt_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fine-tuning reads images as the run's were read, which nothing says here."""
    data = pool()
    monkeypatch.setattr(type(data), "describe", lambda self: {"classes": {}})
    meta_train.run(images(tmp_path / "r", iterations=1), dataset=data)
    assert "metaft.adapt" not in capsys.readouterr().out


def test_several_processes_go_on_as_several() -> None:
    assert to_go_on(Path("r"), (), 1) == "python -m metaft.meta_train --resume r"
    assert to_go_on(Path("r"), (), 3).startswith("torchrun ")
    line = to_go_on(Path("r"), brought(loss=F.l1_loss), 3)
    assert line == "metaft.meta_train.resume_run(Path('r'), loss=..., ranks=...) in Python"
