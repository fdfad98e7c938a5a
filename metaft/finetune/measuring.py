"""How far the steps of a fit move each layer: the rows of `updates.jsonl`, which change nothing of the fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metaft import updates
from metaft.finetune.batches import cut
from metaft.finetune.features import evaluating
from metaft.finetune.lessons import Turn
from metaft.finetune.training import Training
from metaft.types import Params


class Measuring:
    """Tells of every `log_every` steps, or, where that is None, of as many as cost little (see `metaft.updates`)."""

    def __init__(self, training: Training, log_every: int | None, tell: Callable[[Mapping[str, Any]], None]) -> None:
        self._training, self._log_every, self._tell = training, log_every, tell
        self._apart: dict[bool, int] = {}
        """Steps between two of which it tells, by whether the head alone is passed through."""

    def before(self, step: int, turn: Turn, rates: Mapping[str, float], *, on_features: bool) -> Params:
        """What the step, of 0, 1, ..., moves, as it is before it; nothing where there is nothing to tell of."""
        model = self._training.model
        if on_features not in self._apart:
            self._apart[on_features] = self._steps_apart(turn, on_features)
        if not updates.due(step + 1, self._apart[on_features]):
            return {}
        return updates.copied({name: model.get_parameter(name) for name, rate in rates.items() if rate})

    def after(self, step: int, epoch: int, turn: Turn, before: Params, *, on_features: bool) -> None:
        if not before:
            return
        model = self._training.model
        now = dict(model.named_parameters())
        gradient = {name: now[name].grad for name in before}
        dead = {}
        if not on_features:
            x = self._last_inputs(turn)
            dead = updates.dead_units(lambda: _passed(model, x), now)
        self._tell({"epoch": epoch + 1, **updates.row(step + 1, before, now, self._training.start, gradient, dead)})

    def _steps_apart(self, turn: Turn, on_features: bool) -> int:
        """As asked for, or by all parameters that are passed through, those too that a strategy moves later: a resume
        finds the same. Where the head alone is passed through, its FLOPs are those of its weights."""
        if self._log_every is not None:
            return self._log_every
        recipe, lesson = self._training.recipe, self._training.lesson
        model = lesson.alone if on_features else lesson.model
        numbers = sum(p.numel() for p in model.parameters())
        once, passes = 2.0 * numbers, 0.0
        if not on_features:
            some = self._last_inputs(turn)[:2]  # of one alone there may be no moments
            once = updates.flops_of(lambda: _passed(model, some)) / len(some)
            passes = once * recipe.batch_size
        steps = self._training.steps
        return updates.every(None, numbers, 3 * once * recipe.images_per_step, passes, steps=steps)

    def _last_inputs(self, turn: Turn) -> Tensor:
        """The last images that go through the model at once in a step."""
        *_, rows = cut(turn.batch, self._training.recipe.batch_size)
        return self._training.lesson.inputs(torch.from_numpy(rows), turn)


def _passed(model: nn.Module, x: Tensor) -> Tensor:
    """What a model of "body" and "head" makes of a batch in evaluation, which changes nothing of it."""
    with evaluating(model):
        return model.get_submodule("head")(model.get_submodule("body")(x))
