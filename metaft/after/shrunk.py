"""What shrinking came to: the table of all steps, which of them is kept, and what was not reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metaft._version import __version__
from metaft.after.measured import rows_of
from metaft.after.pictures import Pictures
from metaft.after.shrinking import Work, file_of, judged, label_of, network, ratio_of, recovery, tracks_of
from metaft.finetune.classifier import Classifier
from metaft.finetune.examples import Part
from metaft.finetune.extras import EXTRAS
from metaft.finetune.journal import Position, seconds
from metaft.finetune.results import entry, gain, recipe_of, views
from metaft.finetune.scores import scores
from metaft.models.functional import probe_of
from metaft.runs.folder import RunFolder, read_rows
from metaft.runs.machine import where_measured
from metaft.spec import Spec, takes, write
from metaft.support.paths import absolute
from metaft.views.layers import layers_of


def steps_of(folder: RunFolder, work: Work, position: Position) -> list[dict[str, Any]]:
    """A row for the original and for each step, as `rows_of` gives them, on the test part, where there is one: with
    "parameters", "flops" of one picture, "share" of the channels, and "validation": how many "right" of "held" images,
    the "accuracy", and how many "points" are lost; "latency" is the share of the original's time, whose own seconds in
    those turns are "beside"."""
    tracks, own = tracks_of(work), [fit for fit in position.fits if "latency" in fit]
    first = tracks[0]
    models: dict[str, tuple[Classifier, Path]] = {"original": (work.original, work.run.classifier)}
    for fit in own:
        path = file_of(folder, fit["step"], first)
        models[label_of(work, fit["share"])] = network(folder, work, fit["step"], first), path
    timed = [own[0]["latency"]["original"], *(fit["latency"]["own"] for fit in own)]
    rows = rows_of(models, pictures_of(work), timed)
    for step, row in enumerate(rows):
        fits = [fit for fit in position.fits if fit["step"] == step and "right" in fit]
        if len(tracks) == 1 and step == 0:
            fits = [judged(work, work.original, first)]
        right, held = (sum(fit[key] for fit in fits) for key in ("right", "held"))
        row["validation"] = {"right": right, "held": held, "accuracy": right / held}
        row["validation"]["points"] = 100 * (rows[0]["validation"]["accuracy"] - right / held)
        row["share"] = 1.0 if step == 0 else own[step - 1]["share"]
        row["latency"] = 1.0 if step == 0 else ratio_of(own[step - 1])
        row["beside"] = own[max(0, step - 1)]["latency"]["original"]
        row |= size_of(models[row["model"]][0])
    return rows


def pictures_of(work: Work) -> Pictures:
    """The test part with its labels, or, where there is none, what was trained on, without."""
    test, target, whole = torch.from_numpy(work.rows.test), work.target, not len(work.rows.test)
    part = Part(target.examples, torch.from_numpy(work.rows.train) if whole else test)
    return Pictures(part, None if whole else target.labels[test], part, whole)


def size_of(classifier: Classifier) -> dict[str, int]:
    """Parameters, and what one picture costs in convolutions and matrix products, two for each product and sum."""
    x = probe_of(classifier.inputs.shape, next(classifier.parameters()).dtype)[:1]
    model = torch.nn.Sequential(classifier.body, classifier.head)
    flops = sum(layer.flops for layer in layers_of(model, x))
    return {"parameters": sum(p.numel() for p in classifier.parameters()), "flops": flops}


def kept_of(rows: Sequence[Mapping[str, Any]], points: float) -> int:
    """The step that is kept: of those that lost at most so many points on validation the fastest; where there is none
    the one that lost least."""
    steps = range(1, len(rows))
    fine = [i for i in steps if rows[i]["validation"]["points"] <= points + 1e-9]
    if fine:
        return min(fine, key=lambda i: rows[i]["latency"])
    return min(steps, key=lambda i: (rows[i]["validation"]["points"], rows[i]["latency"]))


def unmet(row: Mapping[str, Any], latency: float, points: float) -> list[str]:
    """What was asked for and is not reached."""
    said, lost = [], row["validation"]["points"]
    if row["latency"] > latency:
        said.append(f"latency: {row['latency']:.2f} of the original's time, and {latency:g} was asked for")
    if lost > points + 1e-9:
        said.append(
            f"points: {lost:.1f} are lost on validation, and at most {points:g} were asked for; more --epochs or a "
            "higher --lr may recover some"
        )
    return said


def result_of(
    folder: RunFolder,
    work: Work,
    position: Position,
    before: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    kept: int,
) -> dict[str, Any]:
    """What `result.json` holds: an adapt run's, of the kept classifier beside the original (`before` is the original
    run's), and all steps under "compressed"."""
    timing = read_rows(folder.timing, ["fit", "seconds"])
    fits = [fit for fit in position.fits if "latency" in fit]
    label, epochs = label_of(work, fits[kept - 1]["share"]), fits[kept - 1]["epochs"]
    mine = {"seed": work.seed, "epochs": epochs, "kept_epoch": epochs, "seconds": round(seconds(timing), 3)}
    theirs = {key: before["starts"][0][key] for key in ("epochs", "kept_epoch")} | {"seed": work.seed, "seconds": None}
    pair = [mine | _figures(folder, work, kept), theirs | _figures(folder, work, 0)]
    shape = list(work.original.inputs.shape)
    entries = [entry(name, [fit]) | {"shape": shape} for name, fit in zip((label, "original"), pair, strict=True)]
    gains = [gain(label, "original", [pair[0]], [pair[1]])]
    start, recipe = work.student or work.contender.start, recovery(work)
    same = ("data", "classes", "seed", "train_images", "val_images", "train_images_per_class")
    same += ("val_images_per_class", "test_images", "folds")
    return {
        "command": "adapt",
        "version": __version__,
        "init": start.name,
        "init_about": {k: v for k, v in start.about.items() if k != "classes"},
        **{key: before[key] for key in same},
        "method": "finetune",
        **recipe_of(recipe),
        "extra": [*recipe.extra, _followed(work)],
        "last_seed": work.seed,
        "device": "cpu",
        "environment": where_measured("cpu", torch.get_num_threads()),
        "notes": [*_notes(work, rows[kept]), *(f"of the original's own fits: {note}" for note in before["notes"])],
        "starts": entries,
        "choices": [],
        "gains": gains,
        **views(entries, gains, [pair]),
        "seconds": round(seconds(timing), 3),
        "suspects": None,
        "compressed": {
            "run": str(work.run.path),
            "kept": rows[kept]["model"],
            "unmet": unmet(rows[kept], work.config.latency, work.config.points),
            "steps": list(rows),
        },
    }


