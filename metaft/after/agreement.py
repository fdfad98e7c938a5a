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
    time; a few are taken several times. Raises MetaftError where that is above 1 or logits are not finite. Labels are
    then the same wherever the first two logits are apart by more than what is allowed of both."""
    some = _some(examples)
    expected = original.logits(some)
    return max(_difference(expected, exported.logits(some, at_once), at_once) for at_once in AT_ONCE)


def check_finite(exported: Predictor, examples: Examples) -> None:
    """Raises MetaftError where logits of such pictures, one and seven at a time, are not finite."""
    for at_once in AT_ONCE:
        _check_finite(exported.logits(_some(examples), at_once), at_once)


def _some(examples: Examples) -> Tensor:
    if len(examples) < CHECKED:
        return examples[torch.arange(CHECKED) % len(examples)]
    return examples[torch.linspace(0, len(examples) - 1, CHECKED).long()]


def _check_finite(found: Tensor, at_once: int) -> None:
    if not found.isfinite().all():
        raise MetaftError(f"format: at batches of {at_once} the exported model's logits are not finite")


def _difference(expected: Tensor, found: Tensor, at_once: int) -> float:
    where = f"at batches of {at_once}"
    if found.shape != expected.shape:
        raise MetaftError(f"format: {where} the exported model gives {list(found.shape)}, not {list(expected.shape)}")
    _check_finite(found, at_once)
    off = (found - expected).abs()
    worst_off = float((off / (TOLERANCE * expected.abs().clamp(min=1.0))).max())
    if worst_off > 1:
        raise MetaftError(
            f"format: {where} logits of the exported model are off by up to {float(off.max()):.2g}, "
            f"{worst_off:.1f} times what is allowed; nothing was written"
        )
    return worst_off
