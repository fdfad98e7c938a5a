"""Conv-4's loss with its gradient and the gradient's derivative, written out: the speed of MAML on a CPU.

Its features have a gradient written out likewise, for members that judge by features alone.

Plain autograd composes the derivative of a gradient from hundreds of small operations, which all read and write memory.
Here a support or query pass is one operation, with three savings:

- Activations are rows [pixels, channels], which convolutions read as channels_last: pooling and sums over pixels are
  many times faster so, in all derivatives.
- Pooling goes before the affine part of the normalisation, which is monotone per channel, so that what follows works
  on a quarter of the pixels.
- Since a Hessian is symmetric, what the second derivative sends back is the derivative of the gradient along a
  direction. That takes 3 convolutions per layer of twice the size, where autograd's order takes 8 single ones.

Under `torch.func.vmap` the tasks share each call that their own weights do not forbid: all their pixels are normalised
together, and weights that are not yet a task's own convolve all images at once.

The formulas, per task and layer. With z the convolution's output, m values per channel, mu and s = (var + eps) ** -0.5
its moments, xhat = (z - mu) s, u = gamma xhat + beta and y = max(0, u), the gradient is

    gu = gy [u > 0]    gz = gamma s P(gu)    with P(v) = v - mean(v) - xhat mean(v xhat),

gbeta = sum(gu), ggamma = sum(gu xhat) = m b, and gw and gx by the convolution. Along a direction of all parameters
(dw, dgamma, dbeta) each of them has a derivative D. With p = Dz = conv(Dx, w) + conv(x, dw) and c = mean(p xhat):

    Dxhat = s P(p)    Du = dgamma xhat + gamma s P(p) + dbeta    Dgu = Dgy [u > 0]
    Dgbeta = sum(Dgu)    Dggamma = sum(Dgu xhat) + s k    with k = sum(gu P(p))
    Dgz = P(q) - gamma s^2 (b P(p) + xhat k / m)    with q = gamma s Dgu + (dgamma s - gamma s^2 c) gu
"""

# Above 300 lines: one formula with its first and second derivative, which are read side by side.
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metaft.types import Moments

_aten = torch.ops.aten

_Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is fixed: plain values that travel with the tensors."""

    stride: int
    pool: bool
    eps: float
    z_sizes: tuple[_Size, ...]
    """Height and width of each layer's convolution."""
    sizes: tuple[_Size, ...]
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Body:
    """Per layer: weights [tasks, ...] or shared, scales and shifts [tasks, channels]."""

    weights: list[Tensor]
    scales: list[Tensor]
    shifts: list[Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class _Params(_Body):
    """Then the head's."""

    head: Tensor
    """[tasks, ways, features]"""
    bias: Tensor


class _Up(NamedTuple):
    """One layer on the way up, as rows [tasks, n H W, channels] or per channel [tasks, channels]."""

    y: Tensor
    z: Tensor
    """The convolution's output less its mean."""
    s: Tensor
    peaks: Tensor
    """z at the maxima of gamma z, or z itself without pooling."""
    at: Tensor | None
    """Where they are, as max_pool2d tells it: [tasks n, channels, H / 2, W / 2]."""


class _Layer(NamedTuple):
    """One layer's part of the gradient: what `_Up` has, and the way down."""

    y: Tensor
    z: Tensor
    s: Tensor
    peaks: Tensor
    at: Tensor | None
    gu: Tensor
    gz: Tensor
    gbeta: Tensor
    ggamma: Tensor


class _Top(NamedTuple):
    """The head's part: [tasks, n, ...]."""

    features: Tensor
    chances: Tensor
    gl: Tensor
    """The loss's gradient in the logits."""


def conv4_loss(
    x: Tensor,
    y: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    head: Tensor,
    bias: Tensor,
    *,
    stride: int,
    pool: bool,
    average: bool,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and logits [n, ways] of images [n, C, H, W] with labels [n].

    Layers are relu(norm(conv(x))), max-pooled by 2 if `pool`, once per weight, where convolutions are 3x3 with padding
    1 and no bias and each channel is normalised with the batch's own moments, then scaled and shifted; then a linear
    head on the mean over the last map, or on all of it.

    The loss can be differentiated twice in all parameters, by autograd and by torch.func, also under vmaps. The
    second time is cheaper with `keep`, which costs memory. The logits have no derivative, nor have the images.
    """
    form = _form(x, len(weights), stride, pool, average, eps, keep)
    value, logits, *_ = _Loss.apply(form, _pixels(x), y, *weights, *scales, *shifts, head, bias)  # type: ignore[reportGeneralTypeIssues]
    return value, logits


def conv4_embedded(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    stride: int,
    pool: bool,
    average: bool,
    eps: float,
) -> Tensor:
    """What the head sees [n, features] of images [n, C, H, W], through the layers of `conv4_loss`.

    It can be differentiated in all parameters as that can, but the second derivative is composed from PyTorch's
    operations. The images have none.
    """
    form = _form(x, len(weights), stride, pool, average, eps, True)
    features, *_ = _Features.apply(form, _pixels(x), *weights, *scales, *shifts)  # type: ignore[reportGeneralTypeIssues]
    return features


def _form(x: Tensor, layers: int, stride: int, pool: bool, average: bool, eps: float, keep: bool) -> _Form:
    z_sizes: list[_Size] = []
    sizes: list[_Size] = [(x.shape[2], x.shape[3])]
    for _ in range(layers):
        height, width = ((side - 1) // stride + 1 for side in sizes[-1])
        z_sizes.append((height, width))
        sizes.append((height // 2, width // 2) if pool else (height, width))
    return _Form(stride, pool, eps, tuple(z_sizes), tuple(sizes), average, keep)


def _pixels(x: Tensor) -> Tensor:
    """Images [n, C, H, W] as rows [n H W, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


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
    with: its batch's own, or those `given`. The layers are those of `conv4_loss`; nothing has a derivative."""
    y = _images(_pixels(x).unsqueeze(0), (x.shape[2], x.shape[3]))
    used = []
    for i, (w, gamma, beta) in enumerate(zip(weights, scales, shifts, strict=True)):
        z, mean, var = _peaks_and_moments(y, w, gamma, stride, pool, None if given is None else given[i])
        used.append((mean, var))
        normal = _rows(z, 1).sub_(mean).mul_(gamma * (var + eps).rsqrt()).add_(beta).relu_()
        y = _images(normal, (z.shape[2], z.shape[3]))
    maps = y.permute(0, 2, 3, 1)
    return maps.mean((1, 2)) if average else y.flatten(1), tuple(used)


_CACHED = 1 << 20
"""Values of a map that are pooled before they leave a core's cache."""


def _peaks_and_moments(
    y: Tensor, w: Tensor, gamma: Tensor, stride: int, pool: bool, given: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the convolution z of images y [n, C, H, W], in one task: z where gamma z is largest in each 2x2 pixels (z as
    it is without pooling), and its mean and biased variance by channel, those that are given if any are. Where it is
    pooled, no more than some images' z is ever there."""
    maps = len(w) * y.shape[2] * y.shape[3] // stride**2
    some = max(1, _CACHED // maps) if pool else len(y)
    sign = torch.where(gamma < 0, -1.0, 1.0).to(y).view(-1, 1, 1) if pool and bool((gamma < 0).any()) else None
    peaks, stats = [], []
    for part in y.split(some):
        z = F.conv2d(part, w, None, stride, 1)
        if given is None:
            stats.append(moments(_rows(z, 1)))
        if sign is not None:
            z = z * sign
        peaks.append(F.max_pool2d(z, 2) if pool else z)
    z = _joined(peaks)
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


# --- the arithmetic, for tensors with a task axis -------------------------------------------------------------------


def _rows(images: Tensor, tasks: int) -> Tensor:
    """[tasks n, C, H, W] to [tasks, n H W, C]; no copy from channels_last."""
    return images.permute(0, 2, 3, 1).reshape(tasks, -1, images.shape[1])


def _images(rows: Tensor, size: _Size) -> Tensor:
    """[tasks, n H W, C] to [tasks n, C, H, W] in channels_last."""
    if rows.shape[-1] == 1:  # the strides alone tell the layout then, and a result in the other one is slow to reorder
        return rows.reshape(-1, *size).unsqueeze(-1).permute(0, 3, 1, 2)
    return rows.reshape(-1, *size, rows.shape[-1]).permute(0, 3, 1, 2)


def _conv(x: Tensor, w: Tensor, stride: int) -> Tensor:
    """Images [tasks n, C, H, W], with one weight or with one per task."""
    if w.dim() == 4:
        return F.conv2d(x, w, None, stride, 1)
    return _joined([F.conv2d(part, weight, None, stride, 1) for part, weight in zip(x.chunk(len(w)), w, strict=True)])


def _conv_to_images(gz: Tensor, x: Tensor, w: Tensor, stride: int) -> Tensor:
    """Gradient in images like `x`, with one weight or with one per task."""
    if w.dim() == 4:
        return _conv_backward(gz, x, w, stride, True, False)[0]
    each = zip(gz.chunk(len(w)), x.chunk(len(w)), w, strict=True)
    return _joined([_conv_backward(g, part, own, stride, True, False)[0] for g, part, own in each])


def _conv_to_weights(gz: Tensor, x: Tensor, w: Tensor, stride: int, tasks: int) -> Tensor:
    """Gradient in the weights, one per task: [tasks, ...]."""
    w = w if w.dim() == 4 else w[0]  # of which only the shape counts
    each = zip(gz.chunk(tasks), x.chunk(tasks), strict=True)
    return torch.stack([_conv_backward(g, part, w, stride, False, True)[1] for g, part in each])


def _conv_backward(gz: Tensor, x: Tensor, w: Tensor, stride: int, to_x: bool, to_w: bool) -> Any:
    mask = [to_x, to_w, False]
    return _aten.convolution_backward(gz, x, w, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, mask)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _own(w: Tensor, tasks: int) -> Tensor:
    """One weight per task."""
    return w.unsqueeze(0) if w.dim() == 4 and tasks == 1 else w


def _pooled(v: Tensor, at: Tensor, size: _Size) -> Tensor:
    """Rows of values at the peaks, out of rows of all values."""
    return _rows(_images(v, size).flatten(2).gather(2, at.flatten(2)).view_as(at), len(v))


def _unpooled(v: Tensor, at: Tensor, like: Tensor, size: _Size) -> Tensor:
    """Rows like `like`, zero but for the values `v` at the peaks' places."""
    small, large = _images(v, (at.shape[2], at.shape[3])), _images(like, size)
    wide = _aten.max_pool2d_with_indices_backward(small, large, [2, 2], [2, 2], [0, 0], [1, 1], False, at)
    return _rows(wide, len(v))


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
    means, variances = (_joined(list(of)).double().view(tasks, parts, channels) for of in zip(*each, strict=True))
    mean = means.mean(1, keepdim=True)
    apart = means - mean
    return mean.squeeze(1).to(rows), variances.addcmul(apart, apart).mean(1).to(rows)


def _total(rows: Tensor) -> Tensor:
    return rows.sum(1)


def _affine(shift: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """shift + rows * scale, both per task and channel."""
    return torch.addcmul(shift.unsqueeze(1), rows, scale.unsqueeze(1))


def _features(form: _Form, rows: Tensor, n: int) -> Tensor:
    """[tasks, n H W, C] to what the head sees: [tasks, n, features]."""
    maps = rows.view(len(rows), n, -1, rows.shape[-1])
    return maps.mean(2) if form.average else maps.transpose(2, 3).reshape(len(rows), n, -1)


def _from_features(form: _Form, features: Tensor, channels: int) -> Tensor:
    """The transpose of `_features`."""
    tasks, n, _ = features.shape
    pixels = form.sizes[-1][0] * form.sizes[-1][1]
    if form.average:
        return (features / pixels).unsqueeze(2).expand(-1, -1, pixels, -1).reshape(tasks, -1, channels)
    return features.view(tasks, n, channels, pixels).transpose(2, 3).reshape(tasks, -1, channels)


class _Pass(NamedTuple):
    value: Tensor
    logits: Tensor
    grads: list[Tensor]
    """In the order of `_Params`."""
    layers: list[_Layer]
    top: _Top


def _upwards(form: _Form, x: Tensor, p: _Body, tasks: int) -> list[_Up]:
    """All layers of images x [tasks, n H W, C]."""
    ups: list[_Up] = []
    y = x
    for i, (w, gamma, beta) in enumerate(zip(p.weights, p.scales, p.shifts, strict=True)):
        z = _rows(_conv(_images(y, form.sizes[i]), w, form.stride), tasks)
        mean, var = moments(z)
        z.sub_(mean.unsqueeze(1))
        images = _images(z, form.z_sizes[i])
        s = (var + form.eps).rsqrt()
        peaks, at = z, None
        if form.pool:
            # Of a channel with a negative scale the smallest value is the peak.
            flipped = bool((gamma < 0).any())
            sign = torch.where(gamma < 0, -1.0, 1.0).to(z).unsqueeze(1)
            if flipped:
                images = _images(z * sign, form.z_sizes[i])
            peaks, at = F.max_pool2d(images, 2, return_indices=True)
            peaks = _rows(peaks, tasks)
            peaks = peaks * sign if flipped else peaks
        y = _affine(beta, peaks, gamma * s).relu_()
        ups.append(_Up(y, z, s, peaks, at))
    return ups


def _downwards(
    form: _Form, x: Tensor, p: _Body, ups: list[_Up], gy: Tensor, *, keep: bool
) -> tuple[list[Tensor], list[_Layer]]:
    """The gradient in `_Body`'s order, from that in the last layer's output; `ups` is empty afterwards. The layers are
    returned only to be kept."""
    layers: list[_Layer] = []
    weights: list[Tensor] = []
    scales: list[Tensor] = []
    shifts: list[Tensor] = []
    for i in reversed(range(form.layers)):
        y, z, s, peaks, at = ups.pop()
        gu = _aten.threshold_backward(gy, y, 0)
        m = z.shape[1]
        gbeta = _total(gu)
        ggamma = s * _total(gu * peaks)
        scale = p.scales[i] * s
        slope = -scale * s * ggamma / m
        gz = _affine(-scale * gbeta / m, z, slope)
        if at is None:
            gz.addcmul_(gu, scale.unsqueeze(1))
        else:
            gz += _unpooled(gu * scale.unsqueeze(1), at, z, form.z_sizes[i])
        below, gz_images = _images(ups[-1].y if i else x, form.sizes[i]), _images(gz, form.z_sizes[i])
        weights.append(_conv_to_weights(gz_images, below, p.weights[i], form.stride, len(x)))
        if i:
            gy = _rows(_conv_to_images(gz_images, below, p.weights[i], form.stride), len(x))
        scales.append(ggamma)
        shifts.append(gbeta)
        if keep:
            layers.append(_Layer(y, z, s, peaks, at, gu, gz, gbeta, ggamma))
    layers.reverse()
    return [*reversed(weights), *reversed(scales), *reversed(shifts)], layers


def _gradient(form: _Form, x: Tensor, labels: Tensor, p: _Params, *, keep: bool) -> _Pass:
    """Loss and gradient: x [tasks, n H W, C], labels [tasks, n]. The layers are returned only to be kept."""
    tasks, n = labels.shape
    ups = _upwards(form, x, p, tasks)
    channels = ups[-1].y.shape[-1]
    features = _features(form, ups[-1].y, n)
    logits = torch.baddbmm(p.bias.unsqueeze(1), features, p.head.transpose(1, 2))
    logs = logits.log_softmax(-1)
    value = -logs.gather(-1, labels.unsqueeze(-1)).mean((1, 2))
    chances = logs.exp()
    gl = (chances - F.one_hot(labels, logits.shape[-1])) / n
    body, layers = _downwards(form, x, p, ups, _from_features(form, gl @ p.head, channels), keep=keep)
    grads = [*body, gl.transpose(1, 2) @ features, gl.sum(1)]
    return _Pass(value, logits, grads, layers, _Top(features, chances, gl))


# Above 60 lines: the formulas of one pass, in its order.
def _derivative(form: _Form, x: Tensor, p: _Params, layers: Sequence[_Layer], top: _Top, d: _Params) -> list[Tensor]:
    """The derivative of `_gradient`'s gradient along `d`; the Hessian times d."""
    tasks, n = top.gl.shape[:2]
    below: list[Tensor] = [_images(y, size) for y, size in zip([x, *(v.y for v in layers)], form.sizes, strict=True)]
    dbelow: list[Tensor | None] = [None]
    dy = x
    ups = []
    for i, v in enumerate(layers):
        w, dw, gamma, m = p.weights[i], d.weights[i], p.scales[i], v.z.shape[1]
        dz = _rows(_conv_along(below[i], w, dbelow[i], dw, form.stride, tasks), tasks)
        at_peaks = dz if v.at is None else _pooled(dz, v.at, form.z_sizes[i])
        scale = gamma * v.s
        total = _total(dz)
        c = v.s * _total(dz * v.z) / m
        k = _total(at_peaks * v.gu) - total * v.gbeta / m - v.ggamma * c
        slope = v.s * (d.scales[i] - scale * c)
        du = _affine(d.shifts[i] - scale * total / m, v.peaks, slope)
        du.addcmul_(at_peaks, scale.unsqueeze(1))
        dy = _aten.threshold_backward(du, v.y, 0)
        ups.append((dz, total, c, k))
        dbelow.append(_images(dy, form.sizes[i + 1]))

    dfeatures = _features(form, dy, n)
    dlogits = torch.baddbmm(d.bias.unsqueeze(1), dfeatures, p.head.transpose(1, 2))
    dlogits = dlogits.baddbmm_(top.features, d.head.transpose(1, 2))
    dgl = top.chances * (dlogits - (top.chances * dlogits).sum(-1, keepdim=True)) / n
    dhead = (dgl.transpose(1, 2) @ top.features).baddbmm_(top.gl.transpose(1, 2), dfeatures)
    dgy = _from_features(form, (dgl @ p.head).baddbmm_(top.gl, d.head), dy.shape[-1])

    weights: list[Tensor] = []
    scales: list[Tensor] = []
    shifts: list[Tensor] = []
    for i in reversed(range(form.layers)):
        v, (dz, total, c, k) = layers[i], ups[i]
        w, dw, gamma, m = p.weights[i], d.weights[i], p.scales[i], v.z.shape[1]
        scale, b = gamma * v.s, v.ggamma / m
        dgu = _aten.threshold_backward(dgy, v.y, 0)
        dgbeta = _total(dgu)
        along = v.s * _total(dgu * v.peaks)  # sum(Dgu xhat)
        shifts.append(dgbeta)
        scales.append(along + v.s * k)

        # Dgz in terms of q, z and p: P(q) - gamma s^2 (b (p - mean(p) - xhat c) + xhat k / m)
        of_gu, of_dz = d.scales[i] * v.s - scale * v.s * c, -scale * v.s * b
        mean_q = (scale * dgbeta + of_gu * v.gbeta) / m
        q_along = (scale * along + of_gu * v.ggamma) / m
        slope = -v.s * (q_along + of_dz * c + scale * v.s * k / m)
        dgz = _affine(-mean_q - of_dz * total / m, v.z, slope)
        dgz.addcmul_(dz, of_dz.unsqueeze(1))
        q = (dgu * scale.unsqueeze(1)).addcmul_(v.gu, of_gu.unsqueeze(1))
        dgz += q if v.at is None else _unpooled(q, v.at, v.z, form.z_sizes[i])

        gz, dgz = _images(v.gz, form.z_sizes[i]), _images(dgz, form.z_sizes[i])
        dx = dbelow[i]
        if dx is None:
            weights.append(_conv_to_weights(dgz, below[i], w, form.stride, tasks))
            continue
        g_both, x_both = _per_task(dgz, gz, tasks), _per_task(below[i], dx, tasks)
        weights.append(_conv_to_weights(g_both, x_both, w, form.stride, tasks))
        dgy = _rows(_conv_to_images_along(gz, below[i], w, dgz, dw, form.stride, tasks), tasks)
    return [*reversed(weights), *reversed(scales), *reversed(shifts), dhead, dgl.sum(1)]


def _conv_along(x: Tensor, w: Tensor, dx: Tensor | None, dw: Tensor, stride: int, tasks: int) -> Tensor:
    """The derivative of `_conv` along (dx, dw): with a task's own weights one convolution, twice as deep."""
    if dx is None:
        return _conv(x, dw, stride)
    if w.dim() == 5 or tasks == 1:
        return _conv(torch.cat([dx, x], 1), torch.cat([_own(w, tasks), _own(dw, tasks)], 2), stride)
    return _conv(dx, w, stride) + _conv(x, dw, stride)


def _conv_to_images_along(gz: Tensor, x: Tensor, w: Tensor, dgz: Tensor, dw: Tensor, stride: int, tasks: int) -> Tensor:
    """The derivative of `_conv_to_images` along (dgz, dw), likewise."""
    if w.dim() == 5 or tasks == 1:
        deep = torch.cat([_own(w, tasks), _own(dw, tasks)], 1)
        return _conv_to_images(torch.cat([dgz, gz], 1), x, deep, stride)
    return _conv_to_images(dgz, x, w, stride) + _conv_to_images(gz, x, dw, stride)


def _per_task(a: Tensor, b: Tensor, tasks: int) -> Tensor:
    """Each task's images of `a`, then its images of `b`."""
    return torch.cat([a.unflatten(0, (tasks, -1)), b.unflatten(0, (tasks, -1))], 1).flatten(0, 1)


# --- the same as functions that autograd and torch.func know --------------------------------------------------------
#
# autograd.Function wants flat arguments and results. Parameters: weights, scales, shifts (each for all layers), head.


class _Loss(torch.autograd.Function):
    """(form, x, labels, parameters) to the loss, logits, gradient and, without derivatives, what `keep` keeps.

    The gradient is an output of its own, which `backward` multiplies with the cotangent of the loss. So the derivative
    of a gradient comes back here as the cotangent of that output.
    """

    @staticmethod
    def forward(form: _Form, x: Tensor, labels: Tensor, *params: Tensor) -> Any:
        x, labels = _lifted(form, x, labels)
        p = _grouped(form, params)
        if _one_by_one(form, x, p):
            passes = [_gradient(form, *_one(i, x, labels, p), keep=False) for i in range(len(x))]
        else:
            passes = [_gradient(form, x, labels, p, keep=form.keep)]
        value, logits = _joined([one.value for one in passes]), _joined([one.logits for one in passes])
        grads = [_joined(list(each)) for each in zip(*[one.grads for one in passes], strict=True)]
        kept = _kept(passes[0].layers, passes[0].top) if form.keep else []
        return _lowered(form, [value, logits, *grads, *kept])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        form, *tensors = inputs
        _, logits, *rest = output
        ctx.form = form
        ctx.set_materialize_grads(False)
        count = len(tensors) - 2
        ctx.mark_non_differentiable(logits, *[v for v in rest[count:] if v is not None])
        ctx.save_for_backward(*tensors, *rest)

    @staticmethod
    def backward(ctx: Any, of_value: Tensor | None, of_logits: None, *direction: Tensor | None) -> Any:
        count = _count(ctx.form)
        x, labels, *rest = ctx.saved_tensors
        params, grads, kept = rest[:count], rest[count : 2 * count], rest[2 * count :]
        back: list[Tensor | None] = [None] * count
        if of_value is not None:
            back = [of_value.reshape(*of_value.shape, *[1] * (g.dim() - of_value.dim())) * g for g in grads]
        if any(d is not None for d in direction[:count]):
            filled = [torch.zeros_like(g) if d is None else d for d, g in zip(direction[:count], grads, strict=True)]
            curved = _Derivative.apply(ctx.form, x, labels, *params, *filled, *kept)
            assert curved is not None
            back = [v if b is None else v + b for v, b in zip(curved, back, strict=True)]
        return None, None, None, *_shared(back, params)

    @staticmethod
    def vmap(info: Any, in_dims: Any, form: _Form, *tensors: Tensor) -> Any:
        return _vmapped(_Loss, info, in_dims, form, tensors)


class _Derivative(torch.autograd.Function):
    """(form, x, labels, parameters, direction, what `_Loss` kept) to the derivative of its gradient."""

    @staticmethod
    def forward(form: _Form, x: Tensor, labels: Tensor, *rest: Tensor) -> Any:
        count = _count(form)
        x, labels = _lifted(form, x, labels)
        p, d = _grouped(form, rest[:count]), _grouped(form, rest[count : 2 * count])
        if form.keep:
            layers, top = _unkept(form, rest[2 * count :])
        else:
            done = _gradient(form, x, labels, p, keep=True)
            layers, top = done.layers, done.top
        return _lowered(form, _derivative(form, x, p, layers, top, d))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("conv4_loss has a first and a second derivative, not a third")

    @staticmethod
    def vmap(info: Any, in_dims: Any, form: _Form, *tensors: Tensor) -> Any:
        return _vmapped(_Derivative, info, in_dims, form, tensors)


class _Features(torch.autograd.Function):
    """(form, x, the body's parameters) to the features and, without derivatives, what the gradient needs."""

    @staticmethod
    def forward(form: _Form, x: Tensor, *params: Tensor) -> Any:
        (x,) = _lifted(form, x)
        ups = _upwards(form, x, _body(form, params), len(x))
        features = _features(form, ups[-1].y, _images_in(form, x))
        return _lowered(form, [features, *[v for up in ups for v in _flat_up(up)]])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        form, *tensors = inputs
        _, *kept = output
        ctx.form = form
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[v for v in kept if v is not None])
        ctx.save_for_backward(*tensors, *kept)

    @staticmethod
    def backward(ctx: Any, of_features: Tensor | None, *of_kept: None) -> Any:
        count = 3 * ctx.form.layers
        x, *rest = ctx.saved_tensors
        if of_features is None:
            return (None,) * (2 + count)
        grads = _Gradient.apply(ctx.form, x, of_features, *rest)
        assert grads is not None
        return None, None, *_shared(grads, rest)

    @staticmethod
    def vmap(info: Any, in_dims: Any, form: _Form, *tensors: Tensor) -> Any:
        return _vmapped(_Features, info, in_dims, form, tensors, first_weight=1)


class _Gradient(torch.autograd.Function):
    """(form, x, the gradient in the features, the body's parameters, what `_Features` kept) to that in the parameters.

    Its own derivative is asked for by those alone who move a body by its features. It is composed from operations that
    PyTorch knows.
    """

    @staticmethod
    def forward(form: _Form, x: Tensor, of_features: Tensor, *rest: Tensor) -> Any:
        count = 3 * form.layers
        x, of_features = _lifted(form, x, of_features)
        p = _body(form, rest[:count])
        gy = _from_features(form, of_features, p.scales[-1].shape[-1])
        grads, _ = _downwards(form, x, p, _ups(form, rest[count:]), gy, keep=False)
        return _lowered(form, grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        form, *tensors = inputs
        ctx.form = form
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors[: 2 + 3 * form.layers])

    @staticmethod
    def backward(ctx: Any, *direction: Tensor) -> Any:
        form = ctx.form
        x, of_features, *params = ctx.saved_tensors

        def back(x: Tensor, of_features: Tensor, params: list[Tensor], direction: Sequence[Tensor]) -> list[Tensor]:
            def gradient(of_features: Tensor, *params: Tensor) -> Any:
                return torch.func.vjp(lambda *own: _composed(form, x, own), *params)[1](of_features)

            return list(torch.func.vjp(gradient, of_features, *params)[1](tuple(direction)))

        if form.tasks is None:
            found = back(x, of_features, params, direction)
        else:
            dims = [None if i < form.layers and v.dim() == 4 else 0 for i, v in enumerate(params)]
            found = torch.func.vmap(back, (0, 0, dims, 0))(x, of_features, params, direction)
        nothing = [None] * (ctx.count - 2 - len(params))
        return None, None, found[0], *_shared(found[1:], params), *nothing

    @staticmethod
    def vmap(info: Any, in_dims: Any, form: _Form, *tensors: Tensor) -> Any:
        return _vmapped(_Gradient, info, in_dims, form, tensors)


def _composed(form: _Form, x: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The features of one task, from operations that PyTorch can differentiate as often as is asked."""
    n, (height, width) = form.layers, form.sizes[0]
    y = x.view(-1, height, width, x.shape[-1]).permute(0, 3, 1, 2)
    for w, gamma, beta in zip(params[:n], params[n : 2 * n], params[2 * n :], strict=True):
        z = F.conv2d(y, w, None, form.stride, 1)
        z = z - z.mean((0, 2, 3), keepdim=True)
        s = (z.square().mean((0, 2, 3), keepdim=True) + form.eps).rsqrt()
        y = F.relu(z * s * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1))
        y = F.max_pool2d(y, 2) if form.pool else y
    return y.mean((2, 3)) if form.average else y.flatten(1)


_ALONE = 1 << 18
"""Values of a task's first map from which tasks go one by one: many more do not fit into a core's cache together."""


def _one_by_one(form: _Form, x: Tensor, p: _Params) -> bool:
    pixels = form.z_sizes[0][0] * form.z_sizes[0][1] * _images_in(form, x)
    return not form.keep and pixels * p.scales[0].shape[-1] >= _ALONE


def _one(i: int, x: Tensor, labels: Tensor, p: _Params) -> tuple[Tensor, Tensor, _Params]:
    part = slice(i, i + 1)
    weights = [w if w.dim() == 4 else w[part] for w in p.weights]
    p = _Params(weights, [v[part] for v in p.scales], [v[part] for v in p.shifts], p.head[part], p.bias[part])
    return x[part], labels[part], p


def _count(form: _Form) -> int:
    return 3 * form.layers + 2


def _body(form: _Form, params: Sequence[Tensor]) -> _Body:
    """With a task axis; weights that the tasks share have none."""
    n = form.layers
    weights, rest = list(params[:n]), _lifted(form, *params[n : 3 * n])
    return _Body(weights, list(rest[:n]), list(rest[n:]))


def _grouped(form: _Form, params: Sequence[Tensor]) -> _Params:
    """Likewise, with the head."""
    body = _body(form, params)
    return _Params(body.weights, body.scales, body.shifts, *_lifted(form, *params[3 * form.layers :]))


def _shared(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients like their parameters: of those that tasks share, the sum over tasks."""
    return [g.sum(0) if g is not None and g.dim() > v.dim() else g for g, v in zip(grads, params, strict=False)]


def _images_in(form: _Form, x: Tensor) -> int:
    """How many there are in rows [tasks, n H W, C]."""
    return x.shape[1] // (form.sizes[0][0] * form.sizes[0][1])


def _lifted(form: _Form, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(v.unsqueeze(0) for v in tensors) if form.tasks is None else tensors


def _lowered(form: _Form, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(v if v is None or form.tasks is not None else v.squeeze(0) for v in tensors)


def _flat_up(v: _Up | _Layer) -> list[Tensor | None]:
    """No tensor twice, as autograd wants the outputs of a function: without pooling the peaks are z."""
    at = None if v.at is None else v.at.unflatten(0, (len(v.y), -1))
    return [v.y, v.z, v.s, None if v.at is None else v.peaks, at]


def _up(form: _Form, y: Any, z: Any, s: Any, peaks: Any, at: Any) -> _Up:
    """From what `_flat_up` gave."""
    y, z, s = _lifted(form, y, z, s)
    if at is None:
        return _Up(y, z, s, z, None)
    (peaks,) = _lifted(form, peaks)
    return _Up(y, z, s, peaks, at.flatten(0, at.dim() - 4))


def _ups(form: _Form, flat: Sequence[Any]) -> list[_Up]:
    return [_up(form, *flat[5 * i : 5 * (i + 1)]) for i in range(form.layers)]


def _kept(layers: Sequence[_Layer], top: _Top) -> list[Tensor | None]:
    """Flat; the gradients of scale and shift are outputs of their own already."""
    flat: list[Tensor | None] = []
    for v in layers:
        flat += [*_flat_up(v), v.gu, v.gz, v.gbeta.clone(), v.ggamma.clone()]
    return [*flat, *top]


def _unkept(form: _Form, flat: Sequence[Any]) -> tuple[list[_Layer], _Top]:
    each = [flat[9 * i : 9 * (i + 1)] for i in range(form.layers)]
    layers = [_Layer(*_up(form, *v[:5]), *_lifted(form, *v[5:])) for v in each]
    return layers, _Top(*_lifted(form, *flat[9 * form.layers :]))


def _vmapped(
    function: Any, info: Any, in_dims: Any, form: _Form, tensors: Sequence[Tensor | None], first_weight: int = 2
) -> Any:
    """As one more leading task axis, or as more tasks along the one that there is. Weights that no task has to itself
    have neither."""
    size, before = info.batch_size, form.tasks
    moved: list[Tensor | None] = []
    for i, (v, dim) in enumerate(zip(tensors, in_dims[1:], strict=True)):
        if v is None:
            moved.append(None)
            continue
        is_weight = first_weight <= i < first_weight + form.layers
        by_task = before is not None and not (is_weight and v.dim() - (dim is not None) == 4)
        if dim is not None:
            v = v.movedim(dim, 0)
        elif by_task or not is_weight:
            v = v.expand(size, *v.shape)
        if before is not None and (by_task or dim is not None):
            v = v if by_task else v.unsqueeze(1).expand(size, before, *v.shape[1:])
            v = v.flatten(0, 1)
        moved.append(v)
    tasks = size if before is None else size * before
    out = function.apply(dataclasses.replace(form, tasks=tasks), *moved)
    if before is not None:
        out = tuple(None if v is None else v.unflatten(0, (size, before)) for v in out)
    return out, tuple(None if v is None else 0 for v in out)
