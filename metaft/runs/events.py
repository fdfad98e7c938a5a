"""A run's rows, pictures and settings for TensorBoard, in `RUN/tensorboard`.

The line files stay the truth: what is here is made of them, and a run that goes on makes it anew, so that no step is
there twice. Written at once and by no thread, beside which no process could be forked.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from metaft.errors import MetaftError
from metaft.runs.folder import RunFolder

FILE = "events.out.tfevents.metaft"
"""TensorBoard knows its files by the middle of their names."""


def check(log: str | None) -> None:
    """Raises MetaftError where a run is to be logged by what is not installed."""
    if log is not None and importlib.util.find_spec("tensorboard") is None:
        raise MetaftError(f"log: {log} is not installed; pip install 'metaft[{log}]'")


def scalars_of(row: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """(step, numbers by tag) of a row of `metrics.jsonl`.

    >>> scalars_of({"kind": "val", "step": 7, "transductive": {"mse": 0.5, "ci95": None, "mse_per_step": [1, 0.5]}})
    (7, {'val/transductive/mse': 0.5})
    >>> scalars_of({"draw": 1, "start": "random", "epoch": 3.0, "loss": 0.25})
    (3, {'random, draw 1/loss': 0.25})
    """
    if "kind" in row:
        step, first = int(row["step"]), str(row["kind"])
    else:
        where = [str(row["start"]), *(f"{key} {row[key]}" for key in ("draw", "fold") if row.get(key, 0) != 0)]
        step, first = int(row["epoch"]), ", ".join(where)
    rest = {k: v for k, v in row.items() if k not in ("kind", "step", "draw", "start", "fold", "epoch")}
    return step, dict(_numbers(first, rest))


def _numbers(tag: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{tag}/{name}", value)
        elif isinstance(value, (int, float)):
            yield f"{tag}/{name}", float(value)


class Events:
    """Of one run. Where its file cannot be written a note says so, and the run goes on without."""

    def __init__(self, folder: Path, settings: str) -> None:
        """Begins anew; `settings` are those of `config.toml`."""
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import text

        self._file: BinaryIO | None = None
        self._rows = 0
        try:
            folder.mkdir(exist_ok=True)
            self._file = open(folder / FILE, "wb")  # noqa: SIM115 - open as long as the run
            self._records = RecordWriter(self._file)
        except OSError as error:
            self._lost(error)
        self._write(file_version="brain.Event:2")
        indented = "".join(f"    {line}\n" for line in settings.splitlines())  # as code, in Markdown
        self._write(step=0, summary=text("settings", indented))

    def row(self, row: Mapping[str, Any]) -> None:
        """The numbers of a row of `metrics.jsonl`."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[reportAttributeAccessIssue]

        step, numbers = scalars_of(row)
        self._rows += 1
        if numbers:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
            self._write(step=step, summary=Summary(value=values))

    def follow(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """All rows so far, of which those are written that are new."""
        for row in rows[self._rows :]:
            self.row(row)

    def end(self, pictures: Sequence[Path], step: int) -> None:
        """The pictures of a run that is over."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[reportAttributeAccessIssue]

        for path in pictures:
            try:
                data = path.read_bytes()
                with Image.open(path) as image:
                    width, height, channels = *image.size, len(image.getbands())
            except OSError as error:
                print(f"metaft: note: {path} is not in the events for TensorBoard ({error})", file=sys.stderr)
                continue
            shown = Summary.Image(width=width, height=height, colorspace=channels, encoded_image_string=data)
            self._write(step=step, summary=Summary(value=[Summary.Value(tag=f"plots/{path.stem}", image=shown)]))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[reportAttributeAccessIssue]

        if self._file is None:
            return
        try:
            self._records.write(Event(wall_time=time.time(), **what).SerializeToString())
            self._file.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        print(f"metaft: note: no more is logged for TensorBoard ({error.strerror or error})", file=sys.stderr)
        with contextlib.suppress(OSError):
            self.close()
        self._file = None


@contextlib.contextmanager
def events_of(log: str | None, run: RunFolder) -> Iterator[Events | None]:
    """Those of a run, where they are asked for."""
    if log is None:
        yield None
        return
    events = Events(run.path / "tensorboard", run.config.read_text(encoding="utf-8"))
    try:
        yield events
    finally:
        events.close()
