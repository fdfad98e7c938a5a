"""What every extra must do, and the rule of each against a closed form."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_finetune import CLASSES, INPUTS, bits, body, same, toy
from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.finetune.classifier import Classifier, load, save
from metaft.finetune.dropout import dropped
from metaft.finetune.extras import EXTRAS, Batch, Origin, all_named, composed, in_full, named, plain_loss
from metaft.finetune.extras.cutmix import boxes, edges
from metaft.finetune.extras.distil import divergence
from metaft.finetune.extras.pairs import partners, shares, words_of
from metaft.finetune.fit import Fitted, fit
from metaft.finetune.outcomes import class_loss
from metaft.finetune.recipes import epochs_of, fitting, of_chance
from metaft.finetune.strategies import Groups, Strategy, every
from metaft.inputs import ImageInputs
from metaft.models.blocks import blocks_of
from metaft.models.stored import kept_statistics
from metaft.sampler import uniform
from metaft.settings.finetuning import Recipe

CONTRACT = {
    # an extra as it is written: with which other one it is composed
    "l2-sp:alpha=0.5,beta=0.1": "mixup",
    "mixup:alpha=0.7": "cutmix",
    "cutmix:alpha=0.8": "l2-sp",
    "adversarial:eps=0.1,steps=2": "l2-sp",
    "distil:teacher={teacher},t=3": "mixup",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a classifier with the inputs of the toy images."""
    path = tmp_path_factory.mktemp("teacher") / "classifier.safetensors"
    fitted = fit(body(), INPUTS, *toy(21), CLASSES, Recipe(epochs=1, lr=0.01))
    architecture = {"name": "conv4", "ways": CLASSES, "shape": list(INPUTS.shape), "width": 4}
    save(path, Classifier(fitted.body, fitted.head, INPUTS, ("a", "b", "c")), architecture, {})
    return path


@pytest.fixture
def text(request: pytest.FixtureRequest, teacher: Path) -> str:
    """An extra of the table, with the teacher's path."""
    return request.param.format(teacher=teacher)


def beside(text: str) -> str:
    """The one with which it is composed."""
    (other,) = (other for one, other in CONTRACT.items() if one.partition(":")[0] == text.partition(":")[0])
    return other


def second_half(groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
    """The head alone, then all."""
    return every(groups[-1:] if step < steps / 2 else groups)


def kept() -> nn.Module:
    """A body with running statistics, whose features are computed once while it stays."""
    start = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).double()
    with torch.no_grad():
        for k, p in enumerate(start.parameters()):
            p.copy_(torch.linspace(-1, 1, p.numel(), dtype=torch.float64).mul(3 + k).sin().view_as(p))
    return kept_statistics(start, unseen=True)


BODIES = {"a batch's moments": lambda: body(dtype=torch.float64), "running statistics": kept}


def tune(texts: tuple[str, ...], start: nn.Module, strategy: Any = second_half, **more: Any) -> Fitted:
    recipe = Recipe(epochs=4, batch_size=8, lr=0.01, extra=texts)
    images, labels = toy(21)
    return fit(start, INPUTS, images, labels, CLASSES, recipe, strategy=Strategy(strategy), **more)


