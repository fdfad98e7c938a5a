"""What an adapt run shows: result.json's figures as text, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

import torch

from metaft.finetune import extras, soup
from metaft.finetune.classifier import Classifier
from metaft.finetune.contenders import ALONE
from metaft.finetune.examples import Part
from metaft.finetune.numbers import FIGURES
from metaft.finetune.range_test import said_of
from metaft.finetune.results import of_targets
from metaft.finetune.robust import under_attack
from metaft.finetune.words import called
from metaft.runs.folder import RunFolder, read_rows
from metaft.support.names import short_names
from metaft.support.pictures import drawn, plotting
from metaft.support.places import shown
from metaft.support.progress import duration
from metaft.targets import Target

_TABLE = 30  # classes that are listed; of more, only the worst
_STAYS = 4  # weights that a strategy had to leave
_SUSPECTS = 10  # images whose labels look wrong


def text(result: Mapping[str, Any]) -> str:
    """The report in plain words, several lines."""
    r = result
    what = f"{shown(r['data'])} · {kind(r['classes'])} · {r['train_images']} images to train"
    val = f", {r['val_images']} to validate" if r["val_images"] else ""
    lines = [f"{what}{val}, {r['test_images']} to test", f"{_how(r)}, from {_init(r)}, in {duration(r['seconds'])}"]
    lines += what_trained(r["starts"][0].get("trained"))
    lines += _further(r)
    lines += [] if "range_test" not in r else [said_of(r["range_test"])]
    if "soup" in (first := r["starts"][0]):
        lines.append(soup.said_of(first["soup"], first["mean"]["accuracy"]))
    lines += _ranked(r.get("ranked"))
    lines += _choice(r["starts"][0].get("chosen"), prudent="auto" in r)
    lines += _other_choices(r.get("choices", ()))
    lines += [f"note: {note}" for note in r["notes"]]
    lines += [f"note: {_row(start)}: {warning}" for start in r["starts"] for warning in start.get("warnings", ())]
    if not r["classes"]:
        return "\n".join([*lines, "", *_number_figures(r)])
    lines += ["", *_figures(r), ""]
    lines += under_attack({_row(start): start["mean"] for start in r["starts"]}, _wide(r), _ci)
    lines += _suspects(r["suspects"])
    lines += _table(r["per_class"], _mistaken(short_names(r["classes"]), r["confusion"]))
    return "\n".join(lines)


def _further(r: Mapping[str, Any]) -> list[str]:
    """What came out for each target of several; the first one's figures are those of the whole report."""
    if not r.get("also"):
        return []
    rows, first = of_targets(r), r["starts"][0]
    weights = first.get("trained", {}).get("log_variances")
    learned = (
        "" if weights is None else f", losses weighted at the end by {', '.join(f'{exp(-s):.3g}' for s in weights)}"
    )
    lines = [f"{len(rows)} targets on one backbone ({r['tasks']}{learned}), beside a model of each alone:"]
    for of in rows:
        both = " and ".join(
            f"{_ci_if_any(each['mean']['accuracy'], each['mean']['ci95'])} % {how}"
            for each, how in ((of.together, "together"), (of.alone, "alone"))
        )
        lines.append(
            f"  {shown(of.data)} ({kind(of.classes)}, {of.file}): right {both}, "
            f"gain {_ci_if_any(of.gain['mean'], of.gain['ci95'])} points"
        )
    return lines


def kind(classes: Sequence[str]) -> str:
    """What labels are, in a line's words."""
    return f"{len(classes)} classes" if classes else "numbers"


