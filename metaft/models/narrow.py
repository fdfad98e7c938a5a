"""Convolutions in bfloat16 that oneDNN computes wrong on a CPU, and what computes them right.

The gradient in the weights of a convolution whose input is narrower than its stride, such as the last layer of Conv-4
on images of 8x8 pixels, reads memory that nobody wrote: garbage or NaN, another one each time. Seen with torch 2.13.0
where a processor has AVX512-BF16: in each such shape with padding along the width, of some 1,500 that were tried, and
in no other; forward passes and the gradient in the images are right in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def is_narrow(x: Tensor, stride: int | Sequence[int]) -> bool:
    """Whether the gradient in the weights of a convolution of `x` [..., width] cannot be had in `x`'s own type."""
    last = stride if isinstance(stride, int) else stride[-1]
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[-1] < last


class NarrowInFull(TorchFunctionMode):
    """Inside, convolutions of such inputs multiply in float32, in all derivatives too; what they give is bfloat16."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func not in _CONVOLUTIONS:
            return func(*args, **given)
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **given}
        x: Tensor = given["input"]
        if not is_narrow(x, given.get("stride", 1)):
            return func(**given)
        return func(**{name: v.float() if isinstance(v, Tensor) else v for name, v in given.items()}).to(x.dtype)
