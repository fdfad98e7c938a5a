"""What an adapt run found, as `result.json` holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from metaft._version import __version__
from metaft.finetune import extras
from metaft.finetune.journal import Position, seconds
from metaft.finetune.numbers import FIGURES, pooled_numbers
from metaft.finetune.robust import pooled_curve
from metaft.finetune.scores import pooled
from metaft.finetune.setup import Setup, rows_of
from metaft.finetune.soup import summary
from metaft.finetune.strategies import CHOSEN
from metaft.finetune.study import TABLES, draws_differ
from metaft.finetune.taught import seen_by_teachers
from metaft.finetune.warned import warnings_of
from metaft.metrics import mean_t95
from metaft.options import flat
from metaft.runs.folder import RunFolder, read_rows
from metaft.runs.machine import where_measured
from metaft.settings.finetuning import Recipe
from metaft.starts.base import RANDOM
from metaft.targets import Target
from metaft.targets.draws import VALIDATION_FROM, Rows


def result_of(folder: RunFolder, setup: Setup, position: Position, device: str) -> dict[str, Any]:
    """All that `result.json` holds.

    "starts" has an entry for each start: the first draw's figures in full, and under "mean" the accuracy of all draws.
    "gains" has what the first start gained over each of the others, paired by draw. What else there is of figures are
    views of these (see `views`).
    """
    config, contenders, target = setup.config, setup.contenders, setup.target
    start, rows = setup.start, rows_of(setup, 0)
    timing = read_rows(folder.timing, ["fit", "seconds"])
    fits = [
        {k: v for k, v in fit.items() if k not in ("draw", "start")} | {"seconds": round(seconds(timing, number), 3)}
        for number, fit in enumerate(position.fits)
    ]
    draws = by_draw(fits, len(contenders), setup.folds, target.class_names)
    also = further(folder, setup, list(zip(*draws, strict=True)))
    first = [number for number, contender in enumerate(contenders) if contender.which == 0]
    contenders = [contenders[number] for number in first]
    draws = [[{k: v for k, v in draw[number].items() if k != "also"} for number in first] for draw in draws]
    columns = list(zip(*draws, strict=True))
    labels = [contender.label for contender in contenders]
    entries = []
    for contender, column in zip(contenders, columns, strict=True):
        label = contender.label
        curve = [r for r in position.rows if (r["draw"], r["start"], r.get("fold", 0)) == (0, label, 0)]
        more: dict[str, Any] = {"shape": list(contender.target.inputs.shape)}
        recipe = contender.recipe
        changed = recipe is not None and bool(recipe.extra or recipe.label_smoothing)
        # A random start beside published weights has a rate of its own.
        searched = setup.range_test is not None and recipe is not None and recipe.lr == setup.range_test["rate"]
        more["warnings"] = warnings_of(column[0], curve, len(target.class_names), changed=changed, searched=searched)
        entries.append(entry(label, column) | more)
    if setup.folds > 1 and "chosen" in position.fits[0]:  # of the classifier that is kept, which no fold has
        entries[0]["chosen"] = position.fits[0]["chosen"]
    if "soup" in columns[0][0]:
        entries[0]["soup"] = summary(columns[0])
    gains = [gain(labels[0], label, columns[0], column) for label, column in zip(labels[1:], columns[1:], strict=True)]
    return {
        "command": "adapt",
        "version": __version__,
        "init": start.name,
        "init_about": {k: v for k, v in start.about.items() if k != "classes"},
        "data": target.name,
        "classes": list(target.class_names),
        "method": config.method,
        **({} if config.auto is None else {"auto": config.auto, "ranked": list(setup.ranked)}),
        **({} if setup.range_test is None else {"range_test": setup.range_test}),
        **({"inner_steps": config.inner.inner_steps} if config.recipe is None else recipe_of(config.recipe)),
        "seed": config.draws.seed,
        "last_seed": config.draws.seed + config.draws.seeds - 1,
        "device": device,
        "environment": where_measured(device, torch.get_num_threads()),
        "train_images": len(rows.train),
        "val_images": len(rows.val),
        "train_images_per_class": _per_class(target, rows.train),
        "val_images_per_class": _per_class(target, rows.val),
        "test_images": len(rows.test) if setup.folds == 1 else len(target.labels),
        "folds": setup.folds,
        **({"tasks": config.tasks or "sum", "also": also} if also else {}),
        "notes": notes(setup, rows),
        "starts": entries,
        "choices": [
            {k: fit[k] for k in ("draw", "fold", "start") if k in fit} | dict(fit["chosen"])
            for fit in position.fits
            if "chosen" in fit
        ],
        "gains": gains,
        **(views(entries, gains, draws) if target.class_names else number_views(entries)),
        "seconds": round(seconds(timing), 3),
    }


def further(folder: RunFolder, setup: Setup, columns: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Of each further target: its images, the fit that it shares with the others ("together") beside that of it
    "alone", which are entries as "starts" has them, and the paired gain."""
    rows = []
    for which, target in enumerate(setup.further, 1):
        number = next(n for n, contender in enumerate(setup.contenders) if contender.which == which)
        label, alone = setup.contenders[number].label, columns[number]
        mine = [{**fit["also"][which - 1], **{k: fit[k] for k in _OF_FIT}} for fit in columns[0]]
        parts = rows_of(setup, 0, which=which)
        rows.append({
            "data": target.name,
            "classes": list(target.class_names),
            "file": folder.of_target(which + 1).name,
            "train_images": len(parts.train),
            "val_images": len(parts.val),
            "test_images": len(parts.test),
            "together": entry(setup.start.label, mine),
            "alone": entry(label, alone),
            "gain": gain(setup.start.label, label, mine, alone),
        })  # fmt: skip
    return rows


