"""Where training went through: a few snapshots of what it moves, evenly over as many steps as there come to be.

They are for `metaft.look --landscape` alone. Nothing reads them to go on, so that a run is the same bytes with and
without, and a disk that refuses one ends no run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from metaft.errors import CheckpointError
from metaft.runs import checkpoint
from metaft.types import Params

MOST, FEWEST = 25, 3
"""Snapshots that there are at most, and with which a path begins to be one."""

BYTES, SMALL = 200_000_000, 30_000_000
"""That those of a run may take, and up to which they are kept without being asked for: 25 of Conv-4 take
11 million."""


def kept(done: int, every: int, most: int) -> range:
    """Which of the steps 0, `every`, 2 `every`, ... are kept after step `done`: each k-th, where k is the smallest
    power of two that leaves at most `most`. It depends on nothing that a run would have to remember when it goes on.

    >>> [list(kept(done, 10, 4)) for done in (0, 30, 40, 95)]
    [[0], [0, 10, 20, 30], [0, 20, 40], [0, 40, 80]]
    """
    stride = every
    while done // stride + 1 > most:
        stride *= 2
    return range(0, done + 1, stride)


class Waypoint(NamedTuple):
    """One snapshot."""

    step: int
    params: Params


class Trail:
    """Writes the snapshots of one training into a folder that those of others share."""

    def __init__(
        self, folder: Path, name: str, *, asked: int | None, every: int = 1, trails: int = 1, about: Any = None
    ) -> None:
        """At most `asked` (None: `MOST` where they are small). `trails` share the bytes of a run; `about` is plain data
        that each snapshot carries."""
        self._folder, self._name, self._asked, self._every = folder, name, asked, every
        self._trails, self._about = trails, dict(about or {})
        self._refused = False

    def visit(self, step: int, params: Mapping[str, Tensor], *, last: bool = False) -> None:
        """Training is at this step, with these values of what it moves. Those that are no longer wanted go; the `last`
        step stays beside the others."""
        most = 0 if self._refused else self._most(params)
        if most == 0 or (step % self._every and not last):
            return
        wanted = kept(step, self._every, most - 1)  # the last one has a place of its own
        try:
            if step in wanted or last:
                self._folder.mkdir(exist_ok=True)
                checkpoint.save(self._file(step), params, {**self._about, "step": step}, sync=False)
            for other, path in files_of(self._folder, self._name).items():
                if other not in wanted and not (other == step and last):
                    path.unlink()
        except (CheckpointError, OSError) as error:
            self._refused = True  # said once
            with contextlib.suppress(OSError):
                self._file(step).unlink(missing_ok=True)  # it may be half there
            print(f"metaft: note: no more snapshots for --landscape ({error})", file=sys.stderr)

    def _file(self, step: int) -> Path:
        return self._folder / f"{self._name}-{step:08d}.safetensors"

    def _most(self, params: Mapping[str, Tensor]) -> int:
        """How many there may be. Says so where they are fewer than were asked for."""
        size = self._trails * max(1, sum(p.numel() * p.element_size() for p in params.values()))
        fit = BYTES // size
        if self._asked is None:
            return MOST if MOST * size <= SMALL else 0
        if self._asked > fit:
            fit = fit if fit >= FEWEST else 0
            print(f"metaft: note: {fit} snapshots fit into {BYTES // 10**6} MB, not {self._asked}", file=sys.stderr)
            self._asked = fit
        return self._asked


def files_of(folder: Path, name: str) -> dict[int, Path]:
    """The snapshots that there are, by step."""
    found = {int(path.stem.rpartition("-")[2]): path for path in folder.glob(f"{name}-{'[0-9]' * 8}.safetensors")}
    return dict(sorted(found.items()))


def read_trail(folder: Path, name: str) -> list[Waypoint]:
    """The snapshots in their order. Raises CheckpointError for one that is damaged."""
    return [Waypoint(step, checkpoint.load(path)[0]) for step, path in files_of(folder, name).items()]
