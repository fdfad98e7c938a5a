"""The table and the picture of benchmarks/sinusoid.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from metaft.plots.style import BLACK, BLUE, GREEN, GREY, PURPLE, SKY, VERMILLION, decorate

PRE_TRAINING = "pre-training"
STEPS = 10
SHOWN = (0, 1, 2, 3, 5, STEPS)

Row = dict[str, Any]


def table(results: dict[str, Any]) -> str:
    """Markdown: a row per member and number of points, and below it what was not the MAML paper's."""
    settings = results["settings"]
    about = f"{settings['iterations']} meta-steps, seed {settings['seed']}; ± 95 % interval"
    lines = [
        f"Mean squared error over {settings['episodes']} test tasks of 100 points each; {about}.",
        "Settings of the MAML paper: one inner step of 0.01 in training, 25 tasks, Adam at 0.001; * others, below.",
        "",
        "| member | points | " + " | ".join(f"{s} steps" if s != 1 else "1 step" for s in SHOWN) + " |",
        "|---" * (len(SHOWN) + 2) + "|",
    ]
    for row in sorted(results["rows"], key=lambda row: row["shots"]):
        name = f"`{row['member']}`" + (" *" if "own" in row else "")
        name += f", rate {row['inner_lr']}" if "inner_lr" in row else ""
        cells = [f"{row['mse'][s]:.3f} ± {row['ci95'][s]:.3f}" for s in SHOWN]
        lines.append(f"| {name} | {row['shots']} | " + " | ".join(cells) + " |")
    lines.append("")
    for member, own in {row["member"]: row["own"] for row in results["rows"] if "own" in row}.items():
        said = [f"{k} {' '.join(v) if isinstance(v, (list, tuple)) else v}" for k, v in own["settings"].items()]
        said += [f"{own['points']} points of each task in training"] if "points" in own else []
        lines.append(f"- * `{member}`: {', '.join(said)} ({own['source']}).")
    return "\n".join([*lines, *(f"- left out: {reason}." for reason in results["skipped"].values())]) + "\n"


def figure(rows: Sequence[Row]) -> Figure:
    """A panel for each number of points, a line for each member; a line that leaves at the top diverges."""
    shots = sorted({row["shots"] for row in rows})
    names = list(dict.fromkeys(row["member"] for row in rows))
    colours = (BLUE, VERMILLION, GREEN, PURPLE, SKY, BLACK)
    looks = {n: (colours[i % 6], ("-", "--", ":", "-.")[i // 6 % 4], "osD^vP*X"[i % 8]) for i, n in enumerate(names)}
    looks[PRE_TRAINING] = (GREY, "--", "")
    drawn = Figure(figsize=(5.0 * len(shots) + 1.2, 4.2), layout="constrained")
    named: dict[str, Any] = {}
    for panel, k in zip(drawn.subplots(1, len(shots), squeeze=False)[0], shots, strict=True):
        for row in (row for row in rows if row["shots"] == k):
            colour, line, marker = looks[row["member"]]
            panel.errorbar(
                range(len(row["mse"])), row["mse"], row["ci95"],
                color=colour, ls=line, marker=marker, ms=4, lw=1.2, elinewidth=0.6, label=row["member"],
            )  # fmt: skip
        panel.set_yscale("log")
        least = min(value for row in rows for value in row["mse"] if math.isfinite(value))
        panel.set_ylim(0.8 * least, 2 * max(row["mse"][0] for row in rows))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"{k} points", fontsize=10)
        decorate(panel, "inner steps at test", "mean squared error", legend=False)
        named |= {label: line for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    drawn.legend([named[name] for name in names], names, loc="outside right upper", frameon=False)
    return drawn
