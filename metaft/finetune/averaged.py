"""The exponential moving average of what a fit trains, which is validated and kept in its place."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor


def decay_of(decay: float, step: int) -> float:
    """That of a step, from 0 on: min(decay, (1 + step) / (10 + step)), so that a short fit leaves its start behind, as
    TensorFlow's `ExponentialMovingAverage` has it."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def follow(
    average: Mapping[str, Tensor], values: Mapping[str, Tensor], decay: float, step: int, still: Collection[str] = ()
) -> None:
    """a <- d a + (1 - d) w in place, of buffers too, but for those that are `still` and integers, which are taken over
    (Polyak & Juditsky 1992; Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780, eq. 2). Decay 0 is w itself."""
    by = 1 - decay_of(decay, step)
    for name, value in values.items():
        if name in still:
            continue
        if value.is_floating_point():
            average[name].lerp_(value, by)
        else:
            average[name].copy_(value)