def _figures(folder: RunFolder, work: Work, step: int) -> dict[str, Any]:
    """Of a step's classifier on the test part, or of those of all folds on what was held back from each."""
    tracks = tracks_of(work)
    judges = [(tracks[0], work.rows.test)] if len(work.rows.test) else [(t, t.held) for t in tracks if len(t.held)]
    parts = [torch.from_numpy(rows) for _, rows in judges]
    found = [
        network(folder, work, step, track).logits(Part(work.target.examples, part)).softmax(-1).float().numpy()
        for (track, _), part in zip(judges, parts, strict=True)
    ]
    labels = work.target.labels[torch.cat(parts)].numpy()
    return scores(labels, np.concatenate(found), work.target.class_names)


def _followed(work: Work) -> str:
    """The extra by which all of them follow the original, in a fold that of the fold, as `--extra` would name it."""
    teacher = (("teacher", str(absolute(work.run.path))),)
    return write(Spec("distil", None, teacher), takes(EXTRAS["distil"]))


def _notes(work: Work, row: Mapping[str, Any]) -> list[str]:
    recipe, kept = work.contender.recipe, recovery(work).extra
    dropped = [] if recipe is None else [text for text in recipe.extra if text not in kept]
    how = "was taught by" if work.student is not None else "is what was left of"
    about = f"this classifier {how} that of {work.run.path}, whose settings config.toml has"
    said = [f"{about}; at most {work.config.latency:g} of its time and {work.config.points:g} points were asked for"]
    if folds := len(tracks_of(work)) - 1:
        said.append(
            f"it was chosen by {folds}-fold cross-validation of the training images: in each fold "
            "the run's recipe was fitted anew, and made smaller alike"
        )
    if work.student is not None and work.student.inputs != work.original.inputs:
        said.append(f"{work.student.name} takes pictures as its teacher does, and not as it was published")
    said += [f"{text} is about a start's weights, and was left out" for text in dropped]
    return [*said, *(f"not reached: {line}" for line in unmet(row, work.config.latency, work.config.points))]
