"""The fused passes as functions that autograd and torch.func know, also under vmaps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaft.models.fused.form import Form, Params, form_of, from_features, images_in, lifted, lowered, to_features
from metaft.models.fused.packing import body_of, flat_up, kept_of, layers_of, params_of, shared, ups_of
from metaft.models.fused.passes import derivative, downwards, gradient, upwards
from metaft.models.fused.rows import Kind, joined, kind_of, pixels


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

    Of images in bfloat16 beside parameters in another type the convolutions are in bfloat16, in all derivatives too,
    and all else is in the parameters' type.
    """
    kind = kind_of(x, weights[0], stride)
    form = form_of(x, len(weights), kind, pool, average, eps, keep)
    given = pixels(x.to(weights[0]) if kind.short else x)
    value, logits, *_ = _Loss.apply(form, given, y, *weights, *scales, *shifts, head, bias)  # type: ignore[reportGeneralTypeIssues]
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
    form = form_of(x, len(weights), Kind(stride), pool, average, eps, True)
    features, *_ = _Features.apply(form, pixels(x), *weights, *scales, *shifts)  # type: ignore[reportGeneralTypeIssues]
    return features


class _Loss(torch.autograd.Function):
    """(form, x, labels, parameters) to the loss, logits, gradient and, without derivatives, what `keep` keeps.

    The gradient is an output of its own, which `backward` multiplies with the cotangent of the loss. So the derivative
    of a gradient comes back here as the cotangent of that output.
    """

    @staticmethod
    def forward(form: Form, x: Tensor, labels: Tensor, *params: Tensor) -> Any:
        x, labels = lifted(form, x, labels)
        p = params_of(form, params)
        if _one_by_one(form, x, p):
            passes = [gradient(form, *_one(i, x, labels, p), keep=False) for i in range(len(x))]
        else:
            passes = [gradient(form, x, labels, p, keep=form.keep)]
        value, logits = joined([one.value for one in passes]), joined([one.logits for one in passes])
        grads = [joined(list(each)) for each in zip(*[one.grads for one in passes], strict=True)]
        kept = kept_of(passes[0].layers, passes[0].top) if form.keep else []
        return lowered(form, [value, logits, *grads, *kept])

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
        count = ctx.form.parameters
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
        return None, None, None, *shared(back, params)

    @staticmethod
    def vmap(info: Any, in_dims: Any, form: Form, *tensors: Tensor) -> Any:
        return _vmapped(_Loss, info, in_dims, form, tensors)


class _Derivative(torch.autograd.Function):
    """(form, x, labels, parameters, direction, what `_Loss` kept) to the derivative of its gradient."""

    @staticmethod
    def forward(form: Form, x: Tensor, labels: Tensor, *rest: Tensor) -> Any:
        count = form.parameters
        x, labels = lifted(form, x, labels)
        p, d = params_of(form, rest[:count]), params_of(form, rest[count : 2 * count])
        if form.keep:
            layers, top = layers_of(form, rest[2 * count :])
        else:
            done = gradient(form, x, labels, p, keep=True)
            layers, top = done.layers, done.top
        return lowered(form, derivative(form, x, p, layers, top, d))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("conv4_loss has a first and a second derivative, not a third")

    @staticmethod
    def vmap(info: Any, in_dims: Any, form: Form, *tensors: Tensor) -> Any:
        return _vmapped(_Derivative, info, in_dims, form, tensors)


class _Features(torch.autograd.Function):
    """(form, x, the body's parameters) to the features and, without derivatives, what the gradient needs."""

    @staticmethod
    def forward(form: Form, x: Tensor, *params: Tensor) -> Any:
        (x,) = lifted(form, x)
        ups = upwards(form, x, body_of(form, params), len(x))
        features = to_features(form, ups[-1].y, images_in(form, x))
        return lowered(form, [features, *[v for up in ups for v in flat_up(up)]])

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
        count = ctx.form.of_body
        x, *rest = ctx.saved_tensors
        if of_features is None:
            return (None,) * (2 + count)
        grads = _Gradient.apply(ctx.form, x, of_features, *rest)
        assert grads is not None
        return None, None, *shared(grads, rest)

    @staticmethod
    def vmap(info: Any, in_dims: Any, form: Form, *tensors: Tensor) -> Any:
        return _vmapped(_Features, info, in_dims, form, tensors, first_weight=1)


