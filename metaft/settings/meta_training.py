"""Meta-training: tasks, learner, inner and outer loop, validation and test."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from metaft.options import Group, Option
from metaft.settings.bounds import LARGEST


@dataclasses.dataclass(frozen=True)
class TaskSettings(Group):
    """Tasks in training."""

    ways: Annotated[int | None, Option("Classes per task, N (auto: 5; sinusoid: 1).", at_least=1)] = None
    shots: Annotated[int | None, Option("Support images per class, K (auto: 1; sinusoid: 10 points).", at_least=1)] = (
        None
    )
    query_shots: Annotated[
        int | None, Option("Query images per class (auto: 5; photos: 15; sinusoid: 10).", at_least=1)
    ] = None
    meta_batch: Annotated[
        int | None,
        Option("Tasks per meta-step, B (auto: 16; photos: 4, from 5 shots on 2; sinusoid: 25).", at_least=1),
    ] = None


@dataclasses.dataclass(frozen=True)
class LearnerSettings(Group):
    """Algorithm and model."""

    algorithm: Annotated[
        str,
        Option(
            "Member of the family, e.g. anil, protonet, or with settings: maml++:multi_step=0 (all: "
            "docs/algorithms.md).",
            metavar="NAME[:KEY=VALUE,...]",
        ),
    ] = "maml"
    plugin: Annotated[
        str | None,
        Option(
            "PATH.py or a module that registers algorithms of your own; the run keeps it: opening the run runs it "
            "again.",
            metavar="PATH",
        ),
    ] = None
    model: Annotated[
        str | None,
        Option(
            "conv4 (stride 2, mean), conv4-pool (max-pool), resnet12 or mlp (auto: by the input's shape; above 32 "
            "pixels conv4-pool).",
            metavar="NAME",
        ),
    ] = None
    width: Annotated[
        int | None,
        Option(
            "Filters per convolution, for resnet12 in the first block, or units per hidden layer (auto: 64 for conv4 "
            "and resnet12, 32 for conv4-pool, 40 for mlp).",
            at_least=1,
        ),
    ] = None
    dropout: Annotated[
        float,
        Option(
            "Share of the features before the head that is dropped in inner steps, in training and at test.",
            at_least=0, below=1,
        ),
    ] = 0.0  # fmt: skip
    batch_norm: Annotated[
        Literal["transductive", "inductive"],
        Option("How training queries are normalised: with their own statistics, or with the support set's."),
    ] = "transductive"


@dataclasses.dataclass(frozen=True)
class InnerSettings(Group):
    """Inner loop, and what only some algorithms have."""

    inner_steps: Annotated[
        int | None,
        Option(
            "Gradient steps in training (auto: 1, photos: 5, or what the member says; protonet: none).",
            at_least=0,
        ),
    ] = None
    inner_lr: Annotated[
        float | None,
        Option(
            "Rate; where it is learned, the first one (auto: 0.4; photos, sinusoid: 0.01; or what the member says).",
            at_least=0,
        ),
    ] = None
    inner_optimizer: Annotated[
        str | None,
        Option(
            "sgd, momentum, nesterov or adam, or with numbers: momentum:momentum=0.5, adam:beta1=0,eps=1e-6 "
            "(auto: sgd).",
            metavar="NAME",
        ),
    ] = None
    inner_augment: Annotated[
        str | None,
        Option(
            "What is done to support images before each step: none, or shift by up to 2 pixels (auto: none).",
            metavar="NAME",
        ),
    ] = None
    adapt_norm: Annotated[
        bool | None, Option("Whether the inner loop moves scales and shifts too (auto: on; maml++: off).")
    ] = None
    hyper: Annotated[
        tuple[str, ...],
        Option(
            "Settings that only this algorithm has, e.g. first_order=true (see docs/algorithms.md).",
            metavar="NAME=VALUE",
        ),
    ] = ()


@dataclasses.dataclass(frozen=True)
class OuterSettings(Group):
    """Outer loop."""

    iterations: Annotated[int | None, Option("Meta-steps (auto: 1500; sinusoid: 15000).", at_least=1)] = None
    outer_optimizer: Annotated[Literal["adam", "sgd"] | None, Option("Outer optimiser (auto: adam).")] = None
    outer_lr: Annotated[
        float | None,
        Option(
            "Outer rate, at the start of its schedule (auto: 0.003; photos and sinusoid: 0.001; or what the member "
            "says).",
            above=0, at_most=LARGEST,
        ),
    ] = None  # fmt: skip
    outer_schedule: Annotated[
        str | None,
        Option(
            "How the outer rate goes: constant, linear, cosine (the last two down to 0), "
            "step:every=0.3,factor=0.1, one-cycle or stlr, each with :warmup=SHARE (auto: cosine).",
            metavar="NAME[:KEY=VALUE,...]",
        ),
    ] = None
    clip_value: Annotated[
        float | None,
        Option(
            "Clip each entry of the meta-gradient to +- this (auto: photos without --clip-norm: 10, else not at all).",
            above=0, at_most=LARGEST,
        ),
    ] = None  # fmt: skip
    clip_norm: Annotated[
        float | None,
        Option(
            "Scale the meta-gradient down to at most this norm (auto: not at all).", above=0, at_most=LARGEST
        ),
    ] = None  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MetaTestSettings(Group):
    """Validation and test."""

    eval_every: Annotated[
        int | None, Option("Meta-steps between validations (auto: 250; sinusoid: 1000).", at_least=1)
    ] = None
    eval_episodes: Annotated[int, Option("Validation episodes; the best checkpoint is chosen on them.", at_least=1)] = (
        200
    )
    eval_modes: Annotated[
        Literal["training", "both"],
        Option(
            "What validation measures: the last inner step in the training's normalisation, by which the checkpoint is "
            "chosen, or every step in both."
        ),
    ] = "training"
    keep_best: Annotated[
        int,
        Option(
            "Checkpoints to keep, those that are best on validation; evaluate --checkpoint ensemble averages them.",
            at_least=1,
        ),
    ] = 1
    eval_seed: Annotated[int, Option("Seed of validation and test episodes; independent of --seed.", at_least=0)] = 1234
    test_ways: Annotated[int | None, Option("Classes per task (auto: --ways).", at_least=1)] = None
    test_shots: Annotated[int | None, Option("Support images per class (auto: --shots).", at_least=1)] = None
    test_query_shots: Annotated[int | None, Option("Query images per class (auto: 15; sinusoid: 100).", at_least=1)] = (
        None
    )
    test_inner_steps: Annotated[
        int | None,
        Option("Inner steps (auto: 3; photos, sinusoid: 10; --inner-steps if more; or the member's).", at_least=0),
    ] = None
    test_episodes: Annotated[int, Option("Test episodes.", at_least=1)] = 1000


@dataclasses.dataclass(frozen=True)
class EpisodeSettings(Group):
    """Episodes (auto: as in the run)."""

    ways: Annotated[int | None, Option("Classes per task.", at_least=1)] = None
    shots: Annotated[int | None, Option("Support images per class.", at_least=1)] = None
    query_shots: Annotated[int | None, Option("Query images per class.", at_least=1)] = None
    episodes: Annotated[int | None, Option("How many.", at_least=1)] = None
    inner_steps: Annotated[int | None, Option("Inner gradient steps.", at_least=0)] = None
    eval_seed: Annotated[int | None, Option("Seed of the episodes.", at_least=0)] = None
    set: Annotated[Literal["test", "val", "train"], Option("Which classes to draw from.")] = "test"
    episodes_file: Annotated[
        str | None,
        Option(
            "JSON lines that list each episode's pictures, in the place of drawn ones (docs/running.md).",
            metavar="FILE",
        ),
    ] = None
