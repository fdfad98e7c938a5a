"""Features of one task without any derivative, layer by layer, with as little memory as they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
    y = to_images(pixels(x.to(weights[0])).unsqueeze(0), (x.shape[2], x.shape[3]))
    used = []
    for i, (w, gamma, beta) in enumerate(zip(weights, scales, shifts, strict=True)):
        z, mean, var = _peaks_and_moments(y, w, gamma, kind, pool, None if given is None else given[i])
        used.append((mean, var))
        normal = to_rows(z, 1).sub_(mean).mul_(gamma * (var + eps).rsqrt()).add_(beta).relu_()
        y = to_images(normal, (z.shape[2], z.shape[3]))
    maps = y.permute(0, 2, 3, 1)
    return maps.mean((1, 2)) if average else y.flatten(1), tuple(used)


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
        peaks.append(F.max_pool2d(z, 2) if pool else z)
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
