"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """Counts units of work towards a total on stderr, with the latest figures, speed and time left; nothing of that is
    shown before `after` seconds."""

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        per_unit: int = 1,
        after: float = 0.0,
        file: TextIO | None = None,
    ) -> None:
        self.file = sys.stderr if file is None else file
        self.label, self.total, self.unit, self.per_unit = label, total, unit, per_unit
        self.first, self.done, self.start = done, done, time.perf_counter()
        self.every, self.after = max(1, total // 20), after
        self.bar = None
        if self.file.isatty():
            look: Any = {"dynamic_ncols": True, "leave": False, "delay": after}
            self.bar = tqdm(total=total, initial=done, desc=label, unit=unit, file=self.file, **look)

    @property
    def rate(self) -> float:
        """Units per second, times `per_unit`, since this object was made."""
        seconds = time.perf_counter() - self.start
        return (self.done - self.first) * self.per_unit / seconds if seconds > 0 else 0.0

    def update(self, done: int, **figures: str) -> None:
        """`done` of `total` units are finished; `figures` are shown as they are."""
        before, self.done = self.done, done
        if self.per_unit > 1:
            figures["tasks_per_s"] = f"{self.rate:.0f}"
        if self.bar is not None:
            self.bar.update(done - before)
            if figures:  # which are shown at once
                self.bar.set_postfix(figures)
        elif time.perf_counter() - self.start < self.after:
            return
        elif done // self.every > before // self.every or done == self.total:
            shown = "".join(f" · {name.replace('_', ' ')} {value}" for name, value in figures.items())
            print(f"{self.label} {done}/{self.total}{shown} · {self._left()} left", file=self.file, flush=True)

    def expect(self, total: int, done: int) -> None:
        """There is another number of units than was thought, and of those before as many are finished."""
        if total != self.total:
            self.first += done - self.done
            self.total, self.done, self.every = total, done, max(1, total // 20)
            if self.bar is not None:
                self.bar.total, self.bar.n = total, done
                self.bar.refresh()

    def say(self, line: str) -> None:
        """A line that stays, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(line, file=self.file)
        else:
            print(line, file=self.file, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _left(self) -> str:
        rate = self.rate / self.per_unit
        return "?" if rate == 0 else duration((self.total - self.done) / rate)


def duration(seconds: float) -> str:
    """`1:05:09` or `5:09`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
