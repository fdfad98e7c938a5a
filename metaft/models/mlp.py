"""A plain multi-layer perceptron."""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn


class MLP(nn.Module):
    """[batch, *shape] to [batch, ways] through `depth` hidden ReLU layers (MAML's sinusoid: 2 of 40 units)."""

    def __init__(self, ways: int, shape: tuple[int, ...], width: int = 40, depth: int = 2) -> None:
        super().__init__()
        sizes = [math.prod(shape), *[width] * depth]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1], ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x.flatten(1)))
