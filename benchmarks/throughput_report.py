"""The table and the chart of `benchmarks/throughput.py`, from the rows of its JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaft.plots.style import BLUE, GREY, SKY, decorate, save

Row = Mapping[str, Any]
"""One workload, order and allocator, as in the JSON."""

QUIET = 0.1
"""Cores busy with other work, up to which a row may be quoted. Threads that wait for each other within an operation
suffer far more from such work than threads that do not."""

_WIDTHS = (9, 18, 7, 10, 10, 10, 10, 10, 16)

DIGITS = 3.0
"""How many times the libraries' error a float32 meta-gradient may have before its row is marked."""

_NAMES = {
    "metaft-bf16": "metaft, bf16",
    "metaft-end-to-end": "metaft, end to end",
    "plain": "plain loop",
    "torchopt": "TorchOpt",
}


def table(row: Row, threads: int) -> str:
    """One row as people read it; a system without figures is named with the reason."""
    what = f"{row['workload']}, {row['order']} order, {row['allocator']} allocator, {threads} threads"
    heads = ("ms/step", "quartiles", "steps", "tasks/s", "peak MiB", "MiB/task", "float64", "float32", "against metaft")
    lines = [
        "",
        f"{what}, {row['protocol']['meta_batch']} tasks per step",
        f"  {'system':<19}" + "".join(f"{head:>{width}}" for head, width in zip(heads, _WIDTHS, strict=True)),
    ]
    metaft = row["systems"]["metaft"]["ms"]["median"]
    for name, system in row["systems"].items():
        label = _label(name)
        if system["status"] != "timed":
            reason = system["reason"]
            lines.append(f"  {label:<19} {system['status']}: {reason}")
            continue
        ms = system["ms"]
        cells = (
            f"{ms['median']:.1f}",
            f"{ms['q1']:.1f} - {ms['q3']:.1f}",
            f"{system['n']}",
            f"{system['tasks_per_second']:.1f}",
            "-" if system["peak_mib"] is None else f"{system['peak_mib']:.0f}",
            "-" if system["growth_mib_per_task"] is None else f"{system['growth_mib_per_task']:.1f}",
            *(_error(system.get(f"{dtype}_difference")) for dtype in ("float64", "float32")),
            f"{ms['median'] / metaft:.2f}x",
        )
        lines.append(f"  {label:<19}" + "".join(f"{c:>{width}}" for c, width in zip(cells, _WIDTHS, strict=True)))
        if "share_of_sampling" in system:
            lines.append(f"  {'':<19} sampling {system['dataset']}: {100 * system['share_of_sampling']:.1f} % of it")
    if row["ratio_to_best_peer"] is None:
        lines.append("  no other library was timed")
    else:
        lines.append(
            f"  the fastest other library ({_label(row['best_peer'])}) takes {row['ratio_to_best_peer']:.2f}x as long"
        )
    lines += _digits(row)
    busy = row["cores_busy_elsewhere"]
    if busy is not None and busy > QUIET:
        lines.append(
            f"  NOT QUIET: other work kept {busy:.1f} cores busy meanwhile; no ratio of this row may be quoted"
        )
    return "\n".join(lines)


def _error(found: float | None) -> str:
    return "-" if found is None else f"{found:.1e}"


def _digits(row: Row) -> list[str]:
    """What float64 and float32 stand for, and a mark where metaft has lost digits that the libraries have kept."""
    errors = {name: s["float32_difference"] for name, s in row["systems"].items() if "float32_difference" in s}
    others = [error for name, error in errors.items() if not name.startswith("metaft")]
    lines = ["  float64: difference to the plain loop's meta-gradient; float32: to the same, of the timed one"]
    if others and "metaft" in errors and not errors["metaft"] <= DIGITS * statistics.median(others):
        lines.append(
            f"  FEWER DIGITS: metaft's float32 error is {errors['metaft'] / statistics.median(others):.1f} times the "
            f"others' (median {statistics.median(others):.1e}); this row's speed is paid for with digits"
        )
    return lines


def closing(results: Mapping[str, Any]) -> str:
    """How far the gradients were apart, and on which machine this was."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in results["rows"]:
        for name, system in row["systems"].items():
            if "float64_difference" in system:
                found.setdefault(name, []).append((system["float64_difference"], system["float32_difference"]))
    apart = ", ".join(
        f"{_label(name)} {max(a for a, _ in pairs):.1e} ({max(b for _, b in pairs):.1e})"
        for name, pairs in found.items()
    )
    machine, settings = results["machine"], results["settings"]
    changed = " and changes since" if results["changed_since_commit"] else ""
    where = machine["cpu"] if settings["device"] == "cpu" else f"{machine['gpu']}, {machine['cpu']}"
    return (
        f"\nlargest difference of meta-gradients from the plain loop's in float64, and in float32 from that: {apart}\n"
        f"{where}, {machine['cores']} cores, torch {machine['torch']}, commit {results['commit']}{changed}"
    )


def chart(path: Path, results: Mapping[str, Any]) -> None:
    """Bars of the median milliseconds per meta-step with their quartiles, one panel per row."""
    save(figure(results), path)


def figure(results: Mapping[str, Any]) -> Figure:
    rows = results["rows"]
    columns = min(len(rows), 3)
    lines = math.ceil(len(rows) / columns)
    drawn = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    panels = drawn.subplots(lines, columns, squeeze=False).ravel()
    for axes, row in zip(panels, rows, strict=False):
        _panel(axes, row)
    for axes in panels[len(rows) :]:
        axes.set_axis_off()
    machine, settings = results["machine"], results["settings"]
    where = machine["cpu"] if settings["device"] == "cpu" else machine["gpu"]
    drawn.suptitle(
        f"One MAML meta-step: median and quartiles. {where}, {settings['threads']} threads, torch {machine['torch']}",
        fontsize=9,
    )
    return drawn


def _label(system: str) -> str:
    return _NAMES.get(system, system)


def _short(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _panel(axes: Axes, row: Row) -> None:
    systems = row["systems"]
    top = max(system["ms"]["q3"] for system in systems.values() if "ms" in system)
    for x, (name, system) in enumerate(systems.items()):
        if "ms" not in system:
            axes.text(x, 0.02 * top, system["status"], rotation=90, ha="center", va="bottom", fontsize=8, color=GREY)
            continue
        ms = system["ms"]
        whiskers = [[ms["median"] - ms["q1"]], [ms["q3"] - ms["median"]]]
        colour = BLUE if name.startswith("metaft") else GREY if name == "plain" else SKY
        axes.bar(x, ms["median"], 0.7, color=colour, yerr=whiskers, ecolor="black", capsize=3)
        axes.text(x, ms["q3"] + 0.02 * top, _short(ms["median"]), ha="center", va="bottom", fontsize=8)
    axes.set_ylim(0, 1.15 * top)
    axes.set_xlim(-0.6, len(systems) - 0.4)
    decorate(axes, "", "ms per meta-step", legend=False)
    names = [_label(name).replace(", ", ",\n") for name in systems]
    axes.set_xticks(range(len(systems)), names, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
    ratio = row["ratio_to_best_peer"]
    said = "" if ratio is None else f"\nfastest other library: {ratio:.2f}x metaft's time"
    axes.set_title(f"{row['workload']}, {row['order']} order, {row['allocator']} allocator{said}", fontsize=8)
