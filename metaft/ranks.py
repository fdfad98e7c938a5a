"""Many processes of one run: which one this is, what they add up and tell each other, and who speaks when one is lost.

torchrun starts the same command many times and tells each process in its environment which one it is (its *rank*). All
ranks compute, each its share; rank 0 alone reads and writes the run folder, and prints. Without torchrun there is one
rank, which needs nothing of torch.distributed.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from metaft.errors import MetaftError, RankLost, RanksDiffer, SaidElsewhere

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

_GRACE = 5.0
"""Seconds in which ranks that lost each other say that they are still there: torchrun kills what is left after 30."""
_LAST_STEP = 20.0
"""Seconds that the others leave rank 0 for a last checkpoint, before torchrun learns that they have ended."""


class Ranks:
    """Rank `rank` of `count`. This one is alone: whatever ranks do together is done at once, and costs nothing."""

    def __init__(self, rank: int = 0, count: int = 1, local: int = 0) -> None:
        self.rank, self.count = rank, count
        self.local = local
        """Number of this process on its machine."""
        self.asked = 0
        """Number of the signal that asks this process to stop; 0: none."""
        self.stop = 0
        """The same as all ranks know it since their last `sum_flat` or `gather`, so that all stop at the same point and
        with the same status: SIGTERM where one rank was sent it, else SIGINT where one was sent that."""
        self.restarted = False
        """Whether torchrun has started this job before, which then ended with an error."""
        self._doing = ""
        """What the ranks are at, where it may take so long that some wait in vain for others."""
        self.launch: str | None = None
        """What tells this launch by torchrun from every other one, in each of its attempts; rank 0 alone knows it."""

    def share(self, indices: range) -> range:
        """This rank's part of consecutive numbers: in rank order, the first parts longer by one where they must be."""
        each, more = divmod(len(indices), self.count)
        first = self.rank * each + min(self.rank, more)
        return indices[first : first + each + (self.rank < more)]

    def sum_flat(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor added up over ranks, all in one all-reduce; all ranks get the same bits. Inputs stay as they are.

        Sums are in float32, or in float64 where one of the tensors is wider (or holds integers). Raises RankLost.
        """
        if self.count == 1:
            return list(tensors)
        import torch

        short = {torch.float32, torch.float16, torch.bfloat16}
        wide = torch.float32 if all(t.dtype in short for t in tensors) else torch.float64
        parts = [t.detach().reshape(-1).to(wide) for t in tensors]
        flat = torch.cat([*parts, parts[0].new_tensor([self._request()])])
        self._add(flat)
        *sums, requests = flat.split([*(len(part) for part in parts), 1])
        self._agree(float(requests))
        return [s.view(t.shape).to(t.dtype) for s, t in zip(sums, tensors, strict=True)]

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value (small plain data), in rank order, on all of them. Raises RankLost."""
        if self.count == 1:
            return [value]
        found = self._all((self._request(), value))
        self._agree(sum(request for request, _ in found))
        return [value for _, value in found]

    def on_first(self, function: Callable[[], Value]) -> Value:
        """What rank 0's `function()` gives; the others do not call theirs. An error there ends all. Raises RankLost."""
        if self.count == 1:
            return function()
        value, error = None, None
        if self.rank == 0:
            try:
                value = function()
            except (MetaftError, SystemExit) as raised:
                error = raised
        ended = (type(error) is SystemExit, getattr(error, "status", 0)) if error is not None else None
        value, ended = self._from_first((value, ended))
        if error is not None:
            raise error
        if ended is not None:
            raise SystemExit(0) if ended[0] else SaidElsewhere(ended[1])
        return value

    def in_turn(self, function: Callable[[], Value], what: str = "preparing the data") -> Value:
        """`function()`, first by one rank of each machine, then by the others, who find downloads and caches ready.

        `what` says what it does, for the ranks that wait for one that takes too long.
        """
        if self.count == 1:
            return function()
        self._doing = what
        value = function() if self.local == 0 else None
        self.gather(None)
        value = function() if self.local else value
        self.gather(None)  # so that whoever waits for those knows, too, what for
        self._doing = ""
        return cast(Value, value)

    def check_same(self, what: str, value: Callable[[], object]) -> None:
        """Raises RanksDiffer, on all ranks, where a value (small plain data) is not that of rank 0."""
        if self.count == 1:
            return
        found = self.gather(value())
        others = [rank for rank, each in enumerate(found) if each != found[0]]
        if others:
            raise RanksDiffer(f"{what}: {found[others[0]]} on {_named(others)}, {found[0]} on rank 0")

    def check_device(self, device: str) -> None:
        """Raises MetaftError for a device that this rank would share with another, or that is not there.

        `cuda` is this rank's own GPU, the one of its number on the machine.
        """
        if self.count == 1 or not device.startswith("cuda"):
            return
        import torch

        there = torch.cuda.device_count()
        if self.local >= there:
            raise MetaftError(
                f"device: torchrun starts {self.local + 1} processes or more on this machine, which has {there} GPUs; "
                f"give --nproc-per-node {there}"
            )
        if device not in ("cuda", f"cuda:{self.local}"):
            raise MetaftError(f"device: each process has a GPU of its own; give cuda, not {device!r}")

    def last_words(self, error: MetaftError) -> MetaftError:
        """What this rank has to say of an error that ends it: one rank speaks for all, the others' is SaidElsewhere."""
        return error

    def close(self) -> None:
        """Leave the others."""

    def _request(self) -> int:
        """To be added up over ranks: one SIGTERM is more than a SIGINT to each, so that the sum tells all the same."""
        return {0: 0, signal.SIGINT: 1}.get(self.asked, self.count + 1)

    def _agree(self, requests: float) -> None:
        self.stop = signal.SIGTERM if requests > self.count else signal.SIGINT if requests else 0

    def _add(self, flat: Tensor) -> None:
        raise NotImplementedError

    def _all(self, value: Any) -> list[Any]:
        raise NotImplementedError

    def _from_first(self, value: Any) -> Any:
        raise NotImplementedError


ALONE: Final = Ranks()
"""One process by itself."""


def join() -> Ranks:
    """This process's place among those that torchrun started, or alone. The caller closes it.

    gloo carries what is on the CPU, NCCL what is on GPUs. Raises MetaftError for an environment that is not
    torchrun's and for a PyTorch without gloo, RankLost where the others do not come within METAFT_RANKS_TIMEOUT seconds
    (600), and SaidElsewhere where another rank of this machine raises one of these.
    """
    count = _number("WORLD_SIZE", 1, range(1, 2**31))
    if count == 1:
        alone = Ranks()
        alone.restarted = _number("TORCHELASTIC_RESTART_COUNT", 0) > 0
        alone.launch = _launch_of_one()
        return alone
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise MetaftError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {missing[0]} is not set; start with torchrun")
    rank, local = _number("RANK", 0, range(count)), _number("LOCAL_RANK", 0)
    _number("MASTER_PORT", 0, range(2**16))
    timeout = _timeout()
    # torch's C++ code writes a dump of its stack for each attempt to connect; what it says is in the exception, too.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from torch import distributed

    if not (distributed.is_available() and distributed.is_gloo_available()):
        if local:
            raise SaidElsewhere(MetaftError.status)
        raise MetaftError("this PyTorch was built without gloo, which several processes of a run need; install another")
    return _Group(rank, count, local, timeout)


def check_alone(command: str) -> None:
    """Raises MetaftError, once for all, where torchrun starts many processes of a command that is for one."""
    count = _number("WORLD_SIZE", 1, range(1, 2**31))
    if count > 1 and _number("RANK", 0) > 0:
        raise SaidElsewhere(MetaftError.status)
    if count > 1:
        raise MetaftError(f"{command} is for one process, but WORLD_SIZE is {count}; start it without torchrun")


def _launch_of_one() -> str | None:
    """`Ranks.launch` of a job of one process, which meets nobody. None where torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    if _kept_by_torchrun():
        from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

        where, limit = os.environ.get("MASTER_ADDR", ""), datetime.timedelta(seconds=_timeout())
        with contextlib.suppress(_dist_error()):
            store = TCPStore(where, _number("MASTER_PORT", 0, range(2**16)), is_master=False, timeout=limit)
            return _launch(PrefixStore("metaft", store))
    return _launch(None)


def _launch(store: Any) -> str | None:
    """A word that the first attempt leaves in the store that torchrun keeps as long as it runs itself. Its run id will
    not do: the same command has the same one tomorrow. Without such a store it is torchrun's process beside rank 0."""
    if store is not None and _kept_by_torchrun():
        return store.compare_set("launch", "", uuid.uuid4().hex).decode()
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{run} {socket.gethostname()} {os.getppid()}"


def _kept_by_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def launcher(count: int) -> str:
    """torchrun's options for so many processes; of several machines the meeting point is the user's to fill in."""
    here = _number("LOCAL_WORLD_SIZE", count)
    machines = count // max(1, here)
    if machines < 2:
        return f"--standalone --nproc-per-node {here}"
    meeting = "--rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29400 --rdzv-id NAME"
    return f"--nnodes {machines} --nproc-per-node {here} {meeting}"


def _number(name: str, default: int, allowed: range = range(2**31)) -> int:
    text = os.environ.get(name, str(default))
    with contextlib.suppress(ValueError):
        if int(text) in allowed:
            return int(text)
    bounds = f"from {allowed[0]} to {allowed[-1]}"
    raise MetaftError(f"{name} must be a whole number {bounds}, as torchrun sets it; got {text!r}")


def _timeout() -> float:
    text = os.environ.get("METAFT_RANKS_TIMEOUT", "600")
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise MetaftError(f"METAFT_RANKS_TIMEOUT must be a number of seconds above 0, got {text!r}")


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
            self.restarted = any(self.gather(_number("TORCHELASTIC_RESTART_COUNT", 0) > 0))
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
            self.launch = _launch(self._start)
        # It outlives attempts too: what the dead ranks of an earlier one left there must not be met.
        self._store = PrefixStore(f"metaft/{self._attempt(self._start)}", store)
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

    def _attempt(self, store: Any) -> str:
        """A word that the ranks of this attempt agree on, and no earlier one had. torchrun's own count will not do: it
        differs between machines. Rank 0 answers each rank's question, which nobody else can have asked."""
        from torch.distributed import DistStoreError  # pyright: ignore[reportPrivateImportUsage]

        mine = uuid.uuid4().hex
        if self.rank:
            store.set(f"asks/{self.rank}", mine)
            try:
                word = store.get(f"answer/{mine}").decode()
            except DistStoreError:
                raise _Missing(f"rank 0 of {self.count} did not come") from None
            store.set(f"knows/{word}/{self.rank}", "")
            return word
        others = list(range(1, self.count))
        answered: set[str] = set()
        end = time.monotonic() + self._timeout
        while not all(store.check([f"knows/{mine}/{rank}"]) for rank in others):
            for rank in others:
                if store.check([f"asks/{rank}"]) and (question := store.get(f"asks/{rank}").decode()) not in answered:
                    answered.add(question)  # of a rank of an earlier attempt it is as well, and nobody reads it
                    store.set(f"answer/{question}", mine)
            if time.monotonic() > end:
                missing = [rank for rank in others if not store.check([f"knows/{mine}/{rank}"])]
                raise _Missing(f"{_named(missing)} of {self.count} did not come")
            time.sleep(0.02)
        return mine

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
            why = " ".join(str(error).split("\n")[0].split())
            lost = RankLost(f"{why}; waited {waited:.0f} of METAFT_RANKS_TIMEOUT={self._timeout:g} s")
            lost.waited = waited
            raise lost from error

    def _add(self, flat: Tensor) -> None:
        from torch import distributed

        with self._watched():
            distributed.all_reduce(flat)

    def _all(self, value: Any) -> list[Any]:
        from torch import distributed

        found: list[Any] = [None] * self.count
        with self._watched():
            distributed.all_gather_object(found, value)
        return found

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
            return f"{_named(silent)} of {self.count} {does[0]} not answer, {it} died or {does[1]}{slow}"
        late = [rank for rank, (_, waited) in ends.items() if waited < 1]  # they came when the others had given up
        if late and in_vain:
            doing = f", {self._doing}" if self._doing else ""
            return f"{_named(late)} of {self.count} kept the others waiting for {limit}{doing}"
        return f"the ranks lost each other ({detail})"

    @staticmethod
    def _until(condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(0.05)


class _Missing(RuntimeError):
    """A rank that has not come to the meeting."""


def _dist_error() -> type[Exception]:
    from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]

    return DistError


def _of_connections(error: RuntimeError, meeting: bool) -> bool:
    """Whether an error comes from how ranks are joined, and not from what this one asked for.

    torch.distributed's have a type. gloo's are plain, but begin with the file of gloo that they come from; where it
    calls them "enforce fail" it found its input wrong, which only the machine's network can be while ranks meet.
    """
    said = str(error).lower()
    return isinstance(error, (_Missing, _dist_error())) or ("gloo" in said and (meeting or "enforce fail" not in said))


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
