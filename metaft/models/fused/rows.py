"""Convolutions, pooling and sums of activations that are rows [pixels, channels], for tensors with a task axis."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten

Size = tuple[int, int]


def to_rows(images: Tensor, tasks: int) -> Tensor:
    """[tasks n, C, H, W] to [tasks, n H W, C]; no copy from channels_last."""
    return images.permute(0, 2, 3, 1).reshape(tasks, -1, images.shape[1])


def to_images(rows: Tensor, size: Size) -> Tensor:
    """[tasks, n H W, C] to [tasks n, C, H, W] in channels_last."""
    if rows.shape[-1] == 1:  # the strides alone tell the layout then, and a result in the other one is slow to reorder
        return rows.reshape(-1, *size).unsqueeze(-1).permute(0, 3, 1, 2)
    return rows.reshape(-1, *size, rows.shape[-1]).permute(0, 3, 1, 2)


def pixels(x: Tensor) -> Tensor:
    """Images [n, C, H, W] as rows [n H W, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


class Kind(NamedTuple):
    """What convolutions have in common; all are 3x3 with padding 1 and no bias."""

    stride: int
    short: bool = False
    """Whether they multiply in bfloat16. What they give is of the weights' type all the same."""

    def factor(self, v: Tensor) -> Tensor:
        """A factor as convolutions take it. They do so themselves; who has several with one factor saves time."""
        return v.bfloat16() if self.short else v


def kind_of(x: Tensor, w: Tensor, stride: int) -> Kind:
    """Images in bfloat16 beside weights in another type are convolved in bfloat16."""
    return Kind(stride, short=x.dtype == torch.bfloat16 and w.dtype != torch.bfloat16)


def conv(x: Tensor, w: Tensor, kind: Kind) -> Tensor:
    """Images [tasks n, C, H, W], with one weight or with one per task."""
    images, weights = kind.factor(x), kind.factor(w)
    if w.dim() == 4:
        return F.conv2d(images, weights, None, kind.stride, 1).to(w)
    each = zip(images.chunk(len(w)), weights, strict=True)
    return joined([F.conv2d(part, own, None, kind.stride, 1) for part, own in each]).to(w)


def conv_to_images(gz: Tensor, x: Tensor, w: Tensor, kind: Kind) -> Tensor:
    """Gradient in images like `x`, with one weight or with one per task."""
    g, images, weights = kind.factor(gz), kind.factor(x), kind.factor(w)
    if w.dim() == 4:
        return _conv_backward(g, images, weights, kind, True, False)[0].to(w)
    each = zip(g.chunk(len(w)), images.chunk(len(w)), weights, strict=True)
    return joined([_conv_backward(of, part, own, kind, True, False)[0] for of, part, own in each]).to(w)


def conv_to_weights(gz: Tensor, x: Tensor, w: Tensor, kind: Kind, tasks: int) -> Tensor:
    """Gradient in the weights, one per task: [tasks, ...]."""
    g, images = kind.factor(gz), kind.factor(x)
    own = kind.factor(w if w.dim() == 4 else w[0])  # of which only the shape counts
    each = zip(g.chunk(tasks), images.chunk(tasks), strict=True)
    return torch.stack([_conv_backward(of, part, own, kind, False, True)[1] for of, part in each]).to(w)


def _conv_backward(gz: Tensor, x: Tensor, w: Tensor, kind: Kind, to_x: bool, to_w: bool) -> Any:
    if to_w and kind.short and x.shape[-1] < kind.stride:
        # Where a processor has AVX512-BF16, oneDNN's gradient in these weights is of memory that nobody wrote (torch
        # 2.13.0): Conv-4's last layer on images of 8x8 pixels. No other of 2,720 shapes is off.
        gz, x, w = gz.float(), x.float(), w.float()
    mask = [to_x, to_w, False]
    return _aten.convolution_backward(gz, x, w, None, [kind.stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, mask)


def conv_along(x: Tensor, w: Tensor, dx: Tensor | None, dw: Tensor, kind: Kind, tasks: int) -> Tensor:
    """The derivative of `conv` along (dx, dw): with a task's own weights one convolution, twice as deep."""
    if dx is None:
        return conv(x, dw, kind)
    if w.dim() == 5 or tasks == 1:
        return conv(torch.cat([dx, x], 1), torch.cat([_own(w, tasks), _own(dw, tasks)], 2), kind)
    return conv(dx, w, kind) + conv(x, dw, kind)


def conv_to_images_along(gz: Tensor, x: Tensor, w: Tensor, dgz: Tensor, dw: Tensor, kind: Kind, tasks: int) -> Tensor:
    """The derivative of `conv_to_images` along (dgz, dw), likewise."""
    if w.dim() == 5 or tasks == 1:
        deep = torch.cat([_own(w, tasks), _own(dw, tasks)], 1)
        return conv_to_images(torch.cat([dgz, gz], 1), x, deep, kind)
    return conv_to_images(dgz, x, w, kind) + conv_to_images(gz, x, dw, kind)


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _own(w: Tensor, tasks: int) -> Tensor:
    """One weight per task."""
    return w.unsqueeze(0) if w.dim() == 4 and tasks == 1 else w


def per_task(a: Tensor, b: Tensor, tasks: int) -> Tensor:
    """Each task's images of `a`, then its images of `b`."""
    return torch.cat([a.unflatten(0, (tasks, -1)), b.unflatten(0, (tasks, -1))], 1).flatten(0, 1)


def pooled(v: Tensor, at: Tensor, size: Size) -> Tensor:
    """Rows of values at the peaks, out of rows of all values."""
    return to_rows(to_images(v, size).flatten(2).gather(2, at.flatten(2)).view_as(at), len(v))


def unpooled(v: Tensor, at: Tensor, like: Tensor, size: Size) -> Tensor:
    """Rows like `like`, zero but for the values `v` at the peaks' places."""
    small, large = to_images(v, (at.shape[2], at.shape[3])), to_images(like, size)
    wide = _aten.max_pool2d_with_indices_backward(small, large, [2, 2], [2, 2], [0, 0], [1, 1], False, at)
    return to_rows(wide, len(v))


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [tasks, channels] of rows [tasks, m, channels], to a float32's last digit or two.

    PyTorch's kernel for channels_last adds up row after row, which costs float32 digits: the variance of m rows is off
    by some 3e-10 m of itself, 5e-6 of 15,000 of them, enough to flip a ReLU in most tasks. Here it is given about
    sqrt(m) rows side by side (as many as divide m), as one row of so many times the channels, and their moments are put
    together in float64.
    """
    tasks, m, channels = rows.shape
    parts = next(parts for parts in range(math.isqrt(m), 0, -1) if m % parts == 0)
    wide = rows.reshape(tasks, m // parts, parts * channels).mT.unsqueeze(-1)
    each = [_aten.batch_norm_update_stats(task, None, None, 0.0) for task in wide.split(1)]
    means, variances = (joined(list(of)).double().view(tasks, parts, channels) for of in zip(*each, strict=True))
    mean = means.mean(1, keepdim=True)
    apart = means - mean
    return mean.squeeze(1).to(rows), variances.addcmul(apart, apart).mean(1).to(rows)


def summed(rows: Tensor) -> Tensor:
    return rows.sum(1)


def affine(shift: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """shift + rows * scale, both per task and channel."""
    return torch.addcmul(shift.unsqueeze(1), rows, scale.unsqueeze(1))
