"""Conv-4, the field's standard backbone, in its two published forms."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.models.dropout import EpisodeDropout
from metaft.models.fused import conv4_embedded, conv4_features, conv4_loss
from metaft.models.norm import EpisodeNorm, too_few
from metaft.types import Moments, Params


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, EpisodeNorm and ReLU, then a linear head: [batch, C, H, W] to [batch, ways].

    `form="stride"` halves the map by stride 2 and averages the last one (MAML on Omniglot, Finn et al. 2017, 5.2);
    `form="pool"` halves it by max-pooling and flattens (Vinyals et al. 2016; MAML on mini-ImageNet).
    The convolutions have no bias, since the normalisation behind each one cancels it. `dropout` is that of the
    features before the head, in inner steps (see `EpisodeDropout`).
    """

    def __init__(
        self,
        ways: int,
        shape: tuple[int, ...],
        width: int = 64,
        form: Literal["stride", "pool"] = "stride",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, height, side = shape
        if form == "pool" and min(height, side) < 16:
            raise MetaftError(
                f"conv4-pool halves the image four times and needs at least 16x16 pixels, got {height}x{side}"
            )
        stride = 2 if form == "stride" else 1
        blocks: list[nn.Module] = []
        for i in range(4):
            blocks += [
                nn.Conv2d(channels if i == 0 else width, width, 3, stride=stride, padding=1, bias=False),
                EpisodeNorm(width),
                nn.ReLU(),
            ]
            if form == "pool":
                blocks.append(nn.MaxPool2d(2))
        self.blocks = nn.Sequential(*blocks)
        self.average = form == "stride"
        self.dropout = EpisodeDropout(dropout)
        self.head = nn.Linear(width if self.average else width * (height // 16) * (side // 16), ways)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.head(self.dropout(x.mean((2, 3)) if self.average else x.flatten(1)))

    def cross_entropy(self, params: Params, x: Tensor, y: Tensor, *, curvature: bool) -> tuple[Tensor, Tensor]:
        """Loss and logits of `forward` with these parameters and each batch's own moments, as one operation that is
        quick to differentiate twice (see `metaft.models.fused`)."""
        body, form = self._fused(params)
        return conv4_loss(x, y, *body, params["head.weight"], params["head.bias"], keep=curvature, **form)

    def embedded(self, params: Params, x: Tensor) -> Tensor:
        """What the head of `forward` sees with these parameters and each batch's own moments, as one operation that is
        quick to differentiate once."""
        body, form = self._fused(params)
        return conv4_embedded(x, *body, **form)

    def inferred(self, params: Params, x: Tensor, moments: Moments | None) -> tuple[Tensor, Moments]:
        """What the head of `forward` sees with these parameters, and the moments of each layer, of one task, without
        derivatives; `moments=None` are each batch's own."""
        if moments is not None and len(moments) < 4:
            raise too_few(moments)
        body, form = self._fused(params)
        return conv4_features(x, *body, given=moments, **form)

    def _fused(self, params: Params) -> tuple[tuple[list[Tensor], list[Tensor], list[Tensor]], dict[str, Any]]:
        """Weights, scales and shifts by layer, and what is fixed."""
        size = len(self.blocks) // 4
        convs, norms = ([f"blocks.{i}" for i in range(first, len(self.blocks), size)] for first in (0, 1))
        conv, norm = self.blocks[0], self.blocks[1]
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, EpisodeNorm)
        names = ([f"{n}.weight" for n in convs], [f"{n}.weight" for n in norms], [f"{n}.bias" for n in norms])
        form = {"stride": conv.stride[0], "pool": not self.average, "average": self.average, "eps": norm.eps}
        weights, scales, shifts = ([params[name] for name in each] for each in names)
        return (weights, scales, shifts), form
