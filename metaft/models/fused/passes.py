"""The loss and its gradient, features and theirs, and the derivative of the gradient, for tensors with a task axis.

The formulas, per task and layer. With z the convolution's output, m values per channel, mu and s = (var + eps) ** -0.5
its moments, xhat = (z - mu) s, u = gamma xhat + beta and y = max(0, u), the gradient is

    gu = gy [u > 0]    gz = gamma s P(gu)    with P(v) = v - mean(v) - xhat mean(v xhat),

gbeta = sum(gu), ggamma = sum(gu xhat) = m b, and gw and gx by the convolution. Along a direction of all parameters
(dw, dgamma, dbeta) each of them has a derivative D. With p = Dz = conv(Dx, w) + conv(x, dw) and c = mean(p xhat):

    Dxhat = s P(p)    Du = dgamma xhat + gamma s P(p) + dbeta    Dgu = Dgy [u > 0]
    Dgbeta = sum(Dgu)    Dggamma = sum(Dgu xhat) + s k    with k = sum(gu P(p))
    Dgz = P(q) - gamma s^2 (b P(p) + xhat k / m)    with q = gamma s Dgu + (dgamma s - gamma s^2 c) gu
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metaft.models.fused.form import Body, Form, Layer, Params, Top, Up, from_features, to_features
from metaft.models.fused.rows import (
    affine,
    conv,
    conv_along,
    conv_to_images,
    conv_to_images_along,
    conv_to_weights,
    moments,
    per_task,
    pooled,
    summed,
    to_images,
    to_rows,
    unpooled,
)

_aten = torch.ops.aten


class Pass(NamedTuple):
    value: Tensor
    logits: Tensor
    grads: list[Tensor]
    """In the order of `Params`."""
    layers: list[Layer]
    top: Top


def upwards(form: Form, x: Tensor, p: Body, tasks: int) -> list[Up]:
    """All layers of images x [tasks, n H W, C]."""
    ups: list[Up] = []
    y = x
    for i, (w, gamma, beta) in enumerate(zip(p.weights, p.scales, p.shifts, strict=True)):
        z = to_rows(conv(to_images(y, form.sizes[i]), w, form.kind), tasks)
        mean, var = moments(z)
        z.sub_(mean.unsqueeze(1))
        images = to_images(z, form.z_sizes[i])
        s = (var + form.eps).rsqrt()
        peaks, at = z, None
        if form.pool:
            # Of a channel with a negative scale the smallest value is the peak.
            flipped = bool((gamma < 0).any())
            sign = torch.where(gamma < 0, -1.0, 1.0).to(z).unsqueeze(1)
            if flipped:
                images = to_images(z * sign, form.z_sizes[i])
            peaks, at = F.max_pool2d(images, 2, return_indices=True)
            peaks = to_rows(peaks, tasks)
            peaks = peaks * sign if flipped else peaks
        y = affine(beta, peaks, gamma * s).relu_()
        ups.append(Up(y, z, s, peaks, at))
    return ups


def downwards(
    form: Form, x: Tensor, p: Body, ups: list[Up], gy: Tensor, *, keep: bool
) -> tuple[list[Tensor], list[Layer]]:
    """The gradient in `Body`'s order, from that in the last layer's output; `ups` is empty afterwards. The layers are
    returned only to be kept."""
    layers: list[Layer] = []
    weights: list[Tensor] = []
    scales: list[Tensor] = []
    shifts: list[Tensor] = []
    for i in reversed(range(form.layers)):
        y, z, s, peaks, at = ups.pop()
        gu = _aten.threshold_backward(gy, y, 0)
        m = z.shape[1]
        gbeta = summed(gu)
        ggamma = s * summed(gu * peaks)
        scale = p.scales[i] * s
        slope = -scale * s * ggamma / m
        gz = affine(-scale * gbeta / m, z, slope)
        if at is None:
            gz.addcmul_(gu, scale.unsqueeze(1))
        else:
            gz += unpooled(gu * scale.unsqueeze(1), at, z, form.z_sizes[i])
        below = form.kind.factor(to_images(ups[-1].y if i else x, form.sizes[i]))
        gz_images = form.kind.factor(to_images(gz, form.z_sizes[i]))
        weights.append(conv_to_weights(gz_images, below, p.weights[i], form.kind, len(x)))
        if i:
            gy = to_rows(conv_to_images(gz_images, below, p.weights[i], form.kind), len(x))
        scales.append(ggamma)
        shifts.append(gbeta)
        if keep:
            layers.append(Layer(y, z, s, peaks, at, gu, gz, gbeta, ggamma))
    layers.reverse()
    return [*reversed(weights), *reversed(scales), *reversed(shifts)], layers


def gradient(form: Form, x: Tensor, labels: Tensor, p: Params, *, keep: bool) -> Pass:
    """Loss and gradient: x [tasks, n H W, C], labels [tasks, n]. The layers are returned only to be kept."""
    tasks, n = labels.shape
    ups = upwards(form, x, p, tasks)
    channels = ups[-1].y.shape[-1]
    features = to_features(form, ups[-1].y, n)
    logits = torch.baddbmm(p.bias.unsqueeze(1), features, p.head.transpose(1, 2))
    logs = logits.log_softmax(-1)
    value = -logs.gather(-1, labels.unsqueeze(-1)).mean((1, 2))
    chances = logs.exp()
    gl = (chances - F.one_hot(labels, logits.shape[-1])) / n
    body, layers = downwards(form, x, p, ups, from_features(form, gl @ p.head, channels), keep=keep)
    grads = [*body, gl.transpose(1, 2) @ features, gl.sum(1)]
    return Pass(value, logits, grads, layers, Top(features, chances, gl))


# Above 60 lines: the formulas of one pass, in its order.
def derivative(form: Form, x: Tensor, p: Params, layers: Sequence[Layer], top: Top, d: Params) -> list[Tensor]:
    """The derivative of `gradient`'s gradient along `d`; the Hessian times d."""
    tasks, n = top.gl.shape[:2]
    factor = form.kind.factor
    inputs = zip([x, *(v.y for v in layers[:-1])], form.sizes[:-1], strict=True)
    below = [factor(to_images(y, size)) for y, size in inputs]
    dbelow: list[Tensor | None] = [None]
    dy = x
    ups = []
    for i, v in enumerate(layers):
        w, dw, gamma, m = p.weights[i], d.weights[i], p.scales[i], v.z.shape[1]
        dz = to_rows(conv_along(below[i], w, dbelow[i], dw, form.kind, tasks), tasks)
        at_peaks = dz if v.at is None else pooled(dz, v.at, form.z_sizes[i])
        scale = gamma * v.s
        total = summed(dz)
        c = v.s * summed(dz * v.z) / m
        k = summed(at_peaks * v.gu) - total * v.gbeta / m - v.ggamma * c
        slope = v.s * (d.scales[i] - scale * c)
        du = affine(d.shifts[i] - scale * total / m, v.peaks, slope)
        du.addcmul_(at_peaks, scale.unsqueeze(1))
        dy = _aten.threshold_backward(du, v.y, 0)
        ups.append((dz, total, c, k))
        dbelow.append(factor(to_images(dy, form.sizes[i + 1])))

    dfeatures = to_features(form, dy, n)
    dlogits = torch.baddbmm(d.bias.unsqueeze(1), dfeatures, p.head.transpose(1, 2))
    dlogits = dlogits.baddbmm_(top.features, d.head.transpose(1, 2))
    dgl = top.chances * (dlogits - (top.chances * dlogits).sum(-1, keepdim=True)) / n
    dhead = (dgl.transpose(1, 2) @ top.features).baddbmm_(top.gl.transpose(1, 2), dfeatures)
    dgy = from_features(form, (dgl @ p.head).baddbmm_(top.gl, d.head), dy.shape[-1])

    weights: list[Tensor] = []
    scales: list[Tensor] = []
    shifts: list[Tensor] = []
    for i in reversed(range(form.layers)):
        v, (dz, total, c, k) = layers[i], ups[i]
        w, dw, gamma, m = p.weights[i], d.weights[i], p.scales[i], v.z.shape[1]
        scale, b = gamma * v.s, v.ggamma / m
        dgu = _aten.threshold_backward(dgy, v.y, 0)
        dgbeta = summed(dgu)
        along = v.s * summed(dgu * v.peaks)  # sum(Dgu xhat)
        shifts.append(dgbeta)
        scales.append(along + v.s * k)

        # Dgz in terms of q, z and p: P(q) - gamma s^2 (b (p - mean(p) - xhat c) + xhat k / m)
        of_gu, of_dz = d.scales[i] * v.s - scale * v.s * c, -scale * v.s * b
        mean_q = (scale * dgbeta + of_gu * v.gbeta) / m
        q_along = (scale * along + of_gu * v.ggamma) / m
        slope = -v.s * (q_along + of_dz * c + scale * v.s * k / m)
        dgz = affine(-mean_q - of_dz * total / m, v.z, slope)
        dgz.addcmul_(dz, of_dz.unsqueeze(1))
        q = (dgu * scale.unsqueeze(1)).addcmul_(v.gu, of_gu.unsqueeze(1))
        dgz += q if v.at is None else unpooled(q, v.at, v.z, form.z_sizes[i])

        gz, dgz = (factor(to_images(rows, form.z_sizes[i])) for rows in (v.gz, dgz))
        dx = dbelow[i]
        if dx is None:
            weights.append(conv_to_weights(dgz, below[i], w, form.kind, tasks))
            continue
        g_both, x_both = per_task(dgz, gz, tasks), per_task(below[i], dx, tasks)
        weights.append(conv_to_weights(g_both, x_both, w, form.kind, tasks))
        dgy = to_rows(conv_to_images_along(gz, below[i], w, dgz, dw, form.kind, tasks), tasks)
    return [*reversed(weights), *reversed(scales), *reversed(shifts), dhead, dgl.sum(1)]
