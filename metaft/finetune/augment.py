"""Training pictures changed at random, a function of (seed, epoch, picture); never those that are predicted."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from metaft.sampler import Stream, raw_words, uniform

Change = Callable[[Tensor, Tensor], Tensor]
"""(uint8 [k, C, H, W], which of the training pictures they are, int64 [k]) -> uint8 of the same shape."""


def basic(n: int, seed: int, epoch: int) -> Change:
    """Turns and shifts, for n pictures in an epoch."""
    words = raw_words(seed, "val", [epoch], 3 * n, stream=Stream.FINE_TUNING)[0].reshape(n, 3)
    return partial(_moved, torch.from_numpy(2 * uniform(words) - 1).float())


def _moved(moves: Tensor, images: Tensor, rows: Tensor) -> Tensor:
    return augmented(images, moves[rows])


def augmented(images: Tensor, moves: Tensor) -> Tensor:
    """uint8 [n, C, H, W] turned by up to 10 degrees and moved by up to 8 %, as `moves` [n, 3] in -1..1 say."""
    moves = moves.to(images.device)
    angle, shift = moves[:, 0] * math.radians(10), moves[:, 1:] * 0.16  # in units of half the picture
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], -1), torch.stack([sin, cos, shift[:, 1]], -1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8)


def trivial(n: int, seed: int, epoch: int) -> Change:
    """One operation of TrivialAugment's wide space for each picture (Müller & Hutter 2021,
    https://arxiv.org/abs/2103.10158, algorithm 1), as torchvision has it."""
    return partial(_by_policy, "TrivialAugmentWide", seed, epoch)


def randaug(n: int, seed: int, epoch: int) -> Change:
    """Two operations of magnitude 9 of 30 for each picture (Cubuk et al. 2020, https://arxiv.org/abs/1909.13719), as
    torchvision has them."""
    return partial(_by_policy, "RandAugment", seed, epoch)


def _by_policy(name: str, seed: int, epoch: int, images: Tensor, rows: Tensor) -> Tensor:
    """By a class of torchvision.transforms.v2, which draws from the global generator: it is set for each picture, and
    is afterwards as it was."""
    from metaft.support.vision import transforms

    policy = getattr(transforms, name)(interpolation=transforms.InterpolationMode.BILINEAR)
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, key in zip(images.cpu(), keys_of(rows, seed, epoch), strict=True):
            torch.default_generator.manual_seed(key)  # torch.manual_seed would set those of other devices too
            changed.append(policy(image))
    return torch.stack(changed).to(images.device)


def keys_of(rows: Tensor, seed: int, epoch: int) -> list[int]:
    """A seed for each picture in its epoch, below 2^63."""
    items = [(epoch << 32) + row for row in rows.tolist()]
    return [int(word >> 1) for (word,) in raw_words(seed, "val", items, 1, stream=Stream.EXTRAS)]


AUGMENTS: dict[str, Callable[[int, int, int], Change]] = {"basic": basic, "trivial": trivial, "randaug": randaug}
"""What `--augment` knows beside none."""


def of_epoch(name: str, n: int, seed: int, epoch: int) -> Change | None:
    """What is done to n training pictures in an epoch; None where they stay as they are."""
    return None if name == "none" else AUGMENTS[name](n, seed, epoch)
