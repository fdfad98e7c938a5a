"""What a fused pass is given and what it keeps: sizes, parameters, and each layer's activations and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from metaft.models.fused.rows import Kind, Size


@dataclasses.dataclass(frozen=True)
class Form:
    """What is fixed: plain values that travel with the tensors."""

    kind: Kind
    pool: bool
    eps: float
    z_sizes: tuple[Size, ...]
    """Height and width of each layer's convolution."""
    sizes: tuple[Size, ...]
    """Height and width of the images and of each layer's output."""
    average: bool
    """Whether the head sees the mean over the last map or all of it."""
    keep: bool
    """Whether to keep what the second derivative needs; otherwise it is computed anew if asked for."""
    tasks: int | None = None
    """Length of the leading task axis that all tensors have (parameters that the tasks share excepted), or none."""

    @property
    def layers(self) -> int:
        return len(self.z_sizes)

    @property
    def of_body(self) -> int:
        """How many tensors of parameters the body has."""
        return 3 * self.layers

    @property
    def parameters(self) -> int:
        """Likewise, with the head's weight and bias."""
        return self.of_body + 2


def form_of(x: Tensor, layers: int, kind: Kind, pool: bool, average: bool, eps: float, keep: bool) -> Form:
    z_sizes: list[Size] = []
    sizes: list[Size] = [(x.shape[2], x.shape[3])]
    for _ in range(layers):
        height, width = ((side - 1) // kind.stride + 1 for side in sizes[-1])
        z_sizes.append((height, width))
        sizes.append((height // 2, width // 2) if pool else (height, width))
    return Form(kind, pool, eps, tuple(z_sizes), tuple(sizes), average, keep)


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """Per layer: weights [tasks, ...] or shared, scales and shifts [tasks, channels]."""

    weights: list[Tensor]
    scales: list[Tensor]
    shifts: list[Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Params(Body):
    """Then the head's."""

    head: Tensor
    """[tasks, ways, features]"""
    bias: Tensor


class Up(NamedTuple):
    """One layer on the way up, as rows [tasks, n H W, channels] or per channel [tasks, channels]."""

    y: Tensor
    z: Tensor
    """The convolution's output less its mean."""
    s: Tensor
    peaks: Tensor
    """z at the maxima of gamma z, or z itself without pooling."""
    at: Tensor | None
    """Where they are, as max_pool2d tells it: [tasks n, channels, H / 2, W / 2]."""


class Layer(NamedTuple):
    """One layer's part of the gradient: what `Up` has, and the way down."""

    y: Tensor
    z: Tensor
    s: Tensor
    peaks: Tensor
    at: Tensor | None
    gu: Tensor
    gz: Tensor
    gbeta: Tensor
    ggamma: Tensor


class Top(NamedTuple):
    """The head's part: [tasks, n, ...]."""

    features: Tensor
    chances: Tensor
    gl: Tensor
    """The loss's gradient in the logits."""


def to_features(form: Form, rows: Tensor, n: int) -> Tensor:
    """[tasks, n H W, C] to what the head sees: [tasks, n, features]."""
    maps = rows.view(len(rows), n, -1, rows.shape[-1])
    return maps.mean(2) if form.average else maps.transpose(2, 3).reshape(len(rows), n, -1)


def from_features(form: Form, features: Tensor, channels: int) -> Tensor:
    """The transpose of `to_features`."""
    tasks, n, _ = features.shape
    pixels = form.sizes[-1][0] * form.sizes[-1][1]
    if form.average:
        return (features / pixels).unsqueeze(2).expand(-1, -1, pixels, -1).reshape(tasks, -1, channels)
    return features.view(tasks, n, channels, pixels).transpose(2, 3).reshape(tasks, -1, channels)


def images_in(form: Form, x: Tensor) -> int:
    """How many there are in rows [tasks, n H W, C]."""
    return x.shape[1] // (form.sizes[0][0] * form.sizes[0][1])


def lifted(form: Form, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(v.unsqueeze(0) for v in tensors) if form.tasks is None else tensors


def lowered(form: Form, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(v if v is None or form.tasks is not None else v.squeeze(0) for v in tensors)
