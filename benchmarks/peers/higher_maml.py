"""higher: a stateless copy of the module and a differentiable optimiser per task, inside `innerloop_ctx`."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from benchmarks.peers.workloads import Options, Params, System, Tasks, Workload, module_grads, plain_module


def make(workload: Workload, params: Params, tasks: Tasks, options: Options) -> System:
    higher = importlib.import_module("higher")
    model = plain_module(workload, params)
    inner = torch.optim.SGD(model.parameters(), lr=workload.inner_lr)

    def step() -> Params:
        model.zero_grad()
        for i in range(workload.meta_batch):
            task = tasks.one(i)
            with higher.innerloop_ctx(
                model, inner, copy_initial_weights=False, track_higher_grads=not options.first_order
            ) as (fast, optimizer):
                for _ in range(workload.inner_steps):
                    optimizer.step(F.cross_entropy(fast(task.support_x), task.support_y))
                loss = F.cross_entropy(fast(task.query_x), task.query_y) / workload.meta_batch
                if not options.first_order:
                    loss.backward()
                    continue
                # Untracked, the fast weights are cut off from the module's. Its maintainers' answer (higher#63): take
                # the gradient at the fast weights and carry it over by hand.
                for p, grad in zip(model.parameters(), torch.autograd.grad(loss, fast.parameters()), strict=True):
                    p.grad = grad if p.grad is None else p.grad + grad
        return module_grads(model)

    return System(step)
