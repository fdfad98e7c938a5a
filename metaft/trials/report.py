"""What came of a search: its result, its table and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaft._version import __version__
from metaft.after.comparing import Figure
from metaft.support import tables
from metaft.support.pictures import drawn
from metaft.support.places import shown
from metaft.support.progress import duration
from metaft.trials.journal import Told
from metaft.trials.over import higher_is_better
from metaft.trials.searching import Search
from metaft.trials.space import Range

SHOWN = 40
"""Trials in the table on a terminal; of more the best."""


def figure_words(measure: str, value: float | None) -> str:
    """A figure as people read it.

    >>> figure_words("accuracy", 0.925), figure_words("mse", 0.0123456), figure_words("mse", None)
    ('92.50 %', '0.01235', 'failed')
    """
    if value is None:
        return "failed"
    return f"{100 * value:.2f} %" if measure == "accuracy" else f"{value:.4g}"


def setting_words(value: Any) -> str:
    """A setting as people read it.

    >>> setting_words(0.00031847), setting_words(()), setting_words(("mixup", "cutmix")), setting_words(True)
    ('0.0003185', 'none', 'mixup cutmix', 'True')
    """
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else shown(value) if isinstance(value, str) else str(value)


def values_words(values: Mapping[str, Any]) -> str:
    """All searched settings of a trial in a line."""
    return ", ".join(f"{name} {setting_words(value)}" for name, value in values.items())


def table(search: Search) -> list[list[str]]:
    """The head, and a line for each trial: the best first, those that failed last."""
    journal, order = search.journal, search.order()
    searched = [dimension.name for dimension in search.space.searched]
    by_loss = any(row["loss"] is not None for row in journal.told.values())
    lines = [["trial", search.measure, *(["loss"] if by_loss else []), "time", *searched, ""]]
    for number in (*order, *(n for n in journal.told if journal.told[n]["value"] is None)):
        row, values = journal.told[number], journal.asked[number]
        loss = [] if not by_loss else [""] if row["loss"] is None else [f"{row['loss']:.4g}"]
        time = "" if row["seconds"] is None else duration(row["seconds"])
        settings = [setting_words(values[name]) for name in searched]
        figure = figure_words(search.measure, row["value"])
        lines.append([str(number), figure, *loss, time, *settings, row.get("message", "")[:100]])
    return lines


def result_of(search: Search, tested: Figure) -> dict[str, Any]:
    """What `result.json` holds. The best trial's figure of the test is its only one: nothing was chosen on it."""
    journal, best = search.journal, search.order()[0]
    row = journal.told[best]
    return {
        "command": "search",
        "version": __version__,
        "over": search.space.command,
        **{k: v for k, v in journal.search.items() if k not in ("space", "trials", "chosen")},
        "space": search.space.plain(),
        "trials": [
            {"number": n, "values": journal.asked[n], **{k: v for k, v in row.items() if k != "told"}}
            for n, row in sorted(journal.told.items())
        ],
        "failed": sum(row["value"] is None for row in journal.told.values()),
        "best": {
            "number": best,
            "folder": str(search.folder(best).path),
            "values": journal.asked[best],
            "validation": {search.measure: row["value"], "loss": row["loss"]},
            "test": {search.measure: tested.value, "ci95": tested.ci95},
        },
        "seconds": max(row["at"] for row in journal.told.values()),
    }


def text(search: Search, result: Mapping[str, Any]) -> str:
    """The table, and what the best trial came to, in plain words."""
    lines, measure, best = table(search), search.measure, result["best"]
    count, failed = len(lines) - 1, result["failed"]
    said = [tables.aligned(lines[: SHOWN + 1])]
    said += [f"... and {count - SHOWN} more, see result.json"] if count > SHOWN else []
    loss = best["validation"]["loss"]
    ties = [row["loss"] for row in search.journal.told.values() if row["value"] == best["validation"][measure]]
    how = "the lowest loss of those" if loss is not None and ties.count(loss) == 1 else "the first of those"
    tied = "" if len(ties) == 1 else f", as {len(ties) - 1} more; it is {how}"
    of = f"the best of {count - failed} on validation, hence partly the luckiest{tied}"
    figure = figure_words(measure, best["validation"][measure])
    said += ["", f"best:     trial {best['number']}: {values_words(best['values'])}"]
    said += [f"validation {measure} {figure}, {of}" + (f"; {failed} failed" if failed else "")]
    ci95 = best["test"]["ci95"]
    around = "" if ci95 is None else f" ± {figure_words(measure, ci95)} (95 % interval)"
    test = f"{figure_words(measure, best['test'][measure])}{around}"
    said += [f"test {measure} {test}, of this trial alone; nothing was chosen on it"]
    return "\n".join([*said, *(f"note: {note}" for note in search.journal.search["notes"])])


def points(search: Search) -> list[dict[str, Any]]:
    """Of each trial in the order in which they ended: "number", "value" (None: failed), "at" (seconds), "values"."""
    told, asked = search.journal.told, search.journal.asked
    return [
        {"number": n, "value": row["value"], "at": row["at"], "values": asked[n]}
        for n, row in sorted(told.items(), key=lambda item: item[1]["at"])
    ]


def draw_pictures(search: Search) -> list[Path]:
    """The files that could be drawn."""
    from metaft.plots.search import history, settings

    plots, rows = search.path / "plots", points(search)
    higher = higher_is_better(search.measure)
    logs = {d.name: isinstance(d, Range) and d.log for d in search.space.searched}
    first, second = plots / "history.png", plots / "settings.png"
    return drawn(
        {
            first: lambda: history(first, rows, search.measure, higher=higher),
            second: lambda: settings(second, _shown(rows), search.measure, logs, best=search.order()[0]),
        }
    )


def _shown(rows: Sequence[Told]) -> list[dict[str, Any]]:
    """The rows with settings that are no numbers as words."""
    return [
        {
            **row,
            "values": {
                k: v if isinstance(v, (int, float)) and not isinstance(v, bool) else setting_words(v)
                for k, v in row["values"].items()
            },
        }
        for row in rows
    ]
