"""The groups of options that commands are made of; `metaft.config` puts them together.

Every option is one field here, or in the command that alone has it. An option at None takes a value that follows from
others (data set, model, algorithm, the run), which "auto" in its help line names.
"""

# Above 300 lines: one field per option, and each option in one place alone.
from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from metaft.options import Group, Option

LARGEST = 1e30
"""Of the rates and bounds that are above zero."""

MOST_PIXELS = 4096
"""Per side of what a model computes with: of more a single picture takes gigabytes."""

SkipBad = Annotated[bool, Option("Leave out picture files that cannot be read, and say which, instead of stopping.")]
DataRoot = Annotated[
    str | None,
    Option("Folder of the data sets, and of folders that moved (auto: the variable METAFT_DATA).", metavar="FOLDER"),
]


# ---- what there is to learn from ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DataSource(Group):
    """Data."""

    dataset: Annotated[
        str | None,
        Option("Another data set than the run's, with inputs of the same shape (auto: the run's).", metavar="NAME"),
    ] = None
    data_root: DataRoot = None
    download: Annotated[bool, Option("Fetch the data set first, where that is possible (omniglot, l2l:NAME).")] = False
    split: Annotated[
        str | None, Option("How classes are split. omniglot: finn (default), vinyals, alphabets.", metavar="NAME")
    ] = None


@dataclasses.dataclass(frozen=True)
class DataSettings(DataSource):
    """Data."""

    dataset: Annotated[
        str,
        Option(
            "glyphs (built in), omniglot, mini-imagenet, sinusoid, folder:PATH (class folders), csv:PATH (train.csv, "
            "val.csv and test.csv beside the images), l2l:NAME (learn2learn's, e.g. cifarfs), or unlabelled:PATH "
            "(any pictures, or a named set without its training labels).",
            metavar="NAME",
        ),
    ] = "glyphs"
    image_size: Annotated[
        int | None,
        Option(
            "folder, csv, l2l, mini-imagenet: pixels per side (auto: 28 for grey images, 84 for colour; l2l: their own "
            "where all are squares).",
            at_least=1,
            at_most=MOST_PIXELS,
        ),
    ] = None
    channels: Annotated[
        int | None,
        Option("folder, csv, l2l: grey or colour (auto: grey where a sample of the images is).", one_of=(1, 3)),
    ] = None
    rotate: Annotated[
        bool | None, Option("One random quarter turn per class and task (auto: on for omniglot's finn split).")
    ] = None
    skip_bad: SkipBad = False


@dataclasses.dataclass(frozen=True)
class EvaluateData(DataSource):
    """Data (auto: the run's)."""

    rotate: Annotated[bool | None, Option("One random quarter turn per class and task (auto: as in the run).")] = None
    skip_bad: SkipBad = False


@dataclasses.dataclass(frozen=True)
class TargetSettings(Group):
    """Target task."""

    data: Annotated[
        str,
        Option(
            "folder:PATH (class folders, with or without train/ val/ test/), csv:FILE (columns path, label and perhaps "
            "part), torchvision:NAME (CIFAR10, MNIST, ..., in --data-root), or glyphs:SCRIPT (a held-out script).",
            metavar="NAME",
        ),
    ] = "glyphs:Hebrew"
    data_root: DataRoot = None
    skip_bad: SkipBad = False
    shots_per_class: Annotated[
        int | None,
        Option(
            "Images per class to train and validate on (auto: 5 of glyphs; all of train/; without parts all, in three "
            "folds).",
            at_least=1,
        ),
    ] = None


# ---- meta-training ------------------------------------------------------------------------------------------------


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


# ---- fine-tuning --------------------------------------------------------------------------------------------------


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


# ---- how and where it is computed, and where it goes --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device(Group):
    """Compute."""

    device: Annotated[
        str,
        Option(
            "auto (a GPU where there is one), cpu, cuda, cuda:N.",
            pattern=r"auto|cpu|cuda(:\d+)?", like="auto, cpu, cuda or cuda:N", metavar="DEVICE",
        ),
    ] = "auto"  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Seed(Group):
    """Seed."""

    seed: Annotated[
        int,
        Option("Seed of all that is drawn: initialisation or head, episodes or images and their order.", at_least=0),
    ] = 0


