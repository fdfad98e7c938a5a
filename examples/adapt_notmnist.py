"""Accuracy against images per class: the same training from meta-learned and from random parameters.

    python examples/adapt_notmnist.py --data folder:DATA/notmnist --init runs/glyphs-maml-5w1s-0 --init RUN2

notMNIST are the letters A to J in many typefaces, 28x28 grey, as class folders in train/ and test/; any other
`folder:PATH` with enough images will do. Each point is the mean over `--seeds` draws of the training images, with its
95 % interval; the runs, the table (shots.json) and the figure (shots.png) are in `--out`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from metaft import adapt
from metaft.config import AdaptConfig
from metaft.errors import MetaftError
from metaft.metrics import mean_t95
from metaft.support.places import shown


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder:PATH or glyphs:SCRIPT")
    parser.add_argument(
        "--init", action="append", required=True, help="run folder of metaft.meta_train; may be repeated"
    )
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 20, 100], help="images per class")
    parser.add_argument("--seeds", type=int, default=10, help="draws of the training images")
    parser.add_argument("--method", choices=["finetune", "inner"], default="finetune")
    parser.add_argument("--inner-steps", type=int, help="for --method inner")
    parser.add_argument("--epochs", type=int, help="for --method finetune")
    parser.add_argument("--out", type=Path, default=Path("runs/adapt-notmnist"))
    given = parser.parse_args(argv)
    try:
        if "none" in given.init:
            raise MetaftError("init: a random start stands beside every run already; name run folders, not none")
        rows = apart([row for init in given.init for shots in given.shots for row in one(given, init, shots)])
    except MetaftError as error:
        print(f"adapt_notmnist: {error}", file=sys.stderr)
        return error.status
    (given.out / "shots.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    figure(rows, given.data).savefig(given.out / "shots.png", dpi=200)
    print(f"\n{'start':<34}{'images per class':>17}{'accuracy, %':>18}{'gain, points':>18}   draws")
    for row in rows:
        accuracy, gain = (say(row[k], row[f"{k}_ci95"]) for k in ("accuracy", "gain"))
        print(f"{row['start']:<34}{row['shots']:>17}{accuracy:>18}{gain:>18}   {row['draws']}")
    print(f"\nfigure: {given.out / 'shots.png'}, table: {given.out / 'shots.json'}")
    return 0


def one(given: argparse.Namespace, init: str, shots: int) -> list[dict[str, Any]]:
    """The rows of the meta-learned and the random start at one number of images per class.

    A run that is in `--out` already goes on from where it was, so that an interrupted comparison loses nothing.
    """
    config = AdaptConfig(
        init=init, data=given.data, shots_per_class=shots, method=given.method, inner_steps=given.inner_steps,
        epochs=given.epochs, seeds=given.seeds, out=str(given.out / f"{Path(init).name}-{given.method}-{shots}"),
    )  # fmt: skip
    out = Path(config.output.out or "")
    result = adapt.resume_run(out, config) if (out / "config.toml").exists() else adapt.run(config)
    learned = [draw["accuracy"] for draw in result["draws"]]
    random = [draw["scratch"]["accuracy"] for draw in result["draws"]]
    about = result["init_about"]
    trained = f"{about['algorithm']} on {shown(about['dataset'])}"
    starts = (
        (trained, learned, [a - b for a, b in zip(learned, random, strict=True)]),
        (f"random, for {trained}" if given.method == "inner" else "random", random, []),
    )
    rows = []
    for start, accuracies, gains in starts:
        accuracy, ci95 = mean_t95(accuracies)
        gain, gain_ci95 = mean_t95(gains) if gains else (None, None)
        rows.append({
            "start": start, "init": init, "shots": shots, "draws": len(accuracies),
            "accuracy": accuracy, "accuracy_ci95": ci95, "gain": gain, "gain_ci95": gain_ci95,
        })  # fmt: skip
    return rows


def apart(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the run's name behind starts that several runs share, as two of one algorithm and data set do."""
    named = []
    for row in rows:
        runs = {other["init"] for other in rows if other["start"] == row["start"]}
        shared = len(runs) > 1 and row["start"] != "random"
        named.append({**row, "start": f"{row['start']} ({Path(row['init']).name})" if shared else row["start"]})
    return named


def figure(rows: Sequence[dict[str, Any]], data: str) -> Figure:
    """A line for each start, with bars for the 95 % intervals."""
    picture = Figure(figsize=(6, 4), layout="constrained")
    axes = picture.subplots()
    for start, marker in zip(dict.fromkeys(row["start"] for row in rows), "osD^vP", strict=False):
        # A random start is the same whichever run it stands beside, and is drawn once.
        own = {row["shots"]: row for row in rows if row["start"] == start}
        errors = [100 * (row["accuracy_ci95"] or 0.0) for row in own.values()]
        style = "--" if start.startswith("random") else "-"
        axes.errorbar(
            list(own), [100 * row["accuracy"] for row in own.values()], errors, marker=marker, ls=style, capsize=3,
            label=f"{start} start" if start == "random" else start,
        )  # fmt: skip
    axes.set_xscale("log")
    shots = sorted({row["shots"] for row in rows})
    axes.set_xticks(shots, [str(s) for s in shots])
    axes.minorticks_off()
    axes.set_xlabel("images per class")
    axes.set_ylabel("test accuracy, %")
    title = f"{data.partition(':')[2].rstrip('/').rpartition('/')[2]}, {max(r['draws'] for r in rows)} draws"
    axes.set_title(title, parse_math=False)  # a folder may be called "$x_{"
    axes.grid(axis="y", alpha=0.3)
    for name in axes.legend().get_texts():
        name.set_parse_math(False)
    return picture


def say(value: float | None, ci95: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" if ci95 is None else f"{100 * value:.1f} ± {100 * ci95:.1f}"


if __name__ == "__main__":
    sys.exit(main())
