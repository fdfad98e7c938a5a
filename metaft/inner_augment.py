"""What may be done to the support images before each inner step, as a pure function of the task's key."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metaft import keyed
from metaft.errors import MetaftError
from metaft.spec import Takes, parse

Augment = Callable[[Tensor, Tensor, int], Tensor]
"""(x [n, C, H, W], key [] int64, inner step) -> images of the same shape."""

_PIXELS = 2
_SALT = 2


def shift(x: Tensor, key: Tensor, step: int) -> Tensor:
    """Each image moved by -2..2 pixels down and right, drawn for (key, step, image); what comes in is 0.

    Raises MetaftError where x is not images [n, C, H, W].
    """
    if x.dim() != 4:
        raise MetaftError(f"inner_augment: shift takes images [n, C, H, W], got {list(x.shape)}")
    count, _, height, width = x.shape
    moves = (keyed.words(key, _SALT, step, count=2 * count) % (2 * _PIXELS + 1)).view(2, count, 1)
    rows, columns = (
        (torch.arange(size, device=x.device) + move).view(count, 1, *shape)
        for size, move, shape in zip((height, width), moves, ((height, 1), (1, width)), strict=True)
    )
    padded = F.pad(x, (_PIXELS,) * 4)
    taken = padded.gather(2, rows.expand(-1, x.shape[1], -1, width + 2 * _PIXELS))
    return taken.gather(3, columns.expand(-1, x.shape[1], height, -1))


AUGMENTS: dict[str, Augment] = {"none": lambda x, key, step: x, "shift": shift}
"""What `--inner-augment` knows, to which others may be added."""


def named(name: str | Augment) -> Augment:
    """The augmentation of that name, or the one handed over. Raises MetaftError for an unknown name."""
    if callable(name):
        return name
    return AUGMENTS[parse("inner_augment", name, dict.fromkeys(AUGMENTS, Takes())).name]