class _Gradient(torch.autograd.Function):
    """(form, x, the gradient in the features, the body's parameters, what `_Features` kept) to that in the parameters.

    Its own derivative is asked for by those alone who move a body by its features. It is composed from operations that
    PyTorch knows.
    """

    @staticmethod
    def forward(form: Form, x: Tensor, of_features: Tensor, *rest: Tensor) -> Any:
        count = form.of_body
        x, of_features = lifted(form, x, of_features)
        p = body_of(form, rest[:count])
        gy = from_features(form, of_features, p.scales[-1].shape[-1])
        grads, _ = downwards(form, x, p, ups_of(form, rest[count:]), gy, keep=False)
        return lowered(form, grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        form, *tensors = inputs
        ctx.form = form
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors[: 2 + form.of_body])

    @staticmethod
    def backward(ctx: Any, *direction: Tensor) -> Any:
        form = ctx.form
        x, of_features, *params = ctx.saved_tensors

        def back(x: Tensor, of_features: Tensor, params: list[Tensor], direction: Sequence[Tensor]) -> list[Tensor]:
            def of_params(of_features: Tensor, *params: Tensor) -> Any:
                return torch.func.vjp(lambda *own: _composed(form, x, own), *params)[1](of_features)

            return list(torch.func.vjp(of_params, of_features, *params)[1](tuple(direction)))

        if form.tasks is None:
            found = back(x, of_features, params, direction)
        else:
            dims = [None if i < form.layers and v.dim() == 4 else 0 for i, v in enumerate(params)]
            found = torch.func.vmap(back, (0, 0, dims, 0))(x, of_features, params, direction)
        nothing = [None] * (ctx.count - 2 - len(params))
        return None, None, found[0], *shared(found[1:], params), *nothing

    @staticmethod
    def vmap(info: Any, in_dims: Any, form: Form, *tensors: Tensor) -> Any:
        return _vmapped(_Gradient, info, in_dims, form, tensors)


def _composed(form: Form, x: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The features of one task, from operations that PyTorch can differentiate as often as is asked."""
    n, (height, width) = form.layers, form.sizes[0]
    y = x.view(-1, height, width, x.shape[-1]).permute(0, 3, 1, 2)
    for w, gamma, beta in zip(params[:n], params[n : 2 * n], params[2 * n :], strict=True):
        z = F.conv2d(y, w, None, form.kind.stride, 1)
        z = z - z.mean((0, 2, 3), keepdim=True)
        s = (z.square().mean((0, 2, 3), keepdim=True) + form.eps).rsqrt()
        y = F.relu(z * s * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1))
        y = F.max_pool2d(y, 2) if form.pool else y
    return y.mean((2, 3)) if form.average else y.flatten(1)


_ALONE = 1 << 18
"""Values of a task's first map from which tasks go one by one: many more do not fit into a core's cache together."""


def _one_by_one(form: Form, x: Tensor, p: Params) -> bool:
    pixels = form.z_sizes[0][0] * form.z_sizes[0][1] * images_in(form, x)
    return not form.keep and pixels * p.scales[0].shape[-1] >= _ALONE


def _one(i: int, x: Tensor, labels: Tensor, p: Params) -> tuple[Tensor, Tensor, Params]:
    part = slice(i, i + 1)
    weights = [w if w.dim() == 4 else w[part] for w in p.weights]
    p = Params(weights, [v[part] for v in p.scales], [v[part] for v in p.shifts], p.head[part], p.bias[part])
    return x[part], labels[part], p


def _vmapped(
    function: Any, info: Any, in_dims: Any, form: Form, tensors: Sequence[Tensor | None], first_weight: int = 2
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
