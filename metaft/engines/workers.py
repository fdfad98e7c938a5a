"""Worker processes that apply a function to parts of a batch, with all tensors in memory that they share."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import TMonitor

from metaft.dist import patience
from metaft.errors import MetaftError

OWN_THREADS = "metaft-task"
"""Begins the names of the threads that map tasks."""

_BEFORE = frozenset(threading.enumerate())
"""Of a notebook, say, which no forked process needs."""

_POOLS = ("concurrent.futures.thread", "multiprocessing.pool")

_ORPHAN_AFTER = 2.0
"""Seconds between a worker's looks at whether its parent is still there."""

_LOOK_EVERY = 0.5
"""Seconds between a waiting parent's questions whether it is still to wait."""

_REST_WITHIN = 2.0
"""Seconds that a fork waits at most for the other threads of this process."""


def available() -> bool:
    """Whether this system can fork. Workers inherit functions, which need not be picklable."""
    return "fork" in multiprocessing.get_all_start_methods()


@dataclasses.dataclass(frozen=True)
class _Like:
    """What a tensor looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Workers:
    """Forked processes of one intra-op thread each, for calls with the same function and shapes.

    `function(shared, part)` gets a part of at most `size` tasks and gives a tree of tensors: one row per task, or with
    `summed` one row in all. Part i is the work of worker i modulo `count`.
    """

    def __init__(
        self, count: int, function: Callable[[Any, Any], Any], shared: Any, tasks: Any, *, size: int, summed: bool
    ) -> None:
        self._size, self._summed = size, summed
        self._function = function
        self.capacity = pytree.tree_leaves(tasks)[0].shape[0]
        slots = len(self._parts(self.capacity)) if summed else self.capacity
        self._shared = [_in_shared_memory(leaf.shape, leaf.dtype) for leaf in pytree.tree_leaves(shared)]
        self._tasks = [_in_shared_memory(leaf.shape, leaf.dtype) for leaf in pytree.tree_leaves(tasks)]
        self._shared_spec = pytree.tree_structure(shared)
        self._tasks_spec = pytree.tree_structure(tasks)

        context = multiprocessing.get_context("fork")
        # A process that soon ends computes a part to tell what results look like: what it took is given back.
        ours, theirs = context.Pipe()
        with _quiet_fork():
            probe = context.Process(target=self._probe, args=(theirs, shared, tasks), daemon=True)
            probe.start()
        theirs.close()
        try:
            rows = _received(ours, probe)
        except BaseException:  # it may be at work for ever
            probe.kill()
            raise
        finally:
            probe.join()
            ours.close()
        if isinstance(rows, BaseException):
            raise rows
        likes, self._spec = pytree.tree_flatten(rows)
        self._out = [_in_shared_memory((slots, *like.shape[1:]), like.dtype) for like in likes]

        pipes = [context.Pipe() for _ in range(min(count, len(self._parts(self.capacity))))]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=self._work, args=(rank, pipes, os.getpid()), name="metaft-task", daemon=True)
            for rank in range(len(pipes))
        ]
        with _quiet_fork():
            for process in self._processes:
                process.start()
        for _, theirs in pipes:
            theirs.close()
        atexit.register(self.close)  # before multiprocessing waits for processes that SIGTERM does not end

    def run(self, shared: Any, tasks: Any) -> tuple[list[Tensor], pytree.TreeSpec]:
        """Rows of the results, [rows, ...] each: a view that the next call overwrites. As many tasks as at first, or
        fewer. Raises what the function raises for the first part that fails, and MetaftError where a worker died."""
        count = pytree.tree_leaves(tasks)[0].shape[0]
        for mine, leaf in zip(self._shared, pytree.tree_leaves(shared), strict=True):
            mine.copy_(leaf)
        for mine, leaf in zip(self._tasks, pytree.tree_leaves(tasks), strict=True):
            mine[:count].copy_(leaf)
        failures: list[tuple[int, BaseException]] = []
        for end in self._ends:
            _send(end, count)
        for end, process in zip(self._ends, self._processes, strict=True):
            failures += _received(end, process)
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]
        rows = len(self._parts(count)) if self._summed else count
        return [out[:rows] for out in self._out], self._spec

    def close(self) -> None:
        """End the processes. A second time does nothing."""
        atexit.unregister(self.close)
        for end in self._ends:
            _send(end, None)
            end.close()
        until = time.monotonic() + _ORPHAN_AFTER
        for process in self._processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():  # in the middle of a part that nobody waits for any more
                process.kill()
                process.join()

    def _parts(self, count: int) -> list[tuple[int, int]]:
        return [(first, min(first + self._size, count)) for first in range(0, count, self._size)]

    def _probe(self, end: Connection, shared: Any, tasks: Any) -> None:
        _settle_in()
        try:
            rows = self._function(shared, pytree.tree_map(lambda leaf: leaf[: self._size], tasks))
            end.send(pytree.tree_map(lambda row: _Like(row.shape, row.dtype), rows))
        except Exception as error:  # to be raised by the parent
            end.send(_sendable(error))

    def _work(self, rank: int, pipes: list[tuple[Connection, Connection]], parent: int) -> None:
        _settle_in()
        end = pipes[rank][1]
        # A sibling that held this end open would hide from the parent that this worker died.
        for ours, theirs in pipes:
            ours.close()
            if theirs is not end:
                theirs.close()
        shared = pytree.tree_unflatten(self._shared, self._shared_spec)
        while True:
            while not end.poll(_ORPHAN_AFTER):
                if os.getppid() != parent:
                    return
            try:
                count = end.recv()
            except (EOFError, OSError):
                return
            if count is None:
                return
            end.send(self._answer(rank, shared, count))

    def _answer(self, rank: int, shared: Any, count: int) -> list[tuple[int, BaseException]]:
        parts = self._parts(count)
        for i in range(rank, len(parts), len(self._ends)):
            first, last = parts[i]
            try:
                part = pytree.tree_unflatten([leaf[first:last] for leaf in self._tasks], self._tasks_spec)
                rows = pytree.tree_leaves(self._function(shared, part))
                into = slice(i, i + 1) if self._summed else slice(first, last)
                for out, row in zip(self._out, rows, strict=True):
                    out[into].copy_(row)
            except Exception as error:  # to be raised by the parent
                return [(i, _sendable(error))]
        return []


def _send(end: Connection, what: int | None) -> None:
    with contextlib.suppress(OSError):  # the worker is gone, which the answer that does not come will tell
        end.send(what)


def _received(end: Connection, process: BaseProcess) -> Any:
    try:
        while not end.poll(_LOOK_EVERY):
            patience.ask()
        return end.recv()
    except (EOFError, OSError):
        process.join(_ORPHAN_AFTER)
        how = f"signal {-code}" if (code := process.exitcode or 0) < 0 else f"exit status {process.exitcode}"
        raise MetaftError(f"engine: a worker process ended ({how}), perhaps for want of memory") from None


def _settle_in() -> None:
    # The parent decides what a signal means that all processes of a job get: it may want to write a checkpoint first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.freeze()  # a collection would write to each object that is inherited, and so copy the pages that are shared
    torch.set_num_threads(1)


@contextlib.contextmanager
def _quiet_fork() -> Iterator[None]:
    with warnings.catch_warnings():
        # Python warns of locks that other threads may hold. Workers only compute, and need none of those of Python's.
        warnings.simplefilter("ignore", DeprecationWarning)
        wait_for_threads(_REST_WITHIN)
        yield


def wait_for_threads(seconds: float) -> bool:
    """Wait until all other threads of this process sleep, or for `seconds`; whether they do. True without /proc.

    A lock that another thread holds in the middle of a fork stays locked in the child for ever. The memory manager of
    MKL has one, which threads take when they multiply matrices, and when they end: after Python has joined them, so
    that a matrix product in a child that was forked right after a pool of threads was closed could wait without end.
    """
    mine, end = threading.get_native_id(), time.monotonic() + seconds
    while not all(state == "S" for thread, state in _threads() if thread != mine):
        if time.monotonic() > end:
            return False
        time.sleep(0.0005)
    return True


def others() -> list[threading.Thread]:
    """Python's threads that a function of the user's may wait for, and that no forked process would have: those of
    pools, and those that were started since metaft was first used. Not this one, metaft's own or tqdm's clock."""
    known = (threading.current_thread(), threading.main_thread())
    there = [each for each in threading.enumerate() if each not in known and not isinstance(each, TMonitor)]
    there = [each for each in there if not each.name.startswith(OWN_THREADS)]
    return [each for each in there if each not in _BEFORE or _of_pool(each)]


def _of_pool(thread: threading.Thread) -> bool:
    return getattr(getattr(thread, "_target", None), "__module__", None) in _POOLS


def _threads() -> Iterator[tuple[int, str]]:
    """Native id and state (R: running, S: asleep) of each thread that has not ended."""
    for each in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it ended in between
            state = each.read_text().rpartition(")")[2].split()[0]
            if state not in "ZX":
                yield int(each.parent.name), state


def _in_shared_memory(shape: Any, dtype: torch.dtype) -> Tensor:
    # Anonymous and inherited: unlike /dev/shm it has no size of its own to run out of.
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize))
    return (
        torch.frombuffer(memory, dtype=dtype, count=count).view(tuple(shape))
        if count
        else torch.empty(shape, dtype=dtype)
    )


def _sendable(error: Exception) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
