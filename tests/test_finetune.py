"""Fine-tuning: stored moments, heads, target data, the training loop, and predictions that stand by themselves."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenarios
import torch
import torch.nn.functional as F
from helpers import ONE_PASS, on_threads, rounded_alike
from PIL import Image
from torch import Tensor, nn

from metaft import targets
from metaft.errors import DataError, MetaftError, NonFiniteError
from metaft.finetune import heads
from metaft.finetune.augment import augmented
from metaft.finetune.classifier import Classifier
from metaft.finetune.examples import Part, Prepared
from metaft.finetune.fit import Fitted, fit
from metaft.finetune.training import head_seed
from metaft.inputs import ImageInputs
from metaft.inputs.base import at_most
from metaft.models import Conv4, EpisodeNorm, initialise
from metaft.models.functional import body_of
from metaft.models.norm import measure_moments
from metaft.models.stored import PASSES, StoredNorm, empty_stored, with_stored_moments
from metaft.settings.finetuning import Recipe
from metaft.targets.draws import validation_part
from metaft.tasks.glyphs import glyphs

INPUTS = ImageInputs(*scenarios.SHAPE, mean=(0.4,), std=(0.3,))
CLASSES = 3


def network(name: str = "conv4", dtype: torch.dtype = torch.float32) -> nn.Module:
    module = Conv4(CLASSES, scenarios.SHAPE, 4, "pool" if name == "conv4-pool" else "stride").to(dtype)
    module.load_state_dict(scenarios.model(name, dtype=dtype).params)
    return module


def body(name: str = "conv4", dtype: torch.dtype = torch.float32) -> nn.Module:
    return body_of(network(name, dtype))


def toy(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes that a small network can tell apart: a template each, and noise."""
    rng = np.random.default_rng(99)
    templates = rng.integers(0, 180, (CLASSES, *scenarios.SHAPE))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(n) % CLASSES
    images = templates[labels] + rng.integers(0, 76, (n, *scenarios.SHAPE))
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def bits(fitted: Fitted) -> dict[str, Tensor]:
    return {f"{part}.{k}": v for part in ("body", "head") for k, v in getattr(fitted, part).state_dict().items()}


# Stored moments


@pytest.mark.parametrize("name", ["conv4", "conv4-pool"])
def test_stored_moments_normalise_their_batch_as_it_does_itself(name: str) -> None:
    module, x = network(name, torch.float64), torch.randn(7, *scenarios.SHAPE, dtype=torch.float64)
    before = copy.deepcopy(module.state_dict())
    stored = with_stored_moments(module, x)
    torch.testing.assert_close(stored(x), module(x), rtol=0, atol=1e-12)
    stored.train()  # no mode may bring the batch's statistics back
    torch.testing.assert_close(stored(x[:1]), module(x)[:1], rtol=0, atol=1e-12)
    with measure_moments() as measured:
        module(x)
    layers = [layer for layer in stored.modules() if isinstance(layer, StoredNorm)]
    assert len(layers) == len(measured) == 4
    for layer, (mean, var) in zip(layers, measured, strict=True):
        torch.testing.assert_close((layer.mean, layer.var), (mean, var), rtol=0, atol=1e-12)
    with torch.no_grad():
        next(stored.parameters()).zero_()
    assert same(module.state_dict(), before)
    assert sum(isinstance(part, EpisodeNorm) for part in module.modules()) == 4
    assert not any(part._forward_pre_hooks for part in [*module.modules(), *stored.modules()])


def test_given_moments_are_those_of_the_pure_functions() -> None:
    model, g = scenarios.model(), torch.Generator().manual_seed(3)
    support, query = torch.randn(2, 5, *scenarios.SHAPE, dtype=torch.float64, generator=g)
    moments = model.measure(model.params, support)
    stored = with_stored_moments(network(dtype=torch.float64), query, moments)
    expected = model.apply(model.params, query, moments)
    torch.testing.assert_close(stored(query), expected, rtol=0, atol=1e-12)
    assert (expected - model.apply(model.params, query, None)).abs().max() > 0.01
    with pytest.raises(ValueError, match="shorter"):
        with_stored_moments(network(dtype=torch.float64), query, moments[:-1])


def test_a_layer_that_is_used_twice_is_refused() -> None:
    norm = EpisodeNorm(4)
    with pytest.raises(MetaftError, match="layer '0' is used twice"):
        with_stored_moments(nn.Sequential(norm, nn.Linear(4, 4), norm), torch.randn(5, 4))


class Parts:
    """x part by part, counting how often each layer sees them all."""

    def __init__(self, x: Tensor, at_once: int) -> None:
        self.parts, self.made = x.split(at_once), 0

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.parts:
            self.made += 1
            yield part


