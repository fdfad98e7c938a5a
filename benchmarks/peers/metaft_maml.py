"""metaft: its own Conv-4, `metaft.algorithms.maml`, and `metaft.meta_gradient` over an engine."""

from __future__ import annotations

import contextlib

import torch

import metaft
import metaft.engines
import metaft.types
from benchmarks.peers.workloads import Options, Params, System, Tasks, Workload
from metaft.dist.ranks import ALONE, Ranks
from metaft.models.precision import in_bf16
from metaft.testing import How, group_size, score_tasks


def model_for(workload: Workload, some: torch.Tensor) -> metaft.Model:
    """The workload's Conv-4 in the precision and on the device of a tensor."""
    return metaft.models.build(
        "conv4" if workload.form == "stride" else "conv4-pool",
        ways=workload.ways,
        shape=workload.shape,
        width=workload.width,
        seed=0,
        device=some.device,
        dtype=some.dtype,
    )


def algorithm_for(workload: Workload, model: metaft.Model, options: Options) -> metaft.Algorithm:
    if options.algorithm == "protonet":
        return metaft.algorithms.protonet(model)
    return metaft.algorithms.maml(
        model, inner_lr=workload.inner_lr, inner_steps=workload.inner_steps, first_order=options.first_order
    )


def in_flight(engine: metaft.Engine, tasks: Tasks) -> int:
    """Tasks whose graphs an engine holds at the same time."""
    meta_batch = len(tasks.support_x)
    if isinstance(engine, metaft.engines.Threads | metaft.engines.Processes):
        return min(engine.threads * engine.chunk_of(tasks), meta_batch)
    return min(getattr(engine, "chunk", None) or meta_batch, meta_batch)


def make(
    workload: Workload,
    params: Params,
    tasks: Tasks,
    options: Options,
    ranks: Ranks = ALONE,
    *,
    bf16: bool = False,
) -> System:
    """Of several `ranks` each takes its share of the tasks, and the step ends when all have the sum."""
    stack = contextlib.ExitStack()
    model = model_for(workload, tasks.support_x)
    model = in_bf16(model) if bf16 else model
    if {k: v.shape for k, v in params.items()} != {k: v.shape for k, v in model.params.items()}:
        raise RuntimeError("metaft's Conv-4 has other parameters than the benchmark's")
    engine = stack.enter_context(
        metaft.engine(
            options.engine,
            convolutional=model.convolutional,
            device=tasks.support_x.device,
            threads=options.threads,
        )
    )
    device = tasks.support_x.device
    class_ids = torch.arange(workload.ways, device=device).expand(workload.meta_batch, -1)
    episode = metaft.Episode(*tasks, class_ids, torch.arange(workload.meta_batch, device=device))
    mine = ranks.share(range(workload.meta_batch))
    episode = metaft.Episode(*(t[mine.start : mine.stop] for t in episode))
    algorithm = algorithm_for(workload, model, options)
    meta = {name: params[name].clone() for name in algorithm.init(0)[0]}

    def step() -> Params:
        return metaft.meta_gradient(engine, algorithm, meta, {}, episode, ranks=ranks).grads

    norms = metaft.types.NORMS if options.evaluate != "one" else metaft.types.NORMS[:1]
    how = How(workload.ways, workload.inner_steps, norms, each_step=options.evaluate == "each")
    starts = ((meta, {}),)
    values = (tasks.support_x.numel() + tasks.query_x.numel()) // workload.meta_batch
    size = group_size(engine, starts, how, values)

    def evaluate() -> Params:
        found = score_tasks(engine, algorithm, starts, how, episode, size)
        return {"accuracy": found[:, 0, 0] if options.evaluate == "one" else found}

    return System(evaluate if options.evaluate else step, in_flight(engine, tasks), stack.close)
