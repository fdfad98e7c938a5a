"""ResNet-12 and the squares that it drops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import scenarios
import torch
import torch.nn.functional as F
from helpers import one_thread
from torch import Tensor, nn

from metaft import adapt, algorithms, engines, meta_train, models, outer, predict
from metaft.errors import MetaftError
from metaft.inner import descend
from metaft.models import EpisodeDropBlock, use_dropout
from metaft.models.blocks import blocks_of

WIDTH = 4


def small(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> models.Model:
    return scenarios.model("resnet12", width=WIDTH, dtype=dtype, dropout=dropout)


# --- the network ---


def by_hand(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Written anew with functions of PyTorch."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, params[f"{name}.weight"], params[f"{name}.bias"], training=True)

    for b in range(4):
        out = x
        for i, layer in enumerate((0, 3, 6)):
            at = f"blocks.{b}.residual."
            out = norm(f"{at}{layer + 1}", F.conv2d(out, params[f"{at}{layer}.weight"], padding=1))
            out = F.leaky_relu(out, 0.1) if i < 2 else out
        at = f"blocks.{b}.shortcut."
        x = F.max_pool2d(F.leaky_relu(out + norm(f"{at}1", F.conv2d(x, params[f"{at}0.weight"])), 0.1), 2)
    return F.linear(x.mean((2, 3)), params["head.weight"], params["head.bias"])


def images(n: int = 6, side: int = 20) -> Tensor:
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_it_is_the_network_of_the_papers() -> None:
    model = small()
    torch.testing.assert_close(model.apply(model.params, images(), None), by_hand(model.params, images()))
    whole = models.build("resnet12", ways=64, shape=(3, 84, 84), width=64, seed=0)
    shapes = [tuple(whole.params[f"blocks.{b}.residual.6.weight"].shape[:2]) for b in range(4)]
    assert shapes == [(64, 64), (160, 160), (320, 320), (640, 640)]
    body = sum(p.numel() for name, p in whole.params.items() if not name.startswith("head"))
    assert body == 12_424_320  # the 12.4 million of the papers


def test_its_blocks_are_the_four_residual_ones() -> None:
    module = models.ResNet12(5, (1, 16, 16), WIDTH)
    assert [block[0].split(".residual")[0] for block in blocks_of(module)][:4] == [f"blocks.{b}" for b in range(4)]


def test_given_moments_normalise_as_the_batch_does_itself() -> None:
    model = small()
    moments = model.measure(model.params, images())
    assert len(moments) == 16
    torch.testing.assert_close(model.apply(model.params, images(), moments), model.apply(model.params, images(), None))


def test_what_it_cannot_take_is_named() -> None:
    with pytest.raises(MetaftError, match=r"resnet12 halves .* at least 16x16 pixels, got 9x12"):
        models.build("resnet12", ways=2, shape=(1, 9, 12), width=WIDTH, seed=0)
    with pytest.raises(MetaftError, match=r"'resnet12' takes images \[C, H, W\]"):
        models.build("resnet12", ways=2, shape=(9,), width=WIDTH, seed=0)


def test_the_meta_gradient_is_that_of_plain_autograd_on_every_engine() -> None:
    model = small()
    maml = algorithms.build("maml", model, {"loss": "cross_entropy", "inner_lr": 0.1, "inner_steps": 2})
    tasks = scenarios.episodes(3, ways=3)
    meta, state = maml.init(0)
    names = list(meta)

    total = [torch.zeros_like(meta[k]) for k in names]
    for i in range(3):
        leaves = {k: v.clone().requires_grad_() for k, v in meta.items()}
        support = (tasks.support_x[i], tasks.support_y[i])
        *_, fast = descend(
            lambda p, step, support=support: F.cross_entropy(by_hand(p, support[0]), support[1]),
            leaves, steps=2, lr=0.1,
        )  # fmt: skip
        loss = F.cross_entropy(by_hand(fast, tasks.query_x[i]), tasks.query_y[i])
        total = [t + g / 3 for t, g in zip(total, torch.autograd.grad(loss, list(leaves.values())), strict=True)]
    with one_thread():
        for engine in (engines.Threads(1, 1), engines.Threads(1, 3), engines.Vmap(), engines.Processes(2, 1)):
            found = outer.meta_gradient(engine, maml, meta, state, tasks)
            for name, expected in zip(names, total, strict=True):
                torch.testing.assert_close(found.grads[name], expected, rtol=1e-8, atol=1e-10)
            engine.close()


# --- DropBlock ---


def key(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def mask(layer: nn.Module, k: int = 0, step: int = 0, shape: tuple[int, ...] = (4, 8, 10, 12)) -> Tensor:
    with use_dropout(key(k), step):
        return layer(torch.ones(shape, dtype=torch.float64))


def squares(dropped: Tensor, size: int) -> bool:
    """Whether the dropped pixels [H, W] are a union of squares."""
    windows = F.avg_pool2d(dropped[None, None].double(), size, stride=1)[0, 0] == 1
    covered = torch.zeros_like(dropped)
    for y, x in windows.nonzero().tolist():
        covered[y : y + size, x : x + size] = True
    return torch.equal(covered, dropped)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_what_is_dropped_are_whole_squares_on_the_map(size: int) -> None:
    values = mask(EpisodeDropBlock(0.2, size))
    dropped = values == 0
    assert all(squares(image, size) for image in dropped.flatten(0, 1))
    kept = (~dropped).sum()
    torch.testing.assert_close(values[~dropped], torch.full((int(kept),), values.numel() / int(kept)).double())
    assert float(values.mean()) == pytest.approx(1)


@pytest.mark.parametrize(("p", "size"), [(0.1, 1), (0.1, 3), (0.05, 5)])
def test_squares_are_hit_as_often_as_the_paper_says(p: float, size: int) -> None:
    """A pixel in the middle is in size^2 squares, each hit with probability gamma."""
    height, width = 10, 12
    gamma = p / size**2 * height * width / ((height - size + 1) * (width - size + 1))
    values = torch.stack([mask(EpisodeDropBlock(p, size), k, shape=(8, 16, height, width)) for k in range(40)])
    dropped = (values == 0).double().flatten(0, 2)
    expected, n = 1 - (1 - gamma) ** size**2, len(dropped)
    assert abs(float(dropped[:, 5, 6].mean()) - expected) < 4 * math.sqrt(expected / n)
    assert abs(float(dropped[:, 0, 0].mean()) - gamma) < 4 * math.sqrt(gamma / n)  # a corner is in one


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_type_of_few_bits_keeps_the_mean(dtype: torch.dtype) -> None:
    with use_dropout(key(0), 0):
        values = EpisodeDropBlock(0.1, 3)(torch.ones(75, 64, 10, 10, dtype=dtype))
    assert float(values.double().mean()) == pytest.approx(1, abs=2**-8)


def test_a_map_smaller_than_the_square_is_dropped_whole_or_kept() -> None:
    values = mask(EpisodeDropBlock(0.3, 5), shape=(50, 4, 2, 2)).flatten(2)
    assert torch.equal(values, values[..., :1].expand_as(values))
    assert 0.15 < float((values == 0).double().mean()) < 0.45


def test_squares_are_a_function_of_key_step_and_layer() -> None:
    layer = EpisodeDropBlock(0.3, 3)
    first = mask(layer, 3, 1)
    assert torch.equal(first, mask(EpisodeDropBlock(0.3, 3), 3, 1))
    with use_dropout(key(3), 1):
        again, second = layer(torch.ones_like(first)), layer(torch.ones_like(first))
    assert torch.equal(again, first)
    assert not any(torch.equal(first, other) for other in (second, mask(layer, 4, 1), mask(layer, 3, 2)))
    x = torch.ones(1, 2, 6, 6)
    assert layer(x) is x  # outside
    with use_dropout(key(0), 0):
        assert EpisodeDropBlock(0.0, 3)(x) is x
    keys = torch.arange(4)
    both = torch.func.vmap(lambda k: mask_of(layer, k))(keys)
    assert torch.equal(both, torch.stack([mask_of(layer, k) for k in keys]))


def mask_of(layer: nn.Module, k: Tensor) -> Tensor:
    with use_dropout(k, 0):
        return layer(torch.ones(2, 3, 6, 6))


def test_a_size_that_cannot_be_is_named() -> None:
    with pytest.raises(MetaftError, match="at least 1, got 0"):
        EpisodeDropBlock(0.1, 0)


def test_inner_steps_drop_and_predictions_do_not() -> None:
    plain, dropping = small(), small(dropout=0.4)
    assert dropping.drops
    assert not plain.drops
    torch.testing.assert_close(dropping.apply(plain.params, images(), None), plain.apply(plain.params, images(), None))
    with use_dropout(key(1), 0):
        dropped = dropping.apply(plain.params, images(), None)
    assert not torch.allclose(dropped, plain.apply(plain.params, images(), None))


# --- as a user would ---


@pytest.mark.slow
def test_pretrain_then_meta_train_then_fine_tune(in_tmp: Path) -> None:
    small = ["--ways", "3", "--shots", "1", "--query-shots", "2", "--test-query-shots", "2", "--iterations", "2"]
    small += ["--eval-episodes", "2", "--test-episodes", "2", "--meta-batch", "2", "--no-report"]
    model = ["--model", "resnet12", "--width", "2"]
    assert meta_train.main(["--algorithm", "baseline", *model, *small, "--out", "pretrained"]) == 0
    further = ["--init", "pretrained", "--dropout", "0.1", "--inner-steps", "2", "--inner-lr", "0.01"]
    assert meta_train.main(["--algorithm", "fomaml", *further, *small, "--out", "run"]) == 0
    words = ["--init", "run", "--shots-per-class", "2", "--strategy", "last:blocks=2", "--epochs", "1"]
    words += ["--no-random", "--no-report"]
    assert adapt.main(["--data", "glyphs:Hebrew", *words, "--out", "adapted"]) == 0
    assert predict.main(["adapted", "adapted/plots"]) == 0
