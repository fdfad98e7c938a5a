"""What a meta-learning algorithm is to the rest of metaft: an immutable record of pure functions for ONE task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from metaft.errors import no_such
from metaft.metrics import objective
from metaft.models import Model
from metaft.support.modes import in_usual_modes_but_type
from metaft.types import NORMS, Episode, Fast, Loss, Moments, Norm, Params


class TaskGrad(NamedTuple):
    """One task's contribution to a meta-step."""

    grads: Params
    """With the names and shapes of `meta`. Descent direction: the outer optimiser subtracts it."""
    state_delta: Params
    """What to add to `state`; averaged over tasks like a gradient. Empty for members without state."""
    metrics: dict[str, Tensor]
    """Scalars: "loss" and "accuracy" or "mse", and those of `Algorithm.cautions`."""


class Adapt(Protocol):
    def __call__(
        self,
        meta: Params,
        state: Params,
        support_x: Tensor,
        support_y: Tensor,
        key: Tensor,
        *,
        ways: int,
        steps: int,
        trajectory: bool = False,
        moments: bool = True,
    ) -> Fast:
        """Adapt to one task: support_x [N*K, ...], support_y [N*K], key [] int64.

        `trajectory` keeps every step (see `Fast`). `moments=False` skips the support pass that inductive prediction
        needs. `predict` is the only other thing a test needs, so training, test and fine-tuning share this loop.
        """
        ...


Predict = Callable[[Fast, Tensor, Norm], Tensor]
"""(fast, x [n, ...], norm) -> [n, outputs]"""

TaskLoss = Callable[[Params, Params, Params, Episode], tuple[Tensor, tuple[Params, dict[str, Tensor]]]]
"""(meta, state, knobs, one task) -> (loss, (state_delta, metrics)): a member trained by differentiating a loss."""


@dataclasses.dataclass(frozen=True, eq=False)
class Algorithm:
    """One published algorithm with its hyper-parameters bound.

    A member supplies `task_loss`, whose gradient `metaft.outer` takes, or `task_grad` where its update is not the
    gradient of a loss (Reptile, iMAML).
    """

    name: str
    init: Callable[[int], tuple[Params, Params]]
    """key -> (meta, state); `state` holds what is not learned by gradient."""
    adapt: Adapt
    predict: Predict
    inner_steps: int
    """Steps of `adapt` in training."""
    loss: Loss
    norm: Norm
    """How queries are normalised in training."""
    task_loss: TaskLoss | None = None
    task_grad: Callable[[Params, Params, Params, Any], TaskGrad] | None = None
    schedule: Callable[[int], Params] = lambda step: {}
    """Step -> knobs: tensors for what changes during training."""
    data: Literal["episodes", "batches"] = "episodes"
    static: bool = True
    """Whether the same operations on the same shapes are done whatever the data, so that a GPU may replay them. Nor may
    a step make tensors of Python's numbers by `torch.tensor` or `new_tensor` (`new_full` may): those are sent."""
    curvature: bool = True
    """Whether its meta-gradient differentiates gradients: only then are operations without a second derivative, as fast
    attention, kept away from."""
    any_ways: bool = False
    """Whether a task at test may have another number of classes than in training."""
    outputs: int | None = None
    """How many classes a head that is learned tells apart, which tasks have to have; None where it is of any, or of
    nobody knows how many."""
    adapts_head: bool = True
    """Whether a task's own classes shape its head. Where not, classes that start from equal rows stay equal."""
    predict_steps: Predict | None = None
    """`predict` for every step of a trajectory, [steps + 1, n, outputs], where that costs less than one by one."""

    cautions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Metric -> what to warn of where it is above 0 in some task: under vmap a task cannot do so itself. Its mean is
    in each row of metrics.jsonl."""

    def __post_init__(self) -> None:
        if (self.task_loss is None) == (self.task_grad is None):
            raise ValueError(f"{self.name}: give exactly one of task_loss and task_grad")
        objective(self.loss)
        for field in ("init", "adapt", "predict", "schedule"):
            object.__setattr__(self, field, in_usual_modes_but_type(getattr(self, field)))
        if self.norm not in NORMS:
            raise no_such("norm", self.norm, NORMS)


def moments_for(norm: Norm, fast: Fast) -> Moments | None:
    """What `Model.apply` takes to normalise a query in this mode."""
    return None if norm == "transductive" else fast.moments


def apply_fast(model: Model, fast: Fast, x: Tensor, norm: Norm) -> Tensor:
    """`predict` of members whose fast weights are the model's parameters: x [n, ...] -> [n, outputs]."""
    return model.apply(fast.params, x, moments_for(norm, fast))
