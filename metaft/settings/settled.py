"""What meta-training depends on, with nothing open."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from metaft.settings.data import DataSettings
from metaft.settings.meta_training import LearnerSettings, MetaTestSettings, OuterSettings, TaskSettings

NEEDED: Any = None
"""In place of a default where the type allows none: what is not given is refused."""


@dataclasses.dataclass(frozen=True)
class SettledData(DataSettings):
    """Data."""

    rotate: bool = NEEDED


@dataclasses.dataclass(frozen=True)
class SettledTask(TaskSettings):
    """Tasks in training."""

    ways: int = NEEDED
    shots: int = NEEDED
    query_shots: int = NEEDED
    meta_batch: int = NEEDED


@dataclasses.dataclass(frozen=True)
class SettledLearner(LearnerSettings):
    """Algorithm and model."""

    model: str = NEEDED
    width: int = NEEDED


@dataclasses.dataclass(frozen=True)
class SettledOuter(OuterSettings):
    """Outer loop."""

    iterations: int = NEEDED
    outer_optimizer: Literal["adam", "sgd"] = NEEDED
    outer_lr: float = NEEDED
    outer_schedule: str = NEEDED


@dataclasses.dataclass(frozen=True)
class SettledTest(MetaTestSettings):
    """Validation and test."""

    eval_every: int = NEEDED
    test_ways: int = NEEDED
    test_shots: int = NEEDED
    test_query_shots: int = NEEDED
    test_inner_steps: int = NEEDED