def case(n: int = 9, start: nn.Module | None = None) -> tuple[nn.Module, Batch, Origin]:
    """A model, a batch and an origin from which the model has moved."""
    images, labels = toy(n)
    below = body(dtype=torch.float64) if start is None else start
    x = INPUTS(images).double()
    head = nn.Linear(below(x).shape[1], CLASSES, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(
            torch.linspace(-1, 1, head.weight.numel(), dtype=torch.float64).mul(9).sin().view_as(head.weight)
        )
        nn.init.zeros_(head.bias)
    model = nn.ModuleDict({"body": below, "head": head})
    origin = Origin({k: p.detach().clone() for k, p in model.named_parameters()}, 3, CLASSES, INPUTS)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    return model, Batch(x, labels, 5 + torch.arange(n), 2), origin


def test_every_extra_is_in_the_table() -> None:
    assert EXTRAS.keys() == {text.partition(":")[0] for text in CONTRACT}


@pytest.mark.parametrize("text", CONTRACT, indirect=True)
@pytest.mark.parametrize("start", BODIES)
def test_the_order_of_a_batch_does_not_matter(text: str, start: str) -> None:
    model, batch, origin = case(start=BODIES[start]())
    objective = composed(all_named((text, beside(text))), origin)
    order = torch.tensor([4, 2, 8, 0, 1, 7, 3, 6, 5])
    shuffled = batch._replace(x=batch.x[order], y=batch.y[order], rows=batch.rows[order])
    value = float(objective(model, batch).detach())
    assert float(objective(model, shuffled).detach()) == pytest.approx(value, abs=1e-9)
    assert abs(value - float(plain_loss(model, batch).detach())) > 1e-3


@pytest.mark.parametrize("text", CONTRACT, indirect=True)
def test_the_step_depends_on_seed_epoch_and_example_alone(text: str) -> None:
    model, batch, origin = case()
    state = torch.random.get_rng_state()
    value = float(composed((named(text),), origin)(model, batch).detach())
    assert float(composed((named(text),), origin)(model, batch).detach()) == value
    assert torch.equal(torch.random.get_rng_state(), state)
    if named(text).of_inputs and named(text).run is None:
        others = [(batch._replace(epoch=3), origin), (batch._replace(rows=batch.rows + 1), origin)]
        others.append((batch, origin._replace(seed=4)))
        assert all(float(composed((named(text),), o)(model, b).detach()) != value for b, o in others)


@pytest.mark.parametrize("text", CONTRACT, indirect=True)
def test_a_loss_leaves_model_and_origin_as_they_are(text: str) -> None:
    """Values, gradients and modes: what is trained begins at its start, whatever the extra."""
    model, batch, origin = case()
    model.get_submodule("body").eval()
    modes = [part.training for part in model.modules()]
    before = copy.deepcopy((model.state_dict(), origin.params, batch.x, batch.y))
    composed((named(text),), origin)(model, batch)
    assert [part.training for part in model.modules()] == modes
    assert same(dict(model.state_dict()), dict(before[0])) and same(dict(origin.params), dict(before[1]))
    assert torch.equal(batch.x, before[2]) and torch.equal(batch.y, before[3])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("text", CONTRACT, indirect=True)
@pytest.mark.parametrize("start", BODIES)
def test_a_resume_in_every_phase_gives_the_same_bits(text: str, start: str) -> None:
    texts, states = (text, beside(text)), list[dict[str, Any]]()
    whole = tune(texts, BODIES[start](), on_epoch=states.append)
    assert same(bits(tune(texts, BODIES[start]())), bits(whole)), "the same bits twice"
    for state in states[:3]:
        again = tune(texts, BODIES[start](), resume=copy.deepcopy(state))
        assert same(bits(again), bits(whole)) and again.curve == whole.curve


@pytest.mark.parametrize("text", CONTRACT, indirect=True)
@pytest.mark.parametrize("start", BODIES)
def test_what_is_frozen_stays_to_the_bit(text: str, start: str) -> None:
    states = list[dict[str, Any]]()
    tune((text,), BODIES[start](), on_epoch=states.append)
    begun = {f"body.{k}": v for k, v in BODIES[start]().state_dict().items()}
    names = [f"body.{name}" for block in blocks_of(BODIES[start]()) for name in block]
    assert all(torch.equal(states[1]["model"][name], begun[name]) for name in names)
    assert not any(torch.equal(states[3]["model"][name], begun[name]) for name in names)
    statistics = [k for k in begun if "running" in k or k.endswith(("mean", "var"))]
    assert all(torch.equal(states[3]["model"][name], begun[name]) for name in statistics)


# L2-SP


def test_l2_sp_adds_the_papers_penalty() -> None:
    model, batch, origin = case()
    more = composed((named("l2-sp:alpha=0.3,beta=0.7"),), origin)(model, batch) - plain_loss(model, batch)
    moved = sum(p.numel() for n, p in model.named_parameters() if n.startswith("body."))
    head = sum(float(p.detach().square().sum()) for p in model.get_submodule("head").parameters())
    assert float(more.detach()) == pytest.approx(0.3 / 2 * 0.1**2 * moved + 0.7 / 2 * head, abs=1e-9)


def test_l2_sp_pulls_by_alpha_times_the_distance() -> None:
    model, batch, origin = case()
    objective = composed((named("l2-sp:alpha=0.3,beta=0.7"),), origin)
    params = dict(model.named_parameters())
    grads = [torch.autograd.grad(f(model, batch), list(params.values())) for f in (objective, plain_loss)]
    for (name, p), pulled, plain in zip(params.items(), *grads, strict=True):
        wanted = 0.7 * p if name.startswith("head.") else 0.3 * (p - origin.params[name])
        torch.testing.assert_close(pulled - plain, wanted.detach(), rtol=0, atol=1e-9)


def distance(fitted: Fitted, start: nn.Module) -> float:
    begun = dict(start.named_parameters())
    return sum(float((p.detach() - begun[n].detach()).square().sum()) for n, p in fitted.body.named_parameters())


def test_the_distance_falls_with_alpha_and_at_last_is_that_of_the_linear_probe() -> None:
    """By SGD in float64, at a rate at which the largest alpha is stable: 2 / alpha bounds it."""

    def far(alpha: float) -> float:
        recipe = Recipe(epochs=10, batch_size=32, lr=0.02, optimizer="sgd:momentum=0")
        recipe = Recipe(**{**vars(recipe), "extra": (f"l2-sp:alpha={alpha},beta=0",)})
        return distance(fit(kept(), INPUTS, *toy(21), CLASSES, recipe), kept())

    distances = [far(alpha) for alpha in (0.0, 1.0, 10.0, 49.0)]
    assert all(b < 0.8 * a for a, b in itertools.pairwise(distances)), distances
    assert distances[-1] < 1e-2 * distances[0]


def test_a_backbone_that_stays_keeps_its_features_where_an_extra_looks_at_parameters_alone() -> None:
    passed: list[int] = []

    def head_alone(text: str) -> int:
        passed.clear()
        start = kept()
        start.register_forward_hook(lambda _, inputs, __: passed.append(len(inputs[0])))
        tune((text,), start, lambda groups, step, steps, per_epoch: every(groups[-1:]))
        return sum(passed)

    assert head_alone("l2-sp") == 21
    assert head_alone("mixup") >= 5 * 21


# mixup and CutMix


def test_partners_go_round_and_none_is_its_own() -> None:
    keys = np.array([7, 3, 9, 1], np.uint64)
    assert partners(keys).tolist() == [2, 0, 3, 1]
    assert sorted(partners(keys)) == [0, 1, 2, 3]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_are_of_the_beta_distribution(alpha: float) -> None:
    """Its mean is 1/2 and its variance 1 / (4 (2 alpha + 1)); 4,000 equally spaced quantiles have them."""
    share = shares((np.arange(4000) + 0.5) / 4000, alpha)
    assert share.min() >= 0 and share.max() <= 1
    assert share.mean() == pytest.approx(0.5, abs=1e-6)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=1e-3)


