"""Conv-4's loss and features as one operation: value, gradient and second derivative against PyTorch's operations."""

from __future__ import annotations

import contextvars
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import scenarios
import torch
import torch.nn.functional as F
from helpers import Convolutions
from torch import Tensor, nn

from metaft import models
from metaft.errors import MetaftError
from metaft.models import fused
from metaft.models.functional import plain_operations
from metaft.models.fused import evaluation, functions, rows
from metaft.models.precision import in_bf16
from metaft.objective import Objective
from metaft.types import Params

FORMS = [
    pytest.param((2, False, 1, 12), id="stride-grey"),
    pytest.param((2, False, 3, 9), id="stride-colour-odd"),
    pytest.param((1, True, 1, 10), id="pool-grey-odd"),
    pytest.param((1, True, 3, 11), id="pool-colour-odd"),
]
WAYS, WIDTH, IMAGES, LAYERS = 3, 4, 6, 2

Loss = Callable[..., tuple[Tensor, Tensor]]


def composed_features(
    x: Tensor, weights: list[Tensor], scales: list[Tensor], shifts: list[Tensor],
    *, stride: int, pool: bool, average: bool, eps: float, conv: Any = F.conv2d,
) -> Tensor:  # fmt: skip
    for w, gamma, beta in zip(weights, scales, shifts, strict=True):
        z = conv(x, w, None, stride, 1)
        mean, var = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), unbiased=False, keepdim=True)
        u = (z - mean) * (var + eps).rsqrt() * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)
        x = F.max_pool2d(u.relu(), 2) if pool else u.relu()
    return x.mean((2, 3)) if average else x.flatten(1)


