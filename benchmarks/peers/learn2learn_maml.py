"""learn2learn: `MAML(model)`, a clone per task that adapts to it, and one backward per task."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from benchmarks.peers.workloads import Options, Params, System, Tasks, Workload, accuracies, module_grads, plain_module


def make(workload: Workload, params: Params, tasks: Tasks, options: Options) -> System:
    import metaft.support.vision  # noqa: F401 - learn2learn imports torchvision, which this makes importable beside any torch

    l2l = importlib.import_module("learn2learn")
    model = plain_module(workload, params)
    maml = l2l.algorithms.MAML(model, lr=workload.inner_lr, first_order=options.first_order)

    def step() -> Params:
        maml.zero_grad()
        for i in range(workload.meta_batch):
            task, learner = tasks.one(i), maml.clone()
            for _ in range(workload.inner_steps):
                learner.adapt(F.cross_entropy(learner(task.support_x), task.support_y))
            F.cross_entropy(learner(task.query_x), task.query_y).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(1.0 / workload.meta_batch)
        return module_grads(model)

    def evaluate() -> Params:
        found = []
        for i in range(workload.meta_batch):
            task, learner = tasks.one(i), maml.clone()
            for _ in range(workload.inner_steps):
                learner.adapt(F.cross_entropy(learner(task.support_x), task.support_y))
            with torch.no_grad():
                found.append(learner(task.query_x))
        return accuracies(found, tasks)

    return System(evaluate if options.evaluate else step)
