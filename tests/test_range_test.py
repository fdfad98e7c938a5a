"""`--lr auto`: what the range test finds, that nothing else notices it, and that a run keeps what it found."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import adapted, finished, one_line, words, write_target
from test_finetune import CLASSES, INPUTS, bits, body, same, toy

from metaft import adapt
from metaft.config import read_toml
from metaft.errors import MetaftError
from metaft.finetune import range_test as module
from metaft.finetune.fit import fit
from metaft.finetune.lessons import Labelled
from metaft.finetune.range_test import HIGHEST, LOWEST, STEPS, range_test, smooth
from metaft.plots.range_test import range_test_figure
from metaft.runs.folder import RunFolder
from metaft.settings.finetuning import Recipe
from metaft.views.base import Picture
from metaft.views.subject import of_folder
from metaft.views.training import training

IMAGES, LABELS = toy(21)
GIVEN = Labelled(INPUTS, IMAGES, LABELS, CLASSES)
RECIPE = Recipe(epochs=2, batch_size=8, lr=0.01)


def test_the_rates_grow_by_one_factor_and_each_loss_is_the_mean_around_it() -> None:
    found = range_test(body(), GIVEN, RECIPE)
    rates, losses = found["rates"], found["losses"]
    assert len(rates) == len(losses) == len(found["smoothed"]) <= STEPS
    factor = (HIGHEST / LOWEST) ** (1 / (STEPS - 1))
    assert rates == pytest.approx([LOWEST * factor**i for i in range(len(rates))])
    assert found["smoothed"][10] == pytest.approx(sum(losses[3:18]) / 15)
    assert (found["smoothed"][0], found["smoothed"][1]) == (losses[0], pytest.approx(sum(losses[:3]) / 3))
    first, low = sum(losses[:8]) / 8, min(found["smoothed"])
    behind = [rate for rate, loss in zip(rates, found["smoothed"], strict=True) if loss <= low + 0.1 * (first - low)]
    assert found["rate"] == float(f"{behind[0]:.1e}")


def test_of_gradient_descent_on_a_quadratic_it_is_the_rate_of_the_closed_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of curvature c a step at rate r multiplies the error by 1 - r c, so that at rates that grow by a factor g the
    loss is exp(-2 c r / (g - 1)) as long as r c is small, of which nine tenths are gone at r = log 10 (g - 1) / 2 c."""
    curvature, values = 40.0, {"w": 3.0}

    def step(self: Any, turns: Any, rates: Any, lr: float, *, on_features: bool) -> list[float]:
        loss = curvature / 2 * values["w"] ** 2
        values["w"] *= 1 - lr * curvature
        return [loss * len(turn.batch) for turn in turns]

    monkeypatch.setattr(module.Training, "step", step)
    monkeypatch.setattr(module, "WINDOW", 1)
    found = range_test(body(), GIVEN, RECIPE)
    growth = (HIGHEST / LOWEST) ** (1 / (STEPS - 1))
    assert found["rate"] == pytest.approx(np.log(10) * (growth - 1) / (2 * curvature), rel=growth - 1)
    assert len(found["rates"]) < STEPS, "it ends where the loss has diverged"
    assert found["losses"][-1] > 4 * found["losses"][0]


@pytest.mark.parametrize("changes", [{"strategy": "lora"}, {"augment": "basic", "extra": ("mixup",), "dropout": 0.2}])
def test_nothing_outside_notices_it(changes: dict[str, Any]) -> None:
    start = body().train()
    recipe = Recipe(**{"epochs": 2, "batch_size": 8, "lr": 0.01, **changes})
    alone = fit(start, INPUTS, IMAGES, LABELS, CLASSES, recipe, seed=3)
    before, modes = copy.deepcopy(start.state_dict()), [part.training for part in start.modules()]
    drawn = torch.get_rng_state(), random.getstate()
    first = range_test(start, GIVEN, recipe, seed=3)
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert same(start.state_dict(), before)
    assert [part.training for part in start.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in start.parameters())
    assert range_test(start, GIVEN, recipe, seed=3) == first
    assert same(bits(fit(start, INPUTS, IMAGES, LABELS, CLASSES, recipe, seed=3)), bits(alone))


