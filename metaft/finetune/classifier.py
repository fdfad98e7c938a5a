"""A trained classifier as a plain module: pictures in, logits out, each picture by itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from metaft.tasks.images import read
from metaft.tasks.pool import Preprocessing


class Classifier(nn.Module):
    """Preprocessing, backbone with stored normalisation moments, and head.

    `forward` takes uint8 [n, C, H, W] in the polarity that `preprocessing` names, and gives logits [n, classes]. No
    layer looks at more than one image, so a prediction does not depend on its neighbours in the batch.
    """

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module,
        preprocessing: Preprocessing,
        class_names: tuple[str, ...],
        *,
        invert: bool,
    ) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.preprocessing = preprocessing
        self.class_names = class_names
        self.invert = invert
        """Whether the target's files are dark on bright and have to be turned around after reading."""
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x = self.preprocessing.normalise(images).to(next(self.parameters()).dtype)
        return self.head(self.body(x))

    def read(self, path: Path) -> Tensor:
        """A picture file as `forward` takes it, uint8 [1, C, H, W]. Raises DataError, naming the file."""
        p = self.preprocessing
        pixels = torch.from_numpy(read(path, p.channels, p.height).copy())
        return (255 - pixels if self.invert else pixels).unsqueeze(0)

    @torch.no_grad()
    def probabilities(self, images: Tensor, at_once: int = 256) -> Tensor:
        """float32 [n, classes] on the CPU, `at_once` images at a time."""
        device = next(self.parameters()).device
        parts = [self(part.to(device)).softmax(-1).float().cpu() for part in images.split(at_once)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.class_names))

    def names(self, images: Tensor) -> list[str]:
        """The most probable class of each image."""
        return [self.class_names[int(i)] for i in self.probabilities(images).argmax(-1)]
