"""Data and references that the numeric tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metaft import models
from metaft.algorithms import Algorithm
from metaft.inputs import ImageInputs
from metaft.models import Model
from metaft.tasks.pool import ClassPool
from metaft.types import SPLITS, Batch, Episode, Params

SHAPE = (1, 16, 16)

RENAMED = tuple(torch.tensor(order) for order in ([2, 0, 1], [1, 0, 2]))
"""New labels of three classes. Together they make all orders: one alone would pass what turns all classes round, or
what sets the third apart."""


def model(
    name: str = "conv4", *, ways: int = 3, width: int = 4, dtype: torch.dtype = torch.float64, dropout: float = 0.0
) -> Model:
    """A small model with random scales, shifts and biases: at 1 and 0 some gradients could not be told apart, and a
    dead layer would put the next one exactly on ReLU's kink."""
    made = models.build(name, ways=ways, shape=SHAPE, width=width, seed=1, dtype=dtype, dropout=dropout)
    generator = torch.Generator().manual_seed(2)
    for parameter, values in made.params.items():
        if parameter in made.norm or parameter.endswith("bias"):
            values.add_(0.3 * torch.randn(values.shape, generator=generator, dtype=dtype))
    return made


def episodes(
    tasks: int = 4,
    *,
    ways: int = 3,
    shots: int = 2,
    query_shots: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Episode:
    """Learnable noise: each class has a template."""
    g = torch.Generator().manual_seed(seed)
    templates = torch.randn(tasks, ways, *SHAPE, generator=g, dtype=torch.float64)

    def part(per_class: int) -> tuple[Tensor, Tensor]:
        y = torch.stack([torch.randperm(ways * per_class, generator=g) % ways for _ in range(tasks)])
        x = templates.gather(1, y[:, :, None, None, None].expand(-1, -1, *SHAPE))
        x = x + 0.7 * torch.randn(x.shape, generator=g, dtype=torch.float64)
        return x.to(dtype), y

    support, query = part(shots), part(query_shots)
    return Episode(*support, *query, torch.arange(ways).expand(tasks, -1), torch.arange(tasks))


def batches(
    tasks: int = 4, *, classes: int = 12, size: int = 9, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, size, *SHAPE, generator=g, dtype=torch.float64).to(dtype)
    return Batch(x, torch.randint(classes, (tasks, size), generator=g), torch.arange(tasks))


def data_for(algorithm: Algorithm, **kwargs: Any) -> Any:
    """A meta-batch of what the algorithm trains on."""
    return episodes(**kwargs) if algorithm.data == "episodes" else batches(**kwargs)


def one(data: Episode | Batch, i: int = 0) -> Episode:
    """Task i of a meta-batch."""
    return type(data)(*(t[i] for t in data))  # type: ignore[return-value]


def noise_pool(classes: int = 30, per_class: int = 20, shape: tuple[int, int, int] = SHAPE) -> ClassPool:
    """Pixels that say nothing about the class."""
    images = np.random.Generator(np.random.Philox(7)).integers(0, 256, (classes * per_class, *shape), dtype=np.uint8)
    third = classes // 3
    return ClassPool(
        name="noise",
        images=torch.from_numpy(images),
        class_names=tuple(f"class {c}" for c in range(classes)),
        starts=np.arange(classes, dtype=np.int64) * per_class,
        counts=np.full(classes, per_class, np.int64),
        splits={s: np.arange(i * third, (i + 1) * third) for i, s in enumerate(SPLITS)},
        inputs=ImageInputs(*shape),
    )


def conv4_reference(params: Params, x: Tensor) -> Tensor:
    """The stride form of Conv-4 written again from the paper, on PyTorch's own batch normalisation."""
    for i in range(0, 12, 3):
        x = F.conv2d(x, params[f"blocks.{i}.weight"], stride=2, padding=1)
        x = F.batch_norm(x, None, None, params[f"blocks.{i + 1}.weight"], params[f"blocks.{i + 1}.bias"], training=True)
        x = x.clamp_min(0)
    return F.linear(x.mean((2, 3)), params["head.weight"], params["head.bias"])


def maml_reference(
    net: Callable[[Params, Tensor], Tensor], meta: Params, data: Episode, *, lr: float, steps: int, first_order: bool
) -> Params:
    """MAML's meta-gradient from the paper's equations by autograd alone: one graph over the whole meta-batch."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in meta.items()}
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(data.key)):
        task = one(data, i)
        fast: Params = dict(leaves)
        for _ in range(steps):
            loss = F.cross_entropy(net(fast, task.support_x), task.support_y)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order)
            fast = {k: v - lr * g for (k, v), g in zip(fast.items(), grads, strict=True)}
        total = total + F.cross_entropy(net(fast, task.query_x), task.query_y)
    (total / len(data.key)).backward()
    return {k: v.grad for k, v in leaves.items() if v.grad is not None}


def relative_error(found: Params, expected: Params) -> float:
    """Largest difference over the largest entry of the whole gradient: single tensors may be zero in truth."""
    assert found.keys() == expected.keys()
    scale = max(float(t.abs().max()) for t in expected.values())
    return max(float((found[k] - expected[k]).abs().max()) for k in expected) / scale