@pytest.mark.parametrize("name", ["conv4", "conv4-pool"])
def test_moments_stored_part_by_part_are_those_of_one_batch(name: str) -> None:
    module, x = network(name, torch.float64), torch.randn(23, *scenarios.SHAPE, dtype=torch.float64)
    whole, parts = with_stored_moments(module, x), Parts(x, 5)
    in_parts = with_stored_moments(module, parts)
    for k, v in whole.state_dict().items():
        torch.testing.assert_close(in_parts.state_dict()[k], v, rtol=0, atol=1e-12)
    assert parts.made == 2 + 4 * len(parts.parts), "a pass for each of four layers, one behind the other"
    assert all(p.grad is None for p in module.parameters())


class Branches(nn.Module):
    """Normalisation layers of which none sees another's output."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(EpisodeNorm(3) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([norm(i * x + x**2) for i, norm in enumerate(self.norms)], -1)


def test_moments_of_independent_layers_take_one_pass() -> None:
    module, x = Branches(9), torch.randn(40, 3)
    parts = Parts(x, 7)
    stored = with_stored_moments(module, parts)
    assert parts.made == 2 + len(parts.parts)
    torch.testing.assert_close(stored(x), module(x), rtol=0, atol=1e-5)


class Chain(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[part for _ in range(n) for part in (nn.Linear(8, 8), EpisodeNorm(8), nn.ReLU())])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_moments_of_a_long_chain_take_a_bounded_number_of_passes() -> None:
    """The first layers' are exact; the others' are those of parts normalised by themselves, near the whole's."""
    module, g = initialise(Chain(12), 0).double(), torch.Generator().manual_seed(0)
    x = torch.randn(2048, 8, generator=g, dtype=torch.float64)
    parts = Parts(x, 256)
    stored, whole = with_stored_moments(module, parts), with_stored_moments(module, x, at_once=4096)
    assert parts.made == 2 + PASSES * len(parts.parts)
    norms = [[m for m in made.modules() if isinstance(m, StoredNorm)] for made in (stored, whole)]
    off = [float((a.var - b.var).norm() / b.var.norm()) for a, b in zip(*norms, strict=True)]
    assert max(off[:PASSES]) < 1e-12
    assert 1e-6 < max(off[PASSES:]) < 0.03


class Hidden(nn.Module):
    """A chain that autograd does not see, or not to its end."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.chain = how, Chain(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.chain(x)
        for part in self.chain.layers:
            x = part(x)
            x = x.detach() if self.how == "detach" else torch.sigmoid(x).add_(1) if self.how == "in place" else x
        return x


@pytest.mark.parametrize("how", ["no_grad", "detach", "in place"])
def test_moments_are_exact_where_autograd_cannot_see(how: str) -> None:
    module, x = initialise(Hidden(how), 0).double(), torch.randn(60, 8, dtype=torch.float64)
    whole, parts = with_stored_moments(module, x), with_stored_moments(module, Parts(x, 7))
    for k, v in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[k], v, rtol=0, atol=1e-12)


class Twofold(nn.Module):
    """One normalisation layer by two names, of which one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = EpisodeNorm(8)
        self.layers = nn.Sequential(nn.Linear(8, 8), self.norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_a_layer_by_two_names_is_stored_by_both() -> None:
    x = torch.randn(30, 8)
    for given in (x, Parts(x, 7)):
        stored = with_stored_moments(Twofold(), given)
        assert isinstance(stored.get_submodule("layers.1"), StoredNorm)
        assert stored.get_submodule("layers.1") is stored.get_submodule("norm")
        empty = empty_stored(Twofold())
        empty.load_state_dict(stored.state_dict())
        torch.testing.assert_close(empty(x[:1]), stored(x)[:1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stored_moments_survive_their_state_dict(dtype: torch.dtype) -> None:
    x = torch.randn(6, *scenarios.SHAPE, dtype=dtype)
    stored = with_stored_moments(network(dtype=dtype), x)
    empty = empty_stored(network(dtype=dtype))
    assert not same(empty.state_dict(), stored.state_dict())
    empty.load_state_dict(stored.state_dict())
    assert same(empty.state_dict(), stored.state_dict())
    assert torch.equal(empty(x), stored(x))


# The classifier


def classifier(head: str, name: str, dtype: torch.dtype, *, invert: bool = False) -> Classifier:
    images, labels = toy(12)
    x = INPUTS(images).to(dtype)
    stored = with_stored_moments(body(name, dtype), x)
    built = heads.build(head, stored(x).detach(), labels, CLASSES, seed=0)
    inputs = dataclasses.replace(INPUTS, invert=invert)
    return Classifier(stored, built, inputs, ("a", "b", "c"))


@pytest.mark.parametrize("name", ["conv4", "conv4-pool"])
@pytest.mark.parametrize("head", sorted(heads.HEADS))
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, ONE_PASS), (torch.float64, 1e-12)])
@torch.no_grad()
def test_an_image_gets_the_same_label_in_any_company(head: str, name: str, dtype: torch.dtype, tol: float) -> None:
    made, (images, _) = classifier(head, name, dtype), toy(30, seed=1)
    images[20:] = torch.randint(0, 256, images[20:].shape, generator=torch.Generator().manual_seed(0)).byte()
    logits, names = made(images), made.names(images)
    assert logits.dtype == dtype
    assert len(set(names)) == CLASSES or head != "prototype"
    assert (logits - logits[0]).abs().max() > 0.5
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    companies = [[i] for i in range(30)] + [[i, 29, 29, 29] for i in range(30)]
    for rows in [*companies, list(range(7)), order.tolist()]:
        torch.testing.assert_close(made(images[rows]), logits[rows], rtol=tol, atol=tol)
        assert made.names(images[rows]) == [names[i] for i in rows]
    probabilities = made.probabilities(images, at_once=7)
    torch.testing.assert_close(probabilities, logits.softmax(-1).float(), rtol=0, atol=ONE_PASS)
    assert made.probabilities(images[:0]).shape == (0, CLASSES)


