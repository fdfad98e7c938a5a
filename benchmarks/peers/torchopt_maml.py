"""TorchOpt: a `MetaSGD` over the module itself, whose weights are put back after each task.

Of its documented forms this is the fastest that is right. Tried on three workloads: `torchopt.sgd` with functional_call
in a loop takes as long or a little longer, one backward over the losses of all tasks as long or 1.7 times as long, and
`torch.func.vmap` over the functional form gives a meta-gradient that is off by 0.3 % of its norm (PyTorch's batch
normalisation under vmap).
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from benchmarks.peers.workloads import Options, Params, System, Tasks, Workload, module_grads, plain_module


def make(workload: Workload, params: Params, tasks: Tasks, options: Options) -> System:
    return (_first_order if options.first_order else _second_order)(workload, params, tasks)


def _second_order(workload: Workload, params: Params, tasks: Tasks) -> System:
    torchopt = importlib.import_module("torchopt")
    model = plain_module(workload, params)
    inner = torchopt.MetaSGD(model, lr=workload.inner_lr)

    def step() -> Params:
        model.zero_grad()
        start = torchopt.extract_state_dict(model, by="reference", detach_buffers=True)
        inner_start = torchopt.extract_state_dict(inner, by="reference")
        for i in range(workload.meta_batch):
            task = tasks.one(i)
            for _ in range(workload.inner_steps):
                inner.step(F.cross_entropy(model(task.support_x), task.support_y))
            (F.cross_entropy(model(task.query_x), task.query_y) / workload.meta_batch).backward()
            torchopt.recover_state_dict(model, start)
            torchopt.recover_state_dict(inner, inner_start)
        return module_grads(model)

    return System(step)


def _first_order(workload: Workload, params: Params, tasks: Tasks) -> System:
    """MetaSGD always builds the graph of the inner gradients, so this is the functional optimiser."""
    torchopt = importlib.import_module("torchopt")
    model = plain_module(workload, params)
    inner = torchopt.sgd(lr=workload.inner_lr)
    meta: Params = dict(model.named_parameters())

    def loss_of(fast: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(model, fast, (x,)), y)

    def step() -> Params:
        model.zero_grad()
        for i in range(workload.meta_batch):
            task, fast = tasks.one(i), meta
            state = inner.init(fast)
            for _ in range(workload.inner_steps):
                grads = torch.autograd.grad(loss_of(fast, task.support_x, task.support_y), list(fast.values()))
                updates, state = inner.update(dict(zip(fast, grads, strict=True)), state, params=fast, inplace=False)
                fast = torchopt.apply_updates(fast, updates, inplace=False)
            (loss_of(fast, task.query_x, task.query_y) / workload.meta_batch).backward()
        return module_grads(model)

    return System(step)
