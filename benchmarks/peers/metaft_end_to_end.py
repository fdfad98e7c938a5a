"""metaft with all that a training step has besides: real episodes are drawn, and Adam moves the meta-parameters."""

from __future__ import annotations

import contextlib
import time

import torch

import metaft
from benchmarks.peers.metaft_maml import algorithm_for, in_flight, model_for
from benchmarks.peers.workloads import Options, Params, System, Tasks, Workload
from metaft.config import MetaTrainConfig
from metaft.defaults import resolve
from metaft.runs.training import Outer, draw


def make(workload: Workload, params: Params, tasks: Tasks, options: Options) -> System:
    """`tasks` only says where and in which precision to compute."""
    device = tasks.support_x.device
    folder = options.dataset.startswith("folder:")
    dataset = metaft.tasks.load(
        options.dataset,
        image_size=workload.shape[-1] if folder else None,
        channels=workload.shape[0] if folder else None,
    )
    if dataset.shape != workload.shape:
        raise metaft.MetaftError(
            f"{dataset.name} has inputs of {dataset.shape}, {workload.name} takes {workload.shape}"
        )
    config = resolve(
        MetaTrainConfig(
            dataset=dataset.name,
            ways=workload.ways,
            shots=workload.shots,
            query_shots=workload.query_shots,
            meta_batch=workload.meta_batch,
            inner_steps=workload.inner_steps,
            inner_lr=workload.inner_lr,
            outer_schedule="constant",
        ),
        dataset,
    )
    source = dataset.to(str(device)).source(
        ways=workload.ways,
        shots=workload.shots,
        query_shots=workload.query_shots,
        rotate=config.data.rotate,
        splits=("train",),
    )
    model = model_for(workload, tasks.support_x)
    algorithm = algorithm_for(workload, model, options)
    outer = Outer(config, params)
    stack = contextlib.ExitStack()
    engine = stack.enter_context(
        metaft.engine(options.engine, convolutional=model.convolutional, device=device, threads=options.threads)
    )
    done = 0
    sampling: list[float] = []
    whole: list[float] = []

    def step() -> Params:
        nonlocal done
        start = time.perf_counter()
        first = done * workload.meta_batch
        episodes = draw(algorithm, source, config.compute.seed, range(first, first + workload.meta_batch))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        sampling.append(time.perf_counter() - start)
        grads = metaft.meta_gradient(engine, algorithm, outer.meta, {}, episodes, step=done).grads
        outer.step(grads, done)
        done += 1
        whole.append(time.perf_counter() - start)
        return grads

    def report() -> dict[str, object]:
        # The first step is left out: caches fill in it.
        return {"dataset": dataset.name, "share_of_sampling": sum(sampling[1:]) / sum(whole[1:])}

    return System(step, in_flight(engine, tasks), stack.close, report)