def test_words_of_examples_are_their_own() -> None:
    batch = Batch(torch.zeros(3), torch.zeros(3), torch.tensor([4, 0, 9]), 1)
    words = words_of(batch, 0, 0)
    assert np.array_equal(words_of(batch._replace(rows=batch.rows[:1]), 0, 0), words[:1])
    later, other = words_of(batch._replace(epoch=2), 0, 0), words_of(batch, 0, 1)
    assert len({int(word) for each in (words, later, other) for word in each.ravel()}) == 3 * words.size


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)])
def test_mixup_is_the_loss_of_both_labels_by_their_shares(weights: Tensor | None) -> None:
    model, batch, origin = case()
    words = words_of(batch, origin.seed, 0)
    partner = torch.from_numpy(partners(words[:, 0]))
    share = torch.from_numpy(shares(uniform(words[:, 1]), 0.7))
    x = share.view(-1, 1, 1, 1) * batch.x + (1 - share).view(-1, 1, 1, 1) * batch.x[partner]
    logits = model.get_submodule("head")(model.get_submodule("body")(x))
    first, second = (F.cross_entropy(logits, y, reduction="none") for y in (batch.y, batch.y[partner]))
    w = torch.ones(3, dtype=torch.float64) if weights is None else weights
    a, b = share * w[batch.y], (1 - share) * w[batch.y[partner]]
    wanted = (a * first + b * second).sum() / (a + b).sum()
    objective = composed((named("mixup:alpha=0.7"),), origin, lambda o, y: class_loss(o, y, weights=weights))
    assert float((objective(model, batch) - wanted).detach()) == pytest.approx(0, abs=1e-9)


def test_mixed_numbers_are_mixed_likewise() -> None:
    model, batch, origin = case()
    batch, seen = batch._replace(y=batch.y.double()), list[Tensor]()
    extra = named("mixup")
    extra.wrap(lambda _, b: seen.append(b.y) or b.y.sum(), origin._replace(classes=0))(model, batch)
    (y,) = seen
    assert y.shape == batch.y.shape and float(y.sum()) != float(batch.y.sum())
    assert float(y.min()) >= 0 and float(y.max()) <= 2


