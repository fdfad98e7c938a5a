"""metaft with `--precision bf16`: the same meta-step with bfloat16 convolutions."""

from __future__ import annotations

from benchmarks.peers import metaft_maml
from benchmarks.peers.workloads import Options, Params, System, Tasks, Workload


def make(workload: Workload, params: Params, tasks: Tasks, options: Options) -> System:
    return metaft_maml.make(workload, params, tasks, options, bf16=True)