def composed(
    x: Tensor, y: Tensor, weights: list[Tensor], scales: list[Tensor], shifts: list[Tensor], head: Tensor, bias: Tensor,
    *, keep: bool, **fixed: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    logits = F.linear(composed_features(x, weights, scales, shifts, **fixed), head, bias)
    return F.cross_entropy(logits, y), logits


class Case:
    def __init__(self, form: tuple[int, bool, int, int]) -> None:
        stride, pool, channels, side = form
        g = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.fixed: dict[str, Any] = {"stride": stride, "pool": pool, "average": not pool, "eps": 1e-5}
        self.y = torch.arange(IMAGES) % WAYS
        self.x, self.tasks = draw(IMAGES, channels, side, side), draw(3, IMAGES, channels, side, side)
        last = (side // 4) ** 2 if pool else 1
        self.params = [
            *[draw(WIDTH, WIDTH if i else channels, 3, 3) for i in range(LAYERS)],
            *[
                draw(WIDTH) for _ in range(2 * LAYERS)
            ],  # scales of both signs: of a negative one the peak is the minimum
            draw(WAYS, WIDTH * last),
            draw(WAYS),
        ]

    def loss(self, of: Loss, x: Tensor, params: list[Tensor], keep: bool) -> tuple[Tensor, Tensor]:
        n = LAYERS
        weights, scales, shifts = params[:n], params[n : 2 * n], params[2 * n : 3 * n]
        return of(x, self.y, weights, scales, shifts, params[-2], params[-1], **self.fixed, keep=keep)

    def features(self, of: Callable[..., Tensor], x: Tensor, params: list[Tensor]) -> Tensor:
        n = LAYERS
        return of(x, params[:n], params[n : 2 * n], params[2 * n : 3 * n], **self.fixed)

    def judged(self, features: Tensor) -> Tensor:
        """A number that depends on each feature in another way, and not linearly."""
        weights = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)
        return (weights * features.sin()).sum()


def assert_close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) < 1e-12 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [True, False])
def test_value_gradient_and_curvature_under_autograd(form: Any, keep: bool) -> None:
    case = Case(form)

    def everything(of: Loss) -> list[Tensor]:
        params = [p.clone().requires_grad_() for p in case.params]
        value, logits = case.loss(of, case.x, params, keep)
        grads = torch.autograd.grad(value, params, create_graph=True)
        g = torch.Generator().manual_seed(1)
        along = sum((v * torch.randn(v.shape, generator=g, dtype=v.dtype)).sum() for v in grads)
        second = torch.autograd.grad(along + 3 * value, params)
        return [v.detach() for v in (value, logits, *grads, *second)]

    assert_close(everything(fused.conv4_loss), everything(composed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [True, False])
def test_images_in_bf16_have_their_convolutions_rounded_and_nothing_else(form: Any, keep: bool) -> None:
    """Beside float32 parameters. The reference rounds what convolutions take and give, and what comes back to them."""
    case = Case(form)
    x, start = case.x.bfloat16(), [p.float() for p in case.params]

    def everything(of: Loss, x: Tensor) -> list[Tensor]:
        params = [p.clone().requires_grad_() for p in start]
        value, logits = case.loss(of, x, params, keep)
        grads = torch.autograd.grad(value, params, create_graph=True)
        along = torch.stack([(v * v.sign().detach()).sum() for v in grads]).sum()
        second = torch.autograd.grad(along, params)
        return [v.detach() for v in (value, logits, *grads, *second)]

    def rounded(
        x: Tensor, y: Tensor, weights: Any, scales: Any, shifts: Any, head: Any, bias: Any, **fixed: Any
    ) -> Any:
        def convolved(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
            return F.conv2d(x.bfloat16(), w.bfloat16(), *rest).float()

        fixed.pop("keep")
        logits = F.linear(composed_features(x, weights, scales, shifts, conv=convolved, **fixed), head, bias)
        return F.cross_entropy(logits, y), logits

    with Convolutions() as seen:
        found = everything(fused.conv4_loss, x)
    assert {v.dtype for v in found} == {torch.float32}
    assert set(seen.types) == {torch.bfloat16} and len(seen.types) > 10
    reference, exact = everything(rounded, x.float()), everything(composed, x.float())
    near, far = ([apart(a, b) for a, b in zip(each, reference, strict=True)] for each in (found, exact))
    assert max(near[:2]) < 1e-6 < 1e-5 < min(far[:2]), "value and logits, where the rounding is the very same"
    assert max(near) < 0.05, "what comes back is rounded at other places of the same formula"


@pytest.mark.parametrize("weights", [(4, 3, 3, 3), (2, 4, 3, 3, 3)], ids=["shared", "a task's own"])
def test_what_short_convolutions_give_is_of_the_type_that_they_take(weights: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, gz = (torch.randn(*shape, generator=g) for shape in ((6, 3, 8, 8), weights, (6, 4, 4, 4)))
    kind = rows.Kind(2, short=True)
    given = [
        rows.conv(x, w, kind), rows.conv_along(x, w, x, w, kind, 2), rows.conv_to_images(gz, x, w, kind),
        rows.conv_to_images_along(gz, x, w, gz, w, kind, 2), rows.conv_to_weights(gz, x, w, kind, 2),
    ]  # fmt: skip
    assert {each.dtype for each in given} == {torch.float32}
    assert given[2].shape == x.shape and given[4].shape == (2, 4, 3, 3, 3)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("alone", [1, 1 << 30])
def test_meta_gradient_under_vmap(form: Any, keep: bool, alone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two inner steps: from weights that all tasks share, and from their own. `alone` sends queries one by one."""
    monkeypatch.setattr(functions, "_ALONE", alone)
    case = Case(form)

    def meta_gradient(of: Loss) -> Callable[[list[Tensor], Tensor], list[Tensor]]:
        def outer(params: list[Tensor], x: Tensor) -> Tensor:
            for _ in range(2):
                grads = torch.func.grad(lambda p: case.loss(of, x, p, keep)[0])(params)
                params = [p - 0.01 * g for p, g in zip(params, grads, strict=True)]
            return case.loss(of, 0.5 * x + 0.1, params, False)[0]

        return torch.func.grad(outer)

    found = torch.func.vmap(meta_gradient(fused.conv4_loss), in_dims=(None, 0))(case.params, case.tasks)
    for i, x in enumerate(case.tasks):
        assert_close([v[i] for v in found], meta_gradient(composed)(case.params, x))


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_a_vmapped_loss_in_shared_parameters(form: Any) -> None:
    case = Case(form)

    def total(params: list[Tensor]) -> Tensor:
        return torch.func.vmap(lambda x: case.loss(fused.conv4_loss, x, params, True)[0])(case.tasks).sum()

    def expected(params: list[Tensor]) -> Tensor:
        return sum((case.loss(composed, x, params, True)[0] for x in case.tasks), torch.zeros(()))

    assert_close(torch.func.grad(total)(case.params), torch.func.grad(expected)(case.params))


@pytest.mark.parametrize("mean", [0.3, 10.0])
@pytest.mark.parametrize(("tasks", "rows", "channels"), [(1, 14700, 8), (3, 980, 5), (2, 1001, 4), (1, 1, 3)])
def test_moments_have_a_float32s_digits(tasks: int, rows: int, channels: int, mean: float) -> None:
    """PyTorch's kernel for contiguous maps adds up in float64, and so is off by rounding its result alone."""
    g = torch.Generator().manual_seed(0)
    z = mean + torch.randn(tasks, rows, channels, generator=g)
    true_mean, true_var = z.double().mean(1), z.double().var(1, correction=0)
    found_mean, found_var = fused.moments(z)
    half = torch.finfo(torch.float32).eps / 2
    # Three times half a unit of the last place, and of the variance, which is put together from two sums, twice that
    assert float(((found_mean - true_mean).abs() / (true_mean.abs() + true_var.sqrt())).max()) < 3 * half
    assert float(((found_var - true_var).abs() - 6 * half * true_var).max()) <= 0
    z = z.double()
    found_mean, found_var = fused.moments(z)
    assert_close([found_mean, found_var], [z.mean(1), z.var(1, correction=0)])


@pytest.mark.parametrize("pool", [False, True])
def test_float32_gradient_and_curvature_have_the_digits_of_the_composed_ones(pool: bool) -> None:
    """Where no activation can change the side of its ReLU: shifts of ±9 deviations, so that a channel is on or off.

    With real shifts a gradient jumps with each that does, so that single tasks tell nothing
    (benchmarks/precision.py has many).
    """
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    width, images = 8, 60
    sides = torch.where(torch.arange(width) % 3 == 2, -9.0, 9.0)
    layers = 2 if pool else 3
    x, y = draw(images, 1, 28, 28), torch.arange(images) % WAYS
    weights = [draw(width, width if i else 1, 3, 3) for i in range(layers)]
    scales, shifts = [1 + 0.1 * draw(width) for _ in weights], [sides.clone() for _ in weights]
    params = [*weights, *scales, *shifts, draw(WAYS, width * (49 if pool else 1)) / 10, draw(WAYS)]
    fixed = {"stride": 1 if pool else 2, "pool": pool, "average": not pool, "eps": 1e-5, "keep": True}
    along = [draw(*p.shape) for p in params]

    def both(of: Loss, dtype: torch.dtype) -> list[Tensor]:
        """The gradient and the Hessian times a direction, each as one vector."""
        p = [v.to(dtype).requires_grad_() for v in params]
        n = layers
        value, _ = of(x.to(dtype), y, p[:n], p[n : 2 * n], p[2 * n : 3 * n], p[-2], p[-1], **fixed)
        grads = torch.autograd.grad(value, p, create_graph=True)
        curved = torch.autograd.grad(grads, p, [v.to(dtype) for v in along])
        return [torch.cat([v.detach().double().flatten() for v in vectors]) for vectors in (grads, curved)]

    def errors(of: Loss) -> list[float]:
        return [float((a - b).norm() / b.norm()) for a, b in zip(both(of, torch.float32), exact, strict=True)]

    exact = both(composed, torch.float64)
    of_fused, of_composed = errors(fused.conv4_loss), errors(composed)
    for ours, theirs in zip(of_fused, of_composed, strict=True):
        assert ours < 3 * max(theirs, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_against_finite_differences(form: Any) -> None:
    case = Case(form)
    params = [p.clone().requires_grad_() for p in case.params]

    def value(*params: Tensor) -> Tensor:
        return case.loss(fused.conv4_loss, case.x, list(params), True)[0]

    assert torch.autograd.gradcheck(value, params)
    assert torch.autograd.gradgradcheck(value, params)


def test_a_third_derivative_is_refused() -> None:
    """It would be wrong in silence: the second one is not made of operations that autograd could see through."""
    case = Case((2, False, 1, 12))
    params = [p.clone().requires_grad_() for p in case.params]
    grads = torch.autograd.grad(case.loss(fused.conv4_loss, case.x, params, True)[0], params, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), params, create_graph=True)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="not a third"):
        torch.autograd.grad(sum(g.sum() for g in second), params)  # type: ignore[arg-type]


def along(grads: Any) -> Tensor:
    """Gradients along a direction in which no two values have the same part."""
    parts = [(v * torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view(v.shape).exp()).sum() for v in grads]
    return sum(((-0.9) ** i * part for i, part in enumerate(parts)), torch.zeros(()))


@pytest.mark.parametrize("form", FORMS)
def test_features_gradient_and_curvature_under_autograd(form: Any) -> None:
    case = Case(form)

    def everything(of: Callable[..., Tensor]) -> list[Tensor]:
        params = [p.clone().requires_grad_() for p in case.params[:-2]]
        features = case.features(of, case.x, params)
        grads = torch.autograd.grad(case.judged(features), params, create_graph=True)
        second = torch.autograd.grad(along(grads), params)
        return [v.detach() for v in (features, *grads, *second)]

    assert_close(everything(fused.conv4_embedded), everything(composed_features))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_features_gradients_under_vmap(form: Any, own: bool, times: int) -> None:
    """From weights that tasks share and from their own, once and twice."""
    case = Case(form)

    def grad(of: Callable[..., Tensor]) -> Callable[[list[Tensor], Tensor], Any]:
        def once(params: list[Tensor], x: Tensor) -> Any:
            return torch.func.grad(lambda p: case.judged(case.features(of, x, p)))(params)

        return once if times == 1 else torch.func.grad(lambda params, x: along(once(params, x)))

    scale = torch.tensor([1.0, 0.9, -1.1]).double() if own else None
    shared = case.params[:-2]
    given = shared if scale is None else [torch.stack([v * factor for factor in scale]) for v in shared]
    found = torch.func.vmap(grad(fused.conv4_embedded), in_dims=(0 if own else None, 0))(given, case.tasks)
    for i, x in enumerate(case.tasks):
        assert_close([v[i] for v in found], grad(composed_features)([v[i] for v in given] if own else shared, x))


def test_gradient_of_vmapped_features_in_shared_parameters() -> None:
    case = Case((1, True, 3, 11))

    def total(params: list[Tensor]) -> Tensor:
        return torch.func.vmap(lambda x: case.judged(case.features(fused.conv4_embedded, x, params)))(case.tasks).sum()

    def expected(params: list[Tensor]) -> Tensor:
        each = [case.judged(case.features(composed_features, x, params)) for x in case.tasks]
        return sum(each, torch.zeros(()))

    assert_close(torch.func.grad(total)(case.params[:-2]), torch.func.grad(expected)(case.params[:-2]))


@pytest.mark.parametrize("own", ["neither", "inner", "outer", "both"])
def test_two_vmaps(own: str) -> None:
    """The tasks of both are tasks of one; weights are shared, or vary along either or both."""
    case = Case((1, True, 3, 11))
    x = torch.stack([case.tasks, 0.3 - case.tasks])
    sizes = {"neither": (), "inner": (3,), "outer": (2,), "both": (2, 3)}[own]
    factors = torch.linspace(0.8, 1.2, 6).double()[: math.prod(sizes)].view(sizes)
    params = [v * factors.view(*sizes, *[1] * v.dim()) for v in case.params]
    inner, outer = (0 if own in (which, "both") else None for which in ("inner", "outer"))

    def grad(of: Loss) -> Callable[[list[Tensor], Tensor], Any]:
        return torch.func.grad(lambda p, x: case.loss(of, x, p, True)[0])

    twice = torch.func.vmap(torch.func.vmap(grad(fused.conv4_loss), (inner, 0)), (outer, 0))
    found = twice(params, x)
    for i, j in itertools.product(range(2), range(3)):
        at = tuple(k for k, varies in ((i, outer), (j, inner)) if varies is not None)
        assert_close([v[i, j] for v in found], grad(composed)([v[at] for v in params], x[i, j]))


@pytest.mark.parametrize("name", ["conv4", "conv4-pool"])
def test_the_models_loss_is_that_of_its_forward_pass(name: str) -> None:
    """`Model.loss` takes the fused way, `apply` the layers; both must be the same network."""
    model = scenarios.model(name)
    data = scenarios.one(scenarios.episodes(tasks=1), 0)

    def of(params: Params) -> Tensor:
        return F.cross_entropy(model.apply(params, data.support_x, None), data.support_y)

    def grad(loss: Callable[[Params], Tensor]) -> Params:
        params = {k: v.clone().requires_grad_() for k, v in model.params.items()}
        return dict(zip(params, torch.autograd.grad(loss(params), list(params.values())), strict=True))

    fast = grad(lambda params: model.loss(params, data.support_x, data.support_y, "cross_entropy")[0])
    assert scenarios.relative_error(fast, grad(of)) < 1e-12
    with plain_operations():
        plain = model.loss(model.params, data.support_x, data.support_y, "cross_entropy")
    assert_close(model.loss(model.params, data.support_x, data.support_y, "cross_entropy"), plain)


def test_which_way_the_models_loss_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = models.Conv4.cross_entropy

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("fused")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(models.Conv4, "cross_entropy", seen)
    data = scenarios.one(scenarios.episodes(tasks=1), 0)

    class Mine(models.Conv4):
        """With a forward pass that may be another."""

    for model, expected in (
        (scenarios.model("conv4"), ["fused"]),
        (scenarios.model("mlp"), []),
        (models.functional(Mine(3, scenarios.SHAPE, width=4).double()), []),
    ):
        calls.clear()
        model.loss(model.params, data.support_x, data.support_y, "cross_entropy")
        assert calls == expected
        with plain_operations():
            model.loss(model.params, data.support_x, data.support_y, "cross_entropy")
        assert calls == expected


@pytest.mark.parametrize("name", ["conv4", "conv4-pool"])
def test_which_way_features_with_derivatives_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = scenarios.model(name), []
    data = scenarios.one(scenarios.episodes(tasks=1), 0)
    real = models.Conv4.embedded

    def seen(self: Any, *args: Any) -> Any:
        calls.append("quick")
        return real(self, *args)

    def both() -> list[Tensor]:
        logits = model.of_head(model.params, data.support_x)
        assert logits is not None
        return [model.features(model.params, data.support_x, None), logits(model.params)]

    monkeypatch.setattr(models.Conv4, "embedded", seen)
    quick = both()
    assert calls == ["quick"] * 2
    with plain_operations():
        assert_close(quick, both())
    assert_close(quick[1:], [model.apply(model.params, data.support_x, None)])
    moments = model.measure(model.params, data.support_x)
    model.features(model.params, data.support_x, moments)
    x = data.support_x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model.features(model.params, x, None).sum(), x)
    assert grad.abs().sum() > 0, "what is asked of the images themselves"
    assert len(calls) == 2, "not for a compiler, by given moments, or for a derivative in the images"


@pytest.mark.parametrize("cached", [1, 300, 1 << 20])
@pytest.mark.parametrize("form", FORMS)
def test_features_without_derivatives_are_the_layers_own(
    form: Any, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of one image, of several with a rest, and all at once; by own and by given moments."""
    monkeypatch.setattr(evaluation, "_CACHED", cached)
    case, n = Case(form), LAYERS
    weights, scales, shifts = case.params[:n], case.params[n : 2 * n], case.params[2 * n : 3 * n]
    given = tuple((torch.full((WIDTH,), 0.3 + i).double(), torch.full((WIDTH,), 2.0 + i).double()) for i in range(n))
    for moments in (None, given):
        x, expected = case.x, []
        for i, (w, gamma, beta) in enumerate(zip(weights, scales, shifts, strict=True)):
            z = F.conv2d(x, w, None, case.fixed["stride"], 1)
            mean, var = (z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)) if moments is None else moments[i]
            expected += [mean, var]
            u = F.batch_norm(z, mean, var, gamma, beta, False, 0.0, case.fixed["eps"]).relu()
            x = F.max_pool2d(u, 2) if case.fixed["pool"] else u
        found, used = fused.conv4_features(case.x, weights, scales, shifts, given=moments, **case.fixed)
        assert_close([found], [x.mean((2, 3)) if case.fixed["average"] else x.flatten(1)])
        assert_close([of for pair in used for of in pair], expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_layer_is_shared_by_both_modes_and_by_nothing_else(form: Any) -> None:
    """To the bit as without sharing; a part of the images, the same ones moved, other weights or scales that turn the
    peaks round are convolved anew, and so is the first layer of a batch's own moments after that by given ones."""
    case, n = Case(form), LAYERS
    weights, scales, shifts = case.params[:n], case.params[n : 2 * n], case.params[2 * n : 3 * n]
    _, given = fused.conv4_features(case.x[:2], weights, scales, shifts, given=None, **case.fixed)
    turned = [-scales[0], *scales[1:]]
    asked = [
        (case.x, weights, scales, None, False),
        (case.x, weights, scales, given, True),
        (case.x, weights, scales, None, True),
        (case.x[:2], weights, scales, given, False),
        (case.x[:2], weights, scales, None, False),
        (case.x[:2], weights, turned, given, False),
        (case.x[:2], [2 * weights[0], *weights[1:]], turned, given, False),
        (case.x, weights, scales, given, False),
        (case.x + 0.0, weights, scales, given, False),
    ]

    def features(x: Tensor, weights: list[Tensor], scales: list[Tensor], given: Any) -> Tensor:
        return fused.conv4_features(x, weights, scales, shifts, given=given, **case.fixed)[0]

    for wanted in (True, False):
        with fused.first_layer_once(wanted):
            for *of, shared in asked:
                with Convolutions() as seen:
                    found = features(*of)
                assert len(seen.types) == 2 * (n - (wanted and shared))
                assert torch.equal(found, contextvars.Context().run(features, *of)), "as outside"
    with Convolutions() as seen:
        features(case.x + 0.0, weights, scales, given)
    assert len(seen.types) == 2 * n, "outside nothing is kept"


@pytest.mark.parametrize(("side", "channels"), [((6, 6), 3), ((7, 5), 1), ((1, 4), 2), ((2, 2), 8)])
def test_the_largest_of_four_pixels_is_max_pools(side: tuple[int, int], channels: int) -> None:
    z = torch.randn(5, *side, channels, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2)
    z.select(1, 0)[0, 0, 0] = torch.nan
    z[1] = z[1].round()  # ties
    found = evaluation._largest(z)
    if min(side) > 1:
        torch.testing.assert_close(found, F.max_pool2d(z, 2), rtol=0, atol=0, equal_nan=True)
    assert found.shape[2:] == (side[0] // 2, side[1] // 2)


def test_moments_in_parts_have_a_float32s_digits() -> None:
    """75 images of 84x84 in the parts that such images come in, far from 0."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(75, 1, 84, 84, generator=g) + 5, torch.rand(8, 1, 3, 3, generator=g)
    _, mean, var = evaluation._peaks_and_moments(x, w, torch.ones(8), rows.Kind(1), True, None)
    z = F.conv2d(x.double(), w.double(), None, 1, 1)
    assert float((mean - z.mean((0, 2, 3))).abs().max() / z.mean().abs()) < 3e-7
    assert float((var / z.var((0, 2, 3), unbiased=False) - 1).abs().max()) < 2e-6


@pytest.mark.parametrize("name", ["conv4", "conv4-pool"])
def test_predictions_without_derivatives_take_the_quick_way_and_are_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = scenarios.model(name), []
    data = scenarios.one(scenarios.episodes(tasks=1), 0)
    real = models.Conv4.inferred

    def seen(self: Any, *args: Any) -> Any:
        calls.append("quick")
        return real(self, *args)

    def all_of() -> list[Tensor]:
        moments = model.measure(model.params, data.support_x)
        x = data.query_x
        found = [of(model.params, x, given) for of in (model.apply, model.features) for given in (None, moments)]
        return [*found, *(of for pair in moments for of in pair)]

    monkeypatch.setattr(models.Conv4, "inferred", seen)
    with torch.no_grad():
        quick = all_of()
        assert calls == ["quick"] * 5
        with plain_operations():
            assert_close(quick, all_of())
    assert_close(quick, [of.detach() for of in all_of()])
    with torch.no_grad():
        torch.func.vmap(lambda x: model.apply(model.params, x, None))(data.query_x.unsqueeze(0))
    assert len(calls) == 5, "not with derivatives, under vmap or for a compiler"


@pytest.mark.parametrize("name", ["conv4", "conv4-pool"])
def test_predictions_in_bf16_without_derivatives_are_those_of_the_loss(name: str) -> None:
    """Their convolutions alone are in bf16, as the loss has it, and nothing else is rounded."""
    made, data = scenarios.model(name, dtype=torch.float32), scenarios.one(scenarios.episodes(dtype=torch.float32))
    model, x = in_bf16(made), data.query_x
    _, logits = model.loss(made.params, x, data.query_y, "cross_entropy")
    with torch.no_grad():
        with Convolutions() as seen:
            quick, moments = model.apply(made.params, x, None), model.measure(made.params, x)
        features, given = model.features(made.params, x, None), model.apply(made.params, x, moments)
        exact = made.apply(made.params, x, None)
        of_head = model.of_head(made.params, x)
        assert of_head is not None
        headed = of_head(made.params)
    assert set(seen.types) == {torch.bfloat16} and {v.dtype for pair in moments for v in pair} == {torch.float32}
    head = made.params["head.weight"], made.params["head.bias"]
    for found in (quick, F.linear(features, *head), given, headed):
        assert found.dtype == torch.float32 and apart(found, logits) < 1e-6 < 1e-4 < apart(found, exact)


def test_another_loss_in_bf16_is_one_function_with_and_without_a_derivative() -> None:
    made, data = scenarios.model(dtype=torch.float32), scenarios.one(scenarios.episodes(dtype=torch.float32))
    model, margin = in_bf16(made), Objective(F.multi_margin_loss)
    found, _ = model.loss(made.params, data.query_x, data.query_y, margin)
    with torch.no_grad():
        again, _ = model.loss(made.params, data.query_x, data.query_y, margin)
        exact, _ = made.loss(made.params, data.query_x, data.query_y, margin)
    assert torch.equal(found.detach(), again) and not torch.equal(again, exact)


def _elu(net: models.Conv4) -> None:
    net.blocks[2] = nn.ELU()


def _eps(net: models.Conv4) -> None:
    net.blocks[4] = nn.BatchNorm2d(4, 1e-2)


def _wider(net: models.Conv4) -> None:
    net.blocks[0] = nn.Conv2d(1, 4, 5, 2, 2, bias=False)


def _hooked(net: models.Conv4) -> None:
    net.blocks[0].register_forward_hook(lambda *given: 2 * given[2])


def _tied(net: models.Conv4) -> None:
    net.blocks[6].weight = net.blocks[3].weight


def _grouped(net: models.Conv4) -> None:
    net.blocks[1] = nn.GroupNorm(2, 4)


def _no_bias(net: models.Conv4) -> None:
    net.head = nn.Linear(4, 3, bias=False)


def _weight_norm(net: models.Conv4) -> None:
    nn.utils.parametrizations.weight_norm(net.blocks[3])


@pytest.mark.parametrize("change", [_elu, _eps, _wider, _hooked, _tied, _grouped, _no_bias, _weight_norm])
def test_a_network_that_was_changed_is_computed_as_it_is(change: Callable[[models.Conv4], None]) -> None:
    net = models.Conv4(3, (1, 16, 16), width=4)
    change(net)
    model = models.functional(net.double())
    x, y = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3
    expected = model.apply(model.params, x, None)
    with torch.no_grad():
        assert_close(
            [model.apply(model.params, x, None), *model.loss(model.params, x, y, "cross_entropy")],
            [expected, F.cross_entropy(expected, y), expected],
        )


def test_nothing_and_too_few_moments_are_as_with_derivatives() -> None:
    model = scenarios.model("conv4")
    x = scenarios.one(scenarios.episodes(tasks=1), 0).query_x
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert model.apply(model.params, x[:0], None).shape == (0, model.outputs)
            with pytest.raises(MetaftError, match="were the moments asked for"):
                model.apply(model.params, x, ())
