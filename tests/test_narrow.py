"""Convolutions in bfloat16 whose gradient oneDNN has wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaft import models
from metaft.models.functional import plain_operations
from metaft.models.fused import rows
from metaft.models.fused.rows import is_narrow
from metaft.models.precision import NarrowInFull, in_bf16


class Backward(TorchDispatchMode):
    """Takes down the type, the width and the stride of the convolutions whose weights get a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution_backward" in str(func) and args[-1][1]:
            self.seen.append((args[1].dtype, args[1].shape[-1], args[4][-1]))
        return func(*args, **(kwargs or {}))


def poison() -> None:
    """Leave NaN in the blocks that are handed out next."""
    for count in (16, 64, 256, 1024, 4096, 16384):
        _ = [torch.full((count,), float("nan")) for _ in range(6)]


@pytest.mark.parametrize("channels", [4, 16, 64])
def test_the_gradient_of_a_pass_in_one_piece_is_that_of_float32(channels: int) -> None:
    g = torch.Generator().manual_seed(0)
    kind = rows.Kind(2, short=True)
    x, gz = (torch.randn(5, channels, 1, 1, generator=g).to(memory_format=torch.channels_last) for _ in range(2))
    w = torch.randn(channels, channels, 3, 3, generator=g)
    short = [v.bfloat16().double() for v in (gz, x, w)]
    for _ in range(3):
        poison()
        found = rows.conv_to_weights(gz, x, w, kind, 1)[0]
        args = ([2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
        expected = torch.ops.aten.convolution_backward(*short, None, *args)[1]
        assert float((found.double() - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("composed", [False, True])
def test_no_narrow_gradient_of_a_model_is_in_bf16(composed: bool) -> None:
    """Conv-4 has maps of 4, 2, 1 and 1 pixels behind images of 8x8; the last layer's input is the narrow one."""
    model = in_bf16(models.build("conv4", ways=3, shape=(1, 8, 8), width=4, seed=0))
    params = {name: p.clone().requires_grad_() for name, p in model.params.items()}
    x, y = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(model.loss(params, x, y, "cross_entropy")[0], list(params.values())))

    with Backward() as backward:
        if composed:
            with plain_operations():
                gradient()
        else:
            gradient()
    short = [(width, stride) for dtype, width, stride in backward.seen if dtype == torch.bfloat16]
    assert len(backward.seen) == 4 and sorted(short) == [(2, 2), (4, 2), (8, 2)]


def _conv(dims: int) -> Callable[..., Tensor]:
    return (F.conv1d, F.conv2d, F.conv3d)[dims - 1]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("named", [False, True])
def test_only_narrow_convolutions_are_computed_in_float32(dims: int, named: bool) -> None:
    g = torch.Generator().manual_seed(0)
    w, b = torch.randn(4, 2, *[3] * dims, generator=g).bfloat16(), torch.randn(4, generator=g).bfloat16()
    for width, narrow in ((2, True), (3, False)):
        x = torch.randn(2, 2, *[5] * (dims - 1), width, generator=g).bfloat16().requires_grad_()
        given: dict[str, Any] = {"stride": 3, "padding": 1, "groups": 1}
        with Backward() as backward, NarrowInFull():
            weight = w.clone().requires_grad_()
            out = _conv(dims)(x, weight, bias=b, **given) if named else _conv(dims)(x, weight, b, 3, 1)
            out.float().sum().backward()
        assert out.dtype == torch.bfloat16 and weight.grad is not None and weight.grad.dtype == torch.bfloat16
        assert [dtype == torch.float32 for dtype, *_ in backward.seen] == [narrow]
        assert torch.allclose(out.float(), _conv(dims)(x.float(), w.float(), b.float(), 3, 1), atol=0.1, rtol=0.02)


def test_what_is_narrow() -> None:
    x = torch.zeros(1, 1, 4, 2)
    assert is_narrow(x.bfloat16(), 3) and is_narrow(x.bfloat16(), (1, 3))
    assert not any(is_narrow(x.bfloat16(), stride) for stride in (1, 2, (3, 2), (4, 1)))
    assert not is_narrow(x, 3), "float32 is right"


def test_a_layer_of_a_users_module_is_computed_in_float32_where_it_is_narrow() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).relu()).mean((2, 3)))

    model = in_bf16(models.functional(Net(), head="head"))
    params = {name: p.clone().requires_grad_() for name, p in model.params.items()}
    with Backward() as backward:
        model.features(params, torch.randn(2, 1, 2, 2), None).sum().backward()
    assert [(dtype, width) for dtype, width, _ in backward.seen] == [(torch.float32, 1), (torch.bfloat16, 2)]
