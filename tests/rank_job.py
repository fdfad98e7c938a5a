"""A command as torchrun starts it, with misfortunes: `rank_job.py MODULE [RANK STEP WHAT]... -- ARGUMENTS`.

The first misfortune is for the job's first attempt, and so on. In later attempts rank 0 comes late, when the others
have long found what the one before left in torchrun's store.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metaft.dist.ranks import Ranks
from metaft.errors import MetaftError
from metaft.runs import training


def arrange(at: int, what: str) -> None:
    """What happens to this process before the meta-step of that number (0-based): a `kill`, a `hang` in which it hears
    no signal, a `rest` until one comes, an `error` that metaft has words for, or a `bug`, for which it has none."""
    real = training.meta_gradient

    def meta_gradient(*arguments: Any, step: int, **more: Any) -> Any:
        if step == at:
            happen(what, more["ranks"])
        return real(*arguments, step=step, **more)

    training.meta_gradient = meta_gradient


def happen(what: str, ranks: Ranks) -> None:
    if what == "error":
        raise MetaftError("data: the disk is gone")
    if what == "bug":
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.sigwait({signal.SIGTERM})
    if what == "rest":
        Path("resting").touch()
        while not ranks.asked:
            time.sleep(0.02)


def main(argv: Sequence[str]) -> int:
    module, *words = argv[: argv.index("--")]
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    misfortune = words[3 * attempt : 3 * attempt + 3]
    if misfortune and os.environ["RANK"] == misfortune[0]:
        arrange(int(misfortune[1]), misfortune[2])
    if attempt and os.environ["RANK"] == "0":
        time.sleep(2)
    return importlib.import_module(f"metaft.{module}").main(argv[argv.index("--") + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
