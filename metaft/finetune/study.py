"""The fits of one adapt run, one after the other, from a position that its checkpoint holds whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from metaft.errors import CheckpointError, NonFiniteError
from metaft.finetune import adapter, heads
from metaft.finetune import soup as soups
from metaft.finetune.classifier import Classifier, save
from metaft.finetune.contenders import Contender
from metaft.finetune.deciding import decided
from metaft.finetune.examples import Part, Prepared
from metaft.finetune.features import features_of
from metaft.finetune.fit import SMALLER, Fitted, fit
from metaft.finetune.inner import FEWER, inner
from metaft.finetune.journal import Journal, Position, write_rows
from metaft.finetune.lessons import Labelled
from metaft.finetune.numbers import number_scores
from metaft.finetune.probe import probe
from metaft.finetune.robust import bounds_of, robust_curve
from metaft.finetune.scores import scores
from metaft.finetune.setup import Planned, Setup, rows_of
from metaft.finetune.trails import trail_for
from metaft.runs.checkpoint import under
from metaft.runs.events import Events
from metaft.runs.folder import RunFolder
from metaft.runs.trail import Trail
from metaft.starts.base import body
from metaft.targets import Target
from metaft.targets.draws import Rows

TABLES = ("per_class", "confusion", "calibration", "predictions")
"""Figures that are kept of the first draw alone."""


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

            rows = rows_of(setup, draw, fold, contender.which)
            contender = decided(setup, contender, rows, draw, device, journal, should_stop, on_candidate)
            passes = 1 if contender.recipe is None else contender.recipe.passes

            def on_epoch(
                state: Mapping[str, Any], number: int = number, tag: Mapping[str, Any] = tag, passes: int = passes
            ) -> None:
                journal.epoch(number, tag, state)
                progress(number, state["curve"][-1], passes)

            soup: dict[str, Any] = {}
            if contender.recipe is not None and contender.recipe.soup is not None:
                fitted, made = soup_of(
                    setup, contender, rows, draw, device, journal, number, tag, should_stop=should_stop,
                    progress=progress,
                )  # fmt: skip
                soup = {"soup": made}
            else:
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
                if fitted.products and start.meta is not None and start.architecture["name"] != "custom":
                    adapter.save(run.adapter, classifier, fitted.products, start, setup.config.start)
            also = [
                _of_further(run, setup, contender, fitted, draw, which, stays=stays, should_stop=should_stop)
                for which in range(1, 1 + len(contender.others))
            ]
            if draw > 0 and setup.folds == 1:  # the first draw's tables are enough; those of folds are added up
                figures, *also = [{k: v for k, v in each.items() if k not in TABLES} for each in (figures, *also)]
            figures |= {"also": also} if also else {}
            journal.fit(number, tag, setup.config.draws.seed + draw, fitted, figures | soup)
            for left in range(contender.recipe.soup or 0 if contender.recipe is not None else 0):
                run.single(left).unlink(missing_ok=True)
            should_stop()
    except CheckpointError:  # the disk refuses; trying once more would hide why
        raise
    except BaseException:
        journal.interrupted()
        raise
    return journal.position


def _of_further(
    run: RunFolder,
    setup: Setup,
    contender: Contender,
    fitted: Fitted,
    draw: int,
    which: int,
    *,
    stays: bool,
    should_stop: Callable[[], None],
) -> dict[str, Any]:
    """What a fit of several targets comes to on a further one, whose classifier is kept beside that of the first."""
    target, (body, head) = contender.others[which - 1], fitted.further[which - 1]
    classifier = Classifier(body, head, target.inputs, target.class_names)
    rows = rows_of(setup, draw, which=which)
    figures = test(classifier, target, rows.test, SMALLER, stays=stays, bounds=(), should_stop=should_stop)
    if draw == 0:
        about = {"init": contender.start.name, "data": target.name}
        save(run.of_target(which + 1), classifier, contender.start.architecture, about)
    return figures


def tag_of(setup: Setup, fit: Planned) -> dict[str, Any]:
    """What tells a fit's figures and epochs from those of others."""
    folds = {} if setup.folds == 1 else {"fold": "all" if fit.fold is None else fit.fold}
    return {"draw": fit.draw, "start": fit.contender.label, **folds}


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


