"""The fits of one adapt run, one after the other, from a position that its checkpoint holds whole."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metaft.errors import CheckpointError, NonFiniteError
from metaft.finetune.choose import SETTLED, candidates_of, choose
from metaft.finetune.classifier import Classifier, save
from metaft.finetune.contenders import Contender
from metaft.finetune.examples import Part, Prepared
from metaft.finetune.features import features_of
from metaft.finetune.fit import SMALLER, Fitted, fit, flatten, unflatten
from metaft.finetune.inner import FEWER, inner
from metaft.finetune.numbers import number_scores
from metaft.finetune.probe import probe
from metaft.finetune.robust import bounds_of, robust_curve
from metaft.finetune.scores import scores
from metaft.finetune.setup import Planned, Setup, rows_of
from metaft.finetune.strategies import CHOSEN
from metaft.finetune.trails import trail_for
from metaft.models.architecture import is_published
from metaft.runs import checkpoint
from metaft.runs.checkpoint import write_atomically
from metaft.runs.folder import RunFolder, append_row
from metaft.runs.trail import Trail
from metaft.starts.base import body
from metaft.targets import Target
from metaft.targets.draws import Rows

TABLES = ("per_class", "confusion", "calibration", "predictions")
"""Figures that are kept of the first draw alone."""

SAVE_EVERY = 5.0  # seconds; a killed run loses at most these


@dataclasses.dataclass(frozen=True)
class Position:
    """Where an adapt run stands."""

    fits: tuple[Mapping[str, Any], ...] = ()
    """The figures of each finished fit; the starts of one draw follow one another."""
    rows: tuple[Mapping[str, Any], ...] = ()
    """metrics.jsonl: every epoch so far, of the fit in progress too."""
    current: Mapping[str, Any] | None = None
    """`fit`'s state after the last epoch of the fit in progress."""
    chosen: Mapping[str, Any] | None = None
    """What `--strategy chosen` chose for that fit, see `metaft.finetune.choose`, or under "tried" what it knows of the
    first candidates."""


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
) -> Position:
    """Go on from `position` to the end: for each draw a fit from every start.

    The figures of a fit are in the checkpoint as soon as it is done, and the classifier of the first one in the run
    folder. `should_stop` raises to stop, `progress(number of the fit, row, its epochs)` is told of each epoch, and
    `on_candidate` of each that there is to choose from (see `choose`).
    """
    write_rows(run, position)  # a kill may have come between the checkpoint and them
    journal = Journal(run, header, position)
    planned = setup.fits
    try:
        for number in range(len(position.fits), len(planned)):
            draw, fold, contender = planned[number]
            start, target, tag = contender.start, contender.target, tag_of(setup, planned[number])

            rows = rows_of(setup, draw, fold)
            contender = _decided(setup, contender, rows, draw, device, journal, should_stop, on_candidate)
            passes = 1 if contender.recipe is None else contender.recipe.passes

            def on_epoch(
                state: Mapping[str, Any], number: int = number, tag: Mapping[str, Any] = tag, passes: int = passes
            ) -> None:
                journal.epoch(number, tag, state)
                progress(number, state["curve"][-1], passes)

            begun = journal.position.current
            fitted = fit_one(
                setup, contender, rows, draw, device,
                resume=begun, should_stop=should_stop, on_epoch=on_epoch,
                trail=trail_for(run, setup, planned[number]),
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


class Journal:
    """Writes a run's position down: after each fit, and within one every `SAVE_EVERY` seconds."""

    def __init__(self, run: RunFolder, header: Mapping[str, Any], position: Position) -> None:
        self.run, self.header, self.position = run, header, position
        self._clock, self._before = time.monotonic(), (-1, ())

    def epoch(self, number: int, tag: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """`state` is that of the fit in progress, as `fit` gives it."""
        rows = self._rows(number, tag, state["curve"])
        self.position = dataclasses.replace(self.position, rows=rows, current=state)
        if time.monotonic() - self._clock > SAVE_EVERY:
            self._keep(number)

    def fit(self, number: int, tag: Mapping[str, Any], seed: int, fitted: Fitted, figures: Mapping[str, Any]) -> None:
        """A fit is done."""
        epochs = len([row for row in fitted.curve if row["epoch"] > 0])
        chosen = {} if self.position.chosen is None else {"chosen": self.position.chosen}
        trained = {"trained": fitted.trained} if fitted.trained else {}
        done = {**tag, "seed": seed, "epochs": epochs, "kept_epoch": fitted.kept, **trained, **figures, **chosen}
        self.position = Position((*self.position.fits, _as_read(done)), self._rows(number, tag, fitted.curve))
        self._keep(number)

    def choice(self, number: int, made: Mapping[str, Any]) -> None:
        """What was chosen for the fit that is next, or what is known of the candidates; a resume goes on from it."""
        self.position = dataclasses.replace(self.position, chosen=_as_read(made))
        self._keep(number)

    def interrupted(self) -> None:
        """Something ends the run; what the fit in progress has so far is kept."""
        if self.position.current is not None:
            self._keep(len(self.position.fits))

    def _rows(
        self, number: int, tag: Mapping[str, Any], curve: Sequence[Mapping[str, float]]
    ) -> tuple[Mapping[str, Any], ...]:
        if self._before[0] != number:
            rows = self.position.rows
            self._before = number, tuple(row for row in rows if {k: row.get(k) for k in tag} != tag)
        return (*self._before[1], *({**tag, **row} for row in curve))

    def _keep(self, number: int) -> None:
        now = time.monotonic()
        append_row(self.run.timing, {"fit": number, "seconds": now - self._clock}, sync=True)
        write(self.run, self.position, self.header)
        self._clock = now


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


def _decided(
    setup: Setup,
    contender: Contender,
    rows: Rows,
    draw: int,
    device: str,
    journal: Journal,
    should_stop: Callable[[], None],
    on_candidate: Callable[[Mapping[str, Any]], None],
) -> Contender:
    """The contender with what is chosen in the place of `--strategy chosen`; any other as it is."""
    recipe = contender.recipe
    if recipe is None or recipe.trains != CHOSEN:
        return contender
    made = journal.position.chosen
    if made is None or "tried" in made:
        start, target, train = contender.start, contender.target, torch.from_numpy(rows.train)
        seed, name = setup.config.draws.seed + draw, start.architecture["name"]
        limit, began, number = time_to_choose(setup, journal.position), time.monotonic(), len(journal.position.fits)
        tried, before = (made["tried"], made["seconds"]) if made else ([], 0.0)

        def candidate(row: Mapping[str, Any], by_fold: list[list[float]]) -> None:
            nonlocal tried
            tried = [*tried, {"row": row, "by_fold": by_fold}]
            journal.choice(number, {"tried": tried, "seconds": before + time.monotonic() - began})
            on_candidate(row)

        candidates = candidates_of(recipe, published=is_published(name), images=len(train), many=limit is not None)
        choice = choose(
            body(start, seed).to(device), target.inputs, Part(target.examples, train), target.labels[train],
            len(target.class_names), candidates, groups=target.groups[rows.train], seed=seed, seconds=limit,
            known=tried, should_stop=should_stop, on_candidate=candidate,
        )  # fmt: skip
        made = {"table": choice.table, **{k: getattr(choice.recipe, k) for k in SETTLED}}
        if limit is not None:
            made["seconds"] = round(before + time.monotonic() - began, 3)
        journal.choice(number, made)
    picked = dataclasses.replace(recipe, **{k: made[k] for k in SETTLED if k in made})
    return contender._replace(recipe=picked)


def time_to_choose(setup: Setup, position: Position) -> float | None:
    """Seconds for the next choice: an equal share, among the choices that are still to be made, of what is left of
    `--auto`. None without it."""
    if setup.config.auto is None:
        return None
    spent = sum(row["seconds"] for row in setup.ranked)
    choices = [fit.get("chosen") for fit in position.fits] + [position.chosen]
    spent += sum(made.get("seconds", 0.0) for made in choices if made)
    recipes = [fit.contender.recipe for fit in setup.fits[len(position.fits) :]]
    left = sum(recipe is not None and recipe.trains == CHOSEN for recipe in recipes)
    return max(0.0, 60 * setup.config.auto - spent) / left


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
        seed=seed, should_stop=should_stop, resume=resume, on_epoch=on_epoch, trail=trail,
    )  # fmt: skip


def write(run: RunFolder, position: Position, header: Mapping[str, Any]) -> None:
    """The checkpoint, and metrics.jsonl from the same position. Raises CheckpointError."""
    tensors, plain = ({}, None) if position.current is None else flatten(position.current)
    state = {"fits": position.fits, "rows": position.rows, "current": plain, "chosen": position.chosen}
    run.save_last(tensors, {**header, **state})
    write_rows(run, position)


def write_rows(run: RunFolder, position: Position) -> None:
    """metrics.jsonl. Raises CheckpointError."""
    write_atomically(run.metrics, "".join(json.dumps(row, sort_keys=True) + "\n" for row in position.rows).encode())


def _as_read(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Plain data as a checkpoint gives it back, so that a run that was stopped writes its results in the same order."""
    return json.loads(json.dumps(value, sort_keys=True))


def read(run: RunFolder) -> tuple[Position, Mapping[str, Any]]:
    """The last checkpoint: a position, and the header. Raises CheckpointError, and says which other one is good."""
    tensors, header = run.load(run.last, _load, lambda loaded: f"after {len(loaded[1]['rows'])} epochs")
    current = None if header["current"] is None else unflatten(tensors, header["current"])
    return Position(tuple(header["fits"]), tuple(header["rows"]), current, header.get("chosen")), header


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, header = checkpoint.load(path)
    if "fits" not in header:
        raise CheckpointError(f"checkpoint {path}: not of an adapt run")
    return tensors, header


def seconds(rows: Sequence[Mapping[str, Any]], number: int | None = None) -> float:
    """Time spent on a fit, or on all, from the rows of timing.jsonl."""
    return sum(row["seconds"] for row in rows if number in (None, row["fit"]))
