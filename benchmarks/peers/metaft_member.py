"""Any member of metaft's family on a workload, with the defaults of a run and its own inner steps or the workload's."""

from __future__ import annotations

import contextlib

import torch

import metaft
import metaft.outer
from benchmarks.peers.metaft_maml import in_flight, model_for
from benchmarks.peers.workloads import Options, Params, System, Tasks, Workload
from metaft.types import Batch, Episode

CLASSES = 1100
"""To train on in Omniglot, for members that learn them all at once."""


def make(workload: Workload, params: Params, tasks: Tasks, options: Options) -> System:
    """The member that `options` names begins at `params`, as far as it learns them, and at its own values else."""
    device = tasks.support_x.device
    model = model_for(workload, tasks.support_x)
    known = metaft.algorithms.hyper_parameters(options.algorithm)
    given: dict[str, object] = {"classes": CLASSES}
    if not options.own_steps:
        given["inner_steps"] = workload.inner_steps
    hyper = {name: value for name, value in given.items() if name in known}
    member = metaft.algorithms.build(options.algorithm, model, hyper)
    first, state = member.init(0)
    meta = {k: params[k].clone() if k in params and params[k].shape == p.shape else p for k, p in first.items()}
    keys = torch.arange(workload.meta_batch, device=device)
    if member.data == "batches":  # as many images as an episode has, of all classes
        x = torch.cat([tasks.support_x, tasks.query_x], dim=1)
        generator = torch.Generator().manual_seed(0)
        data = Batch(x, torch.randint(CLASSES, x.shape[:2], generator=generator).to(device), keys)
    else:
        data = Episode(*tasks, torch.arange(workload.ways, device=device).expand(workload.meta_batch, -1), keys)

    stack = contextlib.ExitStack()
    engine = stack.enter_context(
        metaft.engine(options.engine, convolutional=model.convolutional, device=device, threads=options.threads)
    )
    unlearned = {k: torch.zeros_like(p) for k, p in params.items()}

    def step() -> Params:
        grads = metaft.meta_gradient(engine, member, meta, state, data).grads
        return {k: grads[k] if k in grads and grads[k].shape == z.shape else z for k, z in unlearned.items()}

    return System(step, in_flight(engine, tasks), stack.close)
