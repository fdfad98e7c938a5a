"""A loss of the user's own, and the figure by which people and checkpoints judge what it trained."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metaft.errors import MetaftError, no_such
from metaft.support.foreign import in_our_words

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(prediction [n, outputs], target [n] or [n, outputs]) of one task -> scalar."""

RESERVED = ("loss", "kind", "step", "ci95", "episodes")
"""What else stands beside a figure in a run's files."""


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """What is minimised, in the inner loop and on queries, and what is reported: `Objective(F.l1_loss)` for both, or

        Objective(F.l1_loss, figure=worst_error, name="worst_error")
        Objective(F.multi_margin_loss, figure=metaft.metrics.accuracy, name="accuracy", higher_is_better=True)

    Both functions get the predictions and targets of one task and give a scalar, in operations that
    torch can differentiate (the figure need not be). Raises MetaftError for what cannot be such.
    """

    loss: LossFunction
    figure: LossFunction | None = None
    """None: the loss itself."""
    name: str | None = None
    """The figure's, in every file and line (None: its function's). One called "accuracy" is shown in percent."""
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        for field, value in (("loss", self.loss), ("figure", self.figure)):
            if not callable(value) and not (field == "figure" and value is None):
                raise MetaftError(f"{field}: must be a function (prediction, target) -> scalar, got {value!r}")
        if self.higher_is_better and self.figure is None:
            raise MetaftError("higher_is_better: a loss is better where it is lower; give a figure too")
        if self.name is None:
            object.__setattr__(self, "name", _called(self.figure or self.loss))
        if not isinstance(self.name, str) or not self.name.isidentifier() or self.name in RESERVED:
            raise MetaftError(f"name: must be a word other than {', '.join(RESERVED)}, got {self.name!r}")

    @property
    def metric(self) -> str:
        """The figure's name."""
        assert self.name is not None
        return self.name

    @property
    def label(self) -> str:
        """What to call the loss in a message, and in the checkpoints that it leaves."""
        return _called(self.loss)

    def value(self, prediction: Tensor, target: Tensor) -> Tensor:
        return scalar("loss", self.label, self.loss(prediction, target))

    def shown(self, prediction: Tensor, target: Tensor) -> Tensor:
        figure = scalar("figure", self.metric, (self.figure or self.loss)(prediction, target))
        return figure.detach().to(prediction.dtype)


def check(objective: Objective, outputs: int, target: Tensor, like: Tensor) -> None:
    """Try a loss and its figure on made-up predictions [n, outputs], of the type and on the device of `like`, for the
    targets of one task.

    Raises MetaftError, naming the function, where it fails, gives no scalar, draws random numbers (tasks could not be
    reproduced), or, of a loss, has no gradient in the predictions. torch's generator stays as it was.
    """
    target = target.to(like.device)
    prediction = torch.linspace(-1, 1, len(target) * outputs).view(len(target), outputs).to(like)
    functions = [("loss", objective.label, objective.loss)]
    if objective.figure is not None:
        functions.append(("figure", objective.metric, objective.figure))
    for field, name, function in functions:
        shapes = f"predictions {list(prediction.shape)} and targets {list(target.shape)}"
        before = torch.get_rng_state()
        try:
            with in_our_words(f"{field}: {name} fails on {shapes}"):
                # No leaf, as a model's output is none: a loss may change it in place.
                value, again = (function(prediction.clone().requires_grad_() + 0, target) for _ in range(2))
        finally:
            drew = not torch.equal(before, torch.get_rng_state())
            torch.set_rng_state(before)
        value, again = (scalar(field, name, each).detach() if field == "figure" else each for each in (value, again))
        value, again = scalar(field, name, value), scalar(field, name, again)
        if drew or not (torch.equal(value, again) or bool(value.isnan() & again.isnan())):
            raise MetaftError(f"{field}: {name} draws random numbers, so that tasks could not be reproduced")
        if field == "loss" and not value.requires_grad:
            raise MetaftError(f"loss: {name} has no gradient in the predictions, so that nothing could be learned")


def scalar(field: str, name: str, value: object) -> Tensor:
    """Raises MetaftError for anything but a tensor without axes."""
    if not isinstance(value, Tensor) or value.dim():
        given = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise MetaftError(f"{field}: {name} must give a scalar tensor for the examples of a task, got {given}")
    return value


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of right labels, 0..1."""
    return (prediction.argmax(-1) == target).to(prediction.dtype).mean()


def _called(function: object) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return name if name.isidentifier() and name not in RESERVED else "own"


def figure_of(summary: Mapping[str, Any]) -> str:
    """The name of the figure in a mode's part of a meta-test (see `metaft.testing.summarise`)."""
    return next(k for k in summary if f"{k}_per_step" in summary and k != "ci95")


LossName = Literal["cross_entropy", "mse"]

Loss = LossName | Objective | LossFunction
"""One of metaft's, or the user's own: a function whose value is the figure too, or both in a record."""

OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": Objective(F.cross_entropy, accuracy, "accuracy", higher_is_better=True),
    "mse": Objective(F.mse_loss, F.mse_loss, "mse"),
}


def objective(loss: Loss) -> Objective:
    """The loss and figure that a name or function stands for. Raises MetaftError for anything else."""
    if isinstance(loss, Objective):
        return loss
    if isinstance(loss, str) and loss in OBJECTIVES:
        return OBJECTIVES[loss]
    if not callable(loss):
        raise no_such("loss", loss, OBJECTIVES, more=", and functions from Python")
    return Objective(loss)


def label(loss: Loss) -> str:
    """What to call a loss in a message."""
    return loss if isinstance(loss, str) else objective(loss).label


def loss_value(loss: Loss, prediction: Tensor, target: Tensor) -> Tensor:
    """Scalar: the loss of one task's examples."""
    return objective(loss).value(prediction, target)


def figure_name(loss: Loss) -> str:
    """What the figure of merit is called that is reported for a loss."""
    return objective(loss).metric


def figure(loss: Loss, prediction: Tensor, target: Tensor) -> Tensor:
    """Scalar: the figure of one task's queries, as the share of right labels (0..1) or the mean squared error."""
    return objective(loss).shown(prediction, target)
