"""The fits of one adapt run, one after the other, from a position that its checkpoint holds whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from metaft.errors import CheckpointError, NonFiniteError
from metaft.finetune.classifier import Classifier, save
from metaft.finetune.contenders import Contender
from metaft.finetune.deciding import decided
from metaft.finetune.examples import Part, Prepared
from metaft.finetune.features import features_of
from metaft.finetune.fit import SMALLER, Fitted, fit
from metaft.finetune.inner import FEWER, inner
from metaft.finetune.journal import Journal, Position, write_rows
from metaft.finetune.numbers import number_scores
from metaft.finetune.probe import probe
from metaft.finetune.robust import bounds_of, robust_curve
from metaft.finetune.scores import scores
from metaft.finetune.setup import Planned, Setup, rows_of
from metaft.runs.events import Events
from metaft.runs.folder import RunFolder
from metaft.runs.trail import Trail
from metaft.starts.base import body
from metaft.targets import Target
from metaft.targets.draws import Rows

TABLES = ("per_class", "confusion", "calibration", "predictions")
"""Figures that are kept of the first draw alone."""

LOG_EVERY = 10
"""Steps per row of updates.jsonl, where `--log-every` says nothing else."""


def draws_differ(setup: Setup) -> bool:
    """Whether other seeds train, validate or test on other images; without anything to draw they do not."""
    pairs = zip(rows_of(setup, 0), rows_of(setup, 1), strict=True)
    return not all(np.array_equal(first, second) for first, second in pairs)


def study(
    run: RunFolder,
    setup: Setup,
    position: Position,
    header: Mapping[str, Any],
    *,
    device: str,
    should_stop: Callable[[], None] = lambda: None,
    progress: Callable[[int, Mapping[str, float], int], None] = lambda number, row, passes: None,
    on_candidate: Callable[[Mapping[str, Any]], None] = lambda row: None,
    events: Events | None = None,
) -> Position:
    """Go on from `position` to the end: for each draw a fit from every start.

    The figures of a fit are in the checkpoint as soon as it is done, and the classifier of the first one in the run
    folder. `should_stop` raises to stop, `progress(number of the fit, row, its epochs)` is told of each epoch, and
    `on_candidate` of each that there is to choose from (see `choose`); `events` gets the rows too.
    """
    write_rows(run, position)  # a kill may have come between the checkpoint and them
    journal = Journal(run, header, position, events)
    planned = setup.fits
    try:
        for number in range(len(position.fits), len(planned)):
            draw, fold, contender = planned[number]
            start, target, tag = contender.start, contender.target, tag_of(setup, planned[number])

            rows = rows_of(setup, draw, fold)
            contender = decided(setup, contender, rows, draw, device, journal, should_stop, on_candidate)
            passes = 1 if contender.recipe is None else contender.recipe.passes

            def on_epoch(
                state: Mapping[str, Any], number: int = number, tag: Mapping[str, Any] = tag, passes: int = passes
            ) -> None:
                journal.epoch(number, tag, state)
                progress(number, state["curve"][-1], passes)

            begun = journal.position.current
            measured = draw == 0 and (setup.folds == 1 or fold == 0)  # of which curves are drawn, too
            fitted = fit_one(
                setup, contender, rows, draw, device, resume=begun, should_stop=should_stop, on_epoch=on_epoch,
                trail=trail_for(run, setup, planned[number]),
                on_update=partial(journal.update, tag) if measured else None,
            )  # fmt: skip
            classifier = Classifier(fitted.body, fitted.head, target.inputs, target.class_names)
            advice = FEWER if contender.recipe is None else SMALLER
            stays = contender.probe or (contender.recipe is not None and contender.recipe.trains == "head")
            figures = {}
            if len(rows.test):
                bounds = bounds_of(setup.config.robust)
                figures = test(
                    classifier, target, rows.test, advice, stays=stays, bounds=bounds, should_stop=should_stop
                )
            if number == 0:
                save(run.classifier, classifier, start.architecture, {"init": start.name, "data": target.name})
            if draw > 0 and setup.folds == 1:  # the first draw's tables are enough; those of folds are added up
                figures = {k: v for k, v in figures.items() if k not in TABLES}
            journal.fit(number, tag, setup.config.draws.seed + draw, fitted, figures)
            should_stop()
    except CheckpointError:  # the disk refuses; trying once more would hide why
        raise
    except BaseException:
        journal.interrupted()
        raise
    return journal.position


def tag_of(setup: Setup, fit: Planned) -> dict[str, Any]:
    """What tells a fit's figures and epochs from those of others."""
    folds = {} if setup.folds == 1 else {"fold": "all" if fit.fold is None else fit.fold}
    return {"draw": fit.draw, "start": fit.contender.label, **folds}