def test_body_of_ends_in_the_features_and_leaves_its_module() -> None:
    module, x = network(), torch.randn(4, *scenarios.SHAPE)
    features = body_of(module)(x)
    assert features.shape == (4, 4)
    assert torch.equal(module.get_submodule("head")(features), module(x))


# Heads


def test_heads_against_closed_forms() -> None:
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(7, 5, dtype=torch.float64, generator=g), torch.tensor([0, 1, 2, 0, 0, 1, 2])
    new = torch.randn(4, 5, dtype=torch.float64, generator=g)
    linear, cosine, prototype = (heads.build(h, x, labels, 3, seed=4) for h in ("linear", "cosine", "prototype"))
    p = dict(linear.named_parameters())
    torch.testing.assert_close(linear(new), new @ p["weight"].T, rtol=0, atol=1e-12)  # the bias starts at zero
    with torch.no_grad():
        p["bias"].copy_(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(linear(new), new @ p["weight"].T + torch.tensor([1.0, 2.0, 3.0]).double())
    w = cosine.get_parameter("weight")
    expected = 10 * F.cosine_similarity(new[:, None], w[None], dim=-1)
    torch.testing.assert_close(cosine(new), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(cosine(new * 7), expected, rtol=0, atol=1e-12)
    means = torch.stack([x[[0, 3, 4]].mean(0), x[[1, 5]].mean(0), x[[2, 6]].mean(0)])
    torch.testing.assert_close(prototype.get_parameter("points").detach(), means, rtol=0, atol=1e-12)
    torch.testing.assert_close(prototype(new), -(torch.cdist(new, means) ** 2), rtol=0, atol=1e-12)
    for head in (linear, cosine, prototype):
        assert all(q.requires_grad and q.dtype == torch.float64 for q in head.parameters())


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_a_head_comes_from_its_seed_alone(head: str) -> None:
    x, labels, state = torch.randn(6, 5), torch.arange(6) % 3, torch.get_rng_state()
    a, b, c, d = (heads.build(head, x, labels, 3, seed).state_dict() for seed in (1, 1, 2, 2**64 - 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(a, b)
    assert not torch.equal(a["weight"], c["weight"])
    assert not torch.equal(a["weight"], d["weight"])


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_a_head_shares_no_random_numbers_with_a_backbone_of_its_seed(head: str) -> None:
    """Glorot-uniform draws differ by their scale alone, so the first ones would be proportional."""
    backbone = next(initialise(Conv4(CLASSES, scenarios.SHAPE, 4, "stride"), 3).parameters()).detach().flatten()
    made = heads.build(head, torch.randn(6, 5), torch.arange(6) % 3, 3, head_seed(3)).get_parameter("weight").detach()
    n = min(len(backbone), made.numel())
    ratio = made.flatten()[:n] / backbone[:n]
    assert float(ratio.max() - ratio.min()) > 0.1


def test_an_unknown_head_is_refused_with_the_nearest() -> None:
    with pytest.raises(MetaftError, match=r"head: no 'cosin', known are .*; did you mean 'cosine'\?"):
        heads.build("cosin", torch.randn(2, 3), torch.arange(2), 2, 0)


# Target data

GREY8 = ImageInputs(1, 8, 8, polarity="bright-on-black")


def write(path: Path, part: str, count: int, *, classes: str = "abc", side: int = 8, paper: int = 20) -> Path:
    """`count` pictures of each class: random ink on a ground of one grey."""
    rng = np.random.default_rng([count, *part.encode()])
    for name in classes:
        (path / part / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((side, side), paper, np.uint8)
            pixels[2:-2, 2:-2] = rng.integers(0, 256, (side - 4, side - 4))
            Image.fromarray(pixels).save(path / part / name / f"{i:02d}.png")
    return path


def per_class(data: targets.Target, rows: np.ndarray) -> list[int]:
    return np.bincount(data.labels.numpy()[rows], minlength=len(data.class_names)).tolist()


LAYOUTS = [  # pictures of each class in each part, shots per class, then how many of each class are in train, val, test
    ({"train": 4, "test": 3}, None, (4, 0, 3)),
    ({"train": 4, "test": 3}, 2, (2, 0, 3)),
    ({"train": 4, "test": 3}, 4, (4, 0, 3)),
    ({"train": 11, "test": 3}, 10, (8, 2, 3)),
    ({"train": 11, "val": 2, "test": 3}, None, (11, 2, 3)),
    ({"train": 11, "val": 2, "test": 3}, 5, (5, 2, 3)),
    ({".": 10}, None, (8, 0, 2)),
    ({".": 6}, 5, (5, 0, 1)),
    ({".": 17}, 15, (12, 3, 2)),
]


def load_target(data: str, inputs: ImageInputs, *, shots_per_class: int | None, seed: int) -> Any:
    """The target, with the rows of one draw beside its fields."""
    found = targets.load(data, inputs)
    rows = found.rows(shots_per_class=shots_per_class, seed=seed)
    return types.SimpleNamespace(**vars(found), **rows._asdict())


@pytest.mark.parametrize(("parts", "shots", "expected"), LAYOUTS)
def test_every_layout_of_a_folder(
    parts: dict[str, int], shots: int | None, expected: tuple[int, int, int], tmp_path: Path
) -> None:
    for part, count in parts.items():
        write(tmp_path, part, count)
    state = torch.get_rng_state()
    data = load_target(f"folder:{tmp_path}", GREY8, shots_per_class=shots, seed=0)
    again, other = (load_target(f"folder:{tmp_path}", GREY8, shots_per_class=shots, seed=s) for s in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    uses = {"train": data.train, "val": data.val, "test": data.test}
    assert data.class_names == ("a", "b", "c")
    for (use, rows), count in zip(uses.items(), expected, strict=True):
        assert per_class(data, rows) == [count] * 3
        assert rows.dtype == np.int64
        assert np.array_equal(rows, getattr(again, use))
        if "." not in parts:
            source = use if use in parts else "train"
            assert all(Path(data.files[i]).parent.parent.name == source for i in rows)
    every = np.concatenate(list(uses.values()))
    assert len(set(every.tolist())) == len(every)
    drawn = "." in parts or (shots is not None and shots < parts["train"])
    assert drawn != np.array_equal(data.train, other.train)
    if "." in parts:
        assert len(every) == len(data.files)
        assert not np.array_equal(data.test, other.test)
    for file, label, pixels in zip(data.files, data.labels, data.examples, strict=True):
        assert Path(file).parent.name == data.class_names[label]
        assert np.array_equal(np.asarray(Image.open(file)), pixels[0])
    assert (data.inputs.invert, data.changes, data.notes) == (False, (), ())
    assert (data.examples.dtype, data.labels.dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize(
    ("counts", "expected"), [((9, 9), (0, 0)), ((10, 9), (0, 0)), ((10, 10), (2, 2)), ((14, 25), (2, 5))]
)
def test_the_validation_part_is_one_in_five_of_every_class(counts: tuple[int, int], expected: tuple[int, int]) -> None:
    labels = np.repeat([0, 1, 0], [*counts, 5])
    rows = np.arange(sum(counts))  # the last five images are not for training
    train, val = validation_part(labels, rows, seed=3)
    assert np.bincount(labels[val], minlength=2).tolist() == list(expected)
    assert sorted([*train, *val]) == rows.tolist()
    assert np.array_equal(val, validation_part(labels, rows, seed=3)[1])
    assert len(val) == 0 or not np.array_equal(val, validation_part(labels, rows, seed=4)[1])


def test_polarity_and_size_are_fitted_and_reported(tmp_path: Path) -> None:
    write(tmp_path, ".", 3, side=12, paper=230)
    data = load_target(f"folder:{tmp_path}", GREY8, shots_per_class=None, seed=0)
    assert data.inputs.invert
    assert data.changes == ("resized from 12x12 to 8x8", "dark on bright to bright on black")
    assert data.examples[:, 0, 0].float().mean() < 60
    as_is = load_target(f"folder:{tmp_path}", ImageInputs(1, 12, 12), shots_per_class=None, seed=0)
    assert (as_is.inputs.invert, as_is.changes) == (False, ())
    assert torch.equal(as_is.examples[0, 0], torch.from_numpy(np.array(Image.open(data.files[0]))))
    colour = load_target(f"folder:{tmp_path}", ImageInputs(3, 12, 12), shots_per_class=None, seed=0)
    assert (colour.examples.shape[1], colour.changes) == (3, ("grey to colour",))
    made = Classifier(nn.Identity(), nn.Identity(), data.inputs, ("a", "b", "c"))
    for i, file in enumerate(data.files):  # a picture reads the same in training and in prediction
        assert torch.equal(made.read(Path(file)), data.examples[i : i + 1])


def broken(path: Path, case: str) -> None:
    if case in ("few", "few alone", "odd", "no test"):
        write(path, "." if case == "few alone" else "train", 3)
    if case in ("few", "odd"):
        write(path, "test", 3, classes="abd" if case == "odd" else "abc")
    if case == "no train":
        write(path, "val", 2)
    if case == "one class":
        write(path, ".", 3, classes="a")


@pytest.mark.parametrize(
    ("case", "shots", "message"),
    [
        ("empty", None, "holds 0 class folders, fewer than 2"),
        ("one class", None, "holds 1 class folders, fewer than 2"),
        ("no test", None, r"test is missing; give train/ and test/"),
        ("no train", None, r"train is missing; give train/ and test/"),
        ("few", 4, r"class 'a' has 3 images to draw from, fewer than shots_per_class = 4"),
        ("few alone", 3, r"class 'a' has 3 images .* fewer than shots_per_class \+ 1 for the test = 4"),
        ("odd", None, r"2 classes, 'c', 'd', are not in every part of .* \(train, test\)"),
        ("few", 0, "shots_per_class must be at least 1, got 0"),
    ],
)
def test_folders_that_do_not_do(case: str, shots: int | None, message: str, tmp_path: Path) -> None:
    broken(tmp_path, case)
    with pytest.raises(MetaftError, match=message):
        load_target(f"folder:{tmp_path}", GREY8, shots_per_class=shots, seed=0)


@pytest.mark.parametrize("data", ["folder:", "glyphs", "", "omniglot:Greek", "/some/path"])
def test_data_is_a_folder_or_a_script(data: str) -> None:
    with pytest.raises(MetaftError, match=r"^data: .*folder:PATH, csv:FILE|^data: write"):
        load_target(data, GREY8, shots_per_class=None, seed=0)
    with pytest.raises(DataError, match="folder nowhere/at/all does not exist"):
        load_target("folder:nowhere/at/all", GREY8, shots_per_class=None, seed=0)


def test_a_held_out_script_of_the_glyphs() -> None:
    pool = glyphs()
    script = pool.class_names[pool.splits["test"][0]].split("/")[0]
    classes = [i for i, name in enumerate(pool.class_names) if name.startswith(f"{script}/")]
    data = load_target(f"glyphs:{script}", pool.inputs, shots_per_class=10, seed=0)
    assert [per_class(data, rows) for rows in (data.train, data.val, data.test)] == [
        [n] * len(classes) for n in (8, 2, 10)
    ]
    assert data.class_names == tuple(pool.class_names[c] for c in classes)
    for label, c in enumerate(classes):
        own = pool.images[pool.starts[c] : pool.starts[c] + pool.counts[c]]
        assert torch.equal(data.examples[data.labels == label], own)
    other = load_target(f"glyphs:{script}", pool.inputs, shots_per_class=10, seed=1)
    assert not np.array_equal(data.test, other.test)
    with pytest.raises(MetaftError, match=f"no held-out script '{script[:-1]}', .*did you mean '{script}'"):
        load_target(f"glyphs:{script[:-1]}", pool.inputs, shots_per_class=None, seed=0)
    trained = pool.class_names[pool.splits["train"][0]].split("/")[0]
    with pytest.raises(MetaftError, match=f"no held-out script '{trained}'"):
        load_target(f"glyphs:{trained}", pool.inputs, shots_per_class=None, seed=0)
    with pytest.raises(MetaftError, match=r"glyphs are \[1, 28, 28\], but the run's images are \[1, 8, 8\]"):
        load_target(f"glyphs:{script}", GREY8, shots_per_class=None, seed=0)


# The loop


def tune(
    start: nn.Module | None = None, n: int = 21, *, val: tuple[Tensor, Tensor] | None = None, **changes: Any
) -> Fitted:
    own = {k: changes.pop(k) for k in ("resume", "on_epoch", "should_stop", "seed", "each_epoch") if k in changes}
    recipe = Recipe(**{"epochs": 4, "batch_size": 8, "lr": 0.01, **changes})
    images, labels = toy(n)
    val_examples, val_labels = val if val is not None else (None, None)
    start = body() if start is None else start
    return fit(start, INPUTS, images, labels, CLASSES, recipe, val_examples=val_examples, val_labels=val_labels, **own)


def ambiguous() -> tuple[Tensor, Tensor]:
    """Validation images of which a quarter bear a wrong label: confidence pays for a while, then costs."""
    images, labels = toy(24, seed=5)
    return images, torch.where(torch.arange(24) % 4 == 0, (labels + 1) % CLASSES, labels)


@pytest.mark.parametrize("head", sorted(heads.HEADS))
@pytest.mark.parametrize("freeze", ["none", "backbone"])
def test_it_learns_what_can_be_learned(head: str, freeze: str) -> None:
    # In float64, so that what is learned hangs on no processor's rounding.
    fitted = tune(body(dtype=torch.float64), n=60, head=head, freeze=freeze, epochs=20, lr=0.05)
    assert [row["epoch"] for row in fitted.curve] == list(range(1, 21))
    losses = [row["loss"] for row in fitted.curve]
    assert losses[-1] < 0.7 * losses[0]
    images, labels = toy(30, seed=2)
    made = Classifier(fitted.body, fitted.head, INPUTS, ("0", "1", "2"))
    assert sum(int(name) == y for name, y in zip(made.names(images), labels, strict=True)) >= (
        30 if freeze == "none" else 16  # random features tell the classes apart in part
    )


def test_the_losses_of_the_curve_are_means_over_images() -> None:
    val = ambiguous()
    # 21 images in batches of 8, 8 and 5.
    fitted = tune(body(dtype=torch.float64), freeze="backbone", lr=1e-300, epochs=1, val=val)
    for name, (images, labels) in {"loss": toy(21), "val_loss": val}.items():
        logits = fitted.head(fitted.body(INPUTS(images).double())).detach()
        assert fitted.curve[0][name] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-12)
    assert fitted.curve[0]["val_accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))


@pytest.mark.parametrize("augment", ["none", "basic"])
@pytest.mark.parametrize("head", ["linear", "prototype"])
def test_the_seed_alone_decides_and_nothing_outside_is_touched(augment: str, head: str) -> None:
    start = body().train()
    next(start.parameters()).requires_grad_(False)
    before, state = copy.deepcopy(start.state_dict()), torch.get_rng_state()
    a = tune(start, augment=augment, head=head)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(start.state_dict(), before)
    assert [p.requires_grad for p in start.parameters()] == [False] + [True] * (len(list(start.parameters())) - 1)
    assert all(p.grad is None for p in start.parameters())
    torch.randn(3)
    b, c = tune(start, augment=augment, head=head), tune(start, augment=augment, head=head, seed=1)
    assert same(bits(a), bits(b))
    assert a.curve == b.curve
    assert not same(bits(a), bits(c))
    assert a.curve != c.curve
    assert augment == "none" or not same(bits(a), bits(tune(start, head=head)))


def test_a_frozen_backbone_stays_as_it_was() -> None:
    start, (images, _) = body(), toy(21)
    fitted = tune(start, freeze="backbone", lr=0.1, augment="basic")
    x = INPUTS(images)
    assert same(fitted.body.state_dict(), with_stored_moments(start, x).state_dict())
    torch.testing.assert_close(fitted.body(x), start(x), rtol=0, atol=ONE_PASS)
    torch.testing.assert_close(torch.cat([fitted.body(one[None]) for one in x]), start(x), rtol=0, atol=ONE_PASS)
    assert not same(fitted.head.state_dict(), tune(start, freeze="backbone", lr=1e-300).head.state_dict())


def test_the_stored_moments_are_those_of_all_training_images_under_the_last_weights() -> None:
    fitted, again = tune(augment="basic", val=toy(6, seed=3)), body()
    assert not any(isinstance(part, EpisodeNorm) for part in fitted.body.modules())
    again.load_state_dict({k: v for k, v in fitted.body.state_dict().items() if not k.endswith(("mean", "var"))})
    assert not same(again.state_dict(), body().state_dict())
    expected = with_stored_moments(again, INPUTS(toy(21)[0]))
    assert same(fitted.body.state_dict(), expected.state_dict())


def test_early_stopping_keeps_the_epoch_of_the_lowest_validation_loss() -> None:
    start = body(dtype=torch.float64)  # so that no processor's rounding chooses the epoch
    fitted = tune(start, val=ambiguous(), epochs=60, patience=3, lr=0.03)
    losses = [row["val_loss"] for row in fitted.curve]
    best = int(np.argmin(losses))
    assert 0 < best < 40
    assert len(losses) == best + 1 + 3
    until = tune(start, epochs=best + 1, lr=0.03)  # the same training, stopped there by its length
    assert same(bits(fitted), bits(until))
    assert [row["loss"] for row in fitted.curve][: best + 1] == [row["loss"] for row in until.curve]
    images, labels = ambiguous()
    logits = fitted.head(fitted.body(INPUTS(images).double())).detach()
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(min(losses), abs=1e-12)


def test_at_the_end_alone_validation_images_judge_and_choose_nothing() -> None:
    start = body(dtype=torch.float64)
    at = {"epochs": 60, "patience": 3, "lr": 0.03}  # of which the test above keeps one before the 40th
    fitted, without = tune(start, val=ambiguous(), each_epoch=False, **at), tune(start, **at)
    assert same(bits(fitted), bits(without))
    assert ["val_loss" in row for row in fitted.curve] == [False] * 59 + [True]
    images, labels = ambiguous()
    logits = fitted.head(fitted.body(INPUTS(images).double())).detach()
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(fitted.curve[-1]["val_loss"], abs=1e-12)


def test_without_validation_images_it_never_stops_early() -> None:
    empty = (torch.empty(0, *scenarios.SHAPE, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    for val in (None, empty):
        curve = tune(epochs=6, patience=1, lr=0.5, val=val).curve
        assert [set(row) for row in curve] == [{"epoch", "loss"}] * 6


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"val": ambiguous(), "lr": 0.03, "patience": 3, "epochs": 60},
        {"freeze": "backbone", "augment": "basic", "head": "cosine", "val": toy(9, seed=4)},
        {"augment": "basic", "head": "prototype"},
    ],
    ids=["stopped early", "frozen", "without validation"],
)
@pytest.mark.slow
def test_it_resumes_to_the_same_bits_from_every_epoch(changes: dict[str, Any]) -> None:
    states: list[dict[str, Any]] = []
    whole = tune(on_epoch=states.append, **changes)
    assert [len(state["curve"]) for state in states] == list(range(1, len(whole.curve) + 1))
    assert not same(states[0]["model"], states[-1]["model"])
    for state in states if len(states) < 8 else [states[0], *states[-5:]]:
        plain = {k: dict(v) if isinstance(v, dict) else v for k, v in state.items()}
        for start in (copy.deepcopy(state), through_a_file(state), plain, state):
            rest: list[dict[str, Any]] = []
            again = tune(resume=start, on_epoch=rest.append, **changes)
            assert same(bits(again), bits(whole))
            assert again.curve == whole.curve
            assert len(rest) == len(whole.curve) - len(state["curve"])  # nothing was trained twice


@pytest.mark.parametrize("ema", [None, 0.0])
def test_what_a_module_puts_in_the_place_of_a_buffer_is_kept(ema: float | None) -> None:
    """In a checkpoint and in the average, of which 0 is the values themselves."""

    class Counting(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inside = body()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.seen = self.seen + 1.0
            return self.inside(x)

    states: list[dict[str, Any]] = []
    tune(Counting(), on_epoch=states.append, ema=ema)
    for part in ("model", "average") if ema is not None else ("model",):
        seen = [float(state[part]["body.seen"]) for state in states]
        assert len(seen) == 4 and seen == sorted(set(seen)), part


def test_it_can_be_stopped_at_every_step() -> None:
    calls = iter(range(100))

    def should_stop() -> None:
        if next(calls) == 4:
            raise KeyboardInterrupt

    states: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        tune(should_stop=should_stop, on_epoch=states.append)  # three steps an epoch
    assert len(states) == 1
    assert same(bits(tune(resume=states[0])), bits(tune()))


def seen_in_training(n: int, **changes: Any) -> list[list[list[bytes]]]:
    """The pixels that the network is trained on: [epochs][batches][images]."""
    batches: list[list[bytes]] = []
    epochs: list[list[list[bytes]]] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            pixels = (inputs[0] * 0.3 + 0.4) * 255
            torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-3)
            assert -0.001 <= float(pixels.min()) <= float(pixels.max()) <= 255.001
            batches.append([one.round().byte().numpy().tobytes() for one in pixels])

    def end(_: dict[str, Any]) -> None:
        epochs.append(batches.copy())
        batches.clear()

    start = body()
    start.register_forward_pre_hook(look)
    tune(start, n, on_epoch=end, **changes)
    return epochs


@pytest.mark.parametrize("n", [1, 2, 4, 5, 7, 9])
def test_every_image_is_seen_once_an_epoch_and_no_image_alone(n: int) -> None:
    epochs = seen_in_training(n, batch_size=4)
    files = sorted(one.numpy().tobytes() for one in toy(n)[0])
    assert len(epochs) == 4
    for batches in epochs:
        assert sorted(one for batch in batches for one in batch) == files
        assert all(1 < len(batch) <= 5 for batch in batches) or n == 1
    assert n < 4 or any(epochs[0] != other for other in epochs[1:])  # in another order


def test_augmented_images_depend_on_seed_epoch_and_image_alone() -> None:
    def sets(**changes: Any) -> list[set[bytes]]:
        return [{one for batch in epoch for one in batch} for epoch in seen_in_training(9, **changes)]

    plain = sets()
    moved = sets(augment="basic")
    assert sets(augment="basic", batch_size=3, lr=0.1) == moved
    assert all(len(a) == 9 and not a & b for a, b in zip(moved, plain, strict=True))
    assert not set.intersection(*moved)
    assert not moved[0] & sets(augment="basic", seed=1)[0]


def test_augmentation_turns_and_moves_within_its_bounds() -> None:
    images = torch.zeros(4, 3, 50, 50, dtype=torch.uint8)
    images[:, :, 23:27, 35:39] = 250  # its centre lies 12 to the right of the middle
    moves = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
    found = augmented(images, moves)
    assert found.dtype == torch.uint8
    assert torch.equal(found[0], images[0])
    weights, place = found[:, 0].double(), torch.arange(50.0, dtype=torch.float64) - 24.5
    centres = torch.stack([(weights * place).sum((1, 2)), (weights * place[:, None]).sum((1, 2))], -1)
    centres /= weights.sum((1, 2))[:, None]
    turned = [12 * math.cos(math.radians(10)), -12 * math.sin(math.radians(10))]
    expected = torch.tensor([[12.0, 0.0], [8.0, 0.0], [12.0, 4.0], turned], dtype=torch.float64)
    torch.testing.assert_close(centres, expected, rtol=0, atol=0.05)
    flat = torch.full((4, 1, 9, 9), 255, dtype=torch.uint8)
    assert torch.equal(augmented(flat, moves), flat)


def test_on_two_threads_it_is_tuned_as_on_one() -> None:
    """To rounding; the pictures are large enough for convolutions to be shared out."""
    curves = []
    for count in (1, 2):
        with on_threads(count):
            curves.append(tune(body(dtype=torch.float64), 60, batch_size=60, val=toy(24, seed=3)).curve)
    assert rounded_alike(curves[1], curves[0])


def test_a_double_body_is_tuned_in_double() -> None:
    fitted = tune(body(dtype=torch.float64), val=toy(6, seed=3))
    assert {v.dtype for v in bits(fitted).values()} == {torch.float64}


def test_what_cannot_be_trained_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match="epoch 1: the training loss is nan; try a smaller --lr"):
        tune(head="prototype", lr=1e30)
    with pytest.raises(NonFiniteError, match="epoch 1: the validation loss is nan; try a smaller --lr"):
        tune(n=5, epochs=1, val=toy(6, seed=3), lr=1e30)  # in one step, whose loss is that before it
    with pytest.raises(MetaftError, match=r"batch_size must be at least 2, got 1"):
        Recipe(batch_size=1)


def test_a_part_of_a_tensor_is_never_copied_whole() -> None:
    """A batch is taken from where all lie, by two looks at rows."""
    whole, rows = torch.arange(40).view(20, 2), torch.arange(19, -1, -2)
    part = Part(whole, rows)
    assert len(part) == 10
    assert part.whole.data_ptr() == whole.data_ptr()
    assert torch.equal(part[torch.tensor([0, 3])], whole[[19, 13]])
    asked: list[int] = []

    class Counted(Part):
        def __getitem__(self, rows: Tensor) -> Tensor:
            asked.append(len(rows))
            return super().__getitem__(rows)

    images, labels = toy(50)
    examples = Counted(images, torch.arange(40))
    fit(body(), INPUTS, examples, labels[:40], CLASSES, Recipe(epochs=1, batch_size=8))
    assert max(asked) == 40, "as one batch where so many small ones fit"
    asked.clear()
    parts = list(Prepared(examples, INPUTS, torch.empty(0), at_once=16))
    assert asked == [16, 16, 8]
    assert torch.equal(torch.cat(parts), INPUTS(images[:40]))
    assert at_most((3, 224, 224)) < 32 < at_most((3, 84, 84)) < at_most((1, 28, 28)) == 1024


class Watching(nn.Module):
    """Notes whether it was in training when a loss was to be differentiated."""

    seen: list[bool] = []  # noqa: RUF012 - of all copies

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(self.training)
        return x


def test_validating_leaves_the_backbone_in_the_mode_that_it_trains_in() -> None:
    Watching.seen.clear()
    images, labels = toy(12)
    layers = nn.Sequential(Watching(), nn.Flatten(), nn.Linear(images[0].numel(), 3))
    inputs = ImageInputs(images.shape[1], images.shape[2], images.shape[3])
    recipe = Recipe(epochs=3, batch_size=12)
    fit(layers, inputs, images, labels, CLASSES, recipe, val_examples=images, val_labels=labels)
    assert Watching.seen == [True] * 3
