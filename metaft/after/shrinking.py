"""From a classifier to a smaller one, step by step: pruned and recovered, or taught to a smaller start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from metaft.after.measured import latencies
from metaft.after.pictures import Pictures
from metaft.after.pruning import kept_of, pruned
from metaft.config import CompressConfig
from metaft.errors import MetaftError
from metaft.finetune.classifier import Classifier, load, save
from metaft.finetune.contenders import Contender
from metaft.finetune.examples import Part, evenly
from metaft.finetune.extras import all_named
from metaft.finetune.extras.distil import of_classifier
from metaft.finetune.fit import Fitted, fit
from metaft.finetune.heads import kind
from metaft.finetune.journal import Journal, Position
from metaft.finetune.recipes import of_chance, settled
from metaft.finetune.setup import Setup
from metaft.finetune.study import fit_one
from metaft.models.architecture import build
from metaft.models.narrowed import sizes_of, widths_of
from metaft.runs.folder import RunFolder
from metaft.settings.finetuning import Recipe
from metaft.starts.base import Start, body
from metaft.targets import Target
from metaft.targets.base import FOLDS
from metaft.targets.draws import Rows, distinct, grouped_fold

EPOCHS, EPOCHS_INTO = 10, 40
"""After each step, and of a start that is taught, where nothing else is asked for."""

MATCHED = 128
"""Training images at most by which the stored moments of what was pruned are set."""


class Track(NamedTuple):
    """A classifier that is followed through all steps."""

    fold: int | None
    """None: it is the run's own, which is kept. Others are of folds of its training images, from 1 on: trained by the
    run's recipe on what is in no fold's place, since the run's own has seen all of them."""
    train: np.ndarray
    """Rows of the target."""
    held: np.ndarray
    """Those that it is judged by, which it has never trained on; empty of the run's own where there are folds."""


class Work(NamedTuple):
    """What there is to shrink, and with what."""

    run: RunFolder
    setup: Setup
    contender: Contender
    """The start that the run began with, and its recipe with nothing open."""
    rows: Rows
    original: Classifier
    architecture: Mapping[str, Any]
    config: CompressConfig
    student: Start | None = None
    """With --into the start that is taught."""
    module: nn.Module | None = None

    @property
    def target(self) -> Target:
        return self.setup.target

    @property
    def seed(self) -> int:
        return self.setup.config.draws.seed


def tracks_of(work: Work) -> list[Track]:
    """The run's own classifier, judged by its validation part, or beside it those of folds, where there is none, or no
    test part either, whose place the folds take then. Raises MetaftError where a class has a single image."""
    own, val, test = work.rows
    if len(val) and len(test):
        return [Track(None, own, val)]
    target, train = work.target, np.sort(np.concatenate([own, val]))
    labels, groups = target.labels.numpy()[train], target.groups[train]
    folds = min(FOLDS, int(distinct(labels, np.unique(groups, return_inverse=True)[1], len(target.class_names)).min()))
    if folds < 2:
        raise MetaftError("run: a class has one image to train on, and none is left to judge a smaller classifier by")
    first = {group: i for i, group in reversed([*enumerate(groups.tolist())])}
    places = np.array([first[group] for group in groups.tolist()])
    parts = [grouped_fold(labels, places, folds, number, work.seed) for number in range(folds)]
    folded = [Track(i, train[rest], train[held]) for i, (rest, held) in enumerate(parts, 1)]
    return [Track(None, own, val[:0]), *folded]


def shares_of(work: Work) -> list[float]:
    """The shares of the channels that are left after each step, without steps in which no layer would lose any."""
    if work.student is not None:
        return [1.0]
    channels = [s.get("out_channels", s.get("out_features", 0)) for s in map(sizes_of, work.original.body.modules())]
    step, shares, before = work.config.step, [], channels
    for number in range(1, int((1 - 1e-9) / step) + 1):
        share = round(1 - number * step, 9)
        left = [kept_of(c, share) if c else 0 for c in channels]
        if left != before:
            shares.append(share)
        before = left
    return shares


def label_of(work: Work, share: float) -> str:
    """What a step's classifier is called."""
    return work.student.label if work.student is not None else f"{100 * share:.3g} % of channels"


def file_of(folder: RunFolder, step: int, track: Track) -> Path:
    """Where the classifier of a step lies."""
    fold = "" if track.fold is None else f"-fold-{track.fold}"
    return folder.path / "steps" / f"{step}{fold}.safetensors"


def network(folder: RunFolder, work: Work, step: int, track: Track) -> Classifier:
    """The classifier of a track after a step; 0: before any."""
    if step == 0 and track.fold is None:
        return work.original
    return load(file_of(folder, step, track), module=work.module if work.student is None or step == 0 else None)


def jobs_of(work: Work, tracks: list[Track]) -> Iterator[tuple[int, float, Track]]:
    """(step, share, track) of each fit in its order, as if no step were the last."""
    yield from ((0, 1.0, track) for track in tracks if track.fold is not None)
    yield from ((i, share, track) for i, share in enumerate(shares_of(work), 1) for track in tracks)


