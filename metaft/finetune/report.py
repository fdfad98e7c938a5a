"""What an adapt run shows: result.json's figures as text, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metaft.finetune.classifier import Classifier
from metaft.finetune.examples import Part
from metaft.finetune.target import Target
from metaft.runs.folder import RunFolder, read_rows
from metaft.support.names import short_names
from metaft.support.paths import shown
from metaft.support.pictures import drawn, plotting
from metaft.support.progress import duration

_TABLE = 30  # classes that are listed; of more, only the worst


def text(result: Mapping[str, Any]) -> str:
    """The report in plain words, several lines."""
    r = result
    what = f"{shown(r['data'])} · {len(r['classes'])} classes · {r['train_images']} images to train"
    val = f", {r['val_images']} to validate" if r["val_images"] else ""
    if r["method"] == "inner":
        how = f"adapted by {r['inner_steps']} steps of the run's own inner loop"
    else:
        how = f"fine-tuned by Adam at {r['lr']:g}, {r['head']} head, {r['epochs_run']} of at most {r['epochs']} epochs"
    lines = [f"{what}{val}, {r['test_images']} to test", f"{how}, from {_init(r)}, in {duration(r['seconds'])}"]
    lines += [f"note: {note}" for note in r["notes"]]
    lines += ["", *_figures(r), ""]
    lines += _table(r["per_class"], _mistaken(short_names(r["classes"]), r["confusion"]))
    return "\n".join(lines)


def plainly(result: Mapping[str, Any]) -> str:
    """What was gained, in a sentence or two."""
    shots = result["train_images_per_class"]
    images = f"{shots} image{'s' if shots != 1 else ''} per class" if shots else f"{result['train_images']} images"
    images += " to train on"
    if result["val_images"]:
        val = result["val_images_per_class"]
        images += f" and {val} to validate" if shots and val else f" and {result['val_images']} in all to validate"
    if result["scratch"] is None:
        return f"With {images}, {_of_100(result['accuracy'])} of 100 new images get the right label."
    both = [result["accuracy"], result["scratch"]["accuracy"]]
    gain = result["gain"]["accuracy"]
    draws = result["gain"]["draws"]
    over = ""
    if draws > 1:
        both = [result["mean"]["accuracy"], result["mean"]["scratch_accuracy"]]
        over = f" (mean of {draws} draws, ± {100 * result['gain']['ci95']:.1f})"
    change = "gained" if gain >= 0 else "lost"
    return (
        f"With {images}, {_of_100(both[0])} of 100 new images get the right label after starting from the "
        f"{_label(result)} initialisation, and {_of_100(both[1])} of 100 after the same training from a random one: "
        f"{abs(100 * gain):.1f} points {change}{over}."
    )


def _label(r: Mapping[str, Any]) -> str:
    return "meta-learned" if r["init_about"] else "handed over"


def _of_100(share: float) -> str:
    return f"{100 * share:.0f}"


def _init(r: Mapping[str, Any]) -> str:
    about = r["init_about"]
    if about:
        return f"{shown(r['init'])} ({about['algorithm']} on {shown(about['dataset'])})"
    return "a random initialisation" if r["scratch"] is None else "the values that the module was handed over with"


def _figures(r: Mapping[str, Any]) -> list[str]:
    """Accuracy and macro figures of the starts, and the gain."""
    names = ("accuracy", "macro_precision", "macro_recall", "macro_f1")
    heads = ("accuracy", "macro precision", "macro recall", "macro F1")
    lines = [" " * 24 + "".join(f"{name:>17}" for name in heads) + "   test, %"]
    first = "random start" if r["scratch"] is None else f"{_label(r)} start"
    for label, row in ((first, r), ("random start", r["scratch"])):
        if row is not None:
            lines.append(f"  {label:<22}" + "".join(f"{100 * row[name]:>17.2f}" for name in names))
    if r["scratch"] is not None:
        gain = "".join(f"{100 * (r[name] - r['scratch'][name]):>+17.2f}" for name in names)
        lines.append(f"  {'gain':<22}{gain}   points")
    mean = r["mean"]
    if mean["draws"] > 1:
        lines.append("")
        of = f"mean ± 95 % interval (Student's t) of {mean['draws']} draws, seeds {r['seed']} to {r['last_seed']}"
        lines.append(f"accuracy, {of}; the figures above and below are of the first")
        lines.append(f"  {first:<22}{_ci(mean['accuracy'], mean['accuracy_ci95'])} %")
        if r["scratch"] is not None:
            lines.append(f"  {'random start':<22}{_ci(mean['scratch_accuracy'], mean['scratch_accuracy_ci95'])} %")
            lines.append(f"  {'paired gain':<22}{_ci(r['gain']['accuracy'], r['gain']['ci95'])} points")
    return lines


def _ci(value: float, ci95: float) -> str:
    return f"{100 * value:.2f} ± {100 * ci95:.2f}"


def _table(rows: Sequence[Mapping[str, Any]], mistaken: Sequence[str]) -> list[str]:
    """A line per class, of many classes the worst by F1."""
    order = sorted(range(len(rows)), key=lambda i: rows[i]["f1"]) if len(rows) > _TABLE else range(len(rows))
    shown = list(order)[:_TABLE]
    names = short_names([row["class"] for row in rows])
    width = min(max(len(names[i]) for i in shown), 48)
    title = "class" if len(shown) == len(rows) else f"class (the {_TABLE} worst of {len(rows)})"
    width = max(width, len(title))
    lines = [f"{title:<{width}}  images  precision  recall      F1   most often taken for"]
    for i in shown:
        row = rows[i]
        figures = f"{row['test_images']:>6}{row['precision']:>11.3f}{row['recall']:>8.3f}{row['f1']:>8.3f}"
        lines.append(f"{names[i][-width:]:<{width}}  {figures}   {mistaken[i]}".rstrip())
    return lines


def _mistaken(classes: Sequence[str], confusion: Sequence[Sequence[int]]) -> list[str]:
    """For each class the other one that its images are most often given, with how many."""
    found = []
    for true, row in enumerate(confusion):
        wrong = [(n, -other) for other, n in enumerate(row) if other != true]
        n, other = max(wrong)
        found.append(f"{classes[-other]} ({n})" if n else "")
    return found


def draw_pictures(
    run: RunFolder, result: Mapping[str, Any], classifier: Classifier, target: Target, test: torch.Tensor
) -> list[Path]:
    """Confusion matrix, learning curves of the first draw, and the most confident mistakes; returns the files that
    could be drawn.

    Raises CheckpointError where metrics.jsonl is damaged.
    """
    rows = [row for row in read_rows(run.metrics) if row["draw"] == 0]
    names = list(dict.fromkeys(row["start"] for row in rows))
    curves = {name: [row for row in rows if row["start"] == name] for name in names}
    kept = {name: (result if name == names[0] else result["scratch"])["kept_epoch"] for name in names}
    confusion, learning, mistakes = (run.plots / f"{stem}.png" for stem in ("confusion", "learning", "mistakes"))
    return drawn(
        {
            confusion: lambda: plotting().confusion(confusion, result["confusion"], target.class_names),
            learning: lambda: _draw_learning(learning, result, curves, kept),
            mistakes: lambda: _draw_mistakes(mistakes, classifier, target, test),
        }
    )


def _draw_learning(path: Path, result: Mapping[str, Any], curves: Mapping[str, Any], kept: Mapping[str, int]) -> None:
    steps = "inner step" if result["method"] == "inner" else "epoch"
    plotting().learning(path, curves, x_label=steps, kept=kept)


def _draw_mistakes(path: Path, classifier: Classifier, target: Target, test: torch.Tensor) -> None:
    top, labels = classifier.probabilities(Part(target.examples, test)).max(-1), target.labels[test]
    wrong = (top.indices != labels).nonzero().flatten()  # their pictures alone are needed
    plotting().mistakes(
        path, target.examples[test[wrong]], labels[wrong], top.indices[wrong], top.values[wrong], target.class_names
    )
