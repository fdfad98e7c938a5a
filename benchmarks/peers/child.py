"""The process of one system: reads requests from stdin and answers each with one line of JSON on what was its stdout.

    python -m benchmarks.peers.child SYSTEM

Requests, each an object with a key "do":
- gradient (workload, options, device, out): the meta-gradient in float64 (or a meta-test's accuracies), into a file
- prepare (workload, options, device, out, seconds): the system for a workload in float32, warmed up; the gradient of
  its first step goes into a file
- time (seconds): milliseconds of each step
- finish: memory and the system's own figures

An answer {"error": ..., "missing": true or false} stands for an exception; missing is a library that is not installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.peers.meters import forget_peak, resident_mib
from benchmarks.peers.workloads import WORKLOADS, Options, Params, System, Workload, draw_params, draw_tasks

SYSTEMS: dict[str, tuple[str, str]] = {
    "metaft": ("metaft_maml", "metaft"),
    "metaft-bf16": ("metaft_bf16", "metaft"),
    "metaft-end-to-end": ("metaft_end_to_end", "metaft"),
    "metaft-member": ("metaft_member", "metaft"),
    "learn2learn": ("learn2learn_maml", "learn2learn"),
    "higher": ("higher_maml", "higher"),
    "torchopt": ("torchopt_maml", "torchopt"),
    "easyfsl": ("easyfsl_protonet", "easyfsl"),
    "plain": ("plain_loop", "torch"),
}
"""Name -> (file beside this one, the library that it needs)."""


def build(system: str, workload: Workload, options: Options, device: str, dtype: torch.dtype) -> System:
    """A system on the tensors that every system gets."""
    params = draw_params(workload, dtype=dtype, device=device)
    tasks = draw_tasks(workload, dtype=dtype, device=device)
    module = importlib.import_module(f"benchmarks.peers.{SYSTEMS[system][0]}")
    return module.make(workload, params, tasks, options)


def meta_gradient(system: str, workload: Workload, options: Options, device: str = "cpu") -> Params:
    """One system's meta-gradient in float64."""
    made = build(system, workload, options, device, torch.float64)
    try:
        return whole(made.step(), workload, options)
    finally:
        made.close()


def whole(grads: Params, workload: Workload, options: Options) -> Params:
    """The gradient of every parameter, or what a meta-test found. Raises RuntimeError where a system left one out."""
    if options.evaluate:
        return {"accuracy": grads["accuracy"].detach().cpu().contiguous()}
    expected = draw_params(workload)
    missing = [name for name in expected if name not in grads]
    if missing:
        raise RuntimeError(f"no gradient for {', '.join(missing)}")
    return {name: grads[name].detach().cpu().contiguous() for name in expected}


def timed(system: System, seconds: float, device: str, *, least: int = 1) -> Iterator[float]:
    """Milliseconds of each step, until the time is up and at least so many are done."""
    done, end = 0, time.perf_counter() + seconds
    while done < least or time.perf_counter() < end:
        start = time.perf_counter()
        system.step()
        if device != "cpu":
            torch.cuda.synchronize(device)
        yield 1000 * (time.perf_counter() - start)
        done += 1


class Worker:
    """Answers requests, one after the other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.system: System | None = None
        self.device = "cpu"
        self.before: float | None = None
        """MiB before the first step."""
        self.process_peak: tuple[float, float] | None = None

    def respond(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request, or what went wrong."""
        try:
            return self.answer(request)
        except Exception as error:
            traceback.print_exc()
            missing = isinstance(error, ModuleNotFoundError) and error.name == SYSTEMS[self.name][1]
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], "missing": missing}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        action = request["do"]
        if action == "time":
            assert self.system is not None
            return {"ms": list(timed(self.system, request["seconds"], self.device))}
        if action == "finish":
            return self.finish()
        workload = Workload.from_plain(request["workload"])
        options = Options(**request["options"])
        self.device = request["device"]
        torch.set_num_threads(options.threads)
        if action == "gradient":
            save_file(meta_gradient(self.name, workload, options, self.device), request["out"])
            return {}
        self.touch_libraries(options)
        self.system = build(self.name, workload, options, self.device, torch.float32)
        return self.warm_up(workload, options, request)

    def touch_libraries(self, options: Options) -> None:
        """One step of a tiny workload: libraries set up much at their first use, which is no task's memory."""
        name = "metaft" if self.name == "metaft-end-to-end" else self.name
        tiny = build(name, WORKLOADS["tiny"], options, self.device, torch.float32)
        try:
            tiny.step()
        finally:
            tiny.close()

    def warm_up(self, workload: Workload, options: Options, request: Mapping[str, Any]) -> dict[str, Any]:
        """The first steps, and what memory was before them."""
        assert self.system is not None
        self.process_peak = resident_mib()
        forget_peak()
        self.before = self.memory_now()
        save_file(whole(self.system.step(), workload, options), request["out"])
        for _ in timed(self.system, request["seconds"], self.device, least=2):
            pass
        return {"version": _version(SYSTEMS[self.name][1])}

    def finish(self) -> dict[str, Any]:
        assert self.system is not None
        figures: dict[str, Any] = {"peak_mib": None, "growth_mib_per_task": None, "in_flight": self.system.in_flight}
        after = resident_mib()
        if after is not None and self.process_peak is not None:
            figures["peak_mib"] = max(after[1], self.process_peak[1])
        peak = None if after is None else after[1]
        if self.device != "cpu":
            peak = figures["device_peak_mib"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        if peak is not None and self.before is not None:
            figures["growth_mib_per_task"] = max(peak - self.before, 0.0) / self.system.in_flight
        return {**figures, **self.system.report()}

    def memory_now(self) -> float | None:
        """MiB where the tensors are; on a GPU its peak starts anew too."""
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device) / 2**20
        resident = resident_mib()
        return None if resident is None else resident[0]


def _version(library: str) -> str | None:
    if library == "metaft":  # a checkout need not be installed
        return importlib.import_module("metaft").__version__
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    name = sys.argv[1]
    # The pipe is for answers alone: whatever a library prints, from Python or from C, goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(name)
    for line in sys.stdin:
        print(json.dumps(worker.respond(json.loads(line))), file=answers, flush=True)
    if worker.system is not None:
        worker.system.close()


if __name__ == "__main__":
    main()
