"""Every way to fine-tune beside `head` and `full`, on the same draws, as one table.

    python benchmarks/members.py --data folder:PATH --draws 10 -- --image-size 96

A row is one run of `metaft.adapt` from the same start with one thing changed, in `--runs`, which goes on where it was
stopped; the table is made of their result.json alone, with gains paired over the draws. The random start, which no row
changes, is left out of these runs. Further words go to every run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, too

from benchmarks.adapted import apart, finished
from metaft.after.comparing import Finished, differences, opened
from metaft.metrics import verdict
from metaft.support.tables import markdown

MEMBERS: dict[str, list[str]] = {
    "head": ["--strategy", "head"],
    "full": ["--strategy", "full"],
    "lp-ft": ["--strategy", "lp-ft:rise=0.2"],
    "last": ["--strategy", "last:blocks=2"],
    "gradual": ["--strategy", "gradual"],
    "discriminative": ["--strategy", "discriminative"],
    "layer-decay": ["--strategy", "layer-decay"],
    "bitfit": ["--strategy", "bitfit"],
    "lora": ["--strategy", "lora"],
    "head, auto rate": ["--strategy", "head", "--lr", "auto"],
    "full, auto rate": ["--strategy", "full", "--lr", "auto"],
    "full, constant": ["--strategy", "full", "--schedule", "constant"],
    "full, linear": ["--strategy", "full", "--schedule", "linear"],
    "full, step": ["--strategy", "full", "--schedule", "step"],
    "full, one-cycle": ["--strategy", "full", "--schedule", "one-cycle"],
    "full, stlr": ["--strategy", "full", "--schedule", "stlr"],
    "full, plateau": ["--strategy", "full", "--schedule", "plateau"],
    "full, warm-up": ["--strategy", "full", "--schedule", "cosine:warmup=0.1"],
    "full, soup of 3": ["--strategy", "full", "--soup", "3"],
    "full, basic, soup of 3": ["--strategy", "full", "--augment", "basic", "--soup", "3"],
    "full, l2-sp": ["--strategy", "full", "--extra", "l2-sp"],
    "full, mixup": ["--strategy", "full", "--extra", "mixup"],
    "full, cutmix": ["--strategy", "full", "--extra", "cutmix"],
    "full, label smoothing": ["--strategy", "full", "--label-smoothing", "0.1"],
    "full, dropout": ["--strategy", "full", "--dropout", "0.2"],
    "full, EMA": ["--strategy", "full", "--ema", "0.99"],
    "full, basic": ["--strategy", "full", "--augment", "basic"],
    "full, trivial": ["--strategy", "full", "--augment", "trivial"],
    "full, randaug": ["--strategy", "full", "--augment", "randaug"],
    "full, adversarial": ["--strategy", "full", "--extra", "adversarial"],
}
"""Words of `metaft.adapt` by row. `distil` has none: its teacher would have to be another one in each draw."""

BESIDE = ("head", "full")


def main() -> int:
    own, rest = apart(sys.argv[1:])
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--shots", default="20", help="images per class")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--rows", nargs="+", default=list(MEMBERS), choices=list(MEMBERS), metavar="ROW")
    parser.add_argument("--init", default="efficientnet-lite0")
    parser.add_argument("--runs", type=Path, default=Path("runs/members"))
    args = parser.parse_args(own)
    rows = list(dict.fromkeys([*BESIDE, *args.rows]))
    folders = [run(name, args, rest) for name in rows]
    print(markdown(table(rows, opened(folders))))
    return 0


def run(name: str, args: argparse.Namespace, rest: Sequence[str]) -> Path:
    """The folder of a row's run, which is finished. Raises SystemExit where it fails."""
    out = args.runs / "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in name)
    argv = ["--init", args.init, "--data", args.data, "--shots-per-class", args.shots, *MEMBERS[name], *rest]
    return finished(out, [*argv, "--seeds", str(args.draws), "--no-random", "--no-report"])


def table(rows: Sequence[str], runs: Sequence[Finished]) -> list[list[str]]:
    by_name = dict(zip(rows, runs, strict=True))
    probe = next(start for start in runs[0].result["starts"] if start["name"] == "probe")
    above = [*(f"above `{name}`" for name in BESIDE), "above the probe"]
    lines = [["row", *above, "accuracy", "trained of the backbone", "seconds", "n"]]
    lines.append(["the probe", "", "", "", interval(probe["mean"]["accuracy"], probe["mean"]["ci95"]), "", "", ""])
    for name, one in by_name.items():
        above = ["" if name == other else gain(by_name[other], one) for other in BESIDE]
        of_probe = next(each for each in one.result["gains"] if each["over"] == "probe")
        figure = next(iter(one.figures.values()))
        start: dict[str, Any] = one.result["starts"][0]
        trained = start["trained"]["numbers"] if start.get("trained") else 0
        lines.append(
            [
                name,
                *above,
                interval(of_probe["mean"], of_probe["ci95"], "+"),
                interval(figure.value, figure.ci95),
                f"{trained:,}",
                f"{start['seconds']:.1f}",
                str(start["mean"]["draws"]),
            ]
        )
    return lines


def gain(first: Finished, other: Finished) -> str:
    """Paired over the draws, or nothing where these are not the same."""
    difference = differences(first, other)[0]
    return (
        interval(difference.value, difference.ci95, "+") if difference.value is not None and difference.paired else ""
    )


def interval(value: float, half: float | None, sign: str = "") -> str:
    """In %, bold where the interval of a difference leaves 0 out."""
    text = f"{100 * value:{sign}.1f}" + ("" if half is None else f" ± {100 * half:.1f}")
    return f"**{text}**" if sign and verdict(value, half) in ("above", "below") else text


if __name__ == "__main__":
    sys.exit(main())
