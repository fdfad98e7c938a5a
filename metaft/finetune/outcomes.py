"""What a head predicts, one of several classes or a number, and what a fit does differently for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.settings.finetuning import Recipe


class Outcome(NamedTuple):
    """Of the labels of some training examples."""

    outputs: int
    """Of the head."""
    begun: Callable[[nn.Module], nn.Module]
    """A fresh head as training begins with it, in place."""
    prepared: Callable[[Tensor], Tensor]
    """Labels as the loss takes them."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """(outputs [n, outputs], prepared labels [n]) -> scalar, which is trained on."""
    weight: Callable[[Tensor], float]
    """How much prepared labels count in the mean that a loss is: of how many examples, or of what weight."""
    validated: Callable[[Tensor, Tensor], dict[str, float]]
    """The same of validation examples -> "val_loss" and what else there is to say."""
    finished: Callable[[nn.Module], nn.Module]
    """The head as it predicts, in place."""


def outcome_of(recipe: Recipe, labels: Tensor, classes: int, like: Tensor) -> Outcome:
    """Of `labels` [n]: int64 of so many classes, or numbers, where there are none; a model computes as `like`."""
    if classes == 0:
        return _numbers(labels, like)
    weights = None if recipe.balance == "none" else class_weights(labels, classes).to(like)
    loss = partial(class_loss, weights=weights, smoothing=recipe.label_smoothing)
    weight = len if weights is None else lambda y: float(weights[y].sum())
    return Outcome(classes, _same, lambda y: y.to(like.device), loss, weight, _of_classes, _same)


def class_loss(outputs: Tensor, y: Tensor, *, weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of outputs [n, classes] and labels, int64 [n] or shares of the classes, float [n, classes].

    Of each label so much `smoothing` is spread over all classes (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567,
    section 7). With `weights` [classes] shares are weighted as PyTorch weights labels: the mean is over the weights of
    the labels as they were before the smoothing.
    """
    if y.dim() == 1 or weights is None:
        return F.cross_entropy(outputs, y, weight=weights, label_smoothing=smoothing)
    smoothed = (1 - smoothing) * y + smoothing / y.shape[1]
    return -(smoothed * weights * outputs.log_softmax(-1)).sum() / (y * weights).sum()


def _same(head: nn.Module) -> nn.Module:
    return head


def _of_classes(outputs: Tensor, y: Tensor) -> dict[str, float]:
    return {
        "val_loss": float(F.cross_entropy(outputs, y)),
        "val_accuracy": float((outputs.argmax(-1) == y).float().mean()),
    }


def _numbers(labels: Tensor, like: Tensor) -> Outcome:
    """The squared error in units of the training labels' variance, so that rates mean the same whatever is measured:
    1 is what their mean gets."""
    alike = bool((labels == labels[0]).all())  # of which rounding may leave a deviation
    mean, deviation = float(labels.mean()), 1.0 if alike else float(labels.std(correction=0))

    def begun(head: nn.Module) -> nn.Module:
        """At the mean of the labels, and not at what many features happen to sum up to."""
        for p in head.parameters():
            nn.init.zeros_(p)
        return head

    def prepared(y: Tensor) -> Tensor:
        return ((y - mean) / deviation).to(like)

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(outputs.squeeze(-1), y)

    def validated(outputs: Tensor, y: Tensor) -> dict[str, float]:
        squared = float(loss(outputs, y))
        return {"val_loss": squared, "val_rmse": squared**0.5 * deviation}

    @torch.no_grad()
    def finished(head: nn.Module) -> nn.Module:
        assert isinstance(head, nn.Linear) and head.bias is not None
        head.weight.mul_(deviation)
        head.bias.mul_(deviation).add_(mean)
        return head

    return Outcome(1, begun, prepared, loss, len, validated, finished)


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """float64 [classes]: the inverse of how often each label is there, with a mean of 1 over all examples."""
    counts = torch.bincount(labels, minlength=classes)
    return len(labels) / (counts.clamp(min=1).double() * (counts > 0).sum())
