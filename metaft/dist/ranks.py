"""Many processes of one run: which one this is, what they add up and tell each other.

torchrun starts the same command many times and tells each process in its environment which one it is (its *rank*). All
ranks compute, each its share; rank 0 alone reads and writes the run folder, and prints. Without torchrun there is one
rank, which needs nothing of torch.distributed. How many become one job is in `group.py`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from metaft.errors import MetaftError, RanksDiffer, SaidElsewhere

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")


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
        answers = self._all((self._request(), value))
        self._agree(sum(request for request, _ in answers))
        return [value for _, value in answers]

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
        values = self.gather(value())
        others = [rank for rank, each in enumerate(values) if each != values[0]]
        if others:
            raise RanksDiffer(f"{what}: {values[others[0]]} on {named(others)}, {values[0]} on rank 0")

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


def named(ranks: Sequence[int]) -> str:
    """As a message names them: `rank 1`, `ranks 2, 3`."""
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
