"""Small random turns and shifts of pictures, a function of seed and epoch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metaft.sampler import Stream, raw_words, uniform
from metaft.settings import Recipe


def moves_of(n: int, recipe: Recipe, seed: int, epoch: int) -> Tensor | None:
    """[n, 3] uniform in -1..1 for n pictures' angles and shifts in an epoch, or None where they stay as they are."""
    if recipe.augment == "none":
        return None
    words = raw_words(seed, "val", [epoch], 3 * n, stream=Stream.FINE_TUNING)[0].reshape(n, 3)
    return torch.from_numpy(2 * uniform(words) - 1).float()


def augmented(images: Tensor, moves: Tensor) -> Tensor:
    """uint8 [n, C, H, W] turned by up to 10 degrees and moved by up to 8 %, as `moves` [n, 3] in -1..1 say."""
    moves = moves.to(images.device)
    angle, shift = moves[:, 0] * math.radians(10), moves[:, 1:] * 0.16  # in units of half the picture
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], -1), torch.stack([sin, cos, shift[:, 1]], -1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8)
