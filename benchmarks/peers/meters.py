"""Memory of a process and the load of the machine, as Linux counts them in /proc. Elsewhere they are None."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def resident_mib() -> tuple[float, float] | None:
    """(now, peak) resident memory in MiB of this process and those that it started.

    Pages that processes share since a fork count once: from a process's peak is taken what of it is shared now.

    Not `ru_maxrss`: that one begins at the peak of the process that started this one, even across exec (a Python of
    11 MB started by one of 830 MB reports 830 MB).
    """
    now = peak = 0.0
    for pid in _family():
        fields = _sizes(pid, "status") | _sizes(pid, "smaps_rollup")
        shared = fields.get("Rss", 0.0) - fields.get("Pss", 0.0)
        now += fields.get("VmRSS", 0.0) - shared
        peak += fields.get("VmHWM", 0.0) - shared
    return (now, peak) if peak else None


def forget_peak() -> None:
    """Let the peak start anew from what is resident now, where the kernel allows it."""
    for pid in _family():
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def _sizes(pid: int, file: str) -> dict[str, float]:
    """The sizes in /proc/PID/FILE, in MiB."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux, or it has ended meanwhile
        return {}
    words = [line.split() for line in lines if line.endswith(" kB")]
    return {w[0].rstrip(":"): int(w[1]) / 1024 for w in words}


def _family() -> list[int]:
    """This process and its descendants."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in brackets, may hold anything; the parent is the second field behind it.
            parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
    family = [os.getpid()]
    for member in family:  # grows as it goes
        family += [pid for pid, parent in parents.items() if parent == member]
    return family


class Elsewhere:
    """How many cores were busy with other people's work, on average since this was made."""

    def __init__(self) -> None:
        self._start = _clocks()

    def cores(self) -> float | None:
        """Of the cores that this process may use. Processes of ours count as ours once they have ended."""
        end = _clocks()
        if self._start is None or end is None:
            return None
        wall, busy, ours = (now - then for now, then in zip(end, self._start, strict=True))
        return max((busy - ours) / wall, 0.0) if wall else None


def _clocks() -> tuple[float, float, float] | None:
    """Seconds: of the wall, of all work on our cores, and of our own."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    ticks = 0
    for name, *columns in (line.split() for line in lines if line.startswith("cpu")):
        if name in names:  # user, nice, system, -, -, irq, softirq, steal
            ticks += sum(int(columns[i]) for i in (0, 1, 2, 5, 6, 7))
    used = os.times()
    ours = used.user + used.system + used.children_user + used.children_system
    return used.elapsed, ticks / os.sysconf("SC_CLK_TCK"), ours
