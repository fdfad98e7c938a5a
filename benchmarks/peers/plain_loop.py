"""MAML by hand: the paper's equations in `torch.autograd.grad`, without a module or a library.

What one writes for a single paper, and the reference that every system's meta-gradient is checked against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.workloads import Options, Params, System, Tasks, Workload, accuracies


def forward(workload: Workload, params: Params, x: Tensor) -> Tensor:
    """Conv-4."""
    return F.linear(features(workload, params, x), params["head.weight"], params["head.bias"])


def features(workload: Workload, params: Params, x: Tensor) -> Tensor:
    """What its head sees."""
    pool = workload.form == "pool"
    for i in range(0, 16 if pool else 12, 4 if pool else 3):
        x = F.conv2d(x, params[f"blocks.{i}.weight"], stride=1 if pool else 2, padding=1)
        scale, shift = params[f"blocks.{i + 1}.weight"], params[f"blocks.{i + 1}.bias"]
        x = F.relu(F.batch_norm(x, None, None, scale, shift, training=True))
        if pool:
            x = F.max_pool2d(x, 2)
    return x.flatten(1) if pool else x.mean((2, 3))


def make(workload: Workload, params: Params, tasks: Tasks, options: Options) -> System:
    meta = {name: p.clone().requires_grad_() for name, p in params.items()}

    def adapted(task: Tasks) -> Params:
        fast = meta
        for _ in range(workload.inner_steps):
            loss = F.cross_entropy(forward(workload, fast, task.support_x), task.support_y)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=not options.first_order)
            fast = {name: p - workload.inner_lr * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        return fast

    def task_grads(task: Tasks) -> tuple[Tensor, ...]:
        fast = adapted(task)
        loss = F.cross_entropy(forward(workload, fast, task.query_x), task.query_y)
        return torch.autograd.grad(loss, list(meta.values()))

    def step() -> Params:
        total = [torch.zeros_like(p) for p in params.values()]
        for i in range(workload.meta_batch):
            for sum_, grad in zip(total, task_grads(tasks.one(i)), strict=True):
                sum_ += grad
        return {name: sum_ / workload.meta_batch for name, sum_ in zip(params, total, strict=True)}

    def evaluate() -> Params:
        found = []
        for i in range(workload.meta_batch):
            fast = adapted(tasks.one(i))
            with torch.no_grad():
                found.append(forward(workload, fast, tasks.one(i).query_x))
        return accuracies(found, tasks)

    def by_prototypes() -> Params:
        found = []
        with torch.no_grad():
            for i in range(workload.meta_batch):
                task = tasks.one(i)
                support, query = (features(workload, params, x) for x in (task.support_x, task.query_x))
                prototypes = torch.stack([support[task.support_y == n].mean(0) for n in range(workload.ways)])
                found.append(-(query.unsqueeze(1) - prototypes).square().sum(-1))
        return accuracies(found, tasks)

    if not options.evaluate:
        return System(step)
    return System(by_prototypes if options.algorithm == "protonet" else evaluate)
