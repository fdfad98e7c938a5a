"""Batch normalisation without running statistics: a batch is normalised with its own moments, or with given ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.types import Moments


def in_transform() -> bool:
    """Whether the calling thread is inside a `torch.func` transform (grad, vmap, ...).

    torch has no public question for this. It decides between two ways to the same numbers: plain autograd is 1.15 to
    1.5 times as fast, but cannot see through vmap.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def is_differentiated() -> bool:
    """Whether a derivative may be taken of what is computed now: grad mode is on, as it is inside torch.func.grad and
    vjp, or some transform is another than vmap."""
    if torch.is_grad_enabled():
        return True
    stack = torch._C._functorch.get_interpreter_stack() or ()  # pyright: ignore[reportAttributeAccessIssue]
    vmap = torch._C._functorch.TransformType.Vmap  # pyright: ignore[reportAttributeAccessIssue]
    return any(level.key() != vmap for level in stack)


class _Frame:
    """What the normalisation layers of one forward pass are given, and what they measured, in the order they meet."""

    def __init__(self, given: Moments | None) -> None:
        self.given = given
        self.measured: list[tuple[Tensor, Tensor]] = []
        self.met = 0

    def next_given(self, moments: Moments) -> tuple[Tensor, Tensor]:
        if self.met >= len(moments):
            raise too_few(moments)
        self.met += 1
        return moments[self.met - 1]


def too_few(moments: Moments) -> MetaftError:
    """Moments for fewer layers than there are."""
    return MetaftError(
        f"the forward pass meets more normalisation layers than the {len(moments)} whose moments it was given; "
        "were the moments asked for (adapt(..., moments=True))?"
    )


# A context variable is local to its thread, so that tasks that run side by side cannot see each other's frame.
_frame: ContextVar[_Frame | None] = ContextVar("normalisation_frame", default=None)


@contextlib.contextmanager
def use_moments(moments: Moments) -> Iterator[None]:
    """Inside, every EpisodeNorm normalises with the given moments."""
    token = _frame.set(_Frame(moments))
    try:
        yield
    finally:
        _frame.reset(token)


@contextlib.contextmanager
def measure_moments() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, every EpisodeNorm appends its batch's moments to the list that this yields."""
    frame = _Frame(None)
    token = _frame.set(frame)
    try:
        yield frame.measured
    finally:
        _frame.reset(token)


def spread(per_channel: Tensor, x: Tensor) -> Tensor:
    """[C] so that it meets the channels of x [batch, C, ...]."""
    return per_channel.view(1, -1, *[1] * (x.dim() - 2))


def normalised(x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, composed of operations that torch.func differentiates twice."""
    out = (x - spread(mean, x)) * spread((var + eps).rsqrt(), x)
    return out if weight is None or bias is None else out * spread(weight, x) + spread(bias, x)


class EpisodeNorm(nn.Module):
    """Normalises [batch, C, ...] per channel: (x - mean) / sqrt(var + eps) * weight + bias.

    Outside `use_moments` mean and biased variance are the batch's own (transductive when the batch is a query set).
    There are no running statistics, so a forward pass changes nothing.
    """

    def __init__(self, features: int, eps: float = 1e-5, affine: bool = True, then: nn.Module | None = None) -> None:
        super().__init__()
        self.features = features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None
        self.then = then
        """The layer after the normalisation, where both are one: see `then_of`."""

    def forward(self, x: Tensor) -> Tensor:
        out = self._normalised(x)
        return out if self.then is None else self.then(out)

    def _normalised(self, x: Tensor) -> Tensor:
        frame = _frame.get()
        if x.dtype in (torch.bfloat16, torch.float16):  # too short for a mean's square
            return self._normalised(x.float()).to(x.dtype)
        if frame is None and not in_transform():
            # The fused kernel has a correct double backward; under vmap it does not (its second derivative through
            # the scale is wrong), hence the composed form below.
            return torch.batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, False)
        if frame is not None and frame.given is not None:
            mean, var = frame.next_given(frame.given)
        else:
            axes = [0, *range(2, x.dim())]
            mean = x.mean(axes)
            var = (x - spread(mean, x)).square().mean(axes)
            if frame is not None:
                frame.measured.append((mean, var))
        return normalised(x, mean, var, self.eps, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}, affine={self.weight is not None}"


def then_of(layer: nn.modules.batchnorm._BatchNorm) -> nn.Module | None:
    """What a batch normalisation layer does after normalising, where it is of a kind that does more: timm's have a
    dropout and an activation inside. Raises MetaftError for one whose forward pass is of another kind."""
    if type(layer).forward in _PLAIN_FORWARDS:
        return None
    parts = (getattr(layer, "drop", None), getattr(layer, "act", None))
    if not all(isinstance(part, nn.Module) for part in parts):
        raise MetaftError(f"module: {type(layer).__name__} is batch normalisation with a forward pass of its own")
    return nn.Sequential(*(part for part in parts if part is not None and not isinstance(part, nn.Identity)))


_PLAIN_FORWARDS = frozenset({nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward})


def episode_norms(module: nn.Module) -> nn.Module:
    """Replace batch normalisation layers by EpisodeNorm, in place, keeping weight and bias; returns the module.

    Raises MetaftError for layers that keep running statistics and have no such form, naming the layer.
    """
    converted: dict[int, EpisodeNorm] = {}  # a layer may stand in several places and must stay one
    for path, layer in list(module.named_modules(remove_duplicate=False)):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if id(layer) not in converted:
                new = EpisodeNorm(layer.num_features, layer.eps, layer.affine, then_of(layer))
                converted[id(layer)] = new
                if layer.affine:
                    new.weight, new.bias = layer.weight, layer.bias
            if not path:
                return converted[id(layer)]
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, converted[id(layer)])
        elif getattr(layer, "track_running_stats", False):
            raise MetaftError(
                f"layer {path!r} ({type(layer).__name__}) keeps running statistics, which tasks would share; "
                "build it with track_running_stats=False or use batch normalisation"
            )
    return module
