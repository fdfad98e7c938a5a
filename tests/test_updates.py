"""How far steps move each layer: against closed forms, without a change of the run, and the same after a resume."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import adapted, one_thread, remains, settled, sinusoid, words, write_target
from torch import Tensor, nn

from metaft import adapt, algorithms, meta_train, models, updates
from metaft.errors import Interrupted
from metaft.finetune import journal, study
from metaft.finetune.fit import fit
from metaft.inputs import ImageInputs
from metaft.runs import training
from metaft.runs.folder import append_row
from metaft.runs.measuring import every
from metaft.settings.finetuning import Recipe
from metaft.types import Episode
from metaft.views.inner_updates import inner_paths
from metaft.views.updates import _table, by_layer, meaning

pytestmark = pytest.mark.usefixtures("each_step")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure each `--log-every` steps, whatever that costs: these runs are too short for more than one row else."""
    monkeypatch.setattr(updates, "_APART", 1)
    monkeypatch.setattr(updates, "SHARE", math.inf)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    monkeypatch.setattr("metaft.finetune.report.draw_pictures", lambda *_: [])


# ---- when -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [10, 10_000_000])
@pytest.mark.parametrize("of_number", [0, 6, 192, 100_000])
def test_what_is_measured_costs_at_most_its_share(
    numbers: int, of_number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    flops = float(of_number * numbers)
    apart = updates.every(10, numbers, flops, passes=flops / 3)
    cost = updates._MEASURING * numbers + flops / 3
    assert cost / apart <= 0.02 * (updates._UPDATING * numbers + flops) and apart % 10 == 0
    assert apart == 10 or cost / (apart - 10) > 0.02 * (updates._UPDATING * numbers + flops)
    config = settled(log_every=7)
    assert every(config, {"w": torch.zeros(numbers)}) % 7 == 0


def test_a_short_fit_has_a_few_rows_as_far_as_they_cost_little_and_one_that_asks_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    cheap = {"numbers": 1000, "flops": 1e9}
    assert [updates.every(None, **cheap, steps=n) for n in (1, 5, 16, 80, 100, 5000)] == [1, 1, 4, 16, 20, 20]
    dear = updates.every(None, numbers=1000, flops=1e5)
    assert dear > 20 and updates.every(None, numbers=1000, flops=1e5, steps=16) == dear
    for asked, steps in ((1, [1, 2, 3, 4, 5, 6]), (3, [1, 3, 6]), (None, [1])):
        rows, *_ = rows_of_fit(strategy="full", log_every=asked)
        assert [row["step"] for row in rows] == steps


def test_steps_become_fewer_and_one_that_is_measured_is_by_itself() -> None:
    steps = [step for step in range(1, 20_001) if updates.due(step, 10)]
    assert steps[:3] == [1, 10, 20] and len(steps) <= 100 + 50 * math.log2(20_000 / 1000) + 51
    assert all(b - a >= 9 for a, b in itertools.pairwise(steps))
    at, taken = 0, []
    while at < 2000:
        taken.append((at, updates.together(at, 10, 7)))
        at += taken[-1][1]
    alone = {first + 1 for first, count in taken if count == 1}
    assert {step for step in steps if step <= 2000} <= alone
    assert not any(updates.due(first + i, 10) for first, count in taken if count > 1 for i in range(1, count + 1))


# ---- numbers --------------------------------------------------------------------------------------------------------


def rows_of_fit(log_every: int | None = 2, **changes: Any) -> tuple[list[Any], Tensor, Tensor, Tensor, Tensor]:
    """(rows, images, labels, and the head's weight and bias) of a linear model that gradient descent fits."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (12, 1, 2, 2), generator=generator, dtype=torch.uint8)
    labels = torch.arange(12) % 3
    recipe = Recipe(**{"epochs": 6, "batch_size": 12, "lr": 0.5, "optimizer": "sgd:momentum=0", **changes})
    rows: list[Any] = []
    inputs = ImageInputs(1, 2, 2)
    body = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False)).double()
    with torch.no_grad():
        body.get_parameter("1.weight").copy_(torch.eye(4))
    fitted = fit(body, inputs, pictures, labels, 3, recipe, log_every=log_every, on_update=rows.append)
    return rows, inputs(pictures).double().flatten(1), labels, *fitted.head.parameters()  # type: ignore[return-value]


def test_figures_are_those_of_gradient_descent_on_a_linear_model() -> None:
    rows, x, y, weight, bias = rows_of_fit(strategy="full")
    assert [row["step"] for row in rows] == [1, 2, 4, 6] and [row["epoch"] for row in rows] == [1, 2, 4, 6]
    begun = _first_head()
    head, body, pixels = [begun[0].copy(), begun[1].copy()], np.eye(4), x.numpy()
    for step in range(1, 7):
        hidden = pixels @ body.T
        logits = hidden @ head[0].T + head[1]
        error = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[y.numpy()]) / 12
        gradient = {"body.1": [(error @ head[0]).T @ pixels], "head": [error.T @ hidden, error.sum(0)]}
        before = {"body.1": [body.copy()], "head": [part.copy() for part in head]}
        body = body - 0.5 * gradient["body.1"][0]
        head = [part - 0.5 * g for part, g in zip(head, gradient["head"], strict=True)]
        now, start = {"body.1": [body], "head": head}, {"body.1": [np.eye(4)], "head": list(begun)}
        row = next((row for row in rows if row["step"] == step), None)
        if row is None:
            continue
        assert list(row["layers"]) == ["body.1", "head"]
        for layer, own in row["layers"].items():
            size = _norm(before[layer])
            assert own["weights"] == pytest.approx(size, rel=1e-5)
            assert own["gradient"] == pytest.approx(_norm(gradient[layer]), rel=1e-5)
            assert own["update"] == pytest.approx(0.5 * _norm(gradient[layer]) / size, rel=1e-5), "lr times gradient"
            far = [a - b for a, b in zip(now[layer], start[layer], strict=True)]
            assert own["distance"] == pytest.approx(_norm(far), rel=1e-5)
            assert "dead" not in own, "it has no ReLU"
    np.testing.assert_allclose(weight.detach().numpy(), head[0], rtol=1e-9)
    np.testing.assert_allclose(bias.detach().numpy(), head[1], rtol=1e-9)


def _first_head() -> tuple[np.ndarray, np.ndarray]:
    """The head before the first step: that of a fit whose steps are too small to move it."""
    *_, weight, bias = rows_of_fit(strategy="head", epochs=1, lr=1e-30)
    return weight.detach().numpy(), bias.detach().numpy()


def _norm(parts: list[Any]) -> float:
    return math.sqrt(sum(float((part**2).sum()) for part in parts))


def test_layers_that_stay_are_not_listed_and_their_gradient_is_clipped_as_the_optimiser_got_it() -> None:
    rows, *_ = rows_of_fit(strategy="lp-ft:share=0.5", clip_norm=0.01)
    assert [sorted(row["layers"]) for row in rows] == [["head"], ["head"], ["body.1", "head"], ["body.1", "head"]]
    for row in rows:
        total = math.sqrt(sum(own["gradient"] ** 2 for own in row["layers"].values()))
        assert total == pytest.approx(0.01, rel=1e-3)


class Dying(nn.Module):
    """Three of eight units of the first ReLU are 0 for all, one for all but one example; one of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Linear(4, 8), nn.Conv2d(1, 2, 3, padding=1)
        self.quiet = nn.Linear(8, 8)
        with torch.no_grad():
            self.first.weight.zero_()
            self.first.bias.copy_(torch.tensor([-1.0, -1, -1, 1, 1, 1, 1, -5]))
            self.first.weight[7, 0] = 1
            self.get_parameter("conv.bias").copy_(torch.tensor([-1e3, 1e3]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        self.quiet(hidden)
        return nn.functional.relu6(self.conv(hidden.view(-1, 1, 2, 4))).mean((2, 3))


def test_dead_units_are_those_that_are_0_for_all_examples_and_places() -> None:
    model, x = Dying(), torch.zeros(5, 4)
    x[3, 0] = 6
    shares = updates.dead_units(lambda: model(x), dict(model.named_parameters()))
    assert shares == {"first": 3 / 8, "conv": 1 / 2}
    x[3, 0] = 0
    assert updates.dead_units(lambda: model(x), dict(model.named_parameters()))["first"] == 4 / 8

    def both() -> None:
        model(x)
        model(x + 6)

    assert updates.dead_units(both, dict(model.named_parameters()))["first"] == 3 / 8, "alive in one of two passes"
    assert torch.relu(torch.tensor(-1.0)) == 0 and not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6])
def test_dead_units_are_found_behind_modules_too(kind: type[nn.Module], inplace: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 3), kind(inplace=inplace))
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
        model.get_parameter("0.bias").copy_(torch.tensor([-1.0, 1.0, 9.0]))
    x, params = torch.zeros(4, 2), dict(model.named_parameters())
    assert updates.dead_units(lambda: model(x), params) == {"0": pytest.approx(1 / 3)}
    assert updates.dead_units(lambda: nn.Hardtanh()(model[0](x)), params) == {}, "it lets values below 0 through"


