"""The run folder: what one command leaves for the next.

    config.toml  metrics.jsonl  timing.jsonl  checkpoints/{last,previous,best}.safetensors  plots/*.png  result.json
    updates.jsonl: how far steps moved each layer (see metaft.updates), and of metaft.meta_train
    checkpoints/first.safetensors, from where
    episodes.jsonl of metaft.meta_train: the figures of each episode of the meta-test, by which runs are compared
    classifier.safetensors and report.txt of metaft.adapt; classifier-2.safetensors, ... of further targets
    adapter.safetensors of metaft.adapt --strategy lora: what it trained, without the start (`metaft.finetune.adapter`)
    snapshots/FIT-STEP.safetensors: where training went through, for metaft.look --landscape (`metaft.runs.trail`)
    compress.toml and steps/*.safetensors of metaft.compress, whose folder is an adapt run's besides
    .metaft.lock while a command writes to it; .metaft.job: the launch by torchrun that began it

metrics.jsonl holds no clock time, so that a resumed run ends with the same bytes as one that was never stopped;
seconds are in timing.jsonl.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from metaft.errors import CheckpointError, MetaftError
from metaft.runs import checkpoint
from metaft.runs.checkpoint import write_atomically
from metaft.runs.lock import held
from metaft.support.paths import local

Loaded = TypeVar("Loaded")

_NUMBERS = re.compile(r'\[\n\s+[^\[\]{}"]*?\n\s+\]')  # a list of numbers over many lines


class RunFolder:
    """Paths and line files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path = local(path)
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.timing = path / "timing.jsonl"
        self.updates = path / "updates.jsonl"
        self.lock = path / ".metaft.lock"
        self.job = path / ".metaft.job"
        self.result = path / "result.json"
        self.episodes = path / "episodes.jsonl"
        self.plots = path / "plots"
        self.checkpoints = path / "checkpoints"
        self.first = self.checkpoints / "first.safetensors"
        self.last = self.checkpoints / "last.safetensors"
        self.previous = self.checkpoints / "previous.safetensors"
        self.best = self.checkpoints / "best.safetensors"
        self.classifier = path / "classifier.safetensors"
        self.adapter = path / "adapter.safetensors"
        self.snapshots = path / "snapshots"
        self.compress = path / "compress.toml"

    def kept(self, step: int) -> Path:
        """The checkpoint of `--keep-best` of that step."""
        return self.checkpoints / f"kept-{step}.safetensors"

    def single(self, number: int) -> Path:
        """What one of the fits of `--soup` left, until the soup is made."""
        return self.checkpoints / f"single-{number}.safetensors"

    def of_target(self, number: int) -> Path:
        """The classifier of one of the targets of metaft.adapt, of 1, 2, ..."""
        return self.classifier if number == 1 else self.path / f"classifier-{number}.safetensors"

    def all_kept(self) -> dict[int, Path]:
        """Those that there are, by step."""
        found = {int(path.stem.removeprefix("kept-")): path for path in self.checkpoints.glob("kept-*.safetensors")}
        return dict(sorted(found.items()))

    @classmethod
    def create(cls, path: Path, config_toml: str, *, launch: str | None = None) -> RunFolder:
        """A new run, of a `launch` that may be restarted. Raises MetaftError where the folder holds something or cannot
        be made."""
        run = cls(path)
        path = run.path
        try:
            run._check_free()
            path.mkdir(parents=True, exist_ok=True)
            with run.held("out"):
                run._check_free(mine=True)  # of two that were started at once, one is first
                if launch is not None:
                    write_atomically(run.job, launch.encode())
                write_atomically(run.config, config_toml.encode())  # first: what has settings can be resumed
                run.make_folders()
        except OSError as error:
            raise MetaftError(f"out: cannot make {path} ({error.strerror})") from None
        return run

    def began_by(self, launch: str) -> bool:
        """Whether this is a run that the launch has begun itself."""
        try:
            return self.job.read_text() == launch
        except OSError:
            return False

    def _check_free(self, *, mine: bool = False) -> None:
        """Raises MetaftError where the folder holds anything, or is none. `mine` says that its lock is ours."""
        # A run killed before its settings were written leaves nothing but hidden temporaries.
        path = self.path
        if path.exists() and (not path.is_dir() or any(not p.name.startswith(".") for p in path.iterdir())):
            if not mine and self.lock.exists():
                with self.held("out"):  # the process that is at it is what to know first
                    pass
            or_go_on = f", or continue that run with --resume {path}" if self.config.exists() else ""
            raise MetaftError(f"out: {path} already exists; choose another --out{or_go_on}")

    def held(self, field: str) -> AbstractContextManager[None]:
        """Inside, no other process can write to this run. Raises MetaftError, naming `field` and the one that does."""
        return held(self.lock, f"{field}: {self.path}")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises CheckpointError where `path` is not one."""
        run = cls(path)
        path = run.path
        try:
            os.stat(run.config)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise CheckpointError(f"run folder {path} cannot be read ({error.strerror})") from None
        if not run.config.is_file():
            what = "is not a run folder: it has no config.toml" if path.is_dir() else "does not exist"
            raise CheckpointError(f"run folder {path} {what}")
        return run

    def make_folders(self) -> None:
        """The subfolders, where they are not there yet."""
        self.checkpoints.mkdir(exist_ok=True)
        self.plots.mkdir(exist_ok=True)

    def save_last(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Write the last checkpoint, and keep the former one as the previous. Raises CheckpointError."""
        fresh = self.last.with_name("next.safetensors")
        checkpoint.save(fresh, tensors, header)  # first, so that a full disk leaves `last` where it is
        if self.last.exists():
            os.replace(self.last, self.previous)
        fresh.replace(self.last)

    def mend(self) -> None:
        """Bring the last checkpoint back where a run was killed between the two renames of `save_last`."""
        if not self.last.exists() and self.previous.exists():
            self.previous.replace(self.last)

    def load(self, wanted: Path, read: Callable[[Path], Loaded], when: Callable[[Loaded], str]) -> Loaded:
        """`read(wanted)`, one of the checkpoints. Raises CheckpointError that says which other one to use instead.

        `when` puts in words how far a checkpoint is.
        """
        try:
            return read(wanted)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{self._other(wanted, read, when)}") from None

    def _other(self, bad: Path, read: Callable[[Path], Loaded], when: Callable[[Loaded], str]) -> str:
        """What to say about the checkpoints beside a bad one: the first that can be read, and how to go on from it."""
        for path in (self.last, self.previous, self.best):
            if path == bad or not path.exists():
                continue
            try:
                state = when(read(path))
            except CheckpointError:
                continue
            # cp, not mv: the good one has its own part to play when the run goes on.
            copy = f"cp {shlex.quote(str(path))} {shlex.quote(str(bad))}"
            how = copy if path != self.last else f"evaluate --checkpoint last, or {copy}"
            return f"; {path.name} {state} is good, to use it: {how}"
        return "; no other checkpoint of this run can be read"

    def read_result(self, field: str = "run") -> dict[str, Any]:
        """What `result.json` holds. Raises CheckpointError, naming `field`, where the run is not finished or the file
        is damaged."""
        try:
            result = json.loads(self.result.read_text(encoding="utf-8"))
        except FileNotFoundError:
            again = f"go on with --resume {shlex.quote(str(self.path))}"
            raise CheckpointError(f"{field}: {self.path} is not finished: it has no result.json; {again}") from None
        except OSError as error:
            raise CheckpointError(f"{field}: {self.result} cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError):
            raise CheckpointError(f"{field}: {self.result} is damaged: no JSON") from None
        if not isinstance(result, dict) or not isinstance(result.get("command"), str):
            raise CheckpointError(f"{field}: {self.result} is damaged: it names no command")
        return result

    def write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        """Write plain data for people and programs; what JSON lacks (NaN, infinity) becomes null."""
        text = json.dumps(_finite(value), indent=2, ensure_ascii=False)
        text = _NUMBERS.sub(lambda found: "".join(found[0].split()).replace(",", ", "), text)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None
        # A path need not be text; what is none of it JSON spells as this does, too.
        write_atomically(path, (text + "\n").encode(errors="backslashreplace"))


def file_name(name: str) -> str:
    """A name that any file system takes: other characters become hyphens, and a long one keeps its end."""
    return "".join(ch if ch.isalnum() or ch in "._-" else "-" for ch in name)[-100:]


def append_row(path: Path, row: Mapping[str, Any], *, sync: bool = False) -> None:
    """Add one line of JSON; `sync` waits until it, and all lines before it, are on the disk."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row)) + "\n")
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A line file as a whole. Raises CheckpointError where it cannot be written."""
    write_atomically(path, "".join(json.dumps(_finite(row)) + "\n" for row in rows).encode())


def read_rows(path: Path, numbers: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The rows of a line file, each of which has these `numbers`. A last line that a crash cut off is left out.

    Raises CheckpointError where the file cannot be read, or another line is not such a row.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):  # no newline behind it: the write never finished
                break
            raise CheckpointError(f"{path}, line {number}: not JSON: {line[:60]!r}") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(name), (int, float)) for name in numbers):
            raise CheckpointError(f"{path}, line {number}: not a row of this file: {line[:60]!r}")
        rows.append(row)
    return rows


def cut_back(path: Path, step: int, evaluated: int) -> None:
    """Drop rows of steps that the checkpoint does not know: training beyond `step`, validation beyond `evaluated`."""
    if not path.exists():
        return
    kept = [r for r in read_rows(path, ["step"]) if r["step"] <= (evaluated if r.get("kind") == "val" else step)]
    write_rows(path, kept)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
