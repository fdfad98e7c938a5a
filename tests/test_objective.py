"""Losses of the user's own: every gradient-based member goes down them, first and second order, and runs keep them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
import torch.nn.functional as F
from helpers import images, pool, sinusoid, write_target
from torch import Tensor

import metaft
from metaft import adapt, algorithms, engines, evaluate, meta_train, outer
from metaft.algorithms import ALGORITHMS, hyper_parameters
from metaft.config import AdaptConfig
from metaft.errors import MetaftError
from metaft.metrics import accuracy, better
from metaft.objective import Objective, check
from metaft.tasks import Sinusoid
from metaft.types import Params

CLASSIFIERS = ("protonet", "matching-net", "baseline", "baseline++")
GRADIENT = sorted(set(ALGORITHMS) - set(CLASSIFIERS))


def gradient(name: str, loss: Any, model: str = "conv4", **more: Any) -> outer.MetaGradient:
    algorithm = algorithms.build(name, scenarios.model(model), {"loss": loss, **more})
    with engines.engine("threads", threads=1, chunk=1) as engine:
        return outer.meta_gradient(engine, algorithm, *algorithm.init(0), scenarios.episodes(tasks=2))


def smoothed(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target, label_smoothing=0.2)


@pytest.mark.filterwarnings("ignore::metaft.MetaftWarning")  # iMAML's, of small models' curvature
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("name", GRADIENT)
def test_a_function_is_taken_as_the_loss_of_that_name_is(name: str, order: str) -> None:
    more: dict[str, Any] = {"first_order": order == "first"} if "first_order" in hyper_parameters(name) else {}
    expected = gradient(name, "cross_entropy", **more)
    found = gradient(name, Objective(F.cross_entropy, accuracy, "right", higher_is_better=True), **more)
    assert scenarios.relative_error(found.grads, expected.grads) < 1e-9
    assert found.metrics["right"] == expected.metrics["accuracy"]
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-12)
    other = gradient(name, smoothed, **more)
    assert other.metrics["smoothed"] == pytest.approx(other.metrics["loss"], rel=0.5), "without a figure, the loss"
    assert scenarios.relative_error(other.grads, expected.grads) > 1e-3, "another loss has another gradient"


@pytest.mark.parametrize("first_order", [False, True])
def test_the_meta_gradient_of_an_own_loss_is_that_of_the_equations(first_order: bool) -> None:
    model, data = scenarios.model(), scenarios.episodes(tasks=2)
    maml = algorithms.maml(model, loss=smoothed, inner_lr=0.1, inner_steps=2, first_order=first_order)
    meta, state = maml.init(0)
    leaves = {k: p.detach().clone().requires_grad_() for k, p in meta.items()}
    total = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        task, fast = scenarios.one(data, i), dict[str, Tensor](leaves)
        for _ in range(2):
            value = smoothed(scenarios.conv4_reference(fast, task.support_x), task.support_y)
            steps = torch.autograd.grad(value, list(fast.values()), create_graph=not first_order)
            fast = {k: p - 0.1 * g for (k, p), g in zip(fast.items(), steps, strict=True)}
        total = total + smoothed(scenarios.conv4_reference(fast, task.query_x), task.query_y) / 2
    total.backward()
    expected: Params = {k: p.grad for k, p in leaves.items() if p.grad is not None}
    with engines.engine("threads", threads=1) as engine:
        assert scenarios.relative_error(outer.meta_gradient(engine, maml, meta, state, data).grads, expected) < 1e-9


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_members_that_are_cross_entropy_refuse_another_loss(name: str) -> None:
    with pytest.raises(MetaftError, match=f"^{name.replace('+', '.')} classifies; .*'smoothed'"):
        algorithms.build(name, scenarios.model(), {"loss": smoothed})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (3, "^loss: no 3, known are cross_entropy, mse, and functions from Python"),
        ("mes", "^loss: no 'mes', .*did you mean 'mse'"),
    ],
)
def test_what_is_no_loss_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(MetaftError, match=message):
        algorithms.maml(scenarios.model(), loss=loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": 3}, "^loss: must be a function"),
        ({"loss": smoothed, "figure": 3}, "^figure: must be a function"),
        ({"loss": smoothed, "name": "loss"}, "^name: must be a word other than loss, .* got 'loss'"),
        ({"loss": smoothed, "name": "a b"}, "^name: .*'a b'"),
        ({"loss": smoothed, "higher_is_better": True}, "^higher_is_better: a loss is better where it is lower"),
    ],
)
def test_an_objective_is_checked_when_it_is_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MetaftError, match=message):
        Objective(**arguments)


@pytest.mark.parametrize(("field", "changes"), [("loss", {}), ("figure", {"loss": smoothed})])
def test_what_gives_no_scalar_is_named_with_its_shape(field: str, changes: Any) -> None:
    def each(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target, reduction="none")

    with pytest.raises(MetaftError, match=rf"^{field}: each must give a scalar tensor .* got shape \[\d+\]"):
        gradient("maml", Objective(**{"loss": each, field: each, "name": "each", **changes}))


def test_direction_of_a_figure() -> None:
    for higher in (False, True):
        own = Objective(smoothed, accuracy, "own", higher_is_better=higher)
        assert better(own, 2.0, 1.0) is higher
        assert better(own, 1.0, 2.0) is not higher


def negative(prediction: Tensor, target: Tensor) -> Tensor:
    return -F.mse_loss(prediction, target)


def test_a_run_keeps_its_loss_and_chooses_by_its_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = meta_train.run(sinusoid(tmp_path / "mse"))
    score = Objective(F.mse_loss, negative, "score", higher_is_better=True)
    own = meta_train.run(sinusoid(tmp_path / "own"), loss=score)
    assert own["best_step"] == plain["best_step"]
    assert own["test"]["transductive"]["score"] == -plain["test"]["transductive"]["mse"]
    assert "score ± 95 % interval" in capsys.readouterr().out
    again = evaluate.run(tmp_path / "own", loss=score)["test"]
    assert again["transductive"] == own["test"]["transductive"]
    for given, message in ((None, "with mse_loss, a loss from Python"), (F.l1_loss, "given l1_loss")):
        with pytest.raises(MetaftError, match=f"^loss: this run was trained .*{message}"):
            evaluate.run(tmp_path / "own", loss=given)
    with pytest.raises(MetaftError, match=r"^loss: this run was trained without .*given mse_loss"):
        evaluate.run(tmp_path / "mse", loss=score)
    with pytest.raises(MetaftError, match=r"^loss: this run was trained with mse_loss"):
        meta_train.resume_run(tmp_path / "own")
    longer = sinusoid(iterations=9)
    assert meta_train.resume_run(tmp_path / "own", longer, loss=score)["iterations"] == 9


def test_a_run_on_images_with_an_own_loss_is_adapted_by_fine_tuning_alone(tmp_path: Path) -> None:
    result = meta_train.run(images(tmp_path / "run", engine="vmap"), dataset=pool(), loss=smoothed)
    assert 0 < result["test"]["inductive"]["smoothed"] < 5
    assert (tmp_path / "run" / "plots" / "episode.png").exists()
    data = write_target(tmp_path / "target", {"": 4})
    settings: dict[str, Any] = {"init": str(tmp_path / "run"), "data": f"folder:{data}", "device": "cpu"}
    with pytest.raises(MetaftError, match=r"^method: the inner loop of .* goes down smoothed, a loss from Python"):
        adapt.run(AdaptConfig(**settings, method="inner", out=str(tmp_path / "inner")))


def test_names_are_public_and_read_off_functions() -> None:
    assert metaft.Objective is Objective
    assert metaft.metrics.accuracy is accuracy
    partial = functools.partial(F.cross_entropy, label_smoothing=0.1)
    for loss, name in ((F.l1_loss, "l1_loss"), (partial, "cross_entropy"), (torch.nn.L1Loss(), "L1Loss")):
        assert Objective(loss).metric == Objective(loss).label == name
    assert Objective(lambda p, y: (p - y).mean()).metric == "own"


WRONG: dict[str, tuple[Any, str]] = {
    "one argument": (
        lambda prediction: prediction.mean(),
        r"fails on predictions \[6, 3\] and targets \[6\] \(TypeErr",
    ),
    "an error of its own": (lambda p, y: F.nll_loss(p, y.float()), r"fails on predictions .*RuntimeError"),
    "no gradient": (lambda p, y: accuracy(p, y), "has no gradient in the predictions"),
    "random": (lambda p, y: F.cross_entropy(p + 0.1 * torch.randn_like(p), y), "draws random numbers"),
    "a vector": (lambda p, y: F.cross_entropy(p, y, reduction="none"), "must give a scalar tensor"),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_loss_that_cannot_be_one_is_named_before_anything_is_written(name: str, tmp_path: Path) -> None:
    loss, message = WRONG[name]
    before = torch.get_rng_state()
    with pytest.raises(MetaftError, match=f"^loss: own {message}"):
        meta_train.run(images(tmp_path / "run"), dataset=pool(), loss=loss)
    wrong: Any = lambda p: p.mean()  # noqa: E731
    objective = Objective(F.cross_entropy, wrong, name="own")
    with pytest.raises(MetaftError, match=r"^figure: own "):
        meta_train.run(images(tmp_path / "run"), dataset=pool(), loss=objective)
    assert torch.equal(before, torch.get_rng_state())
    assert not (tmp_path / "run").exists()


def in_place(prediction: Tensor, target: Tensor) -> Tensor:
    prediction -= prediction.mean()
    return F.cross_entropy(prediction, target)


def not_a_number(prediction: Tensor, target: Tensor) -> Tensor:
    return prediction.sum() * float("nan")


def weighted(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target, weight=torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("loss", [in_place, not_a_number, weighted])
def test_what_a_loss_may_do_is_not_refused(loss: Any) -> None:
    check(Objective(loss), 3, torch.arange(6) % 3, torch.zeros(1, dtype=torch.float64))


def test_the_loss_of_a_data_set_is_held_to_the_same_rules(tmp_path: Path) -> None:
    """A scalar per task; a loss per example was found out in the first meta-step, with a traceback."""

    points = Sinusoid()
    object.__setattr__(points, "loss", lambda prediction, target: (prediction - target).square())
    config = sinusoid(tmp_path / "r", dataset="sinusoid", ways=1, shots=5, query_shots=5)
    with pytest.raises(MetaftError, match=r"^loss: .* must give a scalar tensor"):
        meta_train.run(config, dataset=points)
    assert not (tmp_path / "r").exists()