def test_a_box_has_its_share_of_the_pixels_and_is_cut_off_at_the_edge() -> None:
    first, last = edges(10, np.array([0.75, 0.75, 0.0]), np.array([0.55, 0.0, 0.5]))
    assert (first.tolist(), last.tolist()) == ([3, 0, 0], [7, 2, 10])  # side 10 sqrt(1 - 3/4) = 5, in halves of 2
    words = words_of(Batch(torch.zeros(40), torch.zeros(40), torch.arange(40), 0), 0, 1)
    box = boxes(8, 12, words, 1.0)
    assert box.shape == (40, 1, 8, 12)
    rows, columns = box.any(-1), box.any(-2)
    assert torch.equal(box, rows[..., None] & columns[..., None, :])
    middle = (uniform(words[:, 2]) * 8).astype(int)
    assert all(rows[i, 0, middle[i]] for i in range(40) if rows[i].any())


def test_cutmix_pastes_and_labels_by_the_pixels() -> None:
    model, batch, origin = case()
    seen = list[Batch]()
    named("cutmix").wrap(lambda _, b: seen.append(b) or b.y.sum(), origin)(model, batch)
    partner = torch.from_numpy(partners(words_of(batch, origin.seed, 1)[:, 0]))
    for i, (x, y) in enumerate(zip(seen[0].x, seen[0].y, strict=True)):
        own, theirs = x == batch.x[i], x == batch.x[partner[i]]
        assert bool((own | theirs).all())
        share = 1 - float((~own).double().mean())
        assert float(y.sum()) == pytest.approx(1, abs=1e-12)
        if batch.y[i] != batch.y[partner[i]] and bool((batch.x[i] != batch.x[partner[i]]).all()):
            assert float(y[batch.y[i]]) == pytest.approx(share, abs=1e-12)
    assert any(0 < float(y.max()) < 1 for y in seen[0].y)


def test_validation_is_of_examples_as_they_are() -> None:
    val = toy(9, seed=3)
    nothing = {
        "strategy": Strategy(lambda groups, step, steps, per_epoch: {}),
        "val_examples": val[0],
        "val_labels": val[1],
    }
    recipes = [Recipe(epochs=1, batch_size=8, extra=extra) for extra in ((), ("mixup:alpha=1", "cutmix"))]
    plain, mixed = (fit(kept(), INPUTS, *toy(21), CLASSES, recipe, **nothing).curve[0] for recipe in recipes)
    assert plain["val_loss"] == mixed["val_loss"]
    assert plain["loss"] != mixed["loss"]


# Distillation


def test_distillation_has_the_gradient_of_both_distributions_and_none_beside_a_teacher_like_itself() -> None:
    """Of logits: t (softmax(student / t) - softmax(teacher / t)) over the number of examples."""
    g = torch.Generator().manual_seed(0)
    student, other = torch.randn(2, 7, 4, dtype=torch.float64, generator=g)
    student.requires_grad_()
    for t in (0.5, 2.0, 20.0):
        (gradient,) = torch.autograd.grad(divergence(student, other, t), student)
        wanted = t * ((student / t).softmax(-1) - (other / t).softmax(-1)) / 7
        torch.testing.assert_close(gradient, wanted.detach(), rtol=0, atol=1e-12)
        (none,) = torch.autograd.grad(divergence(student, student.detach(), t), student)
        assert float(none.abs().max()) < 1e-15
    p, q = (x.softmax(-1) for x in (other, student))
    wanted = (p * (p / q).log()).sum(-1).mean()
    assert float((divergence(student, other, 1.0) - wanted).detach()) == pytest.approx(0, abs=1e-12)


def test_a_student_follows_its_teacher_by_the_share(teacher: Path) -> None:
    model, batch, origin = case()
    known = load(teacher).double()
    with torch.no_grad():
        outputs, wanted = (m.head(m.body(batch.x)) for m in (model, known))  # type: ignore[operator]
        kl = float(divergence(outputs, wanted, 3.0))
    plain = float(plain_loss(model, batch).detach())
    value = composed((named(f"distil:teacher={teacher},t=3,share=0.25"),), origin)(model, batch)
    assert float(value.detach()) == pytest.approx(0.75 * plain + 0.25 * kl, abs=1e-9)
    assert all(p.grad is None for p in known.parameters())


