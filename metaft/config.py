"""The settings of each command: groups of `metaft.settings`, which are its `--help`, its TOML file and its record.

An option left at None takes the value that `metaft.defaults` chooses for data set, model and algorithm; the run
folder's `config.toml` holds what was chosen. Importing this module does not import torch, so that `--help` answers at
once.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from metaft.errors import MetaftError
from metaft.options import Option, Settings, flat, options
from metaft.settings.bounds import LARGEST
from metaft.settings.compute import Compute, Device, Draws, EvaluateCompute, FittingOutput, TrainingOutput
from metaft.settings.data import DataSettings, EvaluateData, TargetSettings
from metaft.settings.finetuning import ImageSize, InnerMethod, Recipe, StartSettings, TrainingStart
from metaft.settings.meta_training import (
    EpisodeSettings,
    InnerSettings,
    LearnerSettings,
    MetaTestSettings,
    OuterSettings,
    TaskSettings,
)
from metaft.settings.settled import SettledData, SettledLearner, SettledOuter, SettledTask, SettledTest
from metaft.support.paths import local

Init = Literal["keep", "seed"]
"""Of a module from Python: the values that it was handed over with, or others drawn from the seed."""


@dataclasses.dataclass(frozen=True, init=False)
class MetaTrainConfig(Settings):
    """Learn an initialisation from few-shot episodes, then meta-test it.

    Defaults follow data, model and member: "photos" below is for --model conv4-pool and for images above 32 pixels.
    """

    stored = True

    data: DataSettings
    start: TrainingStart
    task: TaskSettings
    learner: LearnerSettings
    inner: InnerSettings
    outer: OuterSettings
    test: MetaTestSettings
    compute: Compute
    output: TrainingOutput


@dataclasses.dataclass(frozen=True, init=False)
class Settled(MetaTrainConfig):
    """A config in which nothing is open that training depends on; `metaft.defaults.resolve` makes it."""

    data: SettledData
    task: SettledTask
    learner: SettledLearner
    outer: SettledOuter
    test: SettledTest


@dataclasses.dataclass(frozen=True, init=False)
class EvaluateConfig(Settings):
    """Meta-test a finished run, at its own or at other ways and shots. What is left out is as in the run."""

    episode: EpisodeSettings
    checkpoint: Annotated[
        Literal["best", "last", "ensemble"],
        Option("The one that was best on validation, the last one, or the mean output of those of --keep-best."),
    ] = "best"
    plugin: Annotated[
        str | None,
        Option(
            "PATH.py or a module that registers the run's algorithm, where it is no longer the one that the run names.",
            metavar="PATH",
        ),
    ] = None
    data: EvaluateData
    compute: EvaluateCompute
    out: Annotated[
        str | None, Option("Where to write the result (auto: RUN/evaluations/NAME.json).", metavar="FILE", stored=False)
    ] = None


@dataclasses.dataclass(frozen=True, init=False)
class AdaptConfig(Settings):
    """Fine-tune a meta-learned initialisation to a target task, and compare it with a random one."""

    stored = True

    start: StartSettings
    target: TargetSettings
    method: Annotated[
        Literal["finetune", "inner"],
        Option("finetune: Adam and a fresh head. inner: the run's own inner loop, as in meta-training."),
    ] = "finetune"
    auto: Annotated[
        float | None,
        Option(
            "Choose the start, unless --init names one, then strategy and rate, by cross-validation of the training "
            "images for so many minutes; the fits that are reported come after them.",
            above=0,
            at_most=100_000,
            metavar="MINUTES",
        ),
    ] = None
    robust: Annotated[
        tuple[str, ...],
        Option(
            "Judge by test images that PGD changed within these bounds too, in pixel values 0..1: 1/255 2/255.",
            metavar="EPS",
        ),
    ] = ()
    also: Annotated[
        tuple[str, ...],
        Option(
            "Further targets, as --data names them: one backbone for all, a head and a classifier for each, beside a "
            "model of each alone.",
            metavar="DATA",
        ),
    ] = ()
    tasks: Annotated[
        Literal["sum", "uncertainty", "pcgrad"] | None,
        Option(
            "With --also, the loss of a step: the sum of the targets' losses, weighted by learned uncertainties, or "
            "with gradients that conflict projected (auto: sum)."
        ),
    ] = None
    recipe: Recipe | None = None
    """None where nothing of it is given, and for the inner loop."""
    inner: InnerMethod
    draws: Draws
    compute: Device
    output: FittingOutput

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if self.method == "inner":
            for name, value in given.items():
                if name in options(Recipe) and value is not None:
                    raise of_other_method(name, self.method, value)


def of_other_method(name: str, method: str, value: Any) -> MetaftError:
    """What to say of a setting that the chosen method would ignore."""
    return MetaftError(f"{name}: --method {method} has no such setting (given {value})")


@dataclasses.dataclass(frozen=True, init=False)
class PredictConfig(Settings):
    """Label images with the classifier that an adapt run left."""

    top: Annotated[int, Option("How many of the most probable classes to name for each image.", at_least=1)] = 1
    csv: Annotated[
        str | None, Option("Write the labels to this file too, as comma-separated values.", metavar="FILE")
    ] = None
    skip_bad: Annotated[bool, Option("Take it for success too where more than half of the files cannot be read.")] = (
        False
    )
    compute: Device


@dataclasses.dataclass(frozen=True, init=False)
class ChooseConfig(Settings):
    """Rank what a classifier of these images could begin with, without fine-tuning anything."""

    starts: Annotated[
        tuple[str, ...],
        Option(
            "Starts to rank, as --init of metaft.adapt names them, beside those at hand: the runs in runs/ that fit, "
            "and efficientnet-lite0 where it is installed.",
            metavar="START",
        ),
    ] = ()
    only: Annotated[bool, Option("Rank no others than those of --starts.")] = False
    target: TargetSettings
    image_size: ImageSize = None
    seed: Annotated[int, Option("Of the draw of the images and of their folds; metaft.adapt's.", at_least=0)] = 0
    out: Annotated[
        str | None, Option("A new folder (auto: runs/choose-DATA-SEED).", metavar="FOLDER", stored=False)
    ] = None


MovedData = Annotated[
    str | None, Option("Where the run's data lie, if they moved (auto: $METAFT_DATA).", metavar="PATH")
]


@dataclasses.dataclass(frozen=True, init=False)
class ExportConfig(Settings):
    """Write the classifier that an adapt run left as a file that runs without metaft."""

    format: Annotated[
        Literal["onnx", "torch-export"],
        Option("onnx: for onnxruntime and what else reads ONNX. torch-export: for PyTorch, without metaft."),
    ] = "onnx"
    int8: Annotated[bool, Option("Write a second ONNX file too, in 8-bit integers.")] = False
    pictures: Annotated[
        tuple[str, ...],
        Option(
            "Pictures to check and calibrate with, where those of the run are not at hand.",
            metavar="IMAGE|FOLDER...",
        ),
    ] = ()  # fmt: skip
    data_root: MovedData = None
    out: Annotated[str | None, Option("A new folder (auto: RUN/FORMAT).", metavar="FOLDER", stored=False)] = None


@dataclasses.dataclass(frozen=True, init=False)
class CompressConfig(Settings):
    """Make the classifier that an adapt run left smaller and faster."""

    stored = True

    latency: Annotated[
        float,
        Option("Seconds for one picture to come down to, as a share of the original's.", above=0, below=1),
    ] = 0.75
    points: Annotated[
        float,
        Option("Percentage points of the accuracy on validation images that may be lost.", at_least=0, at_most=100),
    ] = 2.0
    step: Annotated[
        float,
        Option("Share of the original's channels that each step takes out of every layer.", at_least=0.01, below=1),
    ] = 0.1
    into: Annotated[
        str | None,
        Option(
            "Prune nothing, and have the classifier teach this start, as --init of metaft.adapt names it.",
            metavar="START",
        ),
    ] = None
    epochs: Annotated[
        int | None,
        Option("Passes over the training images after each step (auto: 10; with --into 40).", at_least=1),
    ] = None
    lr: Annotated[
        float | None,
        Option("Learning rate of these (auto: as metaft.adapt --strategy full).", above=0, at_most=LARGEST),
    ] = None
    data_root: MovedData = None
    out: Annotated[str | None, Option("A new folder (auto: RUN/compressed).", metavar="FOLDER", stored=False)] = None


@dataclasses.dataclass(frozen=True, init=False)
class CompareConfig(Settings):
    """Put finished runs beside one another."""

    markdown: Annotated[bool, Option("Print the tables as Markdown.")] = False
    latex: Annotated[bool, Option("Print the tables as LaTeX.")] = False
    out: Annotated[
        str | None,
        Option(
            "A new folder for the tables in all forms, what they hold as JSON, and the curves over one another "
            "(auto: nothing is written).",
            metavar="FOLDER", stored=False,
        ),
    ] = None  # fmt: skip


@dataclasses.dataclass(frozen=True, init=False)
class SearchConfig(Settings):
    """Try settings of a command, judge them on validation alone, and keep the best."""

    method: Annotated[
        Literal["grid", "random", "tpe"],
        Option(
            "What is tried next: all combinations in turn, random ones, or what Optuna's TPE proposes (the extra "
            "search)."
        ),
    ] = "random"
    trials: Annotated[int | None, Option("How many to run (auto: 20; of a grid all).", at_least=1)] = None
    workers: Annotated[int, Option("Trials at once, each with its share of the cores.", at_least=1)] = 1
    budget_minutes: Annotated[
        float | None,
        Option(
            "No trial begins after so many minutes of this call; those that run are finished (auto: no limit).",
            above=0,
            at_most=100_000,
            metavar="MINUTES",
        ),
    ] = None
    search_seed: Annotated[
        int, Option("Seed of what is tried; --seed is that of each trial, the same in all.", at_least=0)
    ] = 0
    out: Annotated[
        str | None, Option("A new folder (auto: runs/search-COMMAND-METHOD-SEED).", metavar="FOLDER", stored=False)
    ] = None
    resume: Annotated[
        str | None, Option("Folder of a search to go on with; its own settings apply.", metavar="FOLDER")
    ] = None
    auto_resume: Annotated[
        bool, Option("Go on with the search in --out where there is one already, and start it where there is none.")
    ] = False


@dataclasses.dataclass(frozen=True, init=False)
class LookConfig(Settings):
    """Make a page of pictures, tables and words on a run or a start."""

    image_size: ImageSize = None
    landscape: Annotated[
        bool, Option("Draw the path of training over its loss too, in planes through the parameters; takes minutes.")
    ] = False
    explain: Annotated[
        tuple[str, ...],
        Option(
            "Show what in these images their labels rest on, of an adapt run: Grad-CAM, and with the extra explain "
            "integrated gradients.",
            metavar="IMAGE|FOLDER...",
        ),
    ] = ()
    data_root: MovedData = None
    out: Annotated[
        str | None,
        Option(
            "The page's file (auto: RUN/report.html, of a start look-START.html here).", metavar="FILE", stored=False
        ),
    ] = None


def read_toml(path: Path) -> dict[str, Any]:
    """A flat TOML file as plain data; hyphens in keys count as underscores.

    Raises MetaftError for a missing or malformed file, and a key that is there in both spellings.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values = tomllib.loads(local(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MetaftError(f"config: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # what tomllib raises, and Python at numbers and depths beyond it
        raise MetaftError(f"config: {path} is not valid TOML: {error}") from None
    named: dict[str, Any] = {}
    for key, value in values.items():
        if key.replace("-", "_") in named:
            raise MetaftError(f"{key}: {path} has it in both spellings, with - and with _")
        named[key.replace("-", "_")] = value
    return named


def to_toml(config: Settings) -> str:
    """The options that have a value; TOML has no None, and a missing one means the default."""
    import tomli_w

    return tomli_w.dumps({k: v for k, v in flat(config).items() if v not in (None, ())})
