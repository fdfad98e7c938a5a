"""`--balance weights`: classes that count alike in the training loss, however many images they have."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaft.finetune.fit import fit
from metaft.finetune.outcomes import class_weights
from metaft.inputs import ImageInputs
from metaft.settings.finetuning import Recipe

INPUTS = ImageInputs(1, 4, 4)
LABELS = torch.tensor([0] * 12 + [1] * 3 + [2] * 1)


def body() -> nn.Module:
    layer = nn.Linear(16, 5, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel(), dtype=torch.float64).sin().view_as(p))
    return nn.Sequential(nn.Flatten(), layer, nn.Tanh())


def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (len(LABELS), 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_weights_are_the_inverse_frequency_with_mean_1_over_the_examples() -> None:
    weights = class_weights(LABELS, 3)
    assert weights.tolist() == pytest.approx([16 / 36, 16 / 9, 16 / 3], abs=1e-15)
    assert float(weights[LABELS].mean()) == pytest.approx(1, abs=1e-15)
    assert class_weights(torch.tensor([0, 0, 2]), 3)[[0, 2]].tolist() == [0.75, 1.5]


@pytest.mark.parametrize("balance", ["none", "weights"])
@pytest.mark.parametrize("freeze", ["none", "backbone"])  # the latter on features that are computed once
def test_the_loss_and_the_step_are_those_of_torch(freeze: str, balance: Literal["none", "weights"]) -> None:
    images = pictures()
    settings = {"epochs": 1, "batch_size": 32, "lr": 0.5, "optimizer": "sgd:momentum=0", "freeze": freeze}
    start = fit(body(), INPUTS, images, LABELS, 3, Recipe(**{**settings, "lr": 1e-30}))
    fitted = fit(body(), INPUTS, images, LABELS, 3, Recipe(**settings, balance=balance))

    model = nn.Sequential(start.body, start.head)
    weights = torch.tensor([1 / 12, 1 / 3, 1.0], dtype=torch.float64) if balance == "weights" else None
    loss = F.cross_entropy(model(INPUTS(images).double()), LABELS, weight=weights)
    assert fitted.curve[0]["loss"] == pytest.approx(float(loss.detach()), abs=1e-9)
    model.zero_grad()
    loss.backward()
    for before, after in zip(start.head.parameters(), fitted.head.parameters(), strict=True):
        assert before.grad is not None and float(before.grad.abs().max()) > 1e-3
        torch.testing.assert_close(after, before.detach() - 0.5 * before.grad, rtol=0, atol=1e-9)
    for before, after in zip(start.body.parameters(), fitted.body.parameters(), strict=True):
        moved = 0.0 if freeze == "backbone" or before.grad is None else 0.5 * before.grad
        torch.testing.assert_close(after, before.detach() - moved, rtol=0, atol=1e-9)
