"""Models as pure functions, and normalisation with no memory."""

from __future__ import annotations

import copy

import pytest
import scenarios
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft import models
from metaft.errors import MetaftError
from metaft.models import EpisodeNorm
from metaft.models.norm import measure_moments, use_moments


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 5)])
def test_episode_norm_is_batch_norm_in_training(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = EpisodeNorm(3).double()
    nn.init.uniform_(norm.weight, 0.5, 2.0)  # type: ignore[arg-type]
    nn.init.uniform_(norm.bias, -1.0, 1.0)  # type: ignore[arg-type]
    expected = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-13)
    with measure_moments() as measured:
        torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-13)
    ((mean, var),) = measured
    axes = [0, *range(2, x.dim())]
    torch.testing.assert_close(mean, x.mean(axes), rtol=0, atol=1e-13)
    torch.testing.assert_close(var, x.var(axes, correction=0), rtol=0, atol=1e-13)
    with use_moments(((mean + 1, var * 2),)):
        torch.testing.assert_close(
            norm(x), F.batch_norm(x, mean + 1, var * 2, norm.weight, norm.bias), rtol=0, atol=1e-13
        )


def test_a_frame_does_not_outlive_its_block() -> None:
    norm = EpisodeNorm(2)
    x = torch.randn(4, 2)
    plain = norm(x)
    with pytest.raises(ZeroDivisionError), use_moments(((torch.zeros(2), torch.ones(2)),)):
        raise ZeroDivisionError
    torch.testing.assert_close(norm(x), plain, rtol=0, atol=0)


def custom(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(4 * 14 * 14, 3)
    )


def test_a_users_module_becomes_pure_functions() -> None:
    module = custom().double()
    before = copy.deepcopy(module.state_dict())
    model = models.functional(module)
    x = torch.randn(5, *scenarios.SHAPE, dtype=torch.float64)
    assert model.head == ("5.weight", "5.bias")
    assert model.norm == ("1.weight", "1.bias")
    assert (model.outputs, model.convolutional) == (3, True)
    out = model.apply(model.params, x, None)
    torch.testing.assert_close(out, module.train()(x), rtol=0, atol=1e-12)
    features = model.features(model.params, x, None)
    torch.testing.assert_close(
        F.linear(features, model.params["5.weight"], model.params["5.bias"]), out, rtol=0, atol=1e-12
    )
    for name in before:
        if "running" not in name and "tracked" not in name:  # module.train()(x) above moved those, not functional()
            assert torch.equal(module.state_dict()[name], before[name])


def test_a_forgotten_weight_is_an_error_not_the_modules_own() -> None:
    model = models.functional(custom())
    with pytest.raises(KeyError):
        model.apply({k: v for k, v in model.params.items() if k != "0.weight"}, torch.randn(2, *scenarios.SHAPE), None)


def test_buffers_travel_as_constants_and_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.second.weight = self.first.weight
            self.register_buffer("shift", torch.arange(4.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.first(x + self.get_buffer("shift")).relu()))

    module = Tied()
    model = models.functional(module)
    x = torch.randn(3, 4)
    torch.testing.assert_close(model.apply(model.params, x, None), module(x), rtol=0, atol=0)
    assert "second.weight" not in model.params
    doubled = {k: v * 2 if k == "first.weight" else v for k, v in model.params.items()}
    module.first.weight.data *= 2
    torch.testing.assert_close(model.apply(doubled, x, None), module(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.AlphaDropout(), nn.Linear(4, 2)), r"'0' \(AlphaDropout, p=0.5\) draws from the global"),
        (nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.Linear(3, 2)), "'0' .* running statistics"),
        (nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), "'0.weight' is lazy"),
        (nn.Sequential(nn.ReLU()), "has no nn.Linear"),
        (nn.ModuleList([nn.MultiheadAttention(4, 2, dropout=0.1), nn.Linear(4, 2)]), r"'0' .*dropout=0.1"),
    ],
)
def test_modules_that_tasks_cannot_share_are_refused_by_name(module: nn.Module, message: str) -> None:
    with pytest.raises(MetaftError, match=message):
        models.functional(module)


