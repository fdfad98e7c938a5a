"""Worker processes that apply a function to parts of a batch, with all tensors in memory that they share."""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import TMonitor

from metaft.dist import patience
from metaft.engines.shared import Like, file_in_memory, inherited, mapped, starts_of
from metaft.errors import MetaftError, class_and_words
from metaft.support.foreign import ran_out

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


class _First(NamedTuple):
    """What a worker says before it writes its first results: what a row of them looks like."""

    likes: Any


class _Alone(BaseException):
    """In a worker: the parent is gone, or has given up. No `except Exception` on the way is for it."""


class Workers:
    """Forked processes of one intra-op thread each, for calls with the same function and shapes, of results too.

    `function(shared, part)` gets a part of at most `size` tasks and gives a tree of tensors: one row per task, or with
    `summed` one row in all. Part i is the work of worker i modulo `count`.
    """

    def __init__(
        self, count: int, function: Callable[[Any, Any], Any], shared: Any, tasks: Any, *, size: int, summed: bool
    ) -> None:
        self._size, self._summed = size, summed
        self._function = function
        self.capacity = pytree.tree_leaves(tasks)[0].shape[0]
        self._slots = len(self._parts(self.capacity)) if summed else self.capacity
        self._shared = [inherited(leaf.shape, leaf.dtype) for leaf in pytree.tree_leaves(shared)]
        self._tasks = [inherited(leaf.shape, leaf.dtype) for leaf in pytree.tree_leaves(tasks)]
        self._shared_spec = pytree.tree_structure(shared)
        self._tasks_spec = pytree.tree_structure(tasks)
        self._out: list[Tensor] | None = None
        """Where workers write their results, once it is known what these look like."""
        self._spec: pytree.TreeSpec | None = None
        self._parent = os.getpid()

        context = multiprocessing.get_context("fork")
        pipes = [context.Pipe() for _ in range(min(count, len(self._parts(self.capacity))))]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=self._work, args=(rank, pipes), name="metaft-task", daemon=True)
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
        fewer. Raises what the function raises for the first part that fails, and MetaftError where a worker died, or
        results of tasks look different."""
        count = pytree.tree_leaves(tasks)[0].shape[0]
        for mine, leaf in zip(self._shared, pytree.tree_leaves(shared), strict=True):
            mine.copy_(leaf)
        for mine, leaf in zip(self._tasks, pytree.tree_leaves(tasks), strict=True):
            mine[:count].copy_(leaf)
        for end in self._ends:
            _send(end, count)
        if self._out is None:
            self._out, self._spec = self._room()
        _raise_first(failure for answer in self._answers() for failure in answer)
        rows = len(self._parts(count)) if self._summed else count
        assert self._spec is not None
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

    def _answers(self) -> list[Any]:
        return [_received(end, process) for end, process in zip(self._ends, self._processes, strict=True)]

    def _room(self) -> tuple[list[Tensor], pytree.TreeSpec]:
        """Memory for the results of this call and all others.

        A fork inherits memory, but when the workers were forked nobody knew what results look like. So in the first
        call each of them computes a part, says what came out, and waits for a file to write to.
        """
        answers = self._answers()
        _raise_first(failure for answer in answers if not isinstance(answer, _First) for failure in answer)
        likes, spec = pytree.tree_flatten(answers[0].likes)
        for other in answers[1:]:
            if pytree.tree_flatten(other.likes) != (likes, spec):
                raise _unlike(likes, other.likes)
        with file_in_memory() as file:
            os.ftruncate(file, max(1, starts_of(self._slots, likes)[-1]))
            out = mapped(file, self._slots, likes)
            for end, process in zip(self._ends, self._processes, strict=True):
                with contextlib.suppress(OSError, RuntimeError):  # as in _send; on macOS it is a RuntimeError
                    send_handle(end, file, process.pid)
        return out, spec

    def _take_room(self, rows: Any, end: Connection) -> list[Tensor]:
        likes = pytree.tree_map(lambda row: Like(tuple(row.shape[1:]), row.dtype), rows)
        try:
            end.send(_First(likes))
        except OSError:
            raise _Alone from None
        except Exception as error:  # pickle has no class of its own for it
            if ran_out(error):
                raise
            why = class_and_words(error)
            raise MetaftError(f"engine: processes cannot hand over such results ({why}); use threads") from error
        self._wait(end)
        try:
            file = recv_handle(end)
        except Exception:  # no handle, since the parent gave up
            raise _Alone from None
        try:
            return mapped(file, self._slots, pytree.tree_leaves(likes))
        finally:
            os.close(file)

    def _work(self, rank: int, pipes: list[tuple[Connection, Connection]]) -> None:
        _settle_in()
        end = pipes[rank][1]
        # A sibling that held this end open would hide from the parent that this worker died.
        for ours, theirs in pipes:
            ours.close()
            if theirs is not end:
                theirs.close()
        shared = pytree.tree_unflatten(self._shared, self._shared_spec)
        with contextlib.suppress(_Alone, EOFError, OSError):
            while True:
                self._wait(end)
                count = end.recv()
                if count is None:
                    return
                end.send(self._answer(rank, shared, count, end))

    def _wait(self, end: Connection) -> None:
        """For the parent to say something. Raises _Alone where it is gone."""
        try:
            while not end.poll(_ORPHAN_AFTER):
                if os.getppid() != self._parent:
                    raise _Alone
        except OSError:
            raise _Alone from None

    def _answer(self, rank: int, shared: Any, count: int, end: Connection) -> list[tuple[int, BaseException]]:
        parts = self._parts(count)
        for i in range(rank, len(parts), len(self._ends)):
            first, last = parts[i]
            try:
                part = pytree.tree_unflatten([leaf[first:last] for leaf in self._tasks], self._tasks_spec)
                rows = self._function(shared, part)
                leaves, spec = pytree.tree_flatten(rows)
                if self._out is None:
                    self._out, self._spec = self._take_room(rows, end), spec
                into = slice(i, i + 1) if self._summed else slice(first, last)
                outs = [out[into] for out in self._out]
                if spec != self._spec or [(o.shape, o.dtype) for o in outs] != [(x.shape, x.dtype) for x in leaves]:
                    raise _unlike(outs, leaves)
                for out, row in zip(outs, leaves, strict=True):
                    out.copy_(row)
            except Exception as error:  # to be raised by the parent
                return [(i, _sendable(error))]
        return []


def _send(end: Connection, what: Any) -> None:
    with contextlib.suppress(OSError):  # the other is gone, which the answer that does not come will tell
        end.send(what)


def _raise_first(failures: Iterable[tuple[int, BaseException]]) -> None:
    """Raise the one of the first part, if there is one."""
    first = min(failures, key=lambda failure: failure[0], default=None)
    if first is not None:
        raise first[1]


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


def _unlike(first: Any, other: Any) -> MetaftError:
    """Of two results, or rows of them, that cannot lie beside each other."""

    def shown(tree: Any) -> str:
        return ", ".join(f"{leaf.dtype} {[*leaf.shape]}" for leaf in pytree.tree_leaves(tree))

    return MetaftError(f"engine: results of tasks look different: {shown(first)} and {shown(other)}")


def _sendable(error: Exception) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