def test_its_first_loss_is_that_of_the_fit_and_what_moves_is_what_the_strategy_moves_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, float]] = []
    real = module.Training.step

    def look(self: Any, turns: Any, rates: Any, lr: float, **more: Any) -> list[float]:
        seen.append({name: factor * lr for name, factor in rates.items()})
        return real(self, turns, rates, lr, **more)

    monkeypatch.setattr(module.Training, "step", look)
    recipe = Recipe(epochs=2, batch_size=21, strategy="lp-ft:share=0.5")
    found = range_test(body(), GIVEN, recipe)
    assert {f"body.{name}" for name, _ in body().named_parameters()} < seen[0].keys()
    assert list(seen[5].values()) == pytest.approx([found["rates"][5]] * len(seen[5]))
    [first, _] = fit(body(), INPUTS, IMAGES, LABELS, CLASSES, Recipe(epochs=2, batch_size=21, lr=1e-9)).curve
    assert found["losses"][0] == pytest.approx(first["loss"])


def test_a_loss_that_falls_nowhere_leads_to_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Training, "step", lambda self, turns, rates, lr, **_: [(1 + lr) * len(turns[0].batch)])
    with pytest.raises(MetaftError, match=r"^lr: auto finds none, since the loss fell at no rate from 1e-06 to 10"):
        range_test(body(), GIVEN, RECIPE)
    monkeypatch.setattr(module.Training, "step", lambda *_, **__: [float("nan")])
    with pytest.raises(MetaftError, match=r"^lr: auto finds none"):
        range_test(body(), GIVEN, RECIPE)


def test_smoothing_does_not_lag() -> None:
    straight = [float(i) for i in range(30)]
    assert smooth(straight) == pytest.approx(straight)


# ---- in a run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("data") / "d", {"train": 6, "test": 2})


def line(data: Path, out: Path, **changes: Any) -> list[str]:
    return words(Path("none"), data, out, **{"lr": "auto", **changes})[1:]  # a random start has no probe to leave out


def test_a_run_keeps_the_rate_and_searches_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "STEPS", 50)
    run = finished(line(data, tmp_path / "a"))
    result, lr = json.loads((run / "result.json").read_text()), read_toml(run / "config.toml")["lr"]
    assert lr == result["lr"] == result["range_test"]["rate"]
    report = (run / "report.txt").read_text()
    assert f"rate: {lr:g}, at which nine tenths of the fall of the loss are behind" in report
    assert f"by adam at {lr:g}" in report
    view = training(of_folder(RunFolder(run)))
    assert "Range test of the rate" in [part.title for part in view.parts if isinstance(part, Picture)]  # type: ignore[union-attr]
    number = finished(line(data, tmp_path / "b", lr=lr))
    for name in ("classifier.safetensors", "metrics.jsonl"):
        assert (number / name).read_bytes() == (run / name).read_bytes()
    # Neither a resume, by the same words too, nor the run's own settings search again.
    monkeypatch.setattr(module, "range_test", lambda *_, **__: 1 / 0)
    whole = adapted(run)
    assert adapt.main(["--resume", str(run), "--lr", "auto"]) == 0
    assert adapted(run) == whole
    assert adapt.main(["--config", str(run / "config.toml"), "--out", str(tmp_path / "c")]) == 0
    assert json.loads((tmp_path / "c/result.json").read_text())["lr"] == lr
    capsys.readouterr()
    assert adapt.main(["--resume", str(number), "--lr", "auto"]) == 2
    one_line(capsys, "lr: a resumed run keeps its settings", repr(lr), "'auto'")


def test_who_left_the_rate_to_the_test_is_not_told_to_raise_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_low = {"rate": 1e-9, "rates": [1e-9, 2e-9], "losses": [1.0, 1.0], "smoothed": [1.0, 1.0]}
    monkeypatch.setattr(module, "range_test", lambda *_, **__: too_low)
    for name, changes, told in (("found", {}, False), ("given", {"lr": 1e-9}, True)):
        run = finished(line(data, tmp_path / name, **changes))
        [start] = json.loads((run / "result.json").read_text())["starts"]
        [said] = [text for text in start["warnings"] if text.startswith("under-fitted")]
        assert ("a higher rate" in said) is told, name


def test_rates_are_chosen_once_only(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapt.main(line(data, tmp_path / "a", strategy="chosen")) == 2
    one_line(capsys, "lr: auto is for one strategy")
    assert not (tmp_path / "a").exists()


def test_the_picture_shows_the_rate_that_is_taken() -> None:
    found = range_test(body(), GIVEN, RECIPE)
    axes = range_test_figure(found).axes[0]
    assert axes.get_xscale() == "log"
    assert [float(line.get_xdata()[0]) for line in axes.lines[2:]] == [found["rate"]]  # type: ignore[index]
