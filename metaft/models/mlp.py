"""A plain multi-layer perceptron."""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from metaft.models.dropout import EpisodeDropout


class MLP(nn.Module):
    """[batch, *shape] to [batch, ways] through `depth` hidden ReLU layers (MAML's sinusoid: 2 of 40 units).

    `dropout` is that of the last hidden layer, in inner steps (see `EpisodeDropout`).
    """

    def __init__(
        self, ways: int, shape: tuple[int, ...], width: int = 40, depth: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        sizes = [math.prod(shape), *[width] * depth]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.dropout = EpisodeDropout(dropout)
        self.head = nn.Linear(sizes[-1], ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.hidden(x.flatten(1))))
