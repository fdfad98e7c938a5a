"""FGSM and PGD against the worst case of a linear model, adversarial training, and accuracy under attack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_extras import BODIES, case
from test_finetune import CLASSES, INPUTS, bits, body, same, toy
from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.finetune.attacks import attacked, span_of, within
from metaft.finetune.classifier import Classifier
from metaft.finetune.extras import Batch, all_named, composed, named, plain_loss
from metaft.finetune.extras.adversarial import adverse
from metaft.finetune.fit import Fitted, fit
from metaft.finetune.robust import bounds_of, pooled_curve, robust_curve, shown_bound, under_attack
from metaft.inputs import ImageInputs
from metaft.plots.robust import robust, robust_figure
from metaft.settings.finetuning import Recipe

GREY = ImageInputs(2, 3, 3, mean=(0.4, 0.1), std=(0.3, 2.0))
LIKE = torch.empty(0, dtype=torch.float64)


def pixels(x: Tensor, inputs: ImageInputs = GREY) -> Tensor:
    """What a model computes with as pixel values 0..1."""
    mean, std = (torch.tensor(v, dtype=x.dtype).view(-1, 1, 1) for v in (inputs.mean, inputs.std))
    return x * std + mean


def linear() -> tuple[Tensor, Tensor]:
    """(x [4, 2, 3, 3], weights of a loss x -> sum w x)."""
    g = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (4, 2, 3, 3), dtype=torch.uint8, generator=g)
    raw[0, 0, 0, 0], raw[1, 0, 0, 0] = 0, 255
    return GREY(raw).double(), torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=g)


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("eps", [1 / 255, 0.1, 1.0])
def test_on_a_linear_loss_it_is_eps_times_the_sign_and_no_pixel_leaves_its_range(steps: int, eps: float) -> None:
    x, weights = linear()
    begin = None if steps == 1 else within(torch.arange(4), x)
    moved = attacked(lambda x: (weights * x).sum(), x, span_of(GREY, LIKE), eps=eps, steps=steps, begin=begin)
    wanted = (pixels(x) + eps * weights.sign()).clamp(0, 1)
    torch.testing.assert_close(pixels(moved), wanted, rtol=0, atol=1e-6)  # spans are of float32 inputs


def test_eps_0_is_the_picture_to_the_bit() -> None:
    x, weights = linear()
    assert attacked(lambda x: (weights * x).sum(), x, span_of(GREY, LIKE), eps=0, steps=3, begin=x) is x


def test_it_begins_inside_the_bound_by_the_examples_key_alone() -> None:
    x, _ = linear()
    begin = within(torch.tensor([3, 9, 4, 1]), x)
    assert begin.shape == x.shape and float(begin.abs().max()) <= 1 and float(begin.abs().mean()) > 0.3
    assert torch.equal(within(torch.tensor([9]), x[:1]), begin[1:2])
    nowhere = attacked(lambda x: x.sum() * 0, x, span_of(GREY, LIKE), eps=0.1, steps=2, begin=begin)
    wanted = (pixels(x) + 0.1 * begin).clamp(0, 1)
    torch.testing.assert_close(pixels(nowhere), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", BODIES)
@pytest.mark.parametrize("steps", [1, 3])
def test_training_images_stay_inside_the_bound_and_raise_the_loss(start: str, steps: int) -> None:
    model, batch, origin = case(start=BODIES[start]())
    x = adverse(plain_loss, origin, model, batch, 0.1, steps)
    moved = (pixels(x, INPUTS) - pixels(batch.x, INPUTS)).abs()
    assert 0.05 < float(moved.max()) <= 0.1 + 1e-6
    assert not x.requires_grad
    losses = [float(plain_loss(model, b).detach()) for b in (batch, batch._replace(x=x))]
    assert losses[1] > losses[0] + 1e-3


@pytest.mark.parametrize("start", BODIES)
def test_no_image_helps_to_attack_another(start: str) -> None:
    """The order of the batch apart, which the contract has: of two images that are changed, the others stay as they
    are attacked, where no statistics of the batch are taken; where they are, they are those of the images as given."""
    model, batch, origin = case(start=BODIES[start]())
    whole = adverse(plain_loss, origin, model, batch, 0.1, 1)
    other = batch._replace(y=torch.cat([(batch.y[:1] + 1) % CLASSES, batch.y[1:]]))
    changed = adverse(plain_loss, origin, model, other, 0.1, 1)
    assert torch.equal(whole[1:], changed[1:])
    assert not torch.equal(whole[:1], changed[:1])


def test_it_is_attacked_in_evaluation_mode_and_trained_as_before() -> None:
    model, batch, origin = case()
    modes: list[tuple[bool, bool]] = []

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        modes.append((model.training, model.get_submodule("head").training))
        return plain_loss(model, batch)

    extra = named("adversarial:eps=1/255,steps=2")
    extra.wrap(objective, origin)(model, batch)
    assert modes == [(False, False), (False, False), (True, True)]


def test_eps_0_and_share_0_are_clean_training_to_the_bit() -> None:
    def tuned(*texts: str) -> Fitted:
        recipe = Recipe(epochs=2, batch_size=8, lr=0.01, extra=texts)
        return fit(body(), INPUTS, *toy(21), CLASSES, recipe)

    clean = bits(tuned())
    assert same(bits(tuned("adversarial:eps=0")), clean) and same(bits(tuned("adversarial:share=0")), clean)
    assert not same(bits(tuned("adversarial:eps=1/255")), clean)


def test_a_share_is_of_both_losses() -> None:
    model, batch, origin = case()
    values = {
        share: float(composed((named(f"adversarial:eps=0.1,share={share}"),), origin)(model, batch).detach())
        for share in (0, 0.25, 1)
    }
    assert values[0.25] == pytest.approx(0.75 * values[0] + 0.25 * values[1], abs=1e-9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adversarial:eps=2", "extra: eps must be 0 to 1, in units of pixel values 0..1, got 2 (given"),
        ("adversarial:steps=0", "extra: steps must be at least 1, got 0 (given"),
        ("adversarial:share=1.5", "extra: share must be 0 to 1, got 1.5 (given"),
    ],
)
def test_what_an_attack_cannot_be_is_said(text: str, said: str) -> None:
    with pytest.raises(MetaftError) as caught:
        all_named([text])
    assert str(caught.value).startswith(said)


# Accuracy under attack


def classifier() -> tuple[Classifier, Tensor, Tensor]:
    """Two classes by the sign of w . (pixels - 1/2), and pictures whose margins differ; raw [8, 1, 2, 2]."""
    inputs = ImageInputs(1, 2, 2, mean=(0.5,), std=(0.25,))
    head = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]]))
    level = torch.tensor([2, 5, 9, 20, 40, 60, 90, -3]).view(8, 1, 1, 1)
    raw = (128 + level * torch.tensor([[1, -1], [1, -1]])).to(torch.uint8)
    return Classifier(nn.Flatten(), head, inputs, ("a", "b")), raw, torch.zeros(8, dtype=torch.int64)


def test_accuracy_under_attack_is_how_many_margins_exceed_the_bound() -> None:
    """Each pixel may move by eps against the weight's sign, so that an image at distance m / 255 from the boundary is
    wrong once eps exceeds it."""
    model, raw, labels = classifier()
    right = model.logits(raw).argmax(-1) == labels
    bounds = [3 / 255, 10.5 / 255, 50.5 / 255, 100 / 255, 110 / 255]
    rows = robust_curve(model, raw, labels, bounds, right=right)
    assert [row["eps"] for row in rows] == [0.0, *bounds]
    assert [row["accuracy"] for row in rows] == [7 / 8, 6 / 8, 4 / 8, 2 / 8, 0, 0]
    assert right.tolist() == [True] * 7 + [False], "which is the caller's"
    assert all(p.grad is None for p in model.parameters())
    none = robust_curve(model, raw, labels, bounds, right=torch.zeros_like(right))
    assert [row["accuracy"] for row in none] == [0] * 6


def test_bounds_are_numbers_or_fractions_in_their_order() -> None:
    assert bounds_of(["8/255", "0.01", "2/255", "2/255"]) == [2 / 255, 0.01, 8 / 255]
    assert [shown_bound(eps) for eps in (0, 2 / 255, 0.01)] == ["0", "2/255", "2.55/255"]
    for text in ("0", "-1", "1.5", "x", "1/0", "nan", ""):
        with pytest.raises(MetaftError, match=r"^robust: .* is no bound above 0 and at most 1"):
            bounds_of([text])


def test_curves_of_folds_are_pooled_by_their_images() -> None:
    parts = [[{"eps": 0.1, "accuracy": a, "images": n}] for a, n in ((0.5, 10), (0.8, 30))]
    (row,) = pooled_curve(parts)
    assert row == {"eps": 0.1, "accuracy": pytest.approx(0.725), "images": 40}


def test_lines_of_a_report_are_the_means_over_draws() -> None:
    rows: list[dict[str, Any]] = [
        {"eps": 0.0, "accuracy": 0.9, "ci95": 0.01},
        {"eps": 2 / 255, "accuracy": 0.4, "ci95": 0.1},
    ]
    lines = under_attack({"a start": {"robust": rows, "draws": 3}, "b": {"draws": 3}}, 10, lambda m, c: f"{m}/{c}")
    assert lines[0].endswith("changed by at most eps, mean ± 95 % interval of 3 draws")
    assert [line.split() for line in lines[1:]] == [["eps", "0", "2/255"], ["a", "start", "0.9/0.01", "0.4/0.1"], []]
    assert under_attack({"b": {"draws": 3}}, 10, lambda m, c: "") == []


def test_the_curve_is_drawn_in_grey_levels_and_percent(tmp_path: Path) -> None:
    rows = {"a start": [{"eps": 0.0, "accuracy": 0.9}, {"eps": 2 / 255, "accuracy": 0.25}]}
    (axes,) = robust_figure(rows).axes
    (line,) = axes.lines
    assert line.get_label() == "a start"
    assert np.asarray(line.get_xydata()).tolist() == [[0, 90], [pytest.approx(2), 25]]
    robust(tmp_path / "robust.png", rows)
    assert (tmp_path / "robust.png").stat().st_size > 1000
