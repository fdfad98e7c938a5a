"""What a run chooses before a fit, in the place of `--strategy chosen`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from metaft.finetune.choose import SETTLED, candidates_of, choose
from metaft.finetune.contenders import Contender
from metaft.finetune.examples import Part
from metaft.finetune.journal import Journal, Position
from metaft.finetune.setup import Setup
from metaft.finetune.strategies import CHOSEN
from metaft.models.architecture import is_published
from metaft.starts.base import body
from metaft.targets.draws import Rows


def decided(
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