def followed(setup: Setup) -> list[Planned]:
    """The fits whose trail is kept: those of the first draw that gradients train, where there are folds of the first
    one, in the order of the contenders, by whose number each is named."""
    first = None if setup.folds == 1 else 0
    return [
        one
        for one in setup.fits
        if (one.draw, one.fold) == (0, first) and not one.contender.probe and one.contender.recipe is not None
    ]


def trail_for(run: RunFolder, setup: Setup, planned: Planned) -> Trail | None:
    fits = followed(setup)
    for number, one in enumerate(fits):
        if (one.draw, one.fold, one.contender.label) == (planned.draw, planned.fold, planned.contender.label):
            about = {"start": one.contender.label}
            asked = setup.config.output.snapshots
            return Trail(run.snapshots, str(number), asked=asked, trails=len(fits), about=about)
    return None


@torch.no_grad()
def test(
    classifier: Classifier,
    target: Target,
    rows: np.ndarray,
    advice: str,
    *,
    stays: bool,
    bounds: Sequence[float],
    should_stop: Callable[[], None],
) -> dict[str, Any]:
    """Scores on some of the target's images. Raises NonFiniteError, with the advice, where they would mean nothing.
    With `bounds` there is the accuracy under attack too (see `metaft.finetune.robust`).

    `stays` says that the backbone is a start's own, whose features other fits have use for too.
    """
    some = torch.from_numpy(rows)
    part = Part(target.examples, some)
    if stays:
        prepared = Prepared(part, target.inputs, next(classifier.parameters()))
        logits = classifier.head(features_of(classifier.body, prepared)).cpu()
    else:
        logits = classifier.logits(part)
    for name, value in {**classifier.state_dict(), "the logits of the test images": logits}.items():
        if not value.isfinite().all():
            raise NonFiniteError(f"after the last step: not finite: {name}; {advice}")
    labels = target.labels[some].numpy()
    if not target.class_names:
        return number_scores(labels, logits.squeeze(-1).double().numpy())
    figures = scores(labels, logits.softmax(-1).float().numpy(), target.class_names)
    if bounds:
        right, labels = logits.argmax(-1) == target.labels[some], target.labels[some]
        curve = robust_curve(classifier, part, labels, bounds, right=right, should_stop=should_stop)
        figures["robust"] = curve
    return figures


def fit_one(
    setup: Setup,
    contender: Contender,
    rows: Rows,
    draw: int,
    device: str,
    *,
    resume: Mapping[str, Any] | None = None,
    should_stop: Callable[[], None] = lambda: None,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    trail: Trail | None = None,
    on_update: Callable[[Mapping[str, Any]], None] | None = None,
) -> Fitted:
    """A contender fitted to the images of one draw, as its recipe says, which chooses nothing any more."""
    config, start, target, recipe = setup.config, contender.start, contender.target, contender.recipe
    seed = config.draws.seed + draw
    train, val = torch.from_numpy(rows.train), torch.from_numpy(rows.val)
    labels, classes = target.labels[train], len(target.class_names)
    if contender.probe:
        return probe(body(start, seed).to(device), target.inputs, Part(target.examples, train), labels, classes)
    if recipe is None:
        return inner(
            start, target.examples[train], labels, classes,
            seed=seed, steps=config.inner.inner_steps, device=device,
        )  # fmt: skip
    return fit(
        body(start, seed).to(device),
        target.inputs, Part(target.examples, train), labels, classes, recipe,
        val_examples=Part(target.examples, val), val_labels=target.labels[val],
        seed=seed, should_stop=should_stop, resume=resume, on_epoch=on_epoch, on_update=on_update, trail=trail,
        log_every=config.output.log_every or LOG_EVERY,
    )  # fmt: skip
