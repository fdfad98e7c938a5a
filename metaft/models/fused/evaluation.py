"""Features of one task without any derivative, layer by layer, with as little memory as they need."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metaft.models.fused.rows import Kind, conv, joined, kind_of, moments, pixels, to_images, to_rows
from metaft.types import Moments


def conv4_features(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    stride: int,
    pool: bool,
    average: bool,
    eps: float,
    given: Moments | None,
) -> tuple[Tensor, Moments]:
    """What the head sees [n, features] of images [n, C, H, W] of one task, and the moments that each layer normalised
    with: its batch's own, or those `given`. The layers are those of `conv4_loss`, also where images are in bfloat16
    beside parameters in another type; nothing has a derivative."""
    kind = kind_of(x, weights[0], stride)
    y, used = x, []
    for i, (w, gamma, beta) in enumerate(zip(weights, scales, shifts, strict=True)):
        peaks_of = _peaks_and_moments if i else _of_first
        z, mean, var = peaks_of(y, w, gamma, kind, pool, None if given is None else given[i])
        used.append((mean, var))
        rows = to_rows(z, 1)
        asked_again = i == 0 and _kept.get() is not None
        centred = rows.sub(mean) if asked_again else rows.sub_(mean)
        normal = centred.mul_(gamma * (var + eps).rsqrt()).add_(beta).relu_()
        y = to_images(normal, (z.shape[2], z.shape[3]))
    maps = y.permute(0, 2, 3, 1)
    return maps.mean((1, 2)) if average else y.flatten(1), tuple(used)


class _First(NamedTuple):
    """What the first layer made of its images."""

    made_of: tuple[Tensor, Tensor, Tensor]
    """Images, weights and scales, which are held, so that no other tensor can be where they are."""
    peaks: Tensor
    moments: tuple[Tensor, Tensor] | None
    """Its own; None where others were given."""


_kept: contextvars.ContextVar[list[_First] | None] = contextvars.ContextVar("_kept", default=None)
"""The last first layer, inside `first_layer_once`."""


@contextlib.contextmanager
def first_layer_once(wanted: bool = True) -> Iterator[None]:
    """Inside, where it is `wanted`, images that pass through `conv4_features` a second time in a row with the same
    first weights and scales are not convolved again by its first layer, whose moments alone may differ. Nobody may
    write to any of them."""
    token = _kept.set([] if wanted else None)
    try:
        yield
    finally:
        _kept.reset(token)


def _of_first(
    x: Tensor, w: Tensor, gamma: Tensor, kind: Kind, pool: bool, given: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`_peaks_and_moments` of images as they come."""
    kept = _kept.get()
    for first in kept or ():
        moments = first.moments if given is None else given
        if moments is not None and all(map(_is_same, first.made_of, (x, w, gamma))):
            return first.peaks, *moments
    images = to_images(pixels(x.to(w)).unsqueeze(0), (x.shape[2], x.shape[3]))
    peaks, mean, var = _peaks_and_moments(images, w, gamma, kind, pool, given)
    if kept is not None:
        kept[:] = [_First((x, w, gamma), peaks, (mean, var) if given is None else None)]
    return peaks, mean, var


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


_CACHED = 1 << 20
"""Values of a map that are pooled before they leave a core's cache."""


def _peaks_and_moments(
    y: Tensor, w: Tensor, gamma: Tensor, kind: Kind, pool: bool, given: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the convolution z of images y [n, C, H, W], in one task: z where gamma z is largest in each 2x2 pixels (z as
    it is without pooling), and its mean and biased variance by channel, those that are given if any are. Where it is
    pooled, no more than some images' z is ever there."""
    maps = len(w) * y.shape[2] * y.shape[3] // kind.stride**2
    some = max(1, _CACHED // maps) if pool else len(y)
    sign = torch.where(gamma < 0, -1.0, 1.0).to(y).view(-1, 1, 1) if pool and bool((gamma < 0).any()) else None
    peaks, stats = [], []
    for part in y.split(some):
        z = conv(part, w, kind)
        if given is None:
            stats.append(moments(to_rows(z, 1)))
        if sign is not None:
            z = z * sign
        peaks.append(_largest(z) if pool else z)
    z = joined(peaks)
    z = z if sign is None else z * sign
    if given is not None:
        return z, *given
    if len(stats) == 1:
        (mean, var) = stats[0]
        return z, mean.squeeze(0), var.squeeze(0)
    share = y.new_tensor([len(part) / len(y) for part in y.split(some)], dtype=torch.float64).unsqueeze(1)
    means, variances = (torch.cat(of).double() for of in zip(*stats, strict=True))
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return z, mean.to(y), var.to(y)


def _largest(z: Tensor) -> Tensor:
    """The bits of `max_pool2d(z, 2)` where z lies channels last, in a third of its time."""
    rows = z.permute(0, 2, 3, 1)
    height, width = z.shape[2] // 2 * 2, z.shape[3] // 2 * 2
    pairs = torch.maximum(rows[:, 0:height:2], rows[:, 1:height:2])
    return torch.maximum(pairs[:, :, 0:width:2], pairs[:, :, 1:width:2]).permute(0, 3, 1, 2)
