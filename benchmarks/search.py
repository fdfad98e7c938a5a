"""TPE against random search at equal budget: how good what they choose is after so many trials.

    python benchmarks/search.py --data folder:PATH --image-size 64 --trials 20 --seeds 5
    python benchmarks/search.py --objective bowl --trials 40 --seeds 20

Methods propose as in `metaft.search`, with one worker. Of images each trial is the fit of a head as `metaft.adapt` does
it, validated and tested on the mean of --draws draws; what is chosen is chosen on validation, of equal trials that of
the lower loss. `bowl` is a function of the same settings, without noise. Figures are means over search seeds with a
95 % interval (Student's t), paired by seed where methods are compared. What is measured is kept in `--out`, line by
line; a second call goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metaft.config import AdaptConfig
from metaft.errors import MetaftError, NonFiniteError
from metaft.finetune.classifier import Classifier
from metaft.finetune.fit import SMALLER
from metaft.finetune.recipes import lasting, settled
from metaft.finetune.setup import prepared, rows_of
from metaft.finetune.study import fit_one, test
from metaft.metrics import mean_t95
from metaft.settings.finetuning import Recipe
from metaft.trials.methods import METHODS
from metaft.trials.space import Space, made

Row = Mapping[str, Any]
"""Of a trial: "value" and "loss" on validation, "test"; value None where it failed."""

COMPARED = ("random", "tpe")

SEARCHED: dict[str, Any] = {
    "lr": {"low": 1e-5, "high": 1.0, "log": True},
    "optimizer": ["adam", *(f"adamw:weight_decay={decay}" for decay in ("0.001", "0.01", "0.1", "1"))],
    "epochs": {"low": 5, "high": 60},
    "dropout": {"low": 0.0, "high": 0.8},
}
"""The settings of a head."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--objective", choices=["images", "bowl"], default="images")
    parser.add_argument("--data", metavar="DATA", help="as metaft.adapt takes it")
    parser.add_argument("--init", default="efficientnet-lite0", metavar="START")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--shots", type=int, metavar="K", help="images per class, a fifth of them for validation")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5, help="searches of each method")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/search.jsonl"))
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if args.objective == "images" and args.data is None:
            raise MetaftError("data: --objective images needs --data")
        objective = bowl if args.objective == "bowl" else of_images(args)
        rows = measured(objective, args)
    except MetaftError as error:
        print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
        return error.status
    report(rows, args)
    return 0


def bowl(values: Mapping[str, Any]) -> dict[str, float]:
    """At most 1, where the rate is 0.003, without decay, at 40 epochs, with dropout 0.2; the test is the same."""
    decay = SEARCHED["optimizer"].index(values["optimizer"])
    far = (math.log10(values["lr"] / 3e-3) / 2) ** 2 + decay / 10
    far += ((values["epochs"] - 40) / 40) ** 2 + (values["dropout"] - 0.2) ** 2
    return {"value": math.exp(-far), "loss": far, "test": math.exp(-far)}


def of_images(args: argparse.Namespace) -> Callable[[Mapping[str, Any]], Row]:
    """The means over draws of a head's figures, on features that are computed once."""
    recipe = Recipe(strategy="head", patience=10)
    config = AdaptConfig(
        init=args.init, data=args.data, image_size=args.image_size, shots_per_class=args.shots, seeds=args.draws,
        probe=False, random=False, recipe=recipe, device="cpu",
    )  # fmt: skip
    setup = prepared(config, None, "seed")
    (contender,) = setup.contenders
    parts = [rows_of(setup, draw) for draw in range(args.draws)]
    if not len(parts[0].val):
        raise MetaftError(f"shots: a fifth of 10 or more images per class is for validation, got {args.shots}")

    def objective(values: Mapping[str, Any]) -> Row:
        fitting = settled(dataclasses.replace(recipe, **values), contender.start)
        tried = contender._replace(recipe=lasting(fitting, len(parts[0].train)))
        ends = []
        for draw, rows in enumerate(parts):
            try:
                fitted = fit_one(setup, tried, rows, draw, "cpu")
            except NonFiniteError:
                return {"value": None, "loss": None, "test": None}
            classifier = Classifier(fitted.body, fitted.head, tried.target.inputs, tried.target.class_names)
            figures = test(
                classifier, tried.target, rows.test, SMALLER, stays=True, bounds=(), should_stop=lambda: None
            )
            kept = min(fitted.curve, key=lambda row: row["val_loss"])
            ends.append((kept["val_accuracy"], kept["val_loss"], figures["accuracy"]))
        return {
            name: math.fsum(column) / len(ends)
            for name, column in zip(("value", "loss", "test"), zip(*ends, strict=True), strict=True)
        }

    return objective


def measured(objective: Callable[[Mapping[str, Any]], Row], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each trial of each search."""
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    of = {"objective": args.objective, "data": args.data, "size": args.image_size, "shots": args.shots}
    of["draws"] = args.draws
    space: Space = made("adapt", AdaptConfig, SEARCHED, origin="benchmark")
    found = []
    for seed in range(args.seeds):
        for name in COMPARED:
            method = METHODS[name](space, seed, True)
            for number in range(args.trials):
                key, values = {**of, "method": name, "seed": seed, "trial": number}, method.ask(number)
                row = next((row for row in rows if key.items() <= row.items()), None)
                if row is None:
                    row = {**key, "values": dict(values), **objective(values)}
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                method.tell(number, row["value"])
                found.append(row)
            print(f"{name}, seed {seed}: {chosen(found[-args.trials :])['value']:.4f}", file=sys.stderr, flush=True)
    return found


def chosen(rows: Sequence[Row]) -> Row:
    """The best on validation, of equal ones that of the lower loss, and then the earlier."""
    return min((row for row in rows if row["value"] is not None), key=lambda row: (-row["value"], row["loss"]))


def _words(mean: float, ci95: float | None) -> str:
    return f"{100 * mean:.2f}" + ("" if ci95 is None else f" ± {100 * ci95:.2f}")


def report(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """After some numbers of trials what each method chose, and by how much TPE's is better."""
    print(f"{args.trials} trials, {args.seeds} searches each\n")
    print(
        "| trials | "
        + " | ".join(f"{name}, {of}" for of in ("validation", "test") for name in (*COMPARED, "gain"))
        + " |"
    )
    print("|---" * 7 + "|")
    for count in sorted({max(1, args.trials // 4), max(1, args.trials // 2), args.trials}):
        cells = []
        for figure in ("value", "test"):
            columns = [
                [
                    chosen([r for r in rows if (r["method"], r["seed"]) == (name, seed) and r["trial"] < count])[figure]
                    for seed in range(args.seeds)
                ]
                for name in COMPARED
            ]
            columns.append([b - a for a, b in zip(*columns, strict=True)])
            cells += [_words(*mean_t95(column)) for column in columns]
        print(f"| {count} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