class OfTarget(NamedTuple):
    """What a result has of one target."""

    data: str
    classes: Sequence[str]
    test_images: int
    together: Mapping[str, Any]
    """An entry as "starts" has them, of the fit of all targets."""
    alone: Mapping[str, Any]
    """The same of a model of this target alone."""
    gain: Mapping[str, Any]
    file: str
    """Of its classifier."""


def of_targets(result: Mapping[str, Any]) -> list[OfTarget]:
    """All of a run of several, the first one, whose figures are those of the whole result, first."""
    (first, alone, *_), (own, *_) = result["starts"], result["gains"]
    row = OfTarget(
        result["data"], result["classes"], result["test_images"], first, alone, own, "classifier.safetensors"
    )
    return [row, *(OfTarget(**{name: each[name] for name in OfTarget._fields}) for each in result["also"])]


_OF_FIT = ("seed", "epochs", "kept_epoch")
"""Of a fit of several targets, what is the same for each."""


def by_draw(
    fits: Sequence[Mapping[str, Any]], contenders: int, folds: int, class_names: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """A row for each draw with the figures of each contender, those of folds together. Where there are folds the first
    fit is on all images, and has none."""
    per_draw, fits = contenders * folds, fits if folds == 1 else fits[1:]
    draws = [fits[i : i + per_draw] for i in range(0, len(fits), per_draw)]
    if folds == 1:
        return [[dict(fit) for fit in draw] for draw in draws]
    return [[_of_folds(draw[which::contenders], class_names) for which in range(contenders)] for draw in draws]


def _of_folds(fits: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> dict[str, Any]:
    """The figures of the folds of one contender together; epochs are the first one's."""
    first = {k: v for k, v in fits[0].items() if k not in ("fold", "seconds")}
    figures = pooled(fits, class_names) if class_names else pooled_numbers(fits)
    if "robust" in first:
        figures["robust"] = pooled_curve([fit["robust"] for fit in fits])
    return {**first, **figures, "seconds": round(sum(fit["seconds"] for fit in fits), 3)}


def recipe_of(recipe: Recipe) -> dict[str, Any]:
    """The settings of a fit, with what trains in words of `--strategy`."""
    return {**flat(recipe), "strategy": recipe.trains}


def entry(name: str, fits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A start's: the figures of its first fit, and the mean accuracy of all (of numbers their RMSE) with a 95 %
    interval."""
    figure = figure_of(fits[0])
    mean, ci95 = mean_t95([fit[figure] for fit in fits])
    first = {k: v for k, v in fits[0].items() if k != "seed"}
    of_draws = {figure: mean, "ci95": ci95, "draws": len(fits)}
    if "robust" in first:
        of_draws["robust"] = [_mean_of(rows) for rows in zip(*(fit["robust"] for fit in fits), strict=True)]
    return {"name": name, **first, "mean": of_draws}


def _mean_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one bound's accuracy in each draw."""
    mean, ci95 = mean_t95([row["accuracy"] for row in rows])
    return {"eps": rows[0]["eps"], "accuracy": mean, "ci95": ci95}


def figure_of(fit: Mapping[str, Any]) -> str:
    """The figure by which starts are compared."""
    return "accuracy" if "accuracy" in fit else "rmse"


def gain(of: str, over: str, mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What one start gained over another in accuracy, of numbers by how much its RMSE is less, paired by draw."""
    figure = figure_of(mine[0])
    sign = 1 if figure == "accuracy" else -1
    mean, ci95 = mean_t95([sign * (a[figure] - b[figure]) for a, b in zip(mine, theirs, strict=True)])
    return {"of": of, "over": over, "mean": mean, "ci95": ci95, "draws": len(mine)}


def number_views(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first start's figures where labels are numbers."""
    first = entries[0]
    return {**{k: first[k] for k in (*FIGURES, "kept_epoch")}, "epochs_run": first["epochs"]}


def views(
    entries: Sequence[Mapping[str, Any]],
    gains: Sequence[Mapping[str, Any]],
    draws: Sequence[Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """The same by the names that it had while there were two starts at most: the first, and "scratch", the last."""
    first, last = entries[0], entries[-1] if len(entries) > 1 and entries[-1]["name"] == RANDOM else None
    mean = {"draws": len(draws), "accuracy": first["mean"]["accuracy"], "accuracy_ci95": first["mean"]["ci95"]}
    scratch = None
    if last is not None:
        scratch = {k: v for k, v in last.items() if k not in ("name", "mean", "trained", *TABLES)}
        mean |= {"scratch_accuracy": last["mean"]["accuracy"], "scratch_accuracy_ci95": last["mean"]["ci95"]}
    over_last = gains[-1] if last is not None else None
    return {
        **{k: v for k, v in first.items() if k not in ("name", "mean", "epochs", "seconds", "trained")},
        "epochs_run": first["epochs"],
        "scratch": scratch,
        "gain": over_last and {"accuracy": over_last["mean"], "ci95": over_last["ci95"], "draws": len(draws)},
        "mean": mean,
        "draws": [{**_short(d[0]), **({"scratch": _short(d[-1])} if last is not None else {})} for d in draws],
    }


def _short(fit: Mapping[str, Any]) -> dict[str, Any]:
    return {k: fit[k] for k in ("seed", "accuracy", "macro_f1", "epochs", "kept_epoch")}


def _per_class(target: Target, part: np.ndarray) -> int | None:
    """Images of each class in a part, where all have as many."""
    if not target.class_names:
        return None
    counts = np.bincount(target.labels.numpy()[part], minlength=len(target.class_names))
    return int(counts[0]) if len(set(counts.tolist())) == 1 else None


def notes(setup: Setup, rows: Rows) -> list[str]:
    """What a reader has to know of how the figures came about."""
    config, start, target = setup.config, setup.start, setup.target
    said = list(start.notes)
    said += [f"{c.label}: {note}" for c in setup.contenders[1:] if c.start is not start for note in c.start.notes]
    if target.changes:
        said.append(f"images were fitted to what the start takes: {', '.join(target.changes)}")
    said += target.notes
    if setup.folds > 1:
        kept = rows_of(setup, 0, None)
        stopped = f" but {len(kept.val)}, which validate it" if len(kept.val) else ""
        said.append(
            f"there is no test part: figures are of {setup.folds}-fold {'stratified ' if target.class_names else ''}"
            "cross-validation, in which each image is tested once, by a classifier that has not seen it; the one that "
            f"is kept is trained on all{stopped}"
        )
    if setup.ranked and "all" in target.parts and (setup.folds > 1 or config.draws.seeds > 1):
        said.append(
            f"one start is chosen for all {'folds' if setup.folds > 1 else 'draws'}, on images that "
            f"{'each of them' if setup.folds > 1 else 'those after the first'} may test; strategies and rates are not"
        )
    if setup.range_test and (setup.folds > 1 or ("all" in target.parts and config.draws.seeds > 1)):
        each = "fold, which the others test" if setup.folds > 1 else "draw, which later ones may test"
        said.append(f"the rate was found on images that train in the first {each}")
    said += _duplicates(target, rows)
    said += _dropped(setup)
    said += seen_by_teachers(setup)
    if setup.further and config.recipe is not None and config.recipe.trains == "head":
        said.append(
            "the head alone trains, so that targets share nothing that learns; --strategy full or lp-ft moves the "
            "backbone"
        )
    recipe = config.recipe
    if recipe is not None and recipe.accumulate > 1 and start.norm == "adapt" and recipe.trains != "head":
        said.append(
            f"each batch of {recipe.batch_size} is normalised by its own statistics, so that {recipe.accumulate} of "
            f"them are no batch of {recipe.images_per_step}"
        )
    if config.recipe is not None and config.recipe.trains != CHOSEN and len(rows.val) == 0:
        few = "a class has" if target.class_names else "there are"
        why = f"{few} fewer than {VALIDATION_FROM} images to train on, so"
        if config.recipe.patience is None:
            why = "from published weights, unless --patience asks for it,"
        said.append(
            f"{why} none are set aside for validation: all images train, for the fixed {config.recipe.passes} epochs"
        )
    if config.draws.seeds > 1 and not draws_differ(setup):
        said.append(
            "every draw holds the same images; the interval is of the seeds alone, that is of the head, the order of "
            "the images and the random start, as far as the method has them"
        )
    classes = len(target.class_names)
    if config.method == "inner" and start.head_rows not in (None, classes):
        said.append(
            f"the run learned {start.head_rows}-way tasks: each of the {classes} classes starts from its mean head row"
        )
    return said


def _dropped(setup: Setup) -> Iterator[str]:
    """Which contenders train without an extra that was asked for."""
    given = () if setup.config.recipe is None else setup.config.recipe.extra
    for label, _, _, recipe, *_ in setup.contenders:
        if recipe is not None and (lacking := [text for text in given if text not in recipe.extra]):
            for text in lacking:
                why = (
                    "it has no knowledge of a start to keep" if extras.named(text).of_start else "its inputs are others"
                )
                yield f"{label} trains without {text}: {why}"


def _duplicates(target: Target, rows: Rows) -> list[str]:
    """What there is to know of pictures that are there twice."""
    said, groups = [], target.groups
    copies = int((groups != np.arange(len(groups))).sum())
    trained = len(rows.train) - len(np.unique(groups[rows.train]))
    if copies and "all" in target.parts:
        said.append(f"{copies} images are others again, to the pixel or nearly; duplicates are kept in one part")
    elif trained:
        said.append(f"{trained} of the {len(rows.train)} images to train on are others again, to the pixel or nearly")
    labels = target.labels.numpy()
    if target.class_names and (other := int((labels != labels[groups]).sum())):
        said.append(f"{other} images have another label than the one that they are again")
    twins = rows.test[np.isin(groups[rows.test], groups[[*rows.train, *rows.val]])]
    if len(twins):
        also = "training or validation" if len(rows.val) else "training"
        known = {target.examples[int(i)].numpy().tobytes() for i in (*rows.train, *rows.val)}
        exact = sum(target.examples[int(i)].numpy().tobytes() in known for i in twins)
        how = "to the pixel" if exact == len(twins) else f"{exact} of them to the pixel, the others nearly"
        said.append(f"{len(twins)} of the {len(rows.test)} test images are also {also} images, {how}")
    return said
