"""`python -m metaft.choose --data TARGET`: rank what a classifier could begin with, without fine-tuning anything."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from metaft._version import __version__
from metaft.cli import in_one, stopped_at_once
from metaft.config import ChooseConfig
from metaft.errors import MetaftError
from metaft.flags import parse
from metaft.starts import names
from metaft.support import places
from metaft.support.modes import in_usual_modes
from metaft.support.output import steady
from metaft.support.paths import local
from metaft.support.taken import check_new, fresh_folder
from metaft.support.whole import whole_or_nothing


@dataclasses.dataclass(frozen=True, init=False)
class Arguments(ChooseConfig):
    """Rank what a classifier of these images could begin with, without fine-tuning anything."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 too little memory or features that are not finite, 2 bad input, 130 or 143 stopped by
    Ctrl-C or SIGTERM."""
    return in_one(_command, argv, prog="metaft.choose", smaller="a smaller --image-size, or fewer images")


def _command(argv: Sequence[str]) -> None:
    run(ChooseConfig(**parse(Arguments, argv, prog="python -m metaft.choose")))


@steady()
@in_usual_modes
def run(config: ChooseConfig) -> dict[str, Any]:
    """Write table, picture and figures into a new folder; returns what its `choice.json` holds.

    Raises MetaftError for images or starts that cannot be had, and where no start fits the images; nothing is written
    then. Only images that a draw of metaft.adapt would train on are read by a start.
    """
    from metaft.finetune.contenders import Images
    from metaft.finetune.ranking import at_hand, ranked, text
    from metaft.finetune.setup import located, shots_of
    from metaft.plots.ranking import ranking
    from metaft.runs.folder import file_name
    from metaft.starts.run import RUNS
    from metaft.support.pictures import drawn

    places.note_root(config.target.data_root, config.target.data)
    target = located(config.target)
    shots = shots_of(target)
    name = f"choose-{file_name(places.typed(config.target.data))}-{config.seed}"
    out = fresh_folder(RUNS / name) if config.out is None else check_new(local(config.out))
    images = Images(target)
    if config.only and not config.starts:
        raise MetaftError("only: goes with --starts START..., and none is given")
    starts = at_hand(images, "starts", named=config.starts, only=config.only, image_size=config.image_size)
    read = images.of(starts[0])
    if shots is None and "all" in read.parts:
        _ = read.folds  # which metaft.adapt needs there: raises DataError for a class with a single image
    with stopped_at_once("stopped; nothing was written"), whole_or_nothing(out) as folder:
        rows = ranked(starts, images, shots_per_class=shots, seed=config.seed, named=config.starts)
        best = rows[0]
        result = {
            "command": "choose",
            "version": __version__,
            "data": target.data,
            "shots_per_class": shots,
            "seed": config.seed,
            "recommended": best["start"],
            "starts": rows,
        }
        (folder / "choice.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (folder / "table.txt").write_text(text(rows) + "\n", encoding="utf-8", errors="backslashreplace")
        picture = folder / "ranking.png"
        drawn({picture: lambda: ranking(picture, rows, best["images"])})
    print(text(rows))
    if best["probe"] is None:
        print("a class has a single image, so there are no folds; LogME, which ranks here, says little of so few")
    print(f"\nresult:   {', '.join(str(path) for path in sorted(out.iterdir()))}")
    print(f"recommended: {best['shown']}, with: python -m metaft.adapt {_words(config, best['start'])}")
    return result


def _words(config: ChooseConfig, start: str) -> str:
    """The options of metaft.adapt that begin with a start."""
    given = {"init": places.shown(start), "data": config.target.data, "data-root": config.target.data_root}
    given["shots-per-class"] = config.target.shots_per_class
    given["image-size"] = config.image_size if names.takes_size(start) else None
    given["seed"] = config.seed or None
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None]
    return " ".join([*words, *(["--skip-bad"] if config.target.skip_bad else [])])


if __name__ == "__main__":
    sys.exit(main())
