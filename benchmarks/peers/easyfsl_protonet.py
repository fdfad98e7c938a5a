"""easyfsl: `PrototypicalNetworks(backbone)`, given each episode's support set and asked for its queries."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from benchmarks.peers.workloads import Options, Params, System, Tasks, Workload, accuracies, plain_module


def make(workload: Workload, params: Params, tasks: Tasks, options: Options) -> System:
    """Its meta-test alone: it has no inner loop. Raises RuntimeError for anything else."""
    import metaft.support.vision  # noqa: F401 - easyfsl imports torchvision, which this makes importable beside any torch

    if not options.evaluate or options.algorithm != "protonet":
        raise RuntimeError("easyfsl is here to predict by prototypes alone")
    backbone = plain_module(workload, params)
    backbone.head = nn.Identity()  # type: ignore[assignment]
    # Its normalisation has no running statistics, so that each call takes its batch's own: transductive.
    model = importlib.import_module("easyfsl.methods").PrototypicalNetworks(backbone)

    def evaluate() -> Params:
        found = []
        with torch.no_grad():
            for i in range(workload.meta_batch):
                task = tasks.one(i)
                model.process_support_set(task.support_x, task.support_y)
                found.append(model(task.query_x))
        return accuracies(found, tasks)

    return System(evaluate)
