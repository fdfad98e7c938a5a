"""Commands in processes of their own, to be killed, starved or set against each other; and what they leave.

They are forked from one process that has torch loaded already, since loading it takes longer than all the rest.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import dataclasses
import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from helpers import timeless

FULL = os.environ.get("METAFT_FAULTS") == "full"
"""Whether everything is run (`make test-faults`), or the short form."""

DONE: collections.Counter[str] = collections.Counter()
"""What was done to runs and files, and how often; shown when the tests have ended."""

CLOCKED = ("seconds", "tasks_per_second")

COMMANDS = ("meta_train", "evaluate", "adapt")

context = multiprocessing.get_context("forkserver")
# The commands, and what they import only when they come to use it.
_OURS = [f"metaft.{name}" for name in (*COMMANDS, "runs.report", "finetune.report", "finetune.study")]
_OTHERS = ["torch._dynamo", "torch._inductor", "torch.distributed.nn", "sklearn.metrics"]
context.set_forkserver_preload([*_OURS, "rank_gradients", "wide", *_OTHERS])


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to befall a command."""

    kill_at: float = float("inf")
    """The moment of the disk (see `Moments`) at which it is killed."""
    largest_file: int | None = None
    """Bytes that a file may have: a disk that is full, for whoever may not mount one."""
    memory: int | None = None
    """Bytes of address space beyond what it has when it begins."""
    memory_after: int | None = None
    """The meta-step in which that is so, and a gigabyte asked for."""
    clock: bool = False
    """Whether the clock jumps by years, forwards and back, at each look at it."""
    weigh: Path | None = None
    """A file for the memory that it and its workers take, in bytes, a line after each validation."""
    slow_data: float = 0.0
    """Seconds that its data take longer to load."""
    at_step: tuple[int, str] | None = None
    """The meta-step before which, and what happens to it (see `rank_job.arrange`)."""


