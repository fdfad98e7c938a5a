"""Randomness inside the inner loop is an argument: masks and shifts are functions of the task's key and the step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scenarios
import torch
from torch import Tensor, nn

from metaft import algorithms, engines, inner_augment, keyed, models, outer
from metaft.errors import MetaftError
from metaft.models import EpisodeDropout, Model, use_dropout
from metaft.models.dropout import episode_dropout
from metaft.types import Params

ENGINES = [
    lambda: engines.Threads(1, 1),
    lambda: engines.Threads(2, 1),
    lambda: engines.Processes(2, 1),
    lambda: engines.Threads(1, 2),
    lambda: engines.Vmap(),
]


def key(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def with_dropout(p: float = 0.5, name: str = "conv4", dtype: torch.dtype = torch.float64) -> Model:
    return scenarios.model(name, dtype=dtype, dropout=p)


# ---- words ---------------------------------------------------------------------------------------------------------


def mixed(x: int) -> int:
    """SplitMix64's last lines, in integers without bound."""
    x %= 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("value", [0, 1, 2**31, 2**32 + 5, 2**63 - 1, -1])
def test_words_are_those_of_integers_without_bound(value: int) -> None:
    step = 0x9E3779B97F4A7C15
    own = mixed(value)
    for number in (3, 2**20):
        own = mixed(own + (number + 1) * (step - 2**64) % 2**63)
    expected = [mixed(own + i * step) >> 32 for i in range(1, 51)]
    assert keyed.words(key(value), 3, 2**20, count=50).tolist() == expected


def test_words_are_frozen() -> None:
    """Runs of another version must meet the same masks."""
    assert keyed.words(key(7), 1, 2, 3, count=4).tolist() == [2128967494, 2049721096, 1885843930, 1811708663]


def test_words_under_vmap_are_each_keys_own() -> None:
    keys = torch.tensor([5, 6, 2**40], dtype=torch.int64)
    found = torch.func.vmap(lambda k: keyed.words(k, 1, 2, count=9))(keys)
    assert torch.equal(found, torch.stack([keyed.words(k, 1, 2, count=9) for k in keys]))


def test_streams_of_neighbouring_keys_steps_and_layers_are_uniform_and_unrelated() -> None:
    """1,000 streams of 1,000 words: bits are fair, and no two streams have more in common than chance."""
    places = [(k, step, layer) for k in range(10) for step in range(10) for layer in range(10)]
    words = torch.stack([keyed.words(key(k), s, layer, count=1000) for k, s, layer in places])
    assert int(words.min()) >= 0 and int(words.max()) < 2**32
    bits = ((words.unsqueeze(-1) >> torch.arange(32)) & 1).double()
    # Of 1e6 fair bits the share has standard deviation 0.0005; of 1000, 0.0158. Over 32 and 32,000 of them:
    assert float((bits.mean((0, 1)) - 0.5).abs().max()) < 4.5 * 0.0005
    assert float((bits.mean(1) - 0.5).abs().max()) < 5.5 * 0.0158
    masks = np.sign(words.double().numpy() - 2**31)
    correlation = masks @ masks.T / 1000  # of independent ones, standard deviation 0.0316
    off = correlation[np.triu_indices(1000, 1)]
    assert np.abs(off).max() < 6 * 0.0316
    assert off.std() == pytest.approx(0.0316, rel=0.02)
    shifted = masks[:, 1:].ravel() * masks[:, :-1].ravel()  # and of neighbours within a stream
    assert abs(shifted.mean()) < 4.5 / math.sqrt(shifted.size)
    ordered = np.sort(words.numpy(), axis=1)
    assert len(np.unique(ordered[:, 0])) > 990, "streams that are permutations of each other"


# ---- the layer -----------------------------------------------------------------------------------------------------


