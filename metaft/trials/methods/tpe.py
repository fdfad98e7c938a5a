"""The tree-structured Parzen estimator (Bergstra et al. 2011), Optuna's, by ask and tell."""

from __future__ import annotations

from typing import Any

from metaft.errors import MetaftError
from metaft.trials.methods.base import Values
from metaft.trials.space import Choices, Dimension, Space


class Tpe:
    """Optuna's study in memory. Its random numbers go on from trial to trial, so a search that goes on asks and tells
    all of it again, and comes to the same study. Where another version of Optuna proposes something else then, what
    was tried before is put into the study as it was.

    Raises MetaftError where Optuna is not installed.
    """

    size: int | None = None
    exhausts = False

    def __init__(self, space: Space, seed: int, maximise: bool) -> None:
        self._optuna = optuna = _optuna()
        self._space = space
        self._distributions = {d.name: _distribution(optuna, d) for d in space.searched}
        self._study = optuna.create_study(
            direction="maximize" if maximise else "minimize", sampler=optuna.samplers.TPESampler(seed=seed % 2**32)
        )
        self._failed = optuna.trial.TrialState.FAIL
        self._asked: dict[int, Any] = {}
        """Optuna's trial, or the parameters of one that it did not propose."""

    def ask(self, number: int, before: Values | None = None) -> Values:
        trial = self._asked[number] = self._study.ask(self._distributions)
        values = {d.name: _value(d, trial.params[d.name]) for d in self._space.searched}
        if before is None or values == before:
            return values
        self._study.tell(trial, state=self._failed)
        self._asked[number] = {d.name: _proposed(d, before[d.name]) for d in self._space.searched}
        return before

    def tell(self, number: int, value: float | None) -> None:
        # Optuna takes what failed for not tried: it neither wins nor teaches.
        trial, state = self._asked.pop(number), self._failed if value is None else None
        if not isinstance(trial, dict):
            self._study.tell(trial, value, state=state)
        elif value is not None:
            create = self._optuna.trial.create_trial
            self._study.add_trial(create(params=trial, distributions=self._distributions, value=value))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MetaftError("method: tpe needs Optuna, which is not installed: pip install '.[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    """Of choices their places, since a choice may be a list."""
    if isinstance(dimension, Choices):
        return optuna.distributions.CategoricalDistribution(range(len(dimension.values)))
    d = dimension
    high = d.high if d.values is None or d.log else d.values[-1]  # the last step that there is: Optuna would warn
    if d.whole:
        return optuna.distributions.IntDistribution(int(d.low), int(high), log=d.log, step=int(d.step or 1))
    return optuna.distributions.FloatDistribution(d.low, high, log=d.log, step=d.step)


def _value(dimension: Dimension, proposed: Any) -> Any:
    return dimension.values[proposed] if isinstance(dimension, Choices) else proposed


def _proposed(dimension: Dimension, value: Any) -> Any:
    """The inverse of `_value`."""
    return dimension.values.index(value) if isinstance(dimension, Choices) else value
