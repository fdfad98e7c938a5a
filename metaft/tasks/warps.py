"""Other views of pictures: a function of a few random numbers for each, by tensor operations alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NODES = 4
"""Of the field that bends a drawing, along each side."""

PLACES = 6
"""Numbers that say where a view lies: its angle, two scales, shear, and two shifts."""

DRAWING = PLACES + 2 * NODES**2
"""Random numbers for a view of a drawing."""

PHOTO = PLACES + 4
"""And of a photo."""

ANGLE, SCALE, SHEAR, SHIFT, BEND = math.radians(15), 0.2, 0.2, 0.15, 0.05
"""At most, of drawings; shifts and bends in sides of the picture."""

SMALLEST, COLOUR = 0.5, 0.4
"""Of photos: the shortest side of what is cut out, in sides of the picture, and the change of brightness, contrast and
saturation at most."""


def drawing(x: Tensor, u: Tensor) -> Tensor:
    """x [n, C, H, W], black around, turned, scaled, sheared, shifted and bent by u [n, DRAWING] in -1..1."""
    a = u[:, 0] * ANGLE
    sx, sy = 1 + SCALE * u[:, 1], 1 + SCALE * u[:, 2]
    cos, sin, shear = a.cos(), a.sin(), SHEAR * u[:, 3]
    # A view's pixel comes from this place of the picture, in half sides from the middle.
    rows = (
        torch.stack([cos * sx, (shear - sin) * sy, 2 * SHIFT * u[:, 4]], -1),
        torch.stack([(sin + shear) * sx, cos * sy, 2 * SHIFT * u[:, 5]], -1),
    )
    grid = F.affine_grid(torch.stack(rows, 1).to(x), list(x.shape), align_corners=False)
    bend = 2 * BEND * u[:, PLACES:].view(-1, 2, NODES, NODES).to(x)
    bend = F.interpolate(bend, x.shape[-2:], mode="bicubic", align_corners=False)
    return F.grid_sample(x, grid + bend.permute(0, 2, 3, 1), padding_mode="zeros", align_corners=False)


def photo(x: Tensor, u: Tensor) -> Tensor:
    """x [n, 3, H, W], of any mean and deviation, cut out, perhaps mirrored, and with other light and colours, by
    u [n, PHOTO] in -1..1."""
    u = u.to(x)
    side = SMALLEST + (1 - SMALLEST) * (u[:, 0] + 1) / 2
    wide = (1 + 0.25 * u[:, 1]).clamp(max=1 / side)
    mirrored = torch.where(u[:, 3] < 0, -1.0, 1.0).to(x)
    zero = torch.zeros_like(side)
    rows = (
        torch.stack([side * wide * mirrored, zero, (1 - side * wide) * u[:, 4]], -1),
        torch.stack([zero, side, (1 - side) * u[:, 5]], -1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    light, contrast, colour, grey = (u[:, PLACES + i].view(-1, 1, 1, 1) for i in range(4))
    luma = x.mean(1, keepdim=True)
    x = luma + (x - luma) * torch.where(grey > 0.8, torch.zeros_like(colour), 1 + COLOUR * colour)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (1 + COLOUR * contrast) + COLOUR * light
