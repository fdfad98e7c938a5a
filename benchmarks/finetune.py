"""Accuracy of fine-tuning beside the probe and chance, over data, images per class and strategies, as one table.

    python benchmarks/finetune.py --data hymenoptera=folder:PATH cifar10=folder:PATH --shots 1 5 20 --strategy head

Each cell is one run of `metaft.adapt` in `--runs`, which goes on where it was stopped; the table is made of their
result.json alone. Further words go to every run: `-- --image-size 96 --epochs 10`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, too

from benchmarks.adapted import apart, finished


def main() -> int:
    own, rest = apart(sys.argv[1:])
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DATA")
    parser.add_argument("--shots", nargs="+", default=["1", "5", "20"], metavar="K", help="images per class, or all")
    parser.add_argument("--strategy", nargs="+", default=["head"])
    parser.add_argument("--init", default="efficientnet-lite0")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=Path("runs/finetune"))
    args = parser.parse_args(own)
    print("| data | images per class | strategy | start | probe | random | gain over the probe | seconds per fit | n |")
    print("|---|---|---|---|---|---|---|---|---|")
    for named in args.data:
        name, _, data = named.partition("=")
        for shots in args.shots:
            for strategy in args.strategy:
                print(row(name, data, shots, strategy, args, rest), flush=True)
    return 0


def row(name: str, data: str, shots: str, strategy: str, args: argparse.Namespace, rest: list[str]) -> str:
    """One cell of the table, computed or read. Raises SystemExit where a run fails."""
    words = "-".join(word.lstrip("-") for word in rest)
    stem = "-".join(filter(None, (Path(args.init).name, name, shots, strategy, words, str(args.seeds))))
    out = args.runs / "".join(letter if letter.isalnum() or letter in "-.=" else "_" for letter in stem)
    argv = ["--init", args.init, "--data", data, "--strategy", strategy, "--seeds", str(args.seeds), *rest]
    finished(out, argv if shots == "all" else [*argv, "--shots-per-class", shots])
    result: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    starts = {start["name"]: start for start in result["starts"]}
    first = result["starts"][0]
    over = next(gain for gain in result["gains"] if gain["over"] == "probe")
    cells = [mean(starts[key]["mean"]) for key in (first["name"], "probe", "random")]
    seconds = f"{first['seconds']:.1f} / {starts['probe']['seconds']:.1f} / {starts['random']['seconds']:.1f}"
    gained = f"{100 * over['mean']:+.1f}" + ("" if over["ci95"] is None else f" ± {100 * over['ci95']:.1f}")
    return f"| {name} | {shots} | {strategy} | {' | '.join(cells)} | {gained} | {seconds} | {first['mean']['draws']} |"


def mean(of: dict[str, Any]) -> str:
    half = "" if of["ci95"] is None else f" ± {100 * of['ci95']:.1f}"
    return f"{100 * of['accuracy']:.1f}{half}"


if __name__ == "__main__":
    sys.exit(main())
