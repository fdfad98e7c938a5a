"""`python -m metaft.look RUN|START`: one HTML page on a run or a start, which needs nothing else to be read."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from metaft.cli import in_one, stopped_at_once
from metaft.config import LookConfig
from metaft.errors import MetaftError
from metaft.flags import parse
from metaft.options import Option
from metaft.support.modes import in_usual_modes
from metaft.support.output import steady
from metaft.support.paths import local
from metaft.support.places import check_root
from metaft.support.taken import check_own, check_writable

if TYPE_CHECKING:
    from torch import nn

PAGE = "report.html"
"""In a run's folder."""


@dataclasses.dataclass(frozen=True, init=False)
class Arguments(LookConfig):
    """Make a page of pictures, tables and words on a run or a start."""

    run: Annotated[
        str,
        Option(
            "Run folder of metaft.meta_train or metaft.adapt, or what else --init takes: none, efficientnet-lite0, "
            "torchvision:NAME, timm:NAME, file:PATH:arch=NAME.",
            metavar="RUN|START", positional=True,
        ),
    ] = ""  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 too little memory, 2 bad input, 130 or 143 stopped by Ctrl-C or SIGTERM."""
    return in_one(_command, argv, prog="metaft.look", smaller="a machine with more")


def _command(argv: Sequence[str]) -> None:
    given = parse(Arguments, argv, prog="python -m metaft.look")
    if given.get("explain") == ():
        raise MetaftError("explain: name an image or a folder of images")
    run(given.pop("run"), LookConfig(**given))


@steady()
@in_usual_modes
def run(word: Path | str, config: LookConfig | None = None, *, module: nn.Module | None = None) -> Path:
    """Write the page; returns its file. `module` is the user's own architecture, where the run was made with one.

    Raises MetaftError for a run that is not finished, damaged or another program's, a start that cannot be had, and a
    place that cannot be written; nothing is written then.
    """
    from metaft.runs.checkpoint import write_atomically
    from metaft.runs.folder import file_name
    from metaft.views.explained import readings_of
    from metaft.views.page import page
    from metaft.views.subject import open_subject

    config = config or LookConfig()
    with stopped_at_once("stopped; nothing was written"):
        subject = open_subject(str(word), image_size=config.image_size, module=module)
        if config.landscape and subject.command == "start":
            raise MetaftError(f"landscape: it is of training, and {subject.name} is a start; name a run")
        if config.data_root is not None and subject.command == "start":
            raise MetaftError(f"data_root: {subject.name} is a start, which has no data (given {config.data_root})")
        check_root(config.data_root)
        subject.data_root = config.data_root
        subject.landscape = config.landscape
        subject.explain = readings_of(subject, config.explain)
        beside = Path(f"look-{file_name(subject.name)}.html") if subject.folder is None else subject.folder.path / PAGE
        out = beside if config.out is None else local(config.out)
        check_own(out, "out", ["<!DOCTYPE html>"], "page")
        check_writable(out, "out", out.parent)
        html = page(subject, slow=True)
        _keep(out, html)
        write_atomically(out, html.encode())
    print(f"page:     {out} ({len(html.encode()) / 1e6:.2f} MB), open it in any browser")
    return out


_SLOW = re.compile(r'<section id="(?:landscape|explained)">.*?</section>', re.DOTALL)
"""What of a page takes minutes, and is there where it was asked for alone."""


def _keep(out: Path, html: str) -> None:
    """Copy the page that is there to a free name, where it has what takes minutes and the new one lacks."""
    try:
        before = out.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return
    if all(section in html for section in _SLOW.findall(before)):
        return
    names = (
        out.with_name(f"{out.stem}-before{number}{out.suffix}") for number in itertools.chain([""], itertools.count(2))
    )
    kept = next(name for name in names if not os.path.lexists(name))
    shutil.copy2(out, kept)
    print(f"metaft: note: the page that was there shows more, and is kept as {kept}", file=sys.stderr)


def at_end(folder: Path, *, module: nn.Module | None = None) -> Path | None:
    """The page of a run that has just ended, without what takes long, and a line on it. What goes wrong, a signal too,
    is one line, and takes nothing of the run away."""
    from metaft.support.pictures import missed

    out = folder / PAGE

    def write() -> None:
        from metaft.runs.checkpoint import write_atomically
        from metaft.runs.folder import RunFolder
        from metaft.views.page import page
        from metaft.views.subject import of_folder

        html = page(of_folder(RunFolder(folder), module=module), slow=False)
        _keep(out, html)
        write_atomically(out, html.encode())

    try:
        with stopped_at_once("stopped"):
            why = missed(write)
    except MetaftError as error:
        why = str(error)
    if why is not None:
        print(f"metaft: note: no page could be made ({why})", file=sys.stderr)
        return None
    print(f"page:     {out}; python -m metaft.look {shlex.quote(str(folder))} adds what takes longer")
    return out


if __name__ == "__main__":
    sys.exit(main())
