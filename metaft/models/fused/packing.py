"""To and from the flat lists of tensors that autograd.Function wants for arguments and results.

Parameters are in this order: weights, scales, shifts (each for all layers), head, bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from metaft.models.fused.form import Body, Form, Layer, Params, Top, Up, lifted


def body_of(form: Form, params: Sequence[Tensor]) -> Body:
    """With a task axis; weights that the tasks share have none."""
    n = form.layers
    weights, rest = list(params[:n]), lifted(form, *params[n : form.of_body])
    return Body(weights, list(rest[:n]), list(rest[n:]))


def params_of(form: Form, params: Sequence[Tensor]) -> Params:
    """Likewise, with the head."""
    body = body_of(form, params)
    return Params(body.weights, body.scales, body.shifts, *lifted(form, *params[form.of_body :]))


def shared(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients like their parameters: of those that tasks share, the sum over tasks."""
    return [g.sum(0) if g is not None and g.dim() > v.dim() else g for g, v in zip(grads, params, strict=False)]


def flat_up(v: Up | Layer) -> list[Tensor | None]:
    """No tensor twice, as autograd wants the outputs of a function: without pooling the peaks are z."""
    at = None if v.at is None else v.at.unflatten(0, (len(v.y), -1))
    return [v.y, v.z, v.s, None if v.at is None else v.peaks, at]


def _up(form: Form, y: Any, z: Any, s: Any, peaks: Any, at: Any) -> Up:
    """From what `flat_up` gave."""
    y, z, s = lifted(form, y, z, s)
    if at is None:
        return Up(y, z, s, z, None)
    (peaks,) = lifted(form, peaks)
    return Up(y, z, s, peaks, at.flatten(0, at.dim() - 4))


def ups_of(form: Form, flat: Sequence[Any]) -> list[Up]:
    return [_up(form, *flat[5 * i : 5 * (i + 1)]) for i in range(form.layers)]


def kept_of(layers: Sequence[Layer], top: Top) -> list[Tensor | None]:
    """Flat; the gradients of scale and shift are outputs of their own already."""
    flat: list[Tensor | None] = []
    for v in layers:
        flat += [*flat_up(v), v.gu, v.gz, v.gbeta.clone(), v.ggamma.clone()]
    return [*flat, *top]


def layers_of(form: Form, flat: Sequence[Any]) -> tuple[list[Layer], Top]:
    each = [flat[9 * i : 9 * (i + 1)] for i in range(form.layers)]
    layers = [Layer(*_up(form, *v[:5]), *lifted(form, *v[5:])) for v in each]
    return layers, Top(*lifted(form, *flat[9 * form.layers :]))