def shrink(
    folder: RunFolder,
    work: Work,
    position: Position,
    header: Mapping[str, Any],
    *,
    should_stop: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> Position:
    """Go on from `position` to the step that is fast enough, or the last there is. Each network is a file of the folder
    as soon as it is trained, and its figures are in the checkpoint."""
    journal, tracks = Journal(folder, header, position), tracks_of(work)
    try:
        for number, (step, share, track) in enumerate(jobs_of(work, tracks)):
            if track is tracks[0] and fast_enough(journal.position, work.config, step - 1):
                break
            if number < len(position.fits):
                continue
            fold = {} if track.fold is None else {"fold": track.fold}
            tag = {"draw": 0, "start": label_of(work, share) if step else "original", **fold}
            state = journal.position.current
            fitted = _fitted(
                folder, work, step, share, track, state, should_stop,
                lambda state, number=number, tag=tag: journal.epoch(number, tag, state),
            )  # fmt: skip
            _save(folder, work, step, track, fitted)
            trained = network(folder, work, step, track)
            figures: dict[str, Any] = {"step": step, "share": share, **judged(work, trained, track)}
            if track.fold is None:
                part = Part(work.target.examples, torch.from_numpy(track.train))
                before, after = latencies([work.original, trained], Pictures(part, None, part, True))
                figures["latency"] = {"original": before, "own": after}
            journal.fit(number, tag, work.seed, fitted, figures)
            say(_line(tag, figures))
            should_stop()
    except BaseException:
        journal.interrupted()
        raise
    return journal.position


def _fitted(
    folder: RunFolder,
    work: Work,
    step: int,
    share: float,
    track: Track,
    state: Mapping[str, Any] | None,
    should_stop: Callable[[], None],
    on_epoch: Callable[[Mapping[str, Any]], None],
) -> Fitted:
    """Of step 0 the run's own recipe on the images of a fold; then what the step before left, pruned, or the start that
    is taught, trained to follow what it came from."""
    target, none = work.target, np.empty(0, np.int64)
    if step == 0:
        rows = Rows(track.train, none, none)
        return fit_one(
            work.setup, work.contender, rows, 0, "cpu", resume=state, should_stop=should_stop, on_epoch=on_epoch
        )
    whole = network(folder, work, 0, track)
    train = torch.from_numpy(track.train)
    if work.student is None:
        small = pruned(network(folder, work, step - 1, track), whole, share, images_of(work, train), work.seed)
        backbone, head = small.body, small.head
    else:
        backbone, head = body(work.student, work.seed), None
    recipe = recovery(work)
    return fit(
        backbone, work.original.inputs, Part(target.examples, train), target.labels[train], len(target.class_names),
        recipe, seed=work.seed, extras=(*all_named(recipe.extra), of_classifier(whole)), head=head,
        should_stop=should_stop, resume=state, on_epoch=on_epoch,
    )  # fmt: skip


def images_of(work: Work, train: Tensor, at_most: int = MATCHED) -> Tensor:
    """Training images to prune by, as the backbone takes them."""
    some = train[torch.from_numpy(evenly(len(train), at_most))]
    return work.original.inputs(work.target.examples[some]).to(next(work.original.parameters()).dtype)


def recovery(work: Work) -> Recipe:
    """The run's recipe with everything training, for a fixed number of epochs, in a single fit; what is about a start's
    weights is left out, since they are no longer there."""
    start, config = work.student or work.contender.start, work.config
    given = of_chance(work.contender.recipe or Recipe())
    epochs = config.epochs or (EPOCHS if work.student is None else EPOCHS_INTO)
    recipe = settled(
        dataclasses.replace(
            given, strategy="full", freeze="none", epochs=epochs, lr=config.lr, schedule="cosine", clip_norm=1.0,
            soup=None,
        ),
        start,
    )  # fmt: skip
    return dataclasses.replace(recipe, patience=None)  # nothing validates an epoch


def _save(folder: RunFolder, work: Work, step: int, track: Track, fitted: Fitted) -> None:
    architecture = work.architecture if work.student is None or step == 0 else work.student.architecture
    module = work.module if work.student is None or step == 0 else None
    whole, head = build(architecture, None, module=module)
    classifier = Classifier(fitted.body, fitted.head, work.original.inputs, work.original.class_names)
    if widths := widths_of(fitted.body, whole):
        of_head = sizes_of(whole.get_submodule(head))
        if kind(fitted.head) in ("linear", "own"):
            of_head["in_features"] = sizes_of(fitted.head)["in_features"]
        architecture = {**architecture, "widths": {**widths, head: of_head}}
    path = file_of(folder, step, track)
    path.parent.mkdir(exist_ok=True)
    save(path, classifier, architecture, {"init": work.contender.start.name, "data": work.target.name})


def judged(work: Work, classifier: Classifier, track: Track) -> dict[str, int]:
    """How many of the images that are held back get the right label, and of how many."""
    if not len(track.held):
        return {}
    held = torch.from_numpy(track.held)
    found = classifier.logits(Part(work.target.examples, held)).argmax(-1)
    return {"right": int((found == work.target.labels[held]).sum()), "held": len(held)}


def ratio_of(fit: Mapping[str, Any]) -> float:
    """Of the medians for one picture: a step's over the original's, taken in turns."""
    return fit["latency"]["own"]["1"]["median"] / fit["latency"]["original"]["1"]["median"]


def fast_enough(position: Position, config: CompressConfig, step: int) -> bool:
    """Whether a step is there and came down to the latency that was asked for."""
    own = [fit for fit in position.fits if fit["step"] == step and "latency" in fit]
    return bool(own) and ratio_of(own[0]) <= config.latency


def _line(tag: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    fold = f", fold {tag['fold']}" if "fold" in tag else ""
    right = f": {figures['right']} of {figures['held']} held back are right" if "right" in figures else ""
    fast = f": {100 * ratio_of(figures):.0f} % of the original's time" if "latency" in figures else ""
    return f"{tag['start']}{fold}{right}{fast}"
