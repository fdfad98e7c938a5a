"""In which precision a model computes; parameters, gradients and statistics are float32 in all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metaft.models.functional import Model
from metaft.objective import loss_value
from metaft.types import Loss, Moments, Params

Precision = Literal["fp32", "tf32", "bf16"]
Result = TypeVar("Result")


def in_bf16(model: Model) -> Model:
    """The same model, whose convolutions and matrix products are in bfloat16.

    Parameters are cast as a pass begins, so that fast weights, their updates and all gradients stay as they are.
    Normalisation layers keep their parameters, and compute statistics in float32 (see `EpisodeNorm`); what a pass
    returns is of the input's type again. What is few operations (`models.fused`) has its convolutions alone in
    bfloat16; all others of a CPU multiply in float32 (see `FullConvolutions`).
    """
    short = torch.bfloat16

    def cast(params: Params) -> Params:
        return {k: p if k in model.norm else p.to(short) for k, p in params.items()}

    def shortened(x: Tensor) -> Tensor:
        return x.to(short) if x.is_floating_point() else x  # the numbers of tokens stay as they are

    def composed(x: Tensor) -> contextlib.AbstractContextManager[object]:
        return FullConvolutions() if x.device.type == "cpu" else contextlib.nullcontext()

    def passed(run: Callable[[Params, Tensor], Result], params: Params, x: Tensor) -> Result:
        short_x = shortened(x)
        if model.infers(params, short_x):
            return run(params, short_x)
        with composed(x):
            return run(cast(params), short_x)

    def as_given(result: Tensor, x: Tensor) -> Tensor:
        return result.to(x.dtype if x.is_floating_point() else torch.float32)

    def apply(params: Params, x: Tensor, moments: Moments | None = None) -> Tensor:
        return as_given(passed(lambda own, short_x: model.apply(own, short_x, moments), params, x), x)

    def features(params: Params, x: Tensor, moments: Moments | None = None) -> Tensor:
        return as_given(passed(lambda own, short_x: model.features(own, short_x, moments), params, x), x)

    def of_head(params: Params, x: Tensor) -> Callable[[Params], Tensor] | None:
        as_is = model.infers(params, shortened(x))
        logits = passed(model.of_head, params, x)
        return None if logits is None else lambda own: as_given(logits(own if as_is else cast(own)), x)

    def loss_of(params: Params, x: Tensor, y: Tensor, loss: Loss, *, curvature: bool = False) -> tuple[Tensor, Tensor]:
        if model.fuses(x, loss):
            return model.loss(params, shortened(x), y, loss, curvature=curvature)
        with composed(x):  # of bfloat16 parameters also where there is no derivative, so that a loss is one function
            prediction = as_given(model.apply(cast(params), shortened(x), None), x)
        return loss_value(loss, prediction, y), prediction.detach()

    def measure(params: Params, x: Tensor) -> Moments:
        return passed(model.measure, params, x)

    return dataclasses.replace(model, apply=apply, features=features, of_head=of_head, loss=loss_of, measure=measure)


_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
)  # fmt: skip


class FullConvolutions(TorchFunctionMode):
    """Inside, a CPU's convolutions of bfloat16 values multiply these in float32, in all derivatives too; what they give
    is rounded to bfloat16, as it is otherwise.

    oneDNN's own are wrong in some shapes where a processor has AVX512-BF16 (torch 2.13.0): the gradient in the weights
    reads memory that nobody wrote where the input is narrower than the stride, so does that of a transposed one whose
    output is, and a forward pass without padding whose output is one pixel wide can be off by as much as it is, or end
    the process. Not reached are convolutions by other names than those of `torch.nn.functional`, say `torch.ops.aten`,
    and compiled ones (`torch.jit.script`).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func not in _CONVOLUTIONS or not all(
            _is_short(v) for v in (*args, *named.values()) if isinstance(v, Tensor)
        ):
            return func(*args, **named)
        wide = func(*map(_widened, args), **{name: _widened(v) for name, v in named.items()})
        return wide.bfloat16()


def _is_short(v: Tensor) -> bool:
    return v.dtype == torch.bfloat16 and v.device.type == "cpu"


def _widened(v: Any) -> Any:
    return v.float() if isinstance(v, Tensor) else v


def lacks_bf16() -> bool:
    """Whether this processor is known to have no instructions for bfloat16, in which it is slower then: 11 times in a
    convolution of Conv-4 on an AMD EPYC with AVX2 alone."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False  # of which nothing is known
    have = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    return not any(each is None or each() for each in have)


@contextlib.contextmanager
def matrix_units(precision: Precision) -> Iterator[None]:
    """Inside, a GPU's float32 convolutions and matrix products round their factors to 10 bits (tf32) or do not."""
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    with warnings.catch_warnings():
        # torch 2.9 has newer names too, but other parts of it ask for these, and fail where only the newer were set.
        warnings.simplefilter("ignore", UserWarning)
        before = [place.allow_tf32 for place in places]
        for place in places:
            place.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for place, value in zip(places, before, strict=True):
                place.allow_tf32 = value