def mask(layer: nn.Module, k: int, step: int, shape: tuple[int, ...] = (40, 50)) -> Tensor:
    with use_dropout(key(k), step):
        return layer(torch.ones(shape, dtype=torch.float64))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_the_share(p: float) -> None:
    values = torch.stack([mask(EpisodeDropout(p), k, step) for k in range(20) for step in range(5)])
    assert set(values.unique().tolist()) == {0.0, 1 / (1 - p)}
    n = values.numel()
    assert abs(float((values == 0).double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert float(values.mean()) == pytest.approx(1, abs=4 * math.sqrt(p / (1 - p) / n))


def test_dropout_is_a_function_of_key_step_and_layer() -> None:
    layer = EpisodeDropout(0.5)
    assert torch.equal(mask(layer, 3, 1), mask(EpisodeDropout(0.5), 3, 1))
    two = nn.Sequential(nn.Identity(), layer)
    assert torch.equal(mask(two, 3, 1), mask(layer, 3, 1))
    first = mask(layer, 3, 1)
    with use_dropout(key(3), 1):
        again, second = layer(torch.ones_like(first)), layer(torch.ones_like(first))
    assert torch.equal(again, first)
    for other in (mask(layer, 4, 1), mask(layer, 3, 2), second):
        assert 0.4 < float((other == first).double().mean()) < 0.6


def test_dropout_outside_a_frame_and_of_p_0_is_the_identity() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert EpisodeDropout(0.5)(x) is x
    with use_dropout(key(0), 0):
        assert EpisodeDropout(0.0)(x) is x
    assert EpisodeDropout(0.5)(x) is x


def test_channel_dropout_drops_whole_maps() -> None:
    values = mask(EpisodeDropout(0.5, channels=True), 0, 0, (8, 6, 5, 5)).flatten(2)
    assert torch.equal(values, values[..., :1].expand_as(values))
    assert 0.25 < float((values[..., 0] == 0).double().mean()) < 0.75


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_share_that_cannot_be_dropped_is_named(p: float) -> None:
    with pytest.raises(MetaftError, match=f"dropout must be at least 0 and below 1, got {p}"):
        EpisodeDropout(p)


def test_dropout_layers_of_a_module_are_replaced() -> None:
    layers = [nn.Linear(256, 8), nn.Dropout(0.4), nn.Sequential(nn.Dropout(0.0)), nn.Linear(8, 3)]
    module = nn.Sequential(nn.Flatten(), *layers)
    model = models.functional(models.initialise(module, 0).double())
    x = torch.randn(50, *scenarios.SHAPE, generator=torch.Generator().manual_seed(0)).double()
    plain = model.apply(model.params, x, None)
    assert torch.equal(plain, model.apply(model.params, x, None))
    with use_dropout(key(1), 0):
        dropped = model.apply(model.params, x, None)
    hidden = x.flatten(1) @ model.params["1.weight"].T + model.params["1.bias"]
    with use_dropout(key(1), 0):
        hidden = EpisodeDropout(0.4)(hidden)
    torch.testing.assert_close(dropped, hidden @ model.params["4.weight"].T + model.params["4.bias"])
    assert isinstance(module[2], nn.Dropout), "the module itself is to stay as it was"
    assert "channels=False) (1): EpisodeDropout(p=0.5, channels=True)" in " ".join(
        repr(episode_dropout(nn.Sequential(nn.Dropout(), nn.Dropout2d()))).split()
    )


# ---- in the inner loop ---------------------------------------------------------------------------------------------


def gradients(model: Model, make: Any, dtype: torch.dtype, **hyper: Any) -> Params:
    algorithm = algorithms.maml(model, inner_lr=0.3, inner_steps=2, **hyper)
    engine = make()
    data = scenarios.episodes(dtype=dtype)
    try:
        return outer.meta_gradient(engine, algorithm, *algorithm.init(0), data).grads
    finally:
        engine.close()


@pytest.mark.parametrize("hyper", [{}, {"inner_augment": "shift"}], ids=["dropout", "shift"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_engine_draws_the_same(dtype: torch.dtype, hyper: dict[str, Any]) -> None:
    model = with_dropout(0.0 if hyper else 0.5, dtype=dtype)
    found = [gradients(model, make, dtype, **hyper) for make in ENGINES]
    for same in found[1:3]:  # one task at a time, in threads and in processes: the same bits
        assert all(torch.equal(same[k], found[0][k]) for k in same)
    for other in found[3:]:
        assert scenarios.relative_error(other, found[0]) < (1e-12 if dtype == torch.float64 else 1e-4)
    none = gradients(scenarios.model(dtype=dtype), ENGINES[0], dtype)
    assert scenarios.relative_error(found[0], none) > 1e-2


@pytest.mark.parametrize("name", ["conv4", "mlp"])
def test_inner_steps_drop_and_predictions_do_not(name: str) -> None:
    """Against the same loop written by hand, with masks of the head's input from the layer alone."""
    model, task = with_dropout(0.5, name), scenarios.one(scenarios.episodes())
    whole = scenarios.model(name)
    member = algorithms.maml(model, inner_lr=0.3, inner_steps=2)
    meta, state = member.init(0)
    fast = member.adapt(meta, state, task.support_x, task.support_y, key(9), ways=3, steps=2)
    params = dict(meta)
    for step in range(2):

        def loss(p: Params, step: int = step) -> Tensor:
            with use_dropout(key(9), step):
                features = EpisodeDropout(0.5)(whole.features(p, task.support_x, None))
            return nn.functional.cross_entropy(features @ p["head.weight"].T + p["head.bias"], task.support_y)

        grads = torch.func.grad(loss)(params)
        params = {k: p - 0.3 * grads[k] for k, p in params.items()}
    assert scenarios.relative_error(fast.params, params) < 1e-13
    for norm in ("transductive", "inductive"):
        expected = whole.apply(params, task.query_x, None if norm == "transductive" else fast.moments)
        torch.testing.assert_close(member.predict(fast, task.query_x, norm), expected, rtol=0, atol=1e-12)
    other = member.adapt(meta, state, task.support_x, task.support_y, key(10), ways=3, steps=2)
    assert scenarios.relative_error(other.params, fast.params) > 1e-3


# ---- augmentation --------------------------------------------------------------------------------------------------


def test_shift_moves_each_image_by_up_to_two_pixels_and_fills_with_zeros() -> None:
    x = 1 + torch.rand(200, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    found = inner_augment.shift(x, key(4), 1)
    moves = []
    for before, after in zip(x.numpy(), found.numpy(), strict=True):
        matches = []
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                padded = np.pad(before, ((0, 0), (2, 2), (2, 2)))
                if np.array_equal(padded[:, 2 + dy : 9 + dy, 2 + dx : 11 + dx], after):
                    matches.append((dy, dx))
        assert len(matches) == 1
        moves += matches
    counts = np.array([[moves.count((dy, dx)) for dx in range(-2, 3)] for dy in range(-2, 3)])
    assert counts.min() >= 1 and counts.max() <= 22  # 8 expected of each
    assert torch.equal(found, inner_augment.shift(x, key(4), 1))
    steps = [inner_augment.shift(x, key(4), step) for step in range(6)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(steps, 2))
    assert not torch.equal(found, inner_augment.shift(x, key(5), 1))
    keys, many = torch.arange(3), torch.stack([x[:4], x[4:8], x[8:12]])
    batched = torch.func.vmap(lambda x, k: inner_augment.shift(x, k, 0))(many, keys)
    assert torch.equal(batched, torch.stack([inner_augment.shift(a, k, 0) for a, k in zip(many, keys, strict=True)]))


def test_shift_needs_images_and_has_a_name() -> None:
    with pytest.raises(MetaftError, match=r"inner_augment: shift takes images \[n, C, H, W\], got \[4, 1\]"):
        inner_augment.shift(torch.zeros(4, 1), key(0), 0)
    with pytest.raises(MetaftError, match="inner_augment: no 'shfit', known are none, shift; did you mean 'shift'"):
        algorithms.maml(scenarios.model(), inner_augment="shfit")


@pytest.mark.parametrize("name", ["maml", "reptile"])
def test_an_augmentation_of_ones_own(name: str) -> None:
    """Handed over in Python; it sees the support images, the task's key and the inner step."""
    task, seen = scenarios.one(scenarios.episodes()), []

    def darker(x: Tensor, key: Tensor, step: int) -> Tensor:
        seen.append((len(x), int(key), step))
        return x / (2 + step)

    def fast(x: Tensor, augment: Any) -> Params:
        member = algorithms.ALGORITHMS[name](scenarios.model(), inner_lr=0.1, inner_augment=augment)
        meta, state = member.init(0)
        return member.adapt(meta, state, x, task.support_y, task.key + 7, ways=3, steps=1).params

    found, plain = fast(task.support_x, darker), fast(task.support_x / 2, "none")
    assert all(torch.equal(found[k], plain[k]) for k in plain)
    assert seen == [(6, 7, 0)]
