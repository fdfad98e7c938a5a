"""A classifier as one module of pictures alone, which is what an exported file holds."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from metaft.finetune.classifier import Classifier


class Whole(nn.Module):
    """Raw inputs (of pictures uint8 [n, C, H, W]) to logits [n, classes], the preprocessing inside."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.body, self.head, self.inputs = classifier.body, classifier.head, classifier.inputs
        self.number = next(classifier.parameters()).dtype
        self.inputs(example_of(self))  # which keeps its constants; those that a tracer met first would be no numbers
        self.eval()

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.body(self.inputs(pictures).to(self.number)))

    def single(self) -> Whole:
        """This one, or a copy in float32."""
        if self.number == torch.float32:
            return self
        copy = deepcopy(self).float()
        copy.number = torch.float32
        return copy


def example_of(whole: Whole) -> Tensor:
    """What a trace runs on: two pictures, since one may be taken for the only number there is."""
    return torch.randint(0, 256, (2, *whole.inputs.shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