def soup_of(
    setup: Setup,
    contender: Contender,
    rows: Rows,
    draw: int,
    device: str,
    journal: Journal,
    number: int,
    tag: Mapping[str, Any],
    *,
    should_stop: Callable[[], None],
    progress: Callable[[int, Mapping[str, float], int], None],
) -> tuple[Fitted, dict[str, Any]]:
    """The fits of a contender that differ in `order_of` alone, and their greedy soup; what they were each. The curve is
    that of the fit that was best on validation; those of all are in the journal under names of their own."""
    recipe, seed = contender.recipe, setup.config.draws.seed + draw
    assert recipe is not None and recipe.soup is not None
    head: nn.Module | None = None
    for which in range(len(journal.position.singles), recipe.soup):
        label, before = {**tag, "start": f"{tag['start']}, fit {which + 1}"}, which * recipe.passes

        def on_epoch(
            state: Mapping[str, Any], label: Mapping[str, Any] = label, before: int = before, of: int = recipe.soup
        ) -> None:
            journal.epoch(number, label, state)
            row = state["curve"][-1]
            progress(number, {**row, "epoch": before + row["epoch"]}, recipe.passes * of)

        order = soups.order_of(seed, which)
        fitted = fit_one(
            setup, contender, rows, draw, device, order=order, resume=journal.position.current,
            should_stop=should_stop, on_epoch=on_epoch,
        )  # fmt: skip
        head = fitted.head
        made = Classifier(fitted.body, fitted.head, contender.target.inputs, contender.target.class_names)
        row = {"seed": order, "epochs": len(fitted.curve), "kept_epoch": fitted.kept, "trained": fitted.trained}
        row |= {"val_accuracy": soups.judged(made, contender, rows.val)}
        row |= {"accuracy": soups.judged(made, contender, rows.test), "curve": fitted.curve}
        journal.single(number, row, soups.values_of(fitted))
    singles, values = journal.position.singles, journal.values_of_singles()
    if head is None:  # all of them were done before a resume
        head = heads.filled(recipe.head, under(values[0], "head"))

    def classifier_of(some: soups.Values) -> Classifier:
        assert head is not None
        return soups.filled(some, contender, rows, head, seed, device)

    soup = soups.greedy(
        values, [row["val_accuracy"] for row in singles],
        lambda some: soups.judged(classifier_of(some), contender, rows.val),
    )  # fmt: skip
    classifier, best = classifier_of(soup.values), singles[soup.taken[0]]
    shown = [{k: v for k, v in row.items() if k not in ("curve", "trained")} for row in singles]
    about = {"fits": shown, "taken": list(soup.taken), "val_accuracy": soup.accuracy}
    return Fitted(classifier.body, classifier.head, list(best["curve"]), best["trained"]), about


def fit_one(
    setup: Setup,
    contender: Contender,
    rows: Rows,
    draw: int,
    device: str,
    *,
    order: int | None = None,
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
    also = []
    for which, other in enumerate(contender.others, 1):
        theirs = rows_of(setup, draw, which=which)
        some, judging = torch.from_numpy(theirs.train), torch.from_numpy(theirs.val)
        also.append(Labelled(
            other.inputs, Part(other.examples, some), other.labels[some], len(other.class_names),
            Part(other.examples, judging), other.labels[judging],
        ))  # fmt: skip
    return fit(
        body(start, seed).to(device),
        target.inputs, Part(target.examples, train), labels, classes, recipe,
        val_examples=Part(target.examples, val), val_labels=target.labels[val],
        seed=seed, order=order, should_stop=should_stop, resume=resume, on_epoch=on_epoch, on_update=on_update,
        also=also, together=config.tasks or "sum", trail=trail, log_every=config.output.log_every,
    )  # fmt: skip
