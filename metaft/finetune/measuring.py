"""How far the steps of a fit move each layer, as `updates.jsonl` of metaft.adapt (see `metaft.updates`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from metaft import updates
from metaft.finetune.features import evaluating
from metaft.settings import Recipe
from metaft.types import Params


class Measuring:
    """Of one fit. `x` is a batch of what passes through the body; None where the head alone is passed through."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        start: Params,
        log_every: int,
        tell: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:
        self._model, self._recipe, self._start = model, recipe, start
        self._log_every, self._tell = log_every, tell
        self._apart: dict[bool, int] = {}
        """Steps from one that is measured to the next, where the body is passed through and where it is not."""

    def before(self, step: int, rates: Mapping[str, float], x: Tensor | None) -> Params:
        """The parameters that step 1, 2, ... is to move, as they are; none where it is not measured."""
        if self._tell is None:
            return {}
        if (whole := x is not None) not in self._apart:
            self._apart[whole] = self._every(x)
        if not updates.due(step, self._apart[whole]):
            return {}
        return updates.copied({name: self._model.get_parameter(name) for name, rate in rates.items() if rate})

    def after(self, step: int, epoch: int, before: Params, x: Tensor | None) -> None:
        """Tell of the step that was taken."""
        if self._tell is None or not before:
            return
        after = dict(self._model.named_parameters())
        gradient = {name: after[name].grad for name in before}
        dead = {} if x is None else updates.dead_units(lambda: _passed(self._model, x), after)
        self._tell({"epoch": epoch, **updates.row(step, before, after, self._start, gradient, dead)})

    def _every(self, x: Tensor | None) -> int:
        """By all parameters that are passed through, those too that a strategy moves later: a resume finds the same."""
        model = self._model if x is not None else self._model.get_submodule("head")
        numbers = sum(p.numel() for p in model.parameters())
        once = 2.0 * numbers
        if x is not None:
            some = x[:2]  # of one alone there may be no moments
            once = updates.flops_of(lambda: _passed(self._model, some)) / len(some)
        passes = 0.0 if x is None else once * self._recipe.batch_size
        return updates.every(self._log_every, numbers, 3 * once * self._recipe.images_per_step, passes)


def _passed(model: nn.Module, x: Tensor) -> Tensor:
    """What a model of "body" and "head" makes of a batch in evaluation, which changes nothing of it."""
    with evaluating(model):
        return model.get_submodule("head")(model.get_submodule("body")(x))
