"""A command as torchrun starts it, with a misfortune: `rank_job.py MODULE [RANK STEP WHAT] -- ARGUMENTS`.

WHAT happens to a rank before it computes the meta-step of that number (0-based), in the job's first attempt alone: a
`kill`, a `hang` until somebody sends SIGTERM, or an `error` of its own. In later attempts rank 0 comes late, when the
others have long found what the first attempt left in torchrun's store.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from metaft import training
from metaft.errors import MetaftError


def arrange(rank: str, at: int, what: str) -> None:
    real = training.meta_gradient

    def meta_gradient(*arguments: Any, step: int, **more: Any) -> Any:
        if step == at and os.environ["RANK"] == rank:
            if what == "error":
                raise MetaftError("data: the disk is gone")
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            signal.sigwait({signal.SIGTERM})
        return real(*arguments, step=step, **more)

    training.meta_gradient = meta_gradient


def main(argv: Sequence[str]) -> int:
    module, *misfortune = argv[: argv.index("--")]
    if misfortune and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        rank, step, what = misfortune
        arrange(rank, int(step), what)
    elif misfortune and os.environ["RANK"] == "0":
        time.sleep(2)
    return importlib.import_module(f"metaft.{module}").main(argv[argv.index("--") + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
