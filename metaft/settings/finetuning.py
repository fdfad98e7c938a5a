"""Fine-tuning: what it begins with, and what a fit is made of."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from metaft.options import Group, Option
from metaft.settings.bounds import LARGEST, MOST_PIXELS

ImageSize = Annotated[
    int | None,
    Option(
        "Pixels per side, for published weights and random starts (auto: the weights' own; 28 for grey, 84 for "
        "colour).",
        at_least=1,
        at_most=MOST_PIXELS,
    ),
]
Norm = Annotated[
    Literal["keep", "adapt"] | None,
    Option(
        "What normalises published weights' layers: their running statistics, kept, or moments of the images (auto: "
        "keep)."
    ),
]


@dataclasses.dataclass(frozen=True)
class TrainingStart(Group):
    """Start."""

    init: Annotated[
        str | None,
        Option(
            "What to begin with, in place of --model: efficientnet-lite0 (ImageNet, from the extra vision), "
            "torchvision:NAME[:WEIGHTS], timm:NAME, file:PATH:arch=NAME, or another run's folder (auto: a random "
            "start).",
            metavar="START",
        ),
    ] = None
    init_norm: Norm = None


@dataclasses.dataclass(frozen=True)
class StartSettings(Group):
    """Start."""

    init: Annotated[
        str | None,
        Option(
            "What to begin with: the folder of a run of metaft.meta_train, efficientnet-lite0 (ImageNet, from the "
            "extra vision), torchvision:NAME[:WEIGHTS], timm:NAME, file:PATH:arch=NAME, or none for a random start "
            "alone (auto: efficientnet-lite0 for colour, where it is installed; else the newest run in runs/ that "
            "fits).",
            metavar="START",
        ),
    ] = None
    compare: Annotated[
        tuple[str, ...],
        Option("Further starts, on the same images; several may be given.", metavar="START"),
    ] = ()
    probe: Annotated[
        bool | None,
        Option("Logistic regression on the start's own features beside it (auto: on, but for a random start)."),
    ] = None
    random: Annotated[bool | None, Option("A random start beside it (auto: on).")] = None
    image_size: ImageSize = None
    init_norm: Norm = None


EPOCHS = 40
"""Of a fit, where nothing else is asked for."""

AUTO = "auto"
"""What `--lr` says where a range test is to find the rate."""

PATIENCE = 10
"""Epochs, where validation images are set aside."""

RATE, RATE_OF_HEAD, RATE_OF_PUBLISHED, RATE_OF_FEW = 3e-3, 1e-2, 1e-4, 1e-3
"""Of fine-tuning. The first is the one of 0.001 and 0.003 that is better for a random start, which is what the gain is
measured against; it was chosen on notMNIST's test images. The second is of a head alone on a run's features, which are
few: after 600 steps it is where the first comes to between 1,200 and 2,400 (benchmarks/README.md). At the third
Adam moves published weights by little, as is usual; it was not tuned. The last is for strategies that move few numbers
of them: in 12 epochs from efficientnet-lite0 on 20 images of each of hymenoptera's classes `lora` was right about 55 %
of the test images at 0.0001 and 80 % at 0.001, `bitfit` about 56 and 73 % (one draw)."""


@dataclasses.dataclass(frozen=True)
class Recipe(Group):
    """Fine-tuning (--method finetune), with a fresh head."""

    epochs: Annotated[
        int | None,
        Option(
            "Passes over the training images; fewer if the validation loss stops falling (auto: 40; of --strategy head "
            "as many as make 600 steps, if that is more; of plain lp-ft from published weights 240, 24 of them of "
            "all).",
            at_least=1,
        ),
    ] = None
    patience: Annotated[
        int | None,
        Option(
            "Epochs without a better validation loss before it stops (auto: 10; from published weights none, and all "
            "images train).",
            at_least=1,
        ),
    ] = None
    lr: Annotated[
        float | Literal["auto"] | None,
        Option(
            "Learning rate, or auto: found by a range test on the training images (without it: 0.003; 0.01 of a head "
            "alone on a run's features; 0.0001 where published weights move, 0.001 where few numbers of them do: "
            "bitfit, lora).",
            above=0,
            at_most=LARGEST,
        ),
    ] = None
    optimizer: Annotated[
        str,
        Option("adam, adamw:weight_decay=0.01 or sgd:momentum=0.9, with settings.", metavar="NAME[:KEY=VALUE,...]"),
    ] = "adam"
    schedule: Annotated[
        str | None,
        Option(
            "How the rate changes: constant, linear, cosine, step:every=0.3,factor=0.1, one-cycle, stlr or "
            "plateau:factor=0.1,patience=3 (of the loss), each with :warmup=SHARE (auto: constant; cosine where "
            "published weights move, but for lp-ft of auto epochs).",
            metavar="NAME[:KEY=VALUE,...]",
        ),
    ] = None
    clip_norm: Annotated[
        float | None,
        Option(
            "Scale a gradient down to this norm where it is longer (auto: not; to 1 where published weights move).",
            above=0,
        ),
    ] = None
    batch_size: Annotated[
        int,
        Option("Images per step.", at_least=2),  # a batch of one has no statistics of its own
    ] = 32
    accumulate: Annotated[int, Option("Batches whose gradients make one step.", at_least=1)] = 1
    head: Annotated[Literal["linear", "cosine", "prototype"], Option("The classifier on the features.")] = "linear"
    strategy: Annotated[
        str | None,
        Option(
            "What trains: full, head (on features that are computed once), last:blocks=2, lp-ft:share=0.3,rise=0,"
            "then=full (the head first, then all or what another moves), gradual:every=1 (a block more after so many "
            "epochs), discriminative:decay=2.6 or layer-decay:d=0.75 (all, the lower the slower), bitfit (biases and "
            "head), lora:rank=8 (small products beside the weights, and the head), or chosen by cross-validation of "
            "the training images (auto: head of published weights, else as --freeze says).",
            metavar="NAME[:KEY=VALUE,...]",
        ),
    ] = None
    freeze: Annotated[Literal["none", "backbone"], Option("What is not trained: of --strategy full and head.")] = "none"
    augment: Annotated[
        Literal["none", "basic", "trivial", "randaug"],
        Option(
            "Random changes of the training images: basic (small turns and shifts), trivial (TrivialAugment) or "
            "randaug (RandAugment), as torchvision has them."
        ),
    ] = "none"
    loss: Annotated[
        Literal["cross_entropy", "mse"],
        Option("mse: labels are numbers, which are predicted by their mean squared error (--data csv:FILE)."),
    ] = "cross_entropy"
    balance: Annotated[
        Literal["none", "weights"],
        Option("weights: in the training loss each class counts as much as any other, however many images it has."),
    ] = "none"
    dropout: Annotated[
        float,
        Option("This share of the features is left out in training, before the head.", at_least=0, below=1),
    ] = 0.0
    ema: Annotated[
        float | None,
        Option(
            "Validate and keep the exponential moving average of all parameters with this decay, such as 0.99; in step "
            "t at most (1 + t) / (10 + t) (auto: the parameters themselves).",
            at_least=0,
            below=1,
        ),
    ] = None
    soup: Annotated[
        int | None,
        Option(
            "Train the start so many times, with other orders and changes of the images, and keep the average of those "
            "that validation images say are better together (auto: one fit).",
            at_least=2,
        ),
    ] = None
    label_smoothing: Annotated[
        float,
        Option("This share of each training label is spread over all classes.", at_least=0, below=1),
    ] = 0.0
    extra: Annotated[
        tuple[str, ...],
        Option(
            "Changes to the training loss, the first one first: l2-sp:alpha=0.01,beta=0.01 (pulls to the start), "
            "mixup:alpha=0.2, cutmix:alpha=1, adversarial:eps=2/255,steps=3,share=1, "
            "distil:teacher=RUN,t=2,share=0.5.",
            metavar="NAME[:KEY=VALUE,...]",
        ),
    ] = ()

    @property
    def rate(self) -> float:
        """The learning rate where none is given, of a start that is no library's."""
        assert self.lr != AUTO, "a range test has found it by now"
        return RATE if self.lr is None else self.lr

    @property
    def anneals(self) -> str:
        """The schedule where none is given."""
        return "constant" if self.schedule is None else self.schedule

    @property
    def passes(self) -> int:
        """The number of epochs where none is given."""
        return EPOCHS if self.epochs is None else self.epochs

    @property
    def images_per_step(self) -> int:
        """Of one step of the optimiser, but for the last one of an epoch."""
        return self.batch_size * self.accumulate

    @property
    def trains(self) -> str:
        """The strategy, in words of `--strategy`."""
        return {"none": "full", "backbone": "head"}[self.freeze] if self.strategy is None else self.strategy


@dataclasses.dataclass(frozen=True)
class InnerMethod(Group):
    """Inner loop (--method inner), the run's own."""

    inner_steps: Annotated[
        int | None,
        Option(
            "Steps (auto: the run's --test-inner-steps; 30 where all classes start from its mean head row).",
            at_least=0,
        ),
    ] = None
    plugin: Annotated[
        str | None,
        Option("PATH.py or a module that registers the run's algorithm (auto: the run's own).", metavar="PATH"),
    ] = None
