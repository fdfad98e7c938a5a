"""What every system computes: the workloads, their tensors, and the architecture as a plain PyTorch module.

Nothing here needs metaft, so that a peer's process holds its own library and torch, and no more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Workload:
    """One meta-step of MAML: `meta_batch` tasks, `inner_steps` steps of gradient descent, mean cross-entropy.

    The model is Conv-4; normalisation uses the batch's own statistics, and its scales and shifts are adapted too.
    """

    name: str
    ways: int
    shots: int
    query_shots: int
    meta_batch: int
    inner_steps: int
    inner_lr: float
    shape: tuple[int, int, int]
    """(C, H, W) of an image."""
    width: int
    form: Literal["stride", "pool"]
    """stride: blocks halve by stride 2, then the mean over the map. pool: by max-pooling, then flattened."""

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Workload:
        """From what `dataclasses.asdict` made of one, by way of JSON."""
        return cls(**{**values, "shape": tuple(values["shape"])})


def _omniglot(name: str, ways: int, query_shots: int, meta_batch: int, steps: int, lr: float) -> Workload:
    return Workload(name, ways, 1, query_shots, meta_batch, steps, lr, (1, 28, 28), 64, "stride")


def _mini_imagenet(name: str, shots: int, meta_batch: int) -> Workload:
    return Workload(name, 5, shots, 15, meta_batch, 5, 0.01, (3, 84, 84), 32, "pool")


WORKLOADS = {
    workload.name: workload
    for workload in (
        _omniglot("omniglot-5w1s-q1", 5, 1, 32, 1, 0.4),
        _omniglot("omniglot-5w1s-q15", 5, 15, 32, 1, 0.4),
        _omniglot("omniglot-20w1s", 20, 1, 16, 5, 0.1),
        _mini_imagenet("mini-5w1s", 1, 4),
        _mini_imagenet("mini-5w5s", 5, 2),
        # Milliseconds, to try the benchmark itself
        Workload("tiny", 3, 1, 2, 3, 2, 0.1, (1, 16, 16), 4, "stride"),
        Workload("tiny-pool", 3, 2, 2, 2, 2, 0.1, (3, 16, 16), 4, "pool"),
    )
}
"""The published settings of Finn et al. 2017 (20-way with 16 tasks, mini-ImageNet with 4 and 2), and two tiny ones."""

PUBLISHED = tuple(name for name in WORKLOADS if not name.startswith("tiny"))


class Tasks(NamedTuple):
    """The tensors of a meta-batch."""

    support_x: Tensor
    """[B, N*K, C, H, W]"""
    support_y: Tensor
    """[B, N*K] int64"""
    query_x: Tensor
    """[B, N*Q, C, H, W]"""
    query_y: Tensor
    """[B, N*Q] int64"""

    def one(self, i: int) -> Tasks:
        """Task i, without the leading axis."""
        return Tasks(*(tensor[i] for tensor in self))


def draw_tasks(workload: Workload, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tasks:
    """Normal noise in shuffled order: speed does not depend on what is in the pictures.

    The values are those of float32 in every precision, so that a check in float64 sees what is timed.
    """
    w, generator = workload, torch.Generator().manual_seed(seed)

    def images(per_class: int) -> Tensor:
        x = torch.randn(w.meta_batch, w.ways * per_class, *w.shape, generator=generator)
        return x.to(device, dtype)

    def labels(per_class: int) -> Tensor:
        order = [torch.randperm(w.ways * per_class, generator=generator) for _ in range(w.meta_batch)]
        return (torch.stack(order) % w.ways).to(device)

    return Tasks(images(w.shots), labels(w.shots), images(w.query_shots), labels(w.query_shots))


class Conv4(nn.Module):
    """Conv-4 as one writes it in plain PyTorch; its parameters have the names of metaft's."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        channels, height, width = workload.shape
        filters, stride = workload.width, 2 if workload.form == "stride" else 1
        layers: list[nn.Module] = []
        for block in range(4):
            layers += [
                nn.Conv2d(channels if block == 0 else filters, filters, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(filters, track_running_stats=False),
                nn.ReLU(),
            ]
            if workload.form == "pool":
                layers.append(nn.MaxPool2d(2))
        self.blocks = nn.Sequential(*layers)
        self.average = workload.form == "stride"
        self.head = nn.Linear(filters if self.average else filters * (height // 16) * (width // 16), workload.ways)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.head(x.mean((2, 3)) if self.average else x.flatten(1))


def draw_params(
    workload: Workload, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 1
) -> Params:
    """Initial weights of Conv-4: Glorot-uniform, with scales, shifts and biases a little off 1 and 0.

    At exactly 1 and 0 a check could not tell some wrong gradients from right ones.
    """
    generator = torch.Generator().manual_seed(seed)
    params: Params = {}
    for name, p in Conv4(workload).named_parameters():
        value = torch.empty(p.shape)
        if value.dim() > 1:
            nn.init.xavier_uniform_(value, generator=generator)
        else:
            start = 1.0 if name.startswith("blocks") and name.endswith("weight") else 0.0
            nn.init.normal_(value, start, 0.1, generator=generator)
        params[name] = value.to(device, dtype)
    return params


def plain_module(workload: Workload, params: Params) -> Conv4:
    """The module that a peer is handed, with these weights (copied), their precision and device."""
    some = next(iter(params.values()))
    module = Conv4(workload).to(some.device, some.dtype)
    module.load_state_dict(params)
    return module


def module_grads(module: nn.Module) -> Params:
    """The gradients that backward left, by parameter name."""
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a system runs."""

    first_order: bool = False
    threads: int = 1
    """torch's intra-op threads, or as many tasks at once where a system splits by task."""
    engine: str = "auto"
    """metaft's alone."""
    dataset: str = "glyphs"
    """Where the end-to-end rows draw from; metaft's alone."""
    algorithm: str = "maml"
    """Of `benchmarks/family.py`, metaft's alone; in a meta-test also "protonet"."""
    own_steps: bool = False
    """Whether that takes its own number of inner steps, or the workload's."""
    evaluate: Literal["", "one", "both", "each"] = ""
    """Instead of a meta-gradient a meta-test: {"accuracy": [B]} after the last step in transductive mode, and of metaft
    [B, modes, 1] in both, or [B, modes, steps + 1] after each step."""


def accuracies(logits: Sequence[Tensor], tasks: Tasks) -> Params:
    """Of each task's queries."""
    right = [(found.argmax(-1) == y).double().mean() for found, y in zip(logits, tasks.query_y, strict=True)]
    return {"accuracy": torch.stack(right)}


@dataclasses.dataclass(frozen=True)
class System:
    """A library made ready for a workload."""

    step: Callable[[], Params]
    """One meta-step up to the mean meta-gradient, by parameter name, or what `Options.evaluate` says."""
    in_flight: int = 1
    """Tasks whose graphs are held at the same time."""
    close: Callable[[], None] = lambda: None
    report: Callable[[], dict[str, Any]] = dict
    """Figures of the system's own, asked for after the last step."""
