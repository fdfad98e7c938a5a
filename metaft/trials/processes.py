"""Trials as processes of their own, several at once on one machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from metaft.errors import Interrupted, MetaftError
from metaft.runs.lock import held

LAUNCH = (sys.executable, "-m", "metaft.trials.worker")
"""Begins the words of each process."""

LOOK_EVERY = 0.05
"""Seconds between looks at whether a process has ended."""

STOP_WITHIN = 30.0
"""Seconds that a process has to write its checkpoint when it is asked to stop; then it is killed."""

FREE_WITHIN = 60.0
"""Seconds to wait for a trial's run folder, which a process of a search that was killed may still be at."""

STOPPED = {128 + signal.SIGTERM: signal.SIGTERM, 128 + signal.SIGINT: signal.SIGINT}
STOPPED |= {-number: number for number in STOPPED.values()}
"""Exit status -> signal, of a command that was asked to stop; it kept what it had."""


class Trial(NamedTuple):
    """A command to run."""

    number: int
    words: Sequence[str]
    log: Path
    """The file for what it prints."""
    lock: Path
    """Of its run folder."""


def run_all(
    following: Callable[[], Trial | None],
    ended: Callable[[int, int], None],
    *,
    workers: int,
    launch: Sequence[str] = LAUNCH,
    should_stop: Callable[[], None] = lambda: None,
) -> None:
    """Run what `following` gives, `workers` at once, until it gives None and all have ended. `ended` is told of each
    (number, exit status), -n for a process that signal n killed, which is tried a second time before.

    `should_stop` raises to stop; the processes are then asked to stop too and waited for, and so they are at any other
    error. Raises Interrupted where a process was asked to stop by somebody else.
    """
    running: dict[int, tuple[Trial, subprocess.Popen[bytes]]] = {}
    killed: set[int] = set()
    environment = {**os.environ, **_threads(workers)}
    try:
        while True:
            while len(running) < workers and (trial := following()) is not None:
                running[trial.number] = trial, _begun(trial, launch, environment, should_stop)
            if not running:
                return
            time.sleep(LOOK_EVERY)
            should_stop()
            for number, (trial, process) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                assert process.stdin is not None
                process.stdin.close()
                if status in STOPPED:
                    raise Interrupted(f"trial {number} was stopped by a signal", STOPPED[status])
                if status < 0 and number not in killed:  # for want of memory, say, beside others; it has checkpoints
                    killed.add(number)
                    running[number] = trial, _begun(trial, launch, environment, should_stop)
                    continue
                del running[number]
                ended(number, status)
    finally:
        _stop([process for _, process in running.values()])


def _begun(
    trial: Trial, launch: Sequence[str], environment: Mapping[str, str], should_stop: Callable[[], None]
) -> subprocess.Popen[bytes]:
    """A process in a session of its own, so that Ctrl-C asks the search alone, which then asks its trials. Its stdin
    is never written to: it ends when this process does."""
    _wait_for(trial.lock, should_stop)
    with open(trial.log, "ab") as log:
        return subprocess.Popen(
            [*launch, *trial.words], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment,
            start_new_session=True,
        )  # fmt: skip


def _wait_for(lock: Path, should_stop: Callable[[], None]) -> None:
    """Until no process holds a run folder. Raises MetaftError where one does for too long."""
    limit = time.monotonic() + FREE_WITHIN
    while lock.parent.is_dir():
        try:
            with held(lock, f"trials: {lock.parent}"):
                return
        except MetaftError:
            if time.monotonic() > limit:
                raise
        should_stop()
        time.sleep(LOOK_EVERY)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    limit = time.monotonic() + STOP_WITHIN
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, limit - time.monotonic()))
            continue
        process.kill()
        process.wait()


def _threads(workers: int) -> dict[str, str]:
    """Each worker's share of the cores, where there are several workers."""
    if workers == 1:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    whole = int(given) if given.isdecimal() else cores
    return {"OMP_NUM_THREADS": str(max(1, whole // workers))}
