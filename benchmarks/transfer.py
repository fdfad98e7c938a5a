"""How well the scores of `metaft.choose` tell which start is the best to fine-tune: rank correlations over starts.

    python benchmarks/transfer.py --data cifar10=folder:PATH --starts efficientnet-lite0 runs/A runs/B --shots 5 20

Each start is scored on the images that a draw trains on, and then fine-tuned on them as `metaft.adapt` does where
nothing else is asked for (published weights: the head, a run: everything). Figures are means over draws; Spearman's
rank correlation of each score with the accuracy is over the starts. What is measured is kept in `--out`, line by line;
a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from metaft.config import AdaptConfig
from metaft.errors import MetaftError
from metaft.finetune.classifier import Classifier
from metaft.finetune.fit import SMALLER
from metaft.finetune.ranking import measured
from metaft.finetune.setup import prepared, rows_of
from metaft.finetune.study import fit_one, test
from metaft.starts import names

SCORES = ("probe", "nearest", "logme", "h_score", "leep")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DATA")
    parser.add_argument("--starts", nargs="+", required=True, metavar="START")
    parser.add_argument("--shots", nargs="+", type=int, default=[5, 20], metavar="K")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--image-size", type=int, help="of published weights")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer.jsonl"))
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for named in args.data:
            name, _, data = named.partition("=")
            for shots in args.shots:
                report(name, shots, cell(name, data, shots, args))
    except MetaftError as error:
        print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
        return error.status
    return 0


def cell(name: str, data: str, shots: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each start: its scores and its accuracy, means over the draws."""
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    rows = []
    for start in args.starts:
        draws = []
        for seed in range(args.seeds):
            key = {"data": name, "shots": shots, "start": names.label_of(start), "seed": seed}
            found = next((row for row in known if key.items() <= row.items()), None)
            if found is None:
                found = {**key, **one(data, shots, start, seed, args.image_size)}
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                print(f"{key} {found['accuracy']:.4f}", file=sys.stderr, flush=True)
            draws.append(found)
        means = {of: mean([draw[of] for draw in draws]) for of in (*SCORES, "accuracy")}
        rows.append({"start": names.label_of(start), **means})
    return rows


def one(data: str, shots: int, start: str, seed: int, size: int | None) -> dict[str, Any]:
    """Scores of a start on the images of a draw, and its accuracy on the test part when it was fine-tuned on them."""
    size = size if names.takes_size(start) else None
    asked = AdaptConfig(init=start, data=data, shots_per_class=shots, seed=seed, image_size=size, probe=False)
    setup = prepared(asked, None, "seed")
    first, rows = setup.contenders[0], rows_of(setup, 0)
    scored = measured(first.start, first.target, shots_per_class=shots, seed=seed)
    fitted = fit_one(setup, first, rows, 0, "cpu")
    classifier = Classifier(fitted.body, fitted.head, first.target.inputs, first.target.class_names)
    figures = test(classifier, first.target, rows.test, SMALLER, stays=False, bounds=(), should_stop=lambda: None)
    return {**{of: scored[of] for of in SCORES}, "accuracy": figures["accuracy"]}


def mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return None if len(numbers) < len(values) else sum(numbers) / len(numbers)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, of equal values their mean; nan where one of the two is constant."""
    one, other = rankdata(a), rankdata(b)
    if one.std() == 0 or other.std() == 0:
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def report(name: str, shots: int, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{name}, {shots} images per class, {len(rows)} starts\n")
    print(f"| start | accuracy | {' | '.join(SCORES)} |\n|---|---|{'---|' * len(SCORES)}")
    for row in sorted(rows, key=lambda row: -row["accuracy"]):
        cells = ["-" if row[of] is None else f"{row[of]:.3f}" for of in SCORES]
        print(f"| {row['start']} | {row['accuracy']:.3f} | {' | '.join(cells)} |")
    cells = []
    for of in SCORES:
        pairs = [(row[of], row["accuracy"]) for row in rows if row[of] is not None]
        cells.append(f"{spearman(*zip(*pairs, strict=True)):+.2f}" if len(pairs) > 2 else "-")
    print(f"| *rank correlation* | | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
