"""ResNet-12, the field's larger backbone."""

from __future__ import annotations

from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.models.dropout import EpisodeDropBlock, EpisodeDropout
from metaft.models.norm import EpisodeNorm

SLOPE = 0.1
BLOCK = 5
"""Side of the squares that DropBlock drops."""


class ResNet12(nn.Module):
    """Four residual blocks of three 3x3 convolutions, then a linear head: [batch, C, H, W] to [batch, ways].

    Oreshkin et al. 2018 (https://arxiv.org/abs/1805.10123), whose head sees the mean over the last map, with the blocks
    of Lee et al. 2019, section 4.1 (https://arxiv.org/abs/1904.03758): 1, 2.5, 5 and 10 times `width` filters, which is
    64 there, leaky ReLUs of slope 0.1, and max-pooling by 2 after each block. The shortcut is a 1x1 convolution with a
    normalisation of its own. `dropout` is the share that is dropped in inner steps: entries after the first two blocks,
    squares (`EpisodeDropBlock`) after the last two.
    """

    def __init__(self, ways: int, shape: tuple[int, ...], width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        channels, height, side = shape
        if min(height, side) < 16:
            raise MetaftError(
                f"resnet12 halves the image four times and needs at least 16x16 pixels, got {height}x{side}"
            )
        filters = [max(1, round(width * times)) for times in (1, 2.5, 5, 10)]
        drops = [EpisodeDropout(dropout) if i < 2 else EpisodeDropBlock(dropout, BLOCK) for i in range(4)]
        inputs = [channels, *filters[:-1]]
        self.blocks = nn.Sequential(*map(_Block, inputs, filters, drops))
        self.head = nn.Linear(filters[-1], ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, inputs: int, filters: int, drop: nn.Module) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [nn.Conv2d(filters if i else inputs, filters, 3, padding=1, bias=False), EpisodeNorm(filters)]
            if i < 2:
                layers.append(nn.LeakyReLU(SLOPE))
        self.residual = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, filters, 1, bias=False), EpisodeNorm(filters))
        self.then = nn.Sequential(nn.LeakyReLU(SLOPE), nn.MaxPool2d(2))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.then(self.residual(x) + self.shortcut(x)))
