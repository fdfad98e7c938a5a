"""From features to classes by their likeness to labelled ones, without anything learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[classes, D] mean feature of each class; every class needs at least one example."""
    member = (labels.unsqueeze(1) == torch.arange(classes, device=labels.device)).to(features.dtype)
    return (member.T @ features) / member.sum(0).unsqueeze(1)


def matched(features: Tensor, support: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """[n, classes] logarithms of the attention of features [n, D] on the support images [m, D] of each class.

    `labels` [m, classes] is 1 where an image is of a class, else 0; every class needs at least one.
    """
    attention = (scale * F.normalize(features, dim=-1) @ F.normalize(support, dim=-1).T).log_softmax(-1)
    return attention.unsqueeze(-1).masked_fill(labels == 0, -torch.inf).logsumexp(-2)