def test_a_normalisation_layer_in_two_places_is_converted_in_both_and_stays_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(1)
            self.stack = nn.Sequential(self.bn, nn.ReLU())
            self.head = nn.Linear(256, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.bn(self.stack(x)).flatten(1))

    converted = models.episode_norms(Shared())
    assert converted.bn is converted.stack[0]  # type: ignore[index]
    model = models.functional(Shared().double())
    x = torch.randn(4, *scenarios.SHAPE, dtype=torch.float64)
    moments = model.measure(model.params, x)
    assert len(moments) == 2
    alone = torch.cat([model.apply(model.params, one, moments) for one in x.split(1)])
    torch.testing.assert_close(alone, model.apply(model.params, x, None), rtol=0, atol=1e-12)


class Fickle(nn.Module):
    """Gives another result each time, in one of two ways that no layer shows."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, self.head = by, nn.Linear(256, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        if self.by == "dropout":
            return self.head(F.dropout(x, 0.5))
        self.get_buffer("calls").add_(1)
        return self.head(x) * self.get_buffer("calls")


@pytest.mark.parametrize("by", ["dropout", "buffer"])
def test_a_forward_pass_that_does_not_repeat_itself_is_refused(by: str) -> None:
    state = torch.get_rng_state()
    model = models.functional(Fickle(by))
    torch.set_rng_state(state)
    with pytest.raises(MetaftError, match="Fickle gives two results for one input"):
        models.check_repeats(model, scenarios.SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    models.check_repeats(scenarios.model(), scenarios.SHAPE)


def test_a_head_that_is_not_linear_is_refused_with_those_that_are() -> None:
    with pytest.raises(MetaftError, match=r"head '0' is not an nn.Linear .* \['5'\]"):
        models.functional(custom(), head="0")


def test_what_is_undrawn_is_on_the_cpu_and_draws_nothing() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3, dtype=torch.float64), nn.BatchNorm1d(3), nn.PReLU())

    before, drawn = torch.get_rng_state(), make()
    torch.set_rng_state(before)
    with torch.device("meta"):  # whatever is set outside
        made = models.undrawn(make)
    assert torch.equal(torch.get_rng_state(), before)
    like = {name: (t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors_of(drawn)}
    assert {name: (t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors_of(made)} == like
    assert repr(made) == repr(drawn)


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_initialisation_comes_from_the_seed_alone(name: str) -> None:
    state = torch.get_rng_state()
    a, b, c = (models.build(name, ways=3, shape=scenarios.SHAPE, width=4, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a.params[k], b.params[k]) for k in a.params)
    assert any(not torch.equal(a.params[k], c.params[k]) for k in a.params)
    assert a.apply(a.params, torch.randn(2, *scenarios.SHAPE), None).shape == (2, 3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "conv5"}, r"model: no 'conv5', known are conv4, conv4-pool, mlp, resnet12; did you mean"),
        ({"name": "conv4", "shape": (7,)}, r"'conv4' takes images \[C, H, W\], but the data set's inputs are \[7\]"),
        ({"name": "conv4-pool", "shape": (1, 9, 12)}, "at least 16x16 pixels, got 9x12"),
        ({"name": "mlp", "width": 0}, "width must be at least 1, got 0"),
    ],
)
def test_architectures_check_their_input(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(MetaftError, match=message):
        models.build(**{"ways": 3, "shape": scenarios.SHAPE, "width": 4, "seed": 0, **kwargs})  # type: ignore[arg-type]


def test_pool_form_of_conv4_against_its_definition() -> None:
    model = scenarios.model("conv4-pool")
    p, x = model.params, torch.randn(4, *scenarios.SHAPE, dtype=torch.float64)
    y = x
    for i in range(0, 16, 4):
        y = F.conv2d(y, p[f"blocks.{i}.weight"], padding=1)
        y = F.batch_norm(y, None, None, p[f"blocks.{i + 1}.weight"], p[f"blocks.{i + 1}.bias"], training=True)
        y = F.max_pool2d(y.relu(), 2)
    expected = F.linear(y.flatten(1), p["head.weight"], p["head.bias"])
    torch.testing.assert_close(model.apply(p, x, None), expected, rtol=0, atol=1e-12)
