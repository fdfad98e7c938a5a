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

from metaft.finetune.fit import Fitted, fit
from metaft.finetune.outcomes import class_loss
from metaft.settings import Recipe

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
    still = {"val_examples": images, "val_labels": labels}
    rows = [
        fit(conv4(), TOY_INPUTS, images, labels, CLASSES, Recipe(epochs=1, lr=1e-30, label_smoothing=s), **still).curve[
            0
        ]
        for s in (0.0, 0.5)
    ]
    assert rows[0]["val_loss"] == rows[1]["val_loss"]
    assert rows[0]["loss"] != rows[1]["loss"]


@pytest.mark.parametrize("balance", ["none", "weights"])
@pytest.mark.parametrize(("size", "times"), [(4, 2), (2, 3), (5, 2)])
@pytest.mark.parametrize("more", [{}, {"freeze": "backbone"}, {"clip_norm": 0.1, "label_smoothing": 0.1}])
def test_k_batches_of_b_are_one_of_kb(
    balance: Literal["none", "weights"], size: int, times: int, more: dict[str, Any]
) -> None:
    """16 images: steps of 8, of 6 with 4 left, and of 10 with 6 left, of which the last batch would be a single one."""
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