class Moments:
    """Counts what a run does to the disk. At the moment `kill_at` it is killed; a write then leaves half its data."""

    def __init__(self, kill_at: float) -> None:
        from metaft.runs import checkpoint
        from metaft.runs import folder as run_module

        self.names: list[str] = []
        self.kill_at = kill_at
        for name in ("replace", "fsync", "unlink"):
            setattr(os, name, self._before(name, getattr(os, name)))
        for module in (checkpoint, run_module):
            module.open = self._open  # type: ignore[attr-defined]

    def tick(self, what: str, where: Any) -> bool:
        self.names.append(f"{what} {where}")
        return len(self.names) >= self.kill_at

    def _before(self, name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def ticked(*given: Any, **others: Any) -> Any:
            if self.tick(name, given[0]):
                kill_me()
            return act(*given, **others)

        return ticked

    def _open(self, *given: Any, **others: Any) -> Any:
        if self.tick("open", given[0]):
            kill_me()
        file: Any = builtins.open(*given, **others)  # noqa: SIM115
        return file if "r" in (given[1:] or ("r",))[0] else Writer(file, self)


class Writer:
    """A file that may be cut off in the middle of a write."""

    def __init__(self, file: Any, moments: Moments) -> None:
        self.file, self.moments = file, moments
        self.flush, self.fileno = file.flush, file.fileno

    def write(self, data: Any) -> None:
        if self.moments.tick("write", self.file.name):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            kill_me()
        self.file.write(data)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ALIVE: set[BaseProcess] = set()
"""Every process that was started here and is not known to have ended. What a failing test leaves of them would never
end by itself, and neither would pytest, which waits for its children."""


def end_all() -> None:
    while ALIVE:
        process = ALIVE.pop()
        if process.pid is not None and process.exitcode is None:
            kill_tree(process.pid)
            process.join()


def children_of(process: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        return [int(word) for task in tasks for word in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return []


def kill_tree(process: int) -> None:
    """Kill a process of ours and all that it started, which may be in sessions of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGSTOP)  # so that it starts no other
        for child in children_of(process):
            kill_tree(child)
        os.kill(process, signal.SIGKILL)


class Victim:
    """A command, `python -m metaft.COMMAND ARGV`, in a process of its own, without pictures and on one thread."""

    def __init__(
        self,
        command: str,
        argv: Sequence[str],
        plan: Plan | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> None:
        """`environment` is added to what there is. `fresh` starts Python anew, so that no page of memory is shared with
        any other process. A command that is not one of metaft's is a module of the tests."""
        folder = Path(tempfile.mkdtemp(prefix="metaft-victim-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.said_file, self.count_file = folder / "said", folder / "count"
        module = f"metaft.{command}" if command in COMMANDS else command
        files = (self.said_file, self.count_file)
        self.process: BaseProcess = (multiprocessing.get_context("spawn") if fresh else context).Process(
            target=_run, args=(module, list(argv), plan or Plan(), dict(environment or {}), *files)
        )
        self.process.start()
        ALIVE.add(self.process)

    @property
    def said(self) -> str:
        """What it has said so far, on stdout and stderr."""
        return self.said_file.read_text(encoding="utf-8", errors="replace") if self.said_file.exists() else ""

    @property
    def moments(self) -> list[str]:
        """The moments of the disk that it had; known when it has ended by itself."""
        return self.count_file.read_text().splitlines()

    def status(self, timeout: float = 120.0) -> int:
        """Wait for its end: the exit status, or -signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still there after {timeout} s: {self.said}")
        return self.process.exitcode

    def wait_for(self, there: Callable[[], bool], timeout: float = 60.0) -> None:
        """Until `there()`, while it is alive."""
        until = time.monotonic() + timeout
        while not there():
            assert time.monotonic() < until, self.said
            assert self.process.exitcode is None, self.said
            time.sleep(0.002)


def _run(module: str, argv: list[str], plan: Plan, environment: dict[str, str], said: Path, count: Path) -> None:
    os.environ.update(environment)
    with open(said, "wb", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    faulthandler.enable()
    import torch

    from metaft import look
    from metaft.finetune import report as finetune_report
    from metaft.runs import report

    torch.set_num_threads(1)
    look.at_end = lambda *_, **__: None  # type: ignore[assignment]
    report.draw_pictures = finetune_report.draw_pictures = lambda *_: []  # type: ignore[assignment]
    moments = Moments(plan.kill_at)
    _befall(plan)
    status = importlib.import_module(module).main(argv)
    if plan.memory is None and plan.largest_file is None:
        count.write_text("\n".join(moments.names))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _befall(plan: Plan) -> None:
    if plan.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan.largest_file, plan.largest_file))
    if plan.clock:
        jumps = iter(range(10**9))
        real = time.time
        time.time = lambda: real() + (-1) ** next(jumps) * 1e8
        time.time_ns = lambda: int(1e9 * time.time())
    if plan.weigh is not None:
        weigh(plan.weigh)
    if plan.slow_data:
        from metaft import tasks

        load = tasks.load
        tasks.load = lambda *given, **others: (time.sleep(plan.slow_data), load(*given, **others))[1]
    if plan.at_step is not None:
        import rank_job

        rank_job.arrange(*plan.at_step)
    if plan.memory is not None and plan.memory_after is None:
        limit_memory(plan.memory)
    if plan.memory is not None and plan.memory_after is not None:
        import torch

        from metaft.runs import training

        memory, after, gradient = plan.memory, plan.memory_after, training.meta_gradient

        def limited(*given: Any, step: int, **others: Any) -> Any:
            if step == after:
                limit_memory(memory)
                torch.empty(1 << 30, dtype=torch.uint8).zero_()
            return gradient(*given, step=step, **others)

        training.meta_gradient = limited


def weigh(file: Path) -> None:
    from metaft.runs import training

    real = training.score_episodes

    def weighed(*given: Any, **others: Any) -> Any:
        found = real(*given, **others)
        if not file.exists():
            gc.collect()  # part of warming up: it copies the pages that workers share, which else comes at any time
        with open(file, "a") as log:
            log.write(f"{memory_of(os.getpid())}\n")
        return found

    training.score_episodes = weighed


def memory_of(process: int) -> int:
    """Resident bytes of a process and of those it started; a page that several share counts as one page.

    Without files that are mapped, such as torch's libraries: other programs share those, and change their weight.
    """
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    own = sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return own + sum(map(memory_of, children_of(process)))


def limit_memory(spare: int) -> None:
    """Let this process have so many bytes of address space more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def completed(command: str, argv: Sequence[str], plan: Plan | None = None) -> Victim:
    """A command that has ended well."""
    victim = Victim(command, argv, plan)
    assert victim.status() == 0, victim.said
    return victim


def go_on(command: str, argv: Sequence[str], out: Path) -> None:
    """Resume a run as its user would, or start it again where it had not begun."""
    completed(command, ["--resume", str(out)] if (out / "config.toml").exists() else argv)


def one_error(said: str, *parts: object) -> str:
    """The last line, which is the only error, holds all the parts; and there is no traceback."""
    assert "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("metaft: error: ")]
    assert len(errors) == 1, said
    assert said.splitlines()[-1] == errors[0]
    for part in parts:
        assert str(part) in errors[0], errors[0]
    return errors[0]


@dataclasses.dataclass(frozen=True)
class Whole:
    """A command that was left alone."""

    command: str
    argv: tuple[str, ...]
    """Without --out."""
    left: dict[str, Any]
    """Its run folder, see `tree`."""
    seconds: float
    moments: list[str]

    def to(self, out: Path) -> list[str]:
        return [*self.argv, "--out", str(out)]


def tree(path: Path) -> dict[str, Any]:
    """Every file of a run folder, byte by byte, except for what a clock said."""
    left: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if not file.is_file():
            continue
        if name in ("timing.jsonl", ".metaft.job"):
            left[name] = "clock times, or a word that no other launch has"
        elif name == "result.json":
            result = timeless(json.loads(file.read_text(encoding="utf-8")))
            left[name] = {k: v for k, v in result.items() if k not in CLOCKED}
        elif name == "report.txt":
            left[name] = re.sub(r", in \d+:\d+(:\d+)?$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        else:
            left[name] = file.read_bytes()
    return left


def same_tree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The names first: a difference of bytes says little."""
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