@dataclasses.dataclass(frozen=True)
class Draws(Seed):
    """Draws."""

    seeds: Annotated[
        int,
        Option("Repeat with this many seeds, from --seed on, for the mean gain and its 95 % interval.", at_least=1),
    ] = 1


@dataclasses.dataclass(frozen=True)
class Engines(Device):
    """Compute."""

    engine: Annotated[
        Literal["auto", "tune", "processes", "threads", "vmap", "graph", "compiled"],
        Option(
            "How tasks are mapped (auto: processes for convolutions on a CPU, graph on a GPU, else vmap; tune: the "
            "fastest)."
        ),
    ] = "auto"
    threads: Annotated[
        int | None,
        Option(
            "Processes or threads, for engines of that name (auto: one per core); within an operation for others "
            "(auto: 1).",
            at_least=1,
        ),
    ] = None
    task_chunk: Annotated[
        int | None,
        Option(
            "Tasks at once, at most (auto: by their size, for processes and threads; else all, or as many as fit).",
            at_least=1,
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class EvaluateCompute(Engines):
    """Compute."""

    engine: Annotated[
        Literal["auto", "processes", "threads", "vmap", "graph"],
        Option("How tasks are mapped (auto: processes for convolutions on a CPU, graph on a GPU, else vmap)."),
    ] = "auto"


@dataclasses.dataclass(frozen=True)
class Compute(Engines, Seed):
    """Compute."""

    precision: Annotated[
        Literal["fp32", "tf32", "bf16"],
        Option(
            "What models compute in; parameters and gradients are fp32 in all. tf32 is for GPUs; bf16 is slow on most "
            "CPUs."
        ),
    ] = "fp32"
    inner_checkpoint: Annotated[
        bool,
        Option("Recompute inner steps in the backward pass: many steps then take little memory, and more time."),
    ] = False


@dataclasses.dataclass(frozen=True)
class Output(Group):
    """Run folder."""

    out: Annotated[
        str | None,
        Option(
            "Where to make it (auto: runs/DATASET-ALGORITHM-NwKs-SEED, of adapt runs/adapt-DATA-START-SEED; a number "
            "is added where that is taken).",
            metavar="FOLDER",
            stored=False,
        ),
    ] = None
    report: Annotated[
        bool | None, Option("Write report.html into it at the end, a page of pictures and tables (auto: on).")
    ] = None
    snapshots: Annotated[
        int | None,
        Option(
            "Keep so many snapshots of what trains, evenly over training, for metaft.look --landscape; 200 MB at most "
            "(auto: 25 where they take 30 MB or less).",
            one_of=(0, 5, 10, 15, 20, 25),
        ),
    ] = None  # fmt: skip
    log: Annotated[
        Literal["tensorboard"] | None,
        Option(
            "Write rows, pictures and settings in another form too: for TensorBoard, into tensorboard/ (with the "
            "extra of that name)."
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class FittingOutput(Output):
    """Run folder."""

    log_every: Annotated[
        int | None,
        Option(
            "Steps per row of updates.jsonl (auto: as many as measuring takes 2 % of the time with, at least 20, or "
            "a fifth of a short fit's).",
            at_least=1,
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class TrainingOutput(Output):
    """Run folder."""

    log_every: Annotated[int, Option("Meta-steps per row of metrics.jsonl.", at_least=1)] = 10
    checkpoint_every: Annotated[
        int, Option("Meta-steps between checkpoints; a killed run loses at most these.", at_least=1)
    ] = 100


@dataclasses.dataclass(frozen=True)
class Origin(Group):
    """Settings from a file or a run."""

    config: Annotated[
        str | None,
        Option("TOML file with any of these options; the command line wins, --no-... of a switch too.", metavar="FILE"),
    ] = None
    resume: Annotated[str | None, Option("Run folder to go on with; its own settings apply.", metavar="RUN")] = None
    auto_resume: Annotated[
        bool, Option("Go on with the run in --out where there is one already, and start it where there is none.")
    ] = False


# ---- what training depends on, with nothing open ------------------------------------------------------------------

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
