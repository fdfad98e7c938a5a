"""What an export costs and is worth beside the classifier: accuracy, agreement, bytes, seconds."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaft.after.pictures import Pictures
from metaft.finetune.classifier import Predictor
from metaft.finetune.scores import scores
from metaft.metrics import mean_ci95
from metaft.support.tables import aligned

ROUNDS, SECONDS = (3, 101), 4.0
"""At least and at most how often each latency is taken, and how long at most."""

MANY = 64


def rows_of(
    models: Mapping[str, tuple[Predictor, Path]],
    pictures: Pictures,
    timed: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One for each model, the first of which the others are compared with: "model", "bytes", "sha256", "agreement" (the
    share of pictures with the same label), "accuracy" and "macro_f1" (or "rmse" of numbers) where there are labels,
    "change" of the accuracy with its paired 95 % half-width, and under "seconds" quartiles for one picture and for
    64, measured now unless they are `timed`, as `latencies` gives them."""
    names = [*models]
    logits = {name: model.logits(pictures.test) for name, (model, _) in models.items()}
    timed = latencies([model for model, _ in models.values()], pictures) if timed is None else timed
    rows = []
    for name, (model, path) in models.items():
        row: dict[str, Any] = {
            "model": name,
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
            "pictures": len(pictures.test),
        }
        row |= _figures(model, logits[name], logits[names[0]], pictures.labels)
        rows.append(row | {"seconds": timed[names.index(name)]})
    return rows


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _figures(model: Predictor, found: Tensor, original: Tensor, labels: Tensor | None) -> dict[str, Any]:
    if not model.class_names:
        row: dict[str, Any] = {"off": float((found - original).abs().max())}
        return row if labels is None else {**row, "rmse": float((found[:, 0].double() - labels).square().mean().sqrt())}
    row = {"agreement": float((found.argmax(1) == original.argmax(1)).double().mean())}
    if labels is None:
        return row
    figures = scores(labels.numpy(), found.softmax(-1).float().numpy(), model.class_names)
    right, before = (each.argmax(1) == labels for each in (found, original))
    change, ci95 = mean_ci95(right.double() - before.double())
    row |= {name: figures[name] for name in ("accuracy", "macro_f1")}
    return {**row, "change": float(change), "change_ci95": float(ci95)}


def latencies(models: Sequence[Predictor], pictures: Pictures) -> list[dict[str, Any]]:
    """Seconds of one picture and of `MANY`, raw to logits, in turns, so that what else the machine does meets all."""
    many = pictures.test[torch.arange(MANY) % len(pictures.test)]
    taken: list[dict[str, list[float]]] = [{"1": [], str(MANY): []} for _ in models]
    for key, raw in (("1", many[:1]), (str(MANY), many)):
        for model in models:  # once for what is made at the first call
            model.logits(raw)
        began = time.perf_counter()
        for number in range(ROUNDS[1]):
            if number >= ROUNDS[0] and time.perf_counter() - began > SECONDS * len(models):
                break
            for model, of in zip(models, taken, strict=True):
                start = time.perf_counter()
                model.logits(raw)
                of[key].append(time.perf_counter() - start)
    return [{key: _quartiles(values) for key, values in of.items()} for of in taken]


def _quartiles(values: Sequence[float]) -> dict[str, Any]:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(median), "quartiles": [float(low), float(high)], "n": len(values)}


def text(rows: Sequence[Mapping[str, Any]], *, seen: bool, threads: int) -> str:
    """A table for people; of what was compressed (see `metaft.after.shrunk`) with what there is more of it."""
    smaller = "parameters" in rows[0]
    numbers = "off" in rows[0]
    known = ("rmse" if numbers else "accuracy") in rows[0]
    head = ["model", "MB", *(["parameters", "MFLOPs"] if smaller else [])]
    for count in rows[0]["seconds"]:
        head += [f"ms for {count} (quartiles)", *([f"original's for {count}"] if smaller else [])]
    head += ["of its time", "validation", "points lost"] if smaller else []
    head += ["off by"] if numbers else ["same label"]
    head += (["RMSE"] if numbers else ["accuracy", "change", "macro F1"]) if known else []
    lines = [head]
    for row in rows:
        cells = [row["model"], f"{row['bytes'] / 1e6:.2f}"]
        cells += [f"{row['parameters']:,}", f"{row['flops'] / 1e6:.1f}"] if smaller else []
        for count, of in row["seconds"].items():
            low, high = (1000 * value for value in of["quartiles"])
            cells.append(f"{1000 * of['median']:.1f} ({low:.1f}-{high:.1f})")
            cells += [f"{1000 * row['beside'][count]['median']:.1f}"] if smaller else []
        if smaller:
            validation = row["validation"]
            lost = "" if row is rows[0] else f"{validation['points']:.1f}"
            cells += [f"{row['latency']:.2f}", f"{100 * validation['accuracy']:.1f} %", lost]
        cells.append(f"{row['off']:.2g}" if numbers else f"{100 * row['agreement']:.1f} %")
        if known and numbers:
            cells.append(f"{row['rmse']:.4g}")
        elif known:
            change = "" if row is rows[0] else f"{100 * row['change']:+.1f} ± {100 * row['change_ci95']:.1f}"
            cells += [f"{100 * row['accuracy']:.1f} %", change, f"{row['macro_f1']:.3f}"]
        lines.append(cells)
    which = "pictures that it was trained on (there is no test part)" if seen else "pictures that it has not seen"
    note = f"on {rows[0]['pictures']} {which if known else 'pictures'}, {threads} thread{'' if threads == 1 else 's'}"
    turns = ["the original's time is that in turns with each of them"] if smaller else []
    return "\n".join([aligned(lines), note, *turns])