def test_dropout_leaves_the_same_features_out_of_what_follows_the_teacher(teacher: Path) -> None:
    model, batch, origin = case()
    known = load(teacher).double()
    with torch.no_grad():
        kept = dropped(model.get_submodule("body")(batch.x), batch, origin.seed, 0.5)
        student, wanted = model.get_submodule("head")(kept), known.head(known.body(batch.x))
        right = float(divergence(student, wanted, 2.0))
    follow = composed((named(f"distil:teacher={teacher},share=1"),), origin, dropout=0.5)
    assert float(follow(model.train(), batch).detach()) == pytest.approx(right, abs=1e-12)
    whole = float(follow(model.eval(), batch).detach())
    assert whole != pytest.approx(right, rel=1e-3), "in evaluation nothing is left out"


def test_a_teacher_is_of_the_same_classes_and_inputs(teacher: Path) -> None:
    extra = named(f"distil:teacher={teacher}")
    extra.check(INPUTS, ("a", "b", "c"))
    with pytest.raises(
        MetaftError, match=r"^extra: the teacher .* knows 3 classes, which are not the 2 .*; such as 'c'"
    ):
        extra.check(INPUTS, ("a", "b"))
    with pytest.raises(
        MetaftError, match=r"^extra: the teacher .* takes other inputs than the start: height 16, not 9"
    ):
        extra.check(dataclasses.replace(INPUTS, height=9), ("a", "b", "c"))
    with pytest.raises(MetaftError, match=r"^extra: teacher: .*/none/such"):
        named("distil:teacher=/none/such").check(INPUTS, ("a", "b", "c"))
    recipe = Recipe(extra=(f"distil:teacher={teacher}", "mixup"))
    assert fitting(recipe, INPUTS, ("a", "b", "c")) == recipe
    assert fitting(recipe, INPUTS, ("a", "b")).extra == ("mixup",)


def test_a_teachers_path_is_kept_in_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_full("distil:teacher=runs/a,t=3") == f"distil:teacher={tmp_path}/runs/a,t=3"
    assert in_full('distil:teacher="a:b"') == f'distil:teacher="{tmp_path}/a:b"'
    assert in_full("mixup:alpha=1/5") == "mixup:alpha=1/5"


# What is written


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["mixap"], "extra: no 'mixap', known are l2-sp, mixup, cutmix, adversarial, distil; did you mean 'mixup'?"),
        (["l2-sp:alpha=-1"], "extra: alpha must be at least 0, got -1.0 (given 'l2-sp:alpha=-1')"),
        (["mixup:alpha=0"], "extra: alpha must be above 0 and at most 100, got 0.0 (given 'mixup:alpha=0')"),
        (["cutmix:alpha=1/0"], "extra: 'alpha=1/0' must be float (given 'cutmix:alpha=1/0')"),
        (["distil"], "extra: 'distil' lacks teacher; it is as in 'distil:teacher=TEACHER,t=2.0,share=0.5'"),
        (["distil:teacher=x,t=0"], "extra: t must be above 0 and at most 1000, got 0 (given 'distil:teacher=x,t=0')"),
        (["mixup:beta=1"], "extra: mixup has no 'beta' (given 'mixup:beta=1'); it has alpha"),
        (["mixup", "l2-sp", "mixup:alpha=1"], "extra: mixup is given twice (given 'mixup')"),
    ],
)
def test_what_no_extra_is_called_is_said(texts: list[str], said: str) -> None:
    with pytest.raises(MetaftError) as caught:
        all_named(texts)
    assert str(caught.value) == said


def test_cutmix_is_for_pictures() -> None:
    named("cutmix").check(ImageInputs(1, 4, 4), ("a", "b"))

    class Tokens:
        shape = (7,)

    with pytest.raises(MetaftError, match=r"^extra: cutmix is for pictures, and inputs have the shape \[7\]"):
        named("cutmix").check(Tokens(), ("a", "b"))  # type: ignore[arg-type]


def test_a_random_start_trains_without_what_keeps_to_a_start() -> None:
    assert of_chance(Recipe(extra=("l2-sp:alpha=1", "mixup"))).extra == ("mixup",)


def test_a_head_on_changing_images_gets_no_more_epochs_than_other_fits() -> None:
    assert epochs_of(Recipe(strategy="head"), 32) == epochs_of(Recipe(strategy="head", extra=("l2-sp",)), 32) == 600
    assert epochs_of(Recipe(strategy="head", extra=("mixup",)), 32) == 40