def test_operations_are_those_of_their_formulas() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6))
    expected = 2 * 7 * 5 * 4 * (6 * 3 * 9 + 6 * 9)
    assert updates.flops_of(lambda: model(torch.zeros(7, 3, 9, 8))) == expected
    assert updates.flops_of(lambda: nn.Linear(5, 4)(torch.zeros(7, 3, 5))) == 2 * 7 * 3 * 5 * 4


def test_inner_steps_are_those_of_gradient_descent() -> None:
    x, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 1, 0])
    maml = algorithms.maml(models.functional(nn.Sequential(nn.Linear(3, 2)).double()), inner_lr=0.5)
    meta, state = maml.init(0)
    task = Episode(x, y, x, y, torch.arange(2), torch.tensor(0))
    paths = inner_paths(maml, meta, state, task, ways=2, steps=3)
    assert list(paths) == ["0"]
    weights = np.concatenate([meta["0.weight"].numpy(), meta["0.bias"].numpy()[:, None]], 1)
    pixels, walked = np.concatenate([x.numpy(), np.ones((4, 1))], 1), [weights.copy()]
    for _ in range(3):
        logits = pixels @ weights.T
        error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(2)[y.numpy()]
        weights = weights - 0.5 * error.T @ pixels / 4
        walked.append(weights)
    by_step, far = paths["0"]
    pairs = itertools.pairwise(walked)
    np.testing.assert_allclose(by_step, [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in pairs], rtol=1e-9)
    np.testing.assert_allclose(
        far, [np.linalg.norm(w - walked[0]) / np.linalg.norm(walked[0]) for w in walked], rtol=1e-9
    )


