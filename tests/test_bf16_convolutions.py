"""What a CPU convolves in bfloat16, and what it does not: oneDNN is wrong in some shapes."""

from __future__ import annotations

from typing import Any

import pytest
import scenarios
import torch
import torch.nn.functional as F
from helpers import Convolutions
from torch import Tensor, nn

from metaft import algorithms, models, outer
from metaft.models.functional import plain_operations
from metaft.models.fused import rows
from metaft.models.precision import FullConvolutions, in_bf16
from metaft.types import NORMS, Norm


def poison() -> None:
    """Leave NaN in the blocks that are handed out next."""
    for count in (16, 64, 256, 1024, 4096, 16384):
        _ = [torch.full((count,), float("nan")) for _ in range(6)]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("channels", [4, 16, 64])
def test_the_gradient_of_a_narrow_layer_in_one_piece_is_that_of_float32(channels: int) -> None:
    g, kind = seeded(), rows.Kind(2, short=True)
    x, gz = (torch.randn(5, channels, 1, 1, generator=g).to(memory_format=torch.channels_last) for _ in range(2))
    w = torch.randn(channels, channels, 3, 3, generator=g)
    short = [v.bfloat16().double() for v in (gz, x, w)]
    for _ in range(3):
        poison()
        found = rows.conv_to_weights(gz, x, w, kind, 1)[0]
        args = ([2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
        expected = torch.ops.aten.convolution_backward(*short, None, *args)[1]
        assert float((found.double() - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [name for name in algorithms.ALGORITHMS if "baseline" not in name])
def test_no_member_convolves_in_bf16_but_in_one_piece(name: str, norm: Norm) -> None:
    """On pictures of 8x8 pixels, where the last layer of Conv-4 sees one pixel by a stride of 2."""
    model = in_bf16(models.build("conv4", ways=3, shape=(1, 8, 8), width=4, seed=0))
    member = algorithms.ALGORITHMS[name](model, norm=norm)
    meta, state = member.init(0)
    task = scenarios.one(scenarios.episodes(dtype=torch.float32))
    task = task._replace(support_x=task.support_x[..., :8, :8], query_x=task.query_x[..., :8, :8])
    for composed in (False, True):
        with Convolutions() as seen:
            if composed:
                with plain_operations():
                    outer.task_grad_of(member)((meta, state, member.schedule(0)), task)
            else:
                outer.task_grad_of(member)((meta, state, member.schedule(0)), task)
        assert seen.narrow <= {torch.float32}
        if composed:
            assert set(seen.types) == {torch.float32}


CONVOLUTIONS = [
    (F.conv1d, 1, (4, 2, 3), {"stride": 3, "padding": 1}),
    (F.conv2d, 2, (4, 2, 3, 3), {"stride": 3, "padding": 1}),
    (F.conv2d, 2, (16, 2, 3, 3), {"padding": "same"}),
    (F.conv3d, 3, (4, 2, 3, 3, 3), {"stride": (1, 2, 3), "padding": 1}),
    (F.conv_transpose1d, 1, (2, 4, 3), {"stride": 3, "padding": 1}),
    (F.conv_transpose2d, 2, (2, 4, 3, 3), {"stride": 3, "padding": 1, "output_padding": 1}),
    (F.conv_transpose3d, 3, (2, 4, 3, 3, 3), {"stride": 3, "padding": 1}),
]


@pytest.mark.parametrize(("convolve", "dims", "size", "how"), CONVOLUTIONS, ids=lambda v: getattr(v, "__name__", None))
@pytest.mark.parametrize("named", [False, True])
def test_convolutions_of_bf16_are_rounded_ones_of_float32(
    convolve: Any, dims: int, size: tuple[int, ...], how: dict[str, Any], named: bool
) -> None:
    g = seeded()
    outputs = size[0] if convolve in (F.conv1d, F.conv2d, F.conv3d) else size[1]
    x, w, b = (torch.randn(*s, generator=g).bfloat16() for s in ((2, 2, *[5] * (dims - 1), 2), size, (outputs,)))
    own = [v.clone().requires_grad_() for v in (x, w, b)]
    wide = [v.float().requires_grad_() for v in (x, w, b)]
    with Convolutions() as seen, FullConvolutions():
        out = convolve(input=own[0], weight=own[1], bias=own[2], **how) if named else convolve(*own, **how)
        out.float().sum().backward()
    expected = convolve(*wide, **how)
    expected.sum().backward()
    assert torch.equal(out, expected.bfloat16()) and set(seen.types) == {torch.float32}
    for v, of in zip(own, wide, strict=True):
        assert v.grad is not None and of.grad is not None and torch.equal(v.grad, of.grad.bfloat16())


def test_other_convolutions_stay_as_they_are() -> None:
    w = torch.ones(1, 1, 1, 1)
    with FullConvolutions():
        assert F.conv2d(w, w).dtype == torch.float32
        with pytest.raises(RuntimeError, match="type"):
            F.conv2d(w.bfloat16(), w)  # as PyTorch says it
        short = w.to("meta", torch.bfloat16)
        with Convolutions() as seen:
            F.conv2d(short, short)
        assert set(seen.types) == {torch.bfloat16}, "a GPU's are right"


class Strided(nn.Module):
    """No layer that is known to convolve, and one of a shape whose forward pass oneDNN has wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16, 4, 4, generator=seeded()))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.head(F.conv2d(x, self.weight, None, 4).flatten(1))


def test_a_users_module_gets_the_logits_of_float32() -> None:
    made = models.functional(Strided(), head="head")
    short = in_bf16(made)
    x = torch.randn(4, 16, 4, 4, generator=seeded())
    found, expected = (each.apply(made.params, x, None).detach() for each in (short, made))
    assert float((found - expected).norm() / expected.norm()) < 0.02
    head = short.of_head(made.params, x)
    assert head is not None
    assert float((head(made.params).detach() - expected).norm() / expected.norm()) < 0.02