def _how(r: Mapping[str, Any]) -> str:
    """How the first start was fine-tuned, and on images of what size."""
    shape = r["starts"][0].get("shape", ())
    size = f" on images of {shape[2]}x{shape[1]}" if len(shape) == 3 else ""
    if r["method"] == "inner":
        return f"adapted by {r['inner_steps']} steps of the run's own inner loop{size}"
    chosen = r["starts"][0].get("chosen")
    settled = {**r, **(chosen or {})}
    strategy = f"{chosen['strategy']}, chosen" if chosen else r["strategy"]
    how = f"fine-tuned ({strategy}){size} by {r['optimizer']} at {settled['lr']:g}, {r['head']} head"
    if settled["schedule"] not in (None, "constant"):
        how += f", {settled['schedule']} rate"
    if settled["clip_norm"] is not None:
        how += f", gradients clipped to {settled['clip_norm']:g}"
    if r["augment"] != "none":
        how += f", {r['augment']} augmentation"
    if r["balance"] != "none":
        how += ", classes weighted alike"
    if r["dropout"]:
        how += f", dropout of {r['dropout']:g}"
    if r["ema"] is not None:
        how += f", parameters averaged with decay {r['ema']:g}"
    if r["label_smoothing"]:
        how += f", labels smoothed by {r['label_smoothing']:g}"
    how += "".join(f", {extras.named(text).said} ({text})" for text in r["extra"])
    most = "" if chosen else f"of at most {r['epochs']} "
    of = "" if r["accumulate"] == 1 else f", {r['accumulate']} of them in a step"
    return f"{how}, batches of {r['batch_size']}{of}, {r['epochs_run']} {most}epochs"


def _share(percent: float) -> str:
    """Two digits, or all that a larger one has before its point."""
    return f"{percent:.2g}" if percent < 99.5 else f"{percent:.0f}"


def what_trained(trained: Mapping[str, Any] | None) -> list[str]:
    """What of the first start moved; runs of earlier versions do not say."""
    if not trained:
        return []
    numbers, of, stays = trained["numbers"], trained["of"], trained["stays"]
    what = "the head alone"
    if numbers == of:
        what = f"the head, and all {of:,} numbers of the backbone"
    elif numbers:
        what = f"the head, and {numbers:,} numbers in the backbone, which has {of:,} ({_share(100 * numbers / of)} %)"
    if stays:
        names = ", ".join(stays[:_STAYS]) + (f" and {len(stays) - _STAYS} more" if len(stays) > _STAYS else "")
        what += f"; {len(stays)} of its weights could not take part: {names}"
    return [f"trained: {what}"]


