"""Jobs of several ranks, started again as torchrun does it, but forked from a process that has torch loaded."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from victims import Plan, Victim, context

STOPPED = 60.0
"""Seconds after which torchrun would long have killed those that do not end when another has."""


def keep_store(line: Connection) -> None:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    line.send(store.port)
    line.poll(None)  # until the other end is gone


class Job:
    """One command on some ranks, and the store that outlives them, in a process of its own as torchrun is one.

    What befalls ranks is said for each attempt; after one that fails the job is started again while something is said
    for the next.
    """

    def __init__(
        self,
        command: str,
        argv: Sequence[str],
        *attempts: Mapping[int, Plan],
        count: int = 2,
        name: str = "a job",
        timeout: float = 60.0,
    ) -> None:
        self.command, self.argv, self.plans, self.count = command, list(argv), attempts or ({},), count
        self.line, theirs = context.Pipe()
        self._keeper = context.Process(target=keep_store, args=(theirs,), daemon=True)  # nobody waits for its end
        self._keeper.start()
        theirs.close()
        weakref.finalize(self, _end, self.line, self._keeper)
        self._environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.line.recv()),
            "METAFT_RANKS_TIMEOUT": str(timeout),
            "TORCHELASTIC_MAX_RESTARTS": str(len(self.plans) - 1),
            "TORCHELASTIC_RUN_ID": name,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCH_CPP_LOG_LEVEL": "FATAL",
            "LOCAL_WORLD_SIZE": str(count),
            "WORLD_SIZE": str(count),
        }
        self.attempts: list[list[Victim]] = []
        self._failed = 0.0
        self._start()

    def _start(self) -> None:
        number, self._failed = len(self.attempts), 0.0
        again = {"TORCHELASTIC_RESTART_COUNT": str(number)}
        self.attempts.append(
            [
                Victim(
                    self.command,
                    self.argv,
                    self.plans[number].get(rank),
                    environment={**self._environment, **again, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
                for rank in range(self.count)
            ]
        )

    @property
    def ranks(self) -> list[Victim]:
        """Those of the present attempt."""
        return self.attempts[-1]

    def ended(self) -> bool:
        """Whether all is over; to be asked again and again, since this is what stops and restarts ranks."""
        codes = [rank.process.exitcode for rank in self.ranks]
        if not self._failed and any(codes):
            self._failed = time.monotonic()
            self.send(signal.SIGTERM)
        if None in codes:
            late = self._failed and time.monotonic() - self._failed > STOPPED
            if late:
                self.send(signal.SIGKILL)
            assert not late, self.said()
            return False
        if any(codes) and len(self.attempts) < len(self.plans):
            self._start()
            return False
        return True

    def send(self, number: int) -> None:
        for rank in self.ranks:
            if rank.process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):  # it has ended since it was asked
                    os.kill(rank.process.pid or 0, number)

    def statuses(self, attempt: int = -1) -> list[Any]:
        return [rank.process.exitcode for rank in self.attempts[attempt]]

    def said(self, attempt: int = -1) -> str:
        return "".join(rank.said for rank in self.attempts[attempt])

    def lines(self, attempt: int = -1) -> list[str]:
        """metaft's own, of all ranks."""
        return [line for line in self.said(attempt).splitlines() if line.startswith("metaft: ")]


def _end(line: Connection, keeper: Any) -> None:
    line.close()
    keeper.kill()
    keeper.join()


def settled(*jobs: Job, timeout: float = 200.0) -> None:
    """Wait for jobs that run at the same time: most of what they do is to wait for each other's ranks."""
    until = time.monotonic() + timeout
    while sum(job.ended() for job in jobs) < len(jobs):  # each is to be asked
        if time.monotonic() > until:
            for job in jobs:
                job.send(signal.SIGKILL)
            raise AssertionError("\n".join(job.said() for job in jobs))
        time.sleep(0.02)
