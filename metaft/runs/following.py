"""What can be done after a run has ended or was stopped: a command where there is one, else a line of Python."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metaft.dist.torchrun import launcher
from metaft.errors import DataError

if TYPE_CHECKING:
    from metaft.runs.assemble import Parts


def to_go_on(path: Path, from_python: Sequence[str], processes: int = 1) -> str:
    """How a run that was stopped goes on, on so many processes."""
    if from_python:
        more = [*from_python, *(["ranks=..."] if processes > 1 else [])]
        return f"metaft.meta_train.resume_run({_in_python(path)}, {', '.join(more)}) in Python"
    launch = "python" if processes == 1 else f"torchrun {launcher(processes)}"
    return f"{launch} -m metaft.meta_train --resume {shlex.quote(str(path))}"


def to_do_next(path: Path, parts: Parts, from_python: Sequence[str]) -> list[str]:
    """What to do with a run: a meta-test, at more shots where data and model allow it, and adapting to a target."""
    from metaft.algorithms import is_ours
    from metaft.inputs import ImageInputs, of_header

    c = parts.config
    needed = [argument for argument in from_python if not argument.startswith("init=")]
    if needed:
        names = [argument.partition("=")[0] for argument in needed]
        what = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        test = f"metaft.evaluate.run({_in_python(path)}, {', '.join(needed)}) in Python, which brings the {what} again"
    else:
        test = _more_shots(path, parts)
        if c.learner.plugin is None and not is_ours(
            c.learner.algorithm
        ):  # which adapting by fine-tuning has no need of
            test += f" --plugin YOUR_FILE.py  # registers {c.learner.algorithm!r}, which no process but this one knows"
    # Adapting trains the run's own parameters on images that are read as the run's were: the run's data, and the loss
    # that it went down, are not needed again.
    if c.learner.model == "custom" or not isinstance(of_header(parts.dataset.describe()), ImageInputs):
        return [test]
    data = "glyphs:Hebrew" if parts.dataset.name == "glyphs" else "folder:YOUR_IMAGES"
    return [test, f"python -m metaft.adapt --init {shlex.quote(str(path))} --data {data}"]


def _more_shots(path: Path, parts: Parts) -> str:
    c = parts.config
    shots = 5 if c.test.test_shots < 5 else 2 * c.test.test_shots
    try:
        parts.dataset.source(ways=c.test.test_ways, shots=shots, query_shots=c.test.test_query_shots, splits=("test",))
    except DataError:
        return f"python -m metaft.evaluate {shlex.quote(str(path))} --checkpoint last"
    return f"python -m metaft.evaluate {shlex.quote(str(path))} --shots {shots}"


def _in_python(path: Path) -> str:
    return f"Path({str(path)!r})"
