"""A classifier in the form that a tracer takes, and back."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.finetune import heads
from metaft.finetune.classifier import Classifier
from metaft.models.stored import StoredNorm

ROOTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""What a group of channels begins with."""


class Norm(nn.BatchNorm2d):
    """A StoredNorm as the layer that torch-pruning knows."""

    def __init__(self, stored: StoredNorm) -> None:
        super().__init__(len(stored.mean), stored.eps, affine=stored.weight is not None)
        self.weight, self.bias = stored.weight, stored.bias  # pyright: ignore[reportAttributeAccessIssue]
        self.running_mean, self.running_var = stored.mean.clone(), stored.var.clone()
        self.then = nn.Identity() if stored.then is None else stored.then
        self.of = [stored]  # in a list, so that it is no part of the module

    def forward(self, input: Tensor) -> Tensor:
        x = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.then(x)

    def stored(self) -> StoredNorm:
        (stored,) = self.of
        assert self.running_mean is not None and self.running_var is not None
        stored.weight, stored.bias, stored.mean, stored.var = (
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
        )
        return stored


def traced(classifier: Classifier) -> nn.Module:
    """A copy of "body" and "head" in float64, with layers that torch-pruning knows."""
    columns = _columns(classifier.head)
    head: nn.Module = classifier.head
    if not isinstance(head, nn.Linear):
        with torch.device("meta"):  # the constructor would draw from the global generator
            head = nn.Linear(columns.shape[1], len(columns), bias=False)
        head.weight = nn.Parameter(columns)  # pyright: ignore[reportAttributeAccessIssue]
    model = copy.deepcopy(nn.Sequential(OrderedDict(body=classifier.body, head=head))).double().requires_grad_(True)
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, StoredNorm):
            model.set_submodule(path, Norm(layer).double())
    return model.eval()


def untraced(model: nn.Module) -> nn.Module:
    """The inverse, in place."""
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, Norm):
            model.set_submodule(path, layer.stored())
    return model


def _columns(head: nn.Module) -> Tensor:
    """The parameter of a head that has a column for each feature."""
    names = {heads.Prototype: "points", heads.Matching: "support"}
    return head.get_parameter(names.get(type(head), "weight")).detach()


def with_columns(head: nn.Module, surrogate: nn.Module) -> nn.Module:
    """The head with the columns that are left."""
    if isinstance(head, nn.Linear):
        return surrogate
    head = copy.deepcopy(head)
    name = {heads.Prototype: "points", heads.Matching: "support"}.get(type(head), "weight")
    setattr(head, name, nn.Parameter(surrogate.get_parameter("weight").detach()))
    return head
