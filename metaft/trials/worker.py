"""`python -m metaft.trials.worker COMMAND ...`: a trial's command, which stops as by SIGTERM when whoever waits for it
at the other end of its stdin has ended, however that was."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence


def watch() -> None:
    """From now on, the end of stdin is a SIGTERM."""
    threading.Thread(target=_wait, name="metaft-watch", daemon=True).start()


def _wait() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: Sequence[str]) -> int:
    """Exit status: the command's own."""
    watch()  # before the command is imported, whose engines would wait for a thread that begins later
    return importlib.import_module(f"metaft.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
