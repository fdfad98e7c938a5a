"""What torchrun gives the processes that it starts: numbers in their environment, and a store that it may keep itself.

Such a store outlives an attempt of the job and serves the next one too: words in it tell launches and attempts apart.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import socket
import time
import uuid
from typing import Any

from metaft.errors import MetaftError, SaidElsewhere
from metaft.dist.ranks import named


def env_number(name: str, default: int, allowed: range = range(2**31)) -> int:
    """A whole number that torchrun sets in the environment. Raises MetaftError for what is not allowed there."""
    text = os.environ.get(name, str(default))
    with contextlib.suppress(ValueError):
        if int(text) in allowed:
            return int(text)
    bounds = f"from {allowed[0]} to {allowed[-1]}"
    raise MetaftError(f"{name} must be a whole number {bounds}, as torchrun sets it; got {text!r}")


def time_limit() -> float:
    """Seconds that ranks wait for each other, METAFT_RANKS_TIMEOUT. Raises MetaftError for what is no such time."""
    text = os.environ.get("METAFT_RANKS_TIMEOUT", "600")
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise MetaftError(f"METAFT_RANKS_TIMEOUT must be a number of seconds above 0, got {text!r}")


def check_alone(command: str) -> None:
    """Raises MetaftError, once for all, where torchrun starts many processes of a command that is for one."""
    count = env_number("WORLD_SIZE", 1, range(1, 2**31))
    if count > 1 and env_number("RANK", 0) > 0:
        raise SaidElsewhere(MetaftError.status)
    if count > 1:
        raise MetaftError(f"{command} is for one process, but WORLD_SIZE is {count}; start it without torchrun")


def launcher(count: int) -> str:
    """torchrun's options for so many processes; of several machines the meeting point is the user's to fill in."""
    here = env_number("LOCAL_WORLD_SIZE", count)
    machines = count // max(1, here)
    if machines < 2:
        return f"--standalone --nproc-per-node {here}"
    meeting = "--rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29400 --rdzv-id NAME"
    return f"--nnodes {machines} --nproc-per-node {here} {meeting}"


def launch_of_one() -> str | None:
    """`Ranks.launch` of a job of one process, which meets nobody. None where torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    if _kept_by_torchrun():
        from torch.distributed import DistError, PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

        where, limit = os.environ.get("MASTER_ADDR", ""), datetime.timedelta(seconds=time_limit())
        with contextlib.suppress(DistError):
            store = TCPStore(where, env_number("MASTER_PORT", 0, range(2**16)), is_master=False, timeout=limit)
            return launch_word(PrefixStore("metaft", store))
    return launch_word(None)


def launch_word(store: Any) -> str | None:
    """A word that the first attempt leaves in the store that torchrun keeps as long as it runs itself. Its run id will
    not do: the same command has the same one tomorrow. Without such a store it is torchrun's process beside rank 0."""
    if store is not None and _kept_by_torchrun():
        return store.compare_set("launch", "", uuid.uuid4().hex).decode()
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{run} {socket.gethostname()} {os.getppid()}"


def attempt_word(store: Any, rank: int, count: int, timeout: float) -> str:
    """A word that the ranks of this attempt agree on, and no earlier one had. torchrun's own count will not do: it
    differs between machines. Rank 0 answers each rank's question, which nobody else can have asked."""
    from torch.distributed import DistStoreError  # pyright: ignore[reportPrivateImportUsage]

    mine = uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", mine)
        try:
            word = store.get(f"answer/{mine}").decode()
        except DistStoreError:
            raise Missing(f"rank 0 of {count} did not come") from None
        store.set(f"knows/{word}/{rank}", "")
        return word
    others = list(range(1, count))
    answered: set[str] = set()
    end = time.monotonic() + timeout
    while not all(store.check([f"knows/{mine}/{rank}"]) for rank in others):
        for rank in others:
            if store.check([f"asks/{rank}"]) and (question := store.get(f"asks/{rank}").decode()) not in answered:
                answered.add(question)  # of a rank of an earlier attempt it is as well, and nobody reads it
                store.set(f"answer/{question}", mine)
        if time.monotonic() > end:
            missing = [rank for rank in others if not store.check([f"knows/{mine}/{rank}"])]
            raise Missing(f"{named(missing)} of {count} did not come")
        time.sleep(0.02)
    return mine


class Missing(RuntimeError):
    """A rank that has not come to the meeting."""


def _kept_by_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
