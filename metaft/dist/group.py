"""How the processes that torchrun started meet, what carries their values, and who speaks when one is lost."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from metaft.errors import MetaftError, RankLost, SaidElsewhere, first_line
from metaft.dist.ranks import Ranks, named
from metaft.dist.torchrun import Missing, attempt_word, env_number, launch_of_one, launch_word, time_limit

if TYPE_CHECKING:
    from torch import Tensor

_GRACE = 5.0
"""Seconds in which ranks that lost each other say that they are still there: torchrun kills what is left after 30."""
_LAST_STEP = 20.0
"""Seconds that the others leave rank 0 for a last checkpoint, before torchrun learns that they have ended."""


def join() -> Ranks:
    """This process's place among those that torchrun started, or alone. The caller closes it.

    gloo carries what is on the CPU, NCCL what is on GPUs. Raises MetaftError for an environment that is not
    torchrun's and for a PyTorch without gloo, RankLost where the others do not come within METAFT_RANKS_TIMEOUT seconds
    (600), and SaidElsewhere where another rank of this machine raises one of these.
    """
    count = env_number("WORLD_SIZE", 1, range(1, 2**31))
    if count == 1:
        alone = Ranks()
        alone.restarted = env_number("TORCHELASTIC_RESTART_COUNT", 0) > 0
        alone.launch = launch_of_one()
        return alone
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise MetaftError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {missing[0]} is not set; start with torchrun")
    rank, local = env_number("RANK", 0, range(count)), env_number("LOCAL_RANK", 0)
    env_number("MASTER_PORT", 0, range(2**16))
    timeout = time_limit()
    # torch's C++ code writes a dump of its stack for each attempt to connect; what it says is in the exception, too.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from torch import distributed

    if not (distributed.is_available() and distributed.is_gloo_available()):
        if local:
            raise SaidElsewhere(MetaftError.status)
        raise MetaftError("this PyTorch was built without gloo, which several processes of a run need; install another")
    return _Group(rank, count, local, timeout)


class _Group(Ranks):
    """One of several, through torch.distributed."""

    def __init__(self, rank: int, count: int, local: int, timeout: float) -> None:
        super().__init__(rank, count, local)
        self._timeout = timeout
        self._start: Any = None
        """What torchrun keeps for all attempts of the job; None until it is reached."""
        self._store: Any = None
        """The same for this attempt alone."""
        try:
            with self._watched(meeting=True):
                self._meet()
            # On another machine than the one that failed, torchrun counts no restart.
            self.restarted = any(self.gather(env_number("TORCHELASTIC_RESTART_COUNT", 0) > 0))
        except RankLost as lost:
            self.close()
            if not self._speaks_of_start():
                raise SaidElsewhere(lost.status) from lost
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise RankLost(f"the {count} processes did not meet at {place}: {lost}") from lost

    def _meet(self) -> None:
        # `nn` keeps the group that is there when it is first imported: later, `close` could not close its connections.
        import torch.distributed.nn
        from torch import distributed
        from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
        from torch.distributed.rendezvous import rendezvous

        if on_gpus := torch.cuda.is_available() and distributed.is_nccl_available():
            # NCCL reports a lost rank where it waits, instead of ending the process from a thread of its own.
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            if self.local < torch.cuda.device_count():
                torch.cuda.set_device(self.local)
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        limit = datetime.timedelta(seconds=self._timeout)
        # torchrun keeps the store, so that it outlives ranks: it is where they say why they end.
        store, _, _ = next(rendezvous("env://", timeout=limit))
        self._start = PrefixStore("metaft", store)
        if self.rank == 0:
            self.launch = launch_word(self._start)
        # It outlives attempts too: what the dead ranks of an earlier one left there must not be met.
        word = attempt_word(self._start, self.rank, self.count, self._timeout)
        self._store = PrefixStore(f"metaft/{word}", store)
        store = PrefixStore("group", self._store)
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.count, timeout=limit)

    def _speaks_of_start(self) -> bool:
        """Whether this rank is the one of its machine that says that they did not meet: the first to find it out."""
        if self._start is None:
            return self.local == 0
        attempt = f"unmet/{socket.gethostname()}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        try:
            return self._start.add(attempt, 1) == 1
        except _dist_error():
            return self.local == 0

    @contextlib.contextmanager
    def _watched(self, *, meeting: bool = False) -> Iterator[None]:
        """Inside, what tells that ranks lost each other is RankLost; any other error stays as it is."""
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if not _of_connections(error, meeting):
                raise
            waited = time.monotonic() - start
            lost = RankLost(f"{first_line(error)}; waited {waited:.0f} of METAFT_RANKS_TIMEOUT={self._timeout:g} s")
            lost.waited = waited
            raise lost from error

    def _add(self, flat: Tensor) -> None:
        from torch import distributed

        with self._watched():
            distributed.all_reduce(flat)

    def _all(self, value: Any) -> list[Any]:
        from torch import distributed

        values: list[Any] = [None] * self.count
        with self._watched():
            distributed.all_gather_object(values, value)
        return values

    def _from_first(self, value: Any) -> Any:
        from torch import distributed

        box = [value]
        with self._watched():
            distributed.broadcast_object_list(box)
        return box[0]

    def close(self) -> None:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()

    def last_words(self, error: MetaftError) -> MetaftError:
        mine = "" if isinstance(error, RankLost) else str(error)
        try:
            speaks = self._speaks(error, mine)
            ends = self._ends() if speaks else {}
        except _dist_error():  # the store is gone, and its machine with it: one process of each other machine says so
            speaks, ends = self.local == 0, {self.rank: (mine, 0.0)}
        if not speaks:
            return SaidElsewhere(error.status)
        if mine:
            error.args = (mine if self.rank == 0 else f"rank {self.rank}: {mine}",)
        else:
            error.args = (f"{self._cause(ends, str(error))}{getattr(error, 'hint', '')}",)
        return error

    def _speaks(self, error: MetaftError, mine: str) -> bool:
        """Whether this rank is the one that says why the job ends: the lowest of those that are still there."""

        def told() -> bool:
            return self._store.check(["told"])

        if not error.by_all:
            self._store.set(f"end/{self.rank}", json.dumps([mine, getattr(error, "waited", 0.0)]))
            self._store.add("ends", 1)
        self.close()  # whoever waits for this rank learns it now
        if self.rank and error.by_all:
            self._until(told, _LAST_STEP)
            return False
        if self.rank or not mine:
            self._until(lambda: told() or self._store.add("ends", 0) == self.count, _GRACE)
        if any(self._store.check([f"end/{rank}"]) for rank in range(self.rank)):
            self._until(told, _GRACE)
            return False
        return self._store.add("told", 1) == 1

    def _ends(self) -> dict[int, tuple[str, float]]:
        """Why each rank ends that has said so, "" where it only lost the others; and for how long it had waited."""
        keys = {rank: f"end/{rank}" for rank in range(self.count)}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def _cause(self, ends: dict[int, tuple[str, float]], detail: str) -> str:
        for rank, (reason, _) in sorted(ends.items()):
            if reason:
                return f"rank {rank}: {reason}"
        longest = max(waited for _, waited in ends.values())
        in_vain = longest > 0.9 * self._timeout  # and not only found that a connection was closed
        limit = f"METAFT_RANKS_TIMEOUT={self._timeout:g} s"
        if silent := [rank for rank in range(self.count) if rank not in ends]:
            it, does, is_ = ("it", ("does", "hangs"), "is") if len(silent) == 1 else ("they", ("do", "hang"), "are")
            slow = f", or {is_} still {self._doing} after {limit}" if self._doing and in_vain else ""
            return f"{named(silent)} of {self.count} {does[0]} not answer, {it} died or {does[1]}{slow}"
        late = [rank for rank, (_, waited) in ends.items() if waited < 1]  # they came when the others had given up
        if late and in_vain:
            doing = f", {self._doing}" if self._doing else ""
            return f"{named(late)} of {self.count} kept the others waiting for {limit}{doing}"
        return f"the ranks lost each other ({detail})"

    @staticmethod
    def _until(condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(0.05)


def _dist_error() -> type[Exception]:
    from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]

    return DistError


def _of_connections(error: RuntimeError, meeting: bool) -> bool:
    """Whether an error comes from how ranks are joined, and not from what this one asked for.

    torch.distributed's have a type. gloo's are plain, but begin with the file of gloo that they come from; where it
    calls them "enforce fail" it found its input wrong, which only the machine's network can be while ranks meet.
    """
    said = str(error).lower()
    return isinstance(error, (Missing, _dist_error())) or ("gloo" in said and (meeting or "enforce fail" not in said))