# ---- runs -----------------------------------------------------------------------------------------------------------


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "updates.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("engine", ["vmap", "graph"])
def test_meta_training_is_the_same_with_and_without_and_measured_as_it_is(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"engine": engine, "outer_optimizer": "sgd", "outer_lr": 0.25, "outer_schedule": "constant"}
    meta_train.run(sinusoid(tmp_path / "with", **settings))
    rows = [json.loads(line) for line in (tmp_path / "with/updates.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    for row in rows:
        assert list(row["layers"]) == ["hidden.0", "hidden.2", "head"]
        for layer, own in row["layers"].items():
            assert own["update"] * own["weights"] == pytest.approx(0.25 * own["gradient"], rel=1e-3)
            assert ("dead" in own) == (layer != "head")
    first = rows[0]["layers"]["head"]
    assert first["distance"] == pytest.approx(first["update"] * first["weights"], rel=1e-4), "the first step's"
    monkeypatch.setattr(updates, "due", lambda *_: False)
    meta_train.run(sinusoid(tmp_path / "without", **settings))
    assert not (tmp_path / "without/updates.jsonl").exists()
    assert {**remains(tmp_path / "with"), "updates": b""} == remains(tmp_path / "without")


def test_meta_training_that_was_stopped_has_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta_train.run(sinusoid(tmp_path / "whole"))
    real, left = training._Loop.advance, iter(range(5))

    def advance(self: Any) -> None:
        if next(left, None) is None:
            raise Interrupted("stopped", 15)
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(training._Loop, "advance", advance)
        with pytest.raises(Interrupted):
            meta_train.run(sinusoid(tmp_path / "part"))
    assert steps_in(tmp_path / "part") == [1, 2, 4]
    # As a kill leaves it, whose checkpoint is older.
    append_row(tmp_path / "part/updates.jsonl", {"step": 6, "layers": {}})
    meta_train.resume_run(tmp_path / "part")
    assert remains(tmp_path / "part") == remains(tmp_path / "whole")
    assert steps_in(tmp_path / "part") == [1, 2, 4, 6]


def test_meta_training_goes_on_without_rows_where_its_beginning_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    meta_train.run(sinusoid(run, iterations=2, eval_every=2))
    (run / "checkpoints/first.safetensors").unlink()
    meta_train.resume_run(run, sinusoid(iterations=4, eval_every=2))
    assert steps_in(run) == [1, 2]
    assert "metaft: note: updates.jsonl ends here" in capsys.readouterr().err


@pytest.fixture
def fine(tmp_path: Path) -> list[str]:
    data = write_target(tmp_path / "target", {"train": 6, "test": 2})
    return words(Path("none"), data, tmp_path / "run", log_every=2)


def test_fine_tuning_is_the_same_with_and_without_and_after_a_stop(
    fine: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert adapt.main(fine) == 0
    expected = adapted(tmp_path / "run")
    assert steps_in(tmp_path / "run") == [1, 2, 4, 6, 8]
    monkeypatch.setattr(journal, "SAVE_EVERY", -1.0)
    real, left = study.fit, iter(range(5))

    def stopped(*given: Any, **more: Any) -> Any:
        def check() -> None:
            if next(left, 0) == 4:
                raise Interrupted("stopped", 15)

        return real(*given, **{**more, "should_stop": check})

    with monkeypatch.context() as patch:
        patch.setattr(study, "fit", stopped)
        assert adapt.main([*fine[:-1], str(tmp_path / "part")]) != 0
    assert steps_in(tmp_path / "part")
    assert adapt.main(["--resume", str(tmp_path / "part")]) == 0
    assert adapted(tmp_path / "part") == expected
    monkeypatch.setattr(updates, "due", lambda *_: False)
    assert adapt.main([*fine[:-1], str(tmp_path / "without")]) == 0
    assert adapted(tmp_path / "without") == {**expected, "updates": b""}


# ---- as a page shows them -------------------------------------------------------------------------------------------


def test_layers_that_are_taken_together_have_the_figures_of_all_their_numbers() -> None:
    parts = [
        {"weights": 3.0, "update": 0.1, "gradient": 0.6, "distance": 5.0, "dead": 0.5},
        {"weights": 4.0, "update": 0.2, "gradient": 0.8, "distance": 12.0},
    ]
    both = updates.joined(parts)
    assert both["weights"] == pytest.approx(5) and both["gradient"] == pytest.approx(1)
    assert both["update"] == pytest.approx(math.hypot(0.3, 0.8) / 5) and both["distance"] == pytest.approx(13)
    assert both["dead"] == 0.5 and updates.joined([parts[0], {**parts[1], "dead": 0.25}])["dead"] == 0.375
    assert updates.joined([{**parts[0], "update": None, "weights": 0.0}])["update"] is None


def test_the_table_has_the_median_update_and_the_last_one() -> None:
    def own(update: float | None) -> dict[str, Any]:
        return {"weights": 2.0, "update": update, "gradient": 1.0, "distance": 3.0}

    table = _table([{"step": k, "layers": {"head": own(update)}} for k, update in enumerate((0.2, 0.1, None, 0.9))])
    assert list(table.rows) == [["head", 2.0, 0.2, 0.9, 1.0, 3.0, None, 4]]


def test_what_moves_the_most_is_named() -> None:
    def own(weights: float, update: float, distance: float, **more: float) -> dict[str, float]:
        return {"weights": weights, "update": update, "gradient": 1.0, "distance": distance, **more}

    rows = [
        {"step": 1, "layers": {"head": own(2.0, 0.3, 0.6)}},
        {"step": 9, "layers": {"body": own(4.0, 0.01, 3.0, dead=0.25), "head": own(2.5, 0.1, 1.0)}},
    ]
    names, figures = by_layer(rows)
    assert names == ["body", "head"]
    np.testing.assert_allclose(figures["moved"], [[np.nan, 0.75], [0.3, 0.5]])
    said = meaning(rows)
    assert "head moved the most, by 20 %" in said and "body the least, by 1 %" in said
    assert "body is the farthest, by 75 %" in said and "25 % behind body" in said
