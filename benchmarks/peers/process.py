"""The parent's end: a system in a process of its own, asked over a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from metaft.support.allocator import keep_blocks

ROOT = Path(__file__).resolve().parents[2]
_ALLOCATOR = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


class SystemFailure(Exception):
    """A system that cannot go on; the message is the reason for the table."""

    def __init__(self, reason: str, *, missing: bool = False) -> None:
        super().__init__(reason)
        self.missing = missing


class Process:
    """One system's process. Leaving the `with` block ends it."""

    def __init__(self, system: str, environment: Mapping[str, str]) -> None:
        self.system = system
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.child", system],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(environment),
            cwd=ROOT,
            text=True,
            encoding="utf-8",
        )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises SystemFailure for an exception over there, or where the process ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise SystemFailure(self._last_words()) from None
        line = self._process.stdout.readline()
        if not line:
            raise SystemFailure(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise SystemFailure(answer["error"], missing=answer["missing"])
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        how = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"{how}: {lines[-1][:200]}" if lines else how

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # a step may be under way that nobody waits for any more
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()
        self._log.close()


def environment(*, threads: int, allocator: str, site: Path | None) -> dict[str, str]:
    """What a system's process starts with: the same for all, but that only peers see their `site`."""
    env = {name: value for name, value in os.environ.items() if name not in _ALLOCATOR}
    env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if allocator == "tuned":
        # As the commands do by `keep_freed_memory`. Another C library ignores the variables.
        env |= {"MALLOC_TRIM_THRESHOLD_": str(sys.maxsize), "MALLOC_MMAP_THRESHOLD_": str(keep_blocks() or 1 << 30)}
    paths = [str(ROOT), *([str(site)] if site is not None else []), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return env
