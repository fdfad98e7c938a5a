"""The table of published figures and ours, from benchmarks/results/published.jsonl.

    python benchmarks/table.py [FILE ...] [--picture FILE.png]

For each row and seed that measurement counts which trained longest; of those the last one, and of the seeds those that
trained as long as any. With several seeds accuracy is their mean, and the interval Student's t over seeds; with one it
is that over test episodes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, too

from benchmarks.published import RESULTS
from metaft.errors import MetaftError
from metaft.metrics import mean_t95
from metaft.support.progress import duration

Line = dict[str, Any]

HEAD = (
    "| data | row | published | ours, same mode | the other mode | meta-steps (published) | training | n | seeds |",
    "|---|---|---|---|---|---|---|---|---|",
)


def read(files: Sequence[Path]) -> list[Line]:
    """Measurements in order. Raises MetaftError for a file or line that cannot be read."""
    lines: list[Line] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise MetaftError(f"{file} cannot be read ({error.strerror})") from None
        lines += [_parsed(file, number, line) for number, line in enumerate(text.splitlines(), 1)]
    return lines


NEEDED = ("dataset", "row", "seed", "iterations", "seconds", "episodes", "transductive", "inductive", "published")


def _parsed(file: Path, number: int, line: str) -> Line:
    try:
        held = json.loads(line)
    except ValueError as error:
        raise MetaftError(f"{file}, line {number}, is no JSON: {error}") from None
    lacking = [key for key in NEEDED if key not in held] if isinstance(held, dict) else list(NEEDED)
    if lacking:
        raise MetaftError(f"{file}, line {number}, is no measurement: it lacks {', '.join(lacking)}")
    return held


def counted(lines: Sequence[Line]) -> list[list[Line]]:
    """For each row, in order, its measurement of each seed that trained as long as the longest."""
    found: dict[tuple[str, str], dict[int, Line]] = {}
    for line in lines:
        seeds = found.setdefault((line["dataset"], line["row"]), {})
        known = seeds.get(line["seed"])
        if known is None or line["iterations"] >= known["iterations"]:
            seeds[line["seed"]] = line
    longest = [max(line["iterations"] for line in seeds.values()) for seeds in found.values()]
    return [
        [seeds[seed] for seed in sorted(seeds) if seeds[seed]["iterations"] == most]
        for seeds, most in zip(found.values(), longest, strict=True)
    ]


def figures(lines: Sequence[Line], mode: str) -> tuple[float, float]:
    """Accuracy and its half-width in %."""
    if len(lines) == 1:
        return lines[0][mode]["accuracy"], lines[0][mode]["ci95"]
    mean, half = mean_t95([line[mode]["accuracy"] for line in lines])
    return mean, half or 0.0


def row(lines: Sequence[Line]) -> str:
    first, published = lines[0], lines[0]["published"]
    mode = published["mode"]
    other = "inductive" if mode == "transductive" else "transductive"
    mean, half = figures(lines, mode)
    reached = published["accuracy"] <= mean + half
    ours = f"**{mean:.2f} ± {half:.2f}**" if reached else f"{mean:.2f} ± {half:.2f}"
    theirs = f"{published['accuracy']}" + ("" if published["ci95"] is None else f" ± {published['ci95']}")
    steps = f"{first['iterations']:,}" + (f" ({published['iterations']:,})" if published["iterations"] else "")
    seconds = sum(line["seconds"] for line in lines) / len(lines)
    cells = (
        first["dataset"], f"`{first['row']}`", f"{theirs} ({published['source']})", ours,
        "{:.2f} ± {:.2f}".format(*figures(lines, other)), steps, duration(seconds), first["episodes"], len(lines),
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def table(lines: Sequence[Line]) -> str:
    """Markdown; ours in bold where the published figure lies within or below our interval."""
    return "\n".join([*HEAD, *(row(of_row) for of_row in counted(lines))])


def draw(lines: Sequence[Line], file: Path) -> None:
    """Accuracy against seconds of training: a line for each row and seed, a dash at what was published."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    groups: dict[tuple[str, str, int], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["dataset"], line["row"], line["seed"]), []).append(line)
    for (dataset, name, _), group in groups.items():
        group.sort(key=lambda line: line["seconds"])
        mode = group[0]["published"]["mode"]
        x, y = [line["seconds"] for line in group], [line[mode]["accuracy"] for line in group]
        error = [line[mode]["ci95"] for line in group]
        drawn = axes.errorbar(x, y, error, marker="o", capsize=3, label=f"{dataset} {name}")
        axes.axhline(group[0]["published"]["accuracy"], color=drawn[0].get_color(), linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of training and validation")
    axes.set_ylabel("accuracy in the published mode, %")
    axes.legend(fontsize=7)
    axes.set_title("Dotted: the published figure of that row", fontsize=10, loc="left")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[RESULTS], metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="accuracy against compute")
    args = parser.parse_args(argv)
    try:
        lines = read(args.files)
    except MetaftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(lines))
    if args.picture is not None and lines:
        draw(lines, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
