"""How and where it is computed, and where it goes."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from metaft.options import Group, Option


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
