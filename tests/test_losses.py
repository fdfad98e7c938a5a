"""Label smoothing, and steps of several batches, against PyTorch's loss and one larger batch."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from test_balance import INPUTS, LABELS, body, pictures
from test_finetune import CLASSES, bits, same, toy
from test_finetune import INPUTS as TOY_INPUTS
from test_finetune import body as conv4
from torch import nn

from metaft.finetune.averaged import decay_of, follow
from metaft.finetune.dropout import dropped
from metaft.finetune.extras import Batch
from metaft.finetune.fit import Fitted, fit
from metaft.finetune.outcomes import class_loss
from metaft.finetune.states import flatten, unflatten
from metaft.settings.finetuning import Recipe

WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothing_is_torchs_and_shares_that_are_whole_are_labels(
    weights: torch.Tensor | None, smoothing: float
) -> None:
    g = torch.Generator().manual_seed(0)
    outputs, y = torch.randn(7, 3, dtype=torch.float64, generator=g), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    wanted = F.cross_entropy(outputs, y, weight=weights, label_smoothing=smoothing)
    for labels in (y, F.one_hot(y, 3).double()):
        value = class_loss(outputs, labels, weights=weights, smoothing=smoothing)
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-12)


def tuned(balance: Literal["none", "weights"] = "none", **more: Any) -> Fitted:
    recipe = Recipe(epochs=2, lr=0.3, optimizer="sgd:momentum=0.5", balance=balance, **more)
    return fit(body(), INPUTS, pictures(), LABELS, 3, recipe)


def test_smoothing_reaches_the_training_loss_and_not_validation() -> None:
    images, labels = toy(21)
    still: dict[str, Any] = {"val_examples": images, "val_labels": labels}
    rows = [
        fit(conv4(), TOY_INPUTS, images, labels, CLASSES, Recipe(epochs=1, lr=1e-30, label_smoothing=s), **still).curve[
            0
        ]
        for s in (0.0, 0.5)
    ]
    assert rows[0]["val_loss"] == rows[1]["val_loss"]
    assert rows[0]["loss"] != rows[1]["loss"]


@pytest.mark.parametrize("balance", ["none", "weights"])
@pytest.mark.parametrize(("size", "times"), [(4, 2), (2, 3), (5, 2), (5, 4)])
@pytest.mark.parametrize("more", [{}, {"freeze": "backbone"}, {"clip_norm": 0.1, "label_smoothing": 0.1}])
def test_k_batches_of_b_are_one_of_kb(
    balance: Literal["none", "weights"], size: int, times: int, more: dict[str, Any]
) -> None:
    """16 images: steps of 8, of 6 with 4 left, of 10 with 6 left, of which the last batch would be a single one, and of
    5, 5 and 6."""
    large = tuned(balance, batch_size=size * times, **more)
    small = tuned(balance, batch_size=size, accumulate=times, **more)
    for key, value in bits(large).items():
        torch.testing.assert_close(bits(small)[key], value, rtol=0, atol=1e-12)
    for one, other in zip(small.curve, large.curve, strict=True):
        assert one == pytest.approx(other, abs=1e-12)
    assert not same(bits(large), bits(tuned(balance, batch_size=size, **more)))


def test_batches_normalise_themselves_where_their_statistics_are_taken() -> None:
    """What is said of it is true: of such a body they are no batch of their sum."""
    images, labels = toy(21)

    def first_loss(**more: Any) -> float:
        start: nn.Module = conv4(dtype=torch.float64)
        return fit(start, TOY_INPUTS, images, labels, CLASSES, Recipe(epochs=1, lr=1e-30, **more)).curve[0]["loss"]

    assert first_loss(batch_size=7, accumulate=3) == pytest.approx(first_loss(batch_size=7), abs=1e-9)
    assert abs(first_loss(batch_size=7, accumulate=3) - first_loss(batch_size=21)) > 1e-4


# The moving average, and dropout


def test_the_average_follows_its_rule_and_decay_0_is_the_model() -> None:
    average = {"w": torch.tensor([1.0, 2.0]), "frozen": torch.tensor([5.0]), "count": torch.tensor(0)}
    values = {"w": torch.tensor([3.0, 0.0]), "frozen": torch.tensor([7.0]), "count": torch.tensor(4)}
    follow(average, values, 0.25, 100, {"frozen"})
    assert average["w"].tolist() == [2.5, 0.5] and average["frozen"].tolist() == [5.0] and int(average["count"]) == 4
    follow(average, values, 0.0, 100)
    assert same(average, values)
    assert [decay_of(0.5, step) for step in (0, 2, 8, 1000)] == pytest.approx([0.1, 0.25, 0.5, 0.5])


def averaged(decay: float | None, *, validated: bool = False, **more: Any) -> Fitted:
    recipe = Recipe(epochs=3, batch_size=8, lr=0.01, ema=decay)
    val = dict(zip(("val_examples", "val_labels"), toy(9, seed=3), strict=True)) if validated else {}
    return fit(conv4(), TOY_INPUTS, *toy(21), CLASSES, recipe, **val, **more)


def test_what_is_kept_is_the_average_of_all_steps() -> None:
    states: list[dict[str, Any]] = []
    fitted = averaged(0.9, on_epoch=states.append)
    names = [f"body.{name}" for name, _ in conv4().named_parameters()]
    assert all(torch.equal(bits(fitted)[name], states[-1]["average"][name]) for name in names)
    assert not any(torch.equal(bits(fitted)[name], states[-1]["model"][name]) for name in names)
    assert same(bits(averaged(0.0)), bits(averaged(None))), "decay 0 is the model"
    plain: list[dict[str, Any]] = []
    averaged(None, on_epoch=plain.append)
    assert same(plain[-1]["model"], states[-1]["model"]), "training itself is as it was"


def test_validation_judges_the_average_and_keeps_it() -> None:
    fitted = averaged(0.9, validated=True)
    images, labels = toy(9, seed=3)
    with torch.no_grad():
        loss = F.cross_entropy(fitted.head(fitted.body(TOY_INPUTS(images))), labels)
    assert float(loss) == pytest.approx(min(row["val_loss"] for row in fitted.curve), rel=1e-4)
    plain = averaged(None, validated=True)
    assert [row["loss"] for row in plain.curve] == [row["loss"] for row in fitted.curve]
    assert [row["val_loss"] for row in plain.curve] != [row["val_loss"] for row in fitted.curve]


@pytest.mark.parametrize("validated", [False, True])
def test_an_average_is_resumed_by_way_of_a_checkpoints_tensors(validated: bool) -> None:
    states: list[dict[str, Any]] = []
    whole = averaged(0.9, validated=validated, on_epoch=states.append)
    for state in states[:2]:
        again = averaged(0.9, validated=validated, resume=unflatten(*flatten(state)))
        assert same(bits(again), bits(whole)) and again.curve == whole.curve


def test_dropout_is_inverted_and_a_function_of_seed_epoch_and_example() -> None:
    features = torch.ones(40, 500, dtype=torch.float64)
    batch = Batch(features, torch.zeros(40), torch.arange(40), 1)
    out = dropped(features, batch, 0, 0.2)
    assert set(out.unique().tolist()) == {0.0, 1.25}
    # 20,000 entries: the standard error of the share is 0.0028.
    assert float((out == 0).double().mean()) == pytest.approx(0.2, abs=0.015)
    some = batch._replace(rows=batch.rows[[7, 3]])
    assert torch.equal(dropped(features[:2], some, 0, 0.2), out[[7, 3]])
    for other in (batch._replace(epoch=2), batch._replace(rows=batch.rows + 40)):
        assert not torch.equal(dropped(features, other, 0, 0.2), out)
    assert not torch.equal(dropped(features, batch, 1, 0.2), out)


@pytest.mark.parametrize("freeze", ["none", "backbone"])
def test_dropout_is_in_training_alone_and_resumes(freeze: Literal["none", "backbone"]) -> None:
    def run(share: float, lr: float = 0.05, **more: Any) -> Fitted:
        recipe = Recipe(epochs=3, batch_size=8, lr=lr, dropout=share, freeze=freeze)
        val = dict(zip(("val_examples", "val_labels"), toy(9, seed=3), strict=True))
        return fit(conv4(), TOY_INPUTS, *toy(21), CLASSES, recipe, **val, **more)

    still = [run(share, 1e-30).curve for share in (0.0, 0.5)]
    assert [row["val_loss"] for row in still[0]] == [row["val_loss"] for row in still[1]]
    assert [row["loss"] for row in still[0]] != [row["loss"] for row in still[1]]
    assert len({row["loss"] for row in still[1]}) == 3, "another mask in each epoch"
    states: list[dict[str, Any]] = []
    whole = run(0.5, on_epoch=states.append)
    assert same(bits(run(0.5, resume=states[0])), bits(whole))
