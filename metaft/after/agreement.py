"""Whether an exported model is the classifier that it came from, on real pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from metaft.errors import MetaftError
from metaft.finetune.classifier import Predictor
from metaft.inputs.base import Examples

TOLERANCE = 1e-4
"""Of a logit: this times its absolute value, and at least this."""

CHECKED, AT_ONCE = 56, (1, 7)
"""Pictures, and how many at a time: a model that was traced with one number of them may be wrong at another."""


def worst(original: Predictor, exported: Predictor, examples: Examples) -> float:
    """The largest difference of a logit in units of what is allowed, on up to `CHECKED` pictures, one and seven at a
    time. Raises MetaftError where that is above 1, where the label of a picture with a larger margin is another, or
    where logits are not finite."""
    some = examples[torch.arange(max(CHECKED, *AT_ONCE)) % len(examples)] if len(examples) < CHECKED else None
    some = examples[torch.linspace(0, len(examples) - 1, CHECKED).long()] if some is None else some
    expected = original.logits(some)
    return max(_difference(expected, exported.logits(some, at_once), at_once) for at_once in AT_ONCE)


def _difference(expected: Tensor, found: Tensor, at_once: int) -> float:
    where = f"at batches of {at_once}"
    if found.shape != expected.shape:
        raise MetaftError(f"format: {where} the exported model gives {list(found.shape)}, not {list(expected.shape)}")
    if not found.isfinite().all():
        raise MetaftError(f"format: {where} the exported model's logits are not finite")
    allowed = TOLERANCE * expected.abs().clamp(min=1.0)
    off = float(((found - expected).abs() / allowed).max())
    if off > 1:
        raise MetaftError(
            f"format: {where} logits of the exported model are off by up to {float((found - expected).abs().max()):.2g}"
            f", {off:.1f} times what is allowed; nothing was written"
        )
    if expected.shape[1] > 1:
        first, second = expected.topk(2).values.T
        sure = first - second > 2 * allowed.amax(1)
        if not torch.equal(found.argmax(1)[sure], expected.argmax(1)[sure]):
            raise MetaftError(f"format: {where} the exported model labels some pictures otherwise; nothing was written")
    return off