def _ranked(rows: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """How `--auto` came to the start, where it did."""
    if not rows:
        return []
    by = "LogME" if rows[0]["probe"] is None else "a probe in 5 folds"
    figures = (f"{r['logme']:.3f}" if r["probe"] is None else f"{100 * r['probe']:.1f} %" for r in rows)
    each = ", ".join(f"{row['shown']} {figure}" for row, figure in zip(rows, figures, strict=True))
    return [f"start: {rows[0]['shown']}, the best of {len(rows)} by {by} on the training images ({each})"]


def _choice(chosen: Mapping[str, Any] | None, *, prudent: bool = False) -> list[str]:
    """How `--strategy chosen` or `--auto` (`prudent`) came to the first fit, where it did."""
    if chosen is None:
        return []
    what = f"chosen: {chosen['strategy']} at {chosen['lr']:g}, {chosen['epochs']} epochs"
    if not chosen["table"]:
        return [f"{what}, since a class has too few images to choose by"]
    rows = map(candidate, chosen["table"])
    rule = ", the first that is within a standard error of the best" if prudent else ""
    return [f"{what}, by 5-fold cross-validation of the training images{rule} ({'; '.join(rows)})"]


def _other_choices(choices: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was chosen for other draws, folds and starts than the first, each by its own images."""
    if len(choices) < 2:
        return []
    said = []
    for made in choices[1:]:
        where = f"draw {made['draw'] + 1}"
        where = where if "fold" not in made else f"fold {made['fold'] + 1} of {where}"
        late = sum("late" in row for row in made["table"])
        lacking = f" (no time for {late} others)" if late else ""
        named = f"{shown(made['start'])}, {where}"
        said.append(f"{named}: {made['strategy']} at {made['lr']:g}, {made['epochs']} epochs{lacking}")
    return [f"chosen for others: {'; '.join(said)}"]


def candidate(row: Mapping[str, Any]) -> str:
    """A row of what there was to choose from."""
    figure = "no time" if row.get("late") else "diverged"
    if row["loss"] is not None:
        figure = f"{100 * row['accuracy']:.1f} %" if "accuracy" in row else f"loss {row['loss']:.3f}"
    return f"{row['strategy']} at {row['lr']:g}, {row['epochs']} epochs: {figure}"


def _suspects(suspects: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """The training images whose labels look wrong, the surest of many."""
    if not suspects:
        return []
    lines = [f"training labels that look wrong to a probe that has not seen them ({len(suspects)}):"]
    lines += [
        f"  {s['file']}: {s['label']}, looks like {s['looks_like']} ({100 * s['probability']:.0f} %)"
        for s in suspects[:_SUSPECTS]
    ]
    if len(suspects) > _SUSPECTS:
        lines.append(f"  and {len(suspects) - _SUSPECTS} more, see suspects in result.json")
    return [*lines, ""]


def _number_figures(r: Mapping[str, Any]) -> list[str]:
    """The figures of the starts where labels are numbers, and by how much the first one's errors are less."""
    wide = _wide(r)
    lines = [" " * (2 + wide) + "".join(f"{name:>12}" for name in ("MAE", "RMSE", "R²")) + "   test"]
    for start in r["starts"]:
        shown = "".join(f"{'-':>12}" if start[name] is None else f"{start[name]:>12.4g}" for name in FIGURES)
        lines += [f"  {_row(start):<{wide}}{shown}"]
    return lines + _means(r, "rmse", "RMSE", "the figures above are", lambda mean, ci95: f"{mean:.4g} ± {ci95:.3g}")


def _row(start: Mapping[str, Any]) -> str:
    """What a start's row of figures is called."""
    return start["name"] if start["name"] in ("probe", ALONE) else f"{called(start)} start"


def _init(r: Mapping[str, Any]) -> str:
    about = r["init_about"]
    if "weights" in about:
        return shown(r["init"])
    if about:
        return f"{shown(r['init'])} ({about['algorithm']} on {shown(about['dataset'])})"
    return (
        "a random initialisation"
        if r["starts"][0]["name"] == "random"
        else "the values that the module was handed over with"
    )


def _figures(r: Mapping[str, Any]) -> list[str]:
    """The figures of the starts, and what the first gained over each of the others."""
    names = ("accuracy", "balanced_accuracy", "macro_precision", "macro_recall", "macro_f1", "calibration_error")
    heads = ("accuracy", "balanced", "macro precision", "macro recall", "macro F1", "calibration err.")
    first, *others = r["starts"]
    wide = _wide(r)
    lines = [" " * (2 + wide) + "".join(f"{name:>17}" for name in heads) + "   test, %"]
    for start in r["starts"]:
        figures = "".join(f"{100 * start[name]:>17.2f}" for name in names)
        lines += [f"  {_row(start):<{wide}}{figures}"]
    for start in others:
        # An error is no gain.
        gain = "".join(f"{100 * (first[name] - start[name]):>+17.2f}" for name in names[:-1]) + " " * 17
        lines += [f"  {_over('gain', start, others):<{wide}}{gain}   points"]
    return lines + _means(r, "accuracy", "accuracy", "the figures above and below are", _ci, " %", " points")


def _wide(r: Mapping[str, Any]) -> int:
    """Letters of the first column of the figures."""
    others = r["starts"][1:]
    rows = [*map(_row, r["starts"]), *(_over("paired gain", start, others) for start in others)]
    return max(22, *(2 + len(row) for row in rows))


def _means(
    r: Mapping[str, Any],
    figure: str,
    name: str,
    others_are: str,
    shown: Callable[[float, float], str],
    unit: str = "",
    unit_of_gain: str = "",
) -> list[str]:
    """Of several draws the mean of a figure of each start, and what the first gained over each of the others."""
    first, *others = r["starts"]
    draws, wide = first["mean"]["draws"], _wide(r)
    if draws == 1:
        return []
    of = f"mean ± 95 % interval (Student's t) of {draws} draws, seeds {r['seed']} to {r['last_seed']}"
    lines = ["", f"{name}, {of}; {others_are} of the first"]
    for start in r["starts"]:
        mean = start["mean"]
        lines += [f"  {_row(start):<{wide}}{shown(mean[figure], mean['ci95'])}{unit}"]
    for start, gain in zip(others, r["gains"], strict=True):
        lines += [f"  {_over('paired gain', start, others):<{wide}}{shown(gain['mean'], gain['ci95'])}{unit_of_gain}"]
    return lines


def _over(gain: str, start: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    return gain if len(others) == 1 else f"{gain} over {called(start)}"


def _ci(value: float, ci95: float) -> str:
    return f"{100 * value:.2f} ± {100 * ci95:.2f}"


def _ci_if_any(value: float, ci95: float | None) -> str:
    """Of one draw there is no interval."""
    return f"{100 * value:.2f}" if ci95 is None else _ci(value, ci95)


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
    mistaken = []
    for true, row in enumerate(confusion):
        wrong = [(n, -other) for other, n in enumerate(row) if other != true]
        n, other = max(wrong)
        mistaken.append(f"{classes[-other]} ({n})" if n else "")
    return mistaken


def draw_pictures(
    run: RunFolder, result: Mapping[str, Any], classifier: Classifier, target: Target, test: torch.Tensor | None
) -> list[Path]:
    """Confusion matrix, learning curves of the first draw, calibration, and the most confident mistakes on the `test`
    images, if there are any; of numbers the predictions against the labels, and learning curves. Returns the files that
    could be drawn.

    Raises CheckpointError where metrics.jsonl is damaged.
    """
    rows = [row for row in read_rows(run.metrics) if row["draw"] == 0 and row.get("fold", 0) == 0]
    kept = {start["name"]: start["kept_epoch"] for start in result["starts"]}
    curves = {name: [row for row in rows if row["start"] == name] for name in kept if name != "probe"}
    stems = ("confusion", "learning", "mistakes", "calibration", "range_test")
    confusion, learning, mistakes, calibration, rates = (run.plots / f"{stem}.png" for stem in stems)
    test_of_rates = result.get("range_test")
    search = {rates: lambda: plotting().range_test(rates, test_of_rates)} if test_of_rates else {}
    if not target.class_names:
        scatter = run.plots / "scatter.png"
        pairs = {_row(start): (start["predictions"], start["rmse"]) for start in result["starts"]}
        return drawn(
            {
                scatter: lambda: plotting().scatter(scatter, pairs),
                learning: lambda: _draw_learning(learning, result, curves, kept),
                **search,
            }
        )
    curve = run.plots / "robust.png"
    under = {_row(start): start["mean"]["robust"] for start in result["starts"] if "robust" in start}
    attack = {curve: lambda: plotting().robust(curve, under)} if under else {}
    some = {} if test is None else {mistakes: lambda: _draw_mistakes(mistakes, classifier, target, test)}
    return drawn(
        {
            confusion: lambda: plotting().confusion(confusion, result["confusion"], target.class_names),
            learning: lambda: _draw_learning(learning, result, curves, kept),
            **search,
            **some,
            **attack,
            calibration: lambda: plotting().calibration(calibration, _calibrations(result)),
        }
    )


def _calibrations(result: Mapping[str, Any]) -> dict[str, Any]:
    """Of each start its bins and error."""
    return {_row(s): (s["calibration"], s["calibration_error"]) for s in result["starts"] if "calibration" in s}


def _draw_learning(path: Path, result: Mapping[str, Any], curves: Mapping[str, Any], kept: Mapping[str, int]) -> None:
    steps = "inner step" if result["method"] == "inner" else "epoch"
    plotting().learning(path, curves, x_label=steps, kept=kept)


def _draw_mistakes(path: Path, classifier: Classifier, target: Target, test: torch.Tensor) -> None:
    top, labels = classifier.probabilities(Part(target.examples, test)).max(-1), target.labels[test]
    images = Part(target.examples, test)  # of which a few are drawn
    plotting().mistakes(path, images, labels, top.indices, top.values, target.class_names)
