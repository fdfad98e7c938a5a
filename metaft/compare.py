"""`python -m metaft.compare RUN RUN ...`: finished runs side by side, and what differs between them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from metaft._version import __version__
from metaft.cli import in_one, stopped_at_once
from metaft.config import CompareConfig
from metaft.errors import MetaftError
from metaft.flags import parse
from metaft.options import Option
from metaft.support import tables
from metaft.support.output import steady
from metaft.support.paths import local
from metaft.support.taken import check_new
from metaft.support.whole import whole_or_nothing

if TYPE_CHECKING:
    from metaft.after.comparing import Finished


@dataclasses.dataclass(frozen=True, init=False)
class Arguments(CompareConfig):
    """Put finished runs of one command beside one another; each is compared with the first."""

    runs: Annotated[
        tuple[str, ...],
        Option("Run folders of metaft.meta_train, or of metaft.adapt.", metavar="RUN...", positional=True),
    ] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input, 130 or 143 stopped by Ctrl-C or SIGTERM."""
    return in_one(_command, argv, prog="metaft.compare", smaller="fewer runs")


def _command(argv: Sequence[str]) -> None:
    given = parse(Arguments, argv, prog="python -m metaft.compare")
    run(given.pop("runs", ()), CompareConfig(**given))


@steady()
def run(paths: Sequence[Path | str], config: CompareConfig | None = None) -> dict[str, Any]:
    """Print the tables, and write them into a new folder where `out` names one; returns what its `compare.json` holds.

    Raises MetaftError for fewer than two runs and for runs that cannot be compared, and CheckpointError for what is no
    finished run.
    """
    from metaft.after import compared, comparing

    config = config or CompareConfig()
    if config.markdown and config.latex:
        raise MetaftError("latex: the tables are printed in one form; give --markdown or --latex, not both")
    form = "md" if config.markdown else "tex" if config.latex else "txt"
    out = None if config.out is None else check_new(local(config.out))
    runs = comparing.opened([local(path) for path in paths])
    figures, differing = compared.table(runs), compared.settings(runs)
    said = [sentence for other in runs[1:] for sentence in compared.plainly(runs[0], other)]
    result = _result(runs, differing)
    if out is not None:
        with stopped_at_once("stopped; nothing was written"), whole_or_nothing(out) as folder:
            _write(folder, runs, figures, differing, said, result)
    print(FORMS[form](figures), "", sep="\n")
    print(FORMS[form](differing) if len(differing) > 1 else "all settings are the same", "", sep="\n")
    print(*said, sep="\n")
    if out is not None:
        print(f"\nresult:   {', '.join(str(path) for path in sorted(out.iterdir()))}")
    return result


FORMS = {"txt": tables.aligned, "md": tables.markdown, "tex": tables.latex}
"""How a table is written, by the ending of its file."""


def _write(
    folder: Path,
    runs: Sequence[Finished],
    figures: Sequence[Sequence[str]],
    differing: Sequence[Sequence[str]],
    said: Sequence[str],
    result: Mapping[str, Any],
) -> None:
    from metaft.after.compared import curves
    from metaft.plots.compared import compared
    from metaft.support.pictures import drawn

    for ending, form in FORMS.items():
        for name, lines in (("table", figures), ("settings", differing)):
            (folder / f"{name}.{ending}").write_text(form(lines) + "\n", "utf-8", errors="backslashreplace")
    (folder / "words.txt").write_text("\n".join(said) + "\n", "utf-8", errors="backslashreplace")
    (folder / "compare.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    picture = folder / "curves.png"
    lines, x, y = curves(runs)
    drawn({picture: lambda: compared(picture, lines, x=x, y=y, measure=runs[0].measure)})


def _result(runs: Sequence[Finished], differing: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What compare.json holds."""
    from metaft.after.comparing import differences

    first, *others = runs
    return {
        "command": "compare",
        "version": __version__,
        "of": first.kind,
        "measure": first.measure,
        "runs": [
            {
                "name": run.label,
                "figures": {k: {"value": f.value, "ci95": f.ci95} for k, f in run.figures.items()},
                "settings": {line[0]: run.config.get(line[0]) for line in differing[1:]},
            }
            for run in runs
        ],
        "differences": [
            {"of": run.label, "over": first.label, **dataclasses.asdict(difference)}
            for run in others
            for difference in differences(first, run)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
