"""What becomes of each layer's parameters: which are frozen, which are learned, and which a task adapts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from metaft import algorithms, models, plugin
from metaft.defaults import hyper
from metaft.errors import MetaftError
from metaft.finetune import strategies
from metaft.finetune.phases import groups_of
from metaft.models.architecture import build, is_of
from metaft.models.handed import copied
from metaft.objective import figure_of
from metaft.starts.base import Start
from metaft.types import Episode, Loss
from metaft.views.layers import Layer
from metaft.views.subject import Subject

FROZEN, LEARNED, ADAPTED, MADE, TRAINED = "frozen", "learned", "adapted", "made anew", "trained"
UNUSED, DRAWN, GIVEN, NONE = "unused", "drawn", "as published", ""

MEANING = {
    LEARNED: "moves in meta-training, and stays in a task",
    ADAPTED: "moves in meta-training, and again in each task",
    MADE: "is made of each task's support images, and of nothing learned",
    TRAINED: "moves in fine-tuning",
    FROZEN: "stays as it was",
    UNUSED: "is there, and this algorithm uses other means",
    DRAWN: "drawn at random, nothing is learned yet",
    GIVEN: "as its publisher trained it; what fine-tuning moves is its strategy's to say (docs/adapting.md)",
}
"""In the words of the legend."""

_SAMPLES = 200  # steps of a fit at which a strategy is asked what moves


def moves_of(subject: Subject, layers: Iterable[Layer]) -> tuple[dict[str, str], str]:
    """(what becomes of each layer that has parameters, by path; a sentence on how that is known)."""
    layers = [layer for layer in layers if layer.names]
    if subject.command == "adapt":
        return _of_fine_tuning(subject, layers)
    if subject.start.settings is None:
        kind = DRAWN if subject.start.meta is None else GIVEN
        return {layer.path: kind for layer in layers if not is_of(f"{layer.path}.", subject.built.head)}, ""
    return _of_meta_training(subject, layers)


def _of_meta_training(subject: Subject, layers: list[Layer]) -> tuple[dict[str, str], str]:
    start, head = subject.start, subject.built.head
    meta = start.meta or {}
    try:
        adapted, made, extra = adapted_by(start, loss_of(subject))
    except MetaftError as error:
        return _learned(start, layers), f"What a task adapts is not shown: {error}."
    states: dict[str, str] = {}
    for layer in layers:
        names = set(layer.names)
        if names & adapted:
            states[layer.path] = ADAPTED
        elif names & made or (extra and is_of(f"{layer.path}.", head) and not names & meta.keys()):
            states[layer.path] = MADE
        elif names <= start.frozen:
            states[layer.path] = FROZEN
        else:
            states[layer.path] = LEARNED if names & meta.keys() else UNUSED
    name = start.about["algorithm"]
    return states, f"What a task adapts was measured: by two inner steps of {name} on made-up images."


def _learned(start: Start, layers: list[Layer]) -> dict[str, str]:
    return {layer.path: FROZEN if set(layer.names) <= start.frozen else LEARNED for layer in layers}


def loss_of(subject: Subject) -> Loss:
    """The loss by name. Raises MetaftError for one from Python."""
    if "loss" in subject.start.about:
        raise MetaftError(f"the run went down {subject.start.about['loss']}, a loss from Python")
    test = subject.result.get("test")
    return "mse" if test is not None and figure_of(test["transductive"]) == "mse" else "cross_entropy"


def adapted_by(start: Start, loss: Loss, *, seed: int = 0) -> tuple[set[str], set[str], bool]:
    """(names of the learned parameters that the run's own inner loop moves, of those that it makes without having
    learned them, whether it makes something else of the support images). Raises MetaftError where it cannot be had.

    By two steps on support images that are noise, so that it is the algorithm itself that says so.
    """
    settings = start.settings
    assert settings is not None
    plugin.load(settings.learner.plugin, settings.learner.algorithm)
    module, head = build(start.architecture, seed, module=start.module)
    module = models.with_constants(module, {}, start.buffers)
    model = models.functional(module, head=head, architecture=start.architecture)
    algorithm = algorithms.build(settings.learner.algorithm, model, hyper(settings, loss))
    fresh, state = algorithm.init(seed)
    meta = {name: (start.meta or {}).get(name, value) for name, value in fresh.items()}
    task = _noise(start, settings.task.ways, settings.task.shots, loss, next(iter(model.params.values())).dtype)
    steps = 2 if settings.test.test_inner_steps else 0
    with torch.no_grad():
        fast = algorithm.adapt(
            meta, {k: start.state.get(k, v) for k, v in state.items()}, task.support_x, task.support_y, task.key,
            ways=settings.task.ways, steps=steps,
        )  # fmt: skip
    moved = {k for k, v in fast.params.items() if k in meta and not torch.equal(v, meta[k])}
    return moved, fast.params.keys() - meta.keys() - start.frozen, bool(fast.extra)


def _noise(start: Start, ways: int, shots: int, loss: Loss, dtype: torch.dtype) -> Episode:
    generator = torch.Generator().manual_seed(0)
    n = ways * shots
    x = torch.randn(n, *start.shape, generator=generator).to(dtype)
    y: Tensor = torch.arange(ways).repeat(shots)
    if loss != "cross_entropy":
        y = torch.randn(n, 1, generator=generator).to(dtype)
    return Episode(x, y, x, y, torch.arange(ways), torch.zeros((), dtype=torch.int64))


def _of_fine_tuning(subject: Subject, layers: list[Layer]) -> tuple[dict[str, str], str]:
    result = subject.result
    if result["method"] == "inner":
        return {}, "What the run's own inner loop adapts is in the report of that run."
    chosen = result["starts"][0].get("chosen") or {}
    text = str(chosen.get("strategy") or result.get("strategy") or "full")
    try:
        strategy = strategies.named(text)
    except MetaftError as error:
        return {}, f"What the strategy trained is not shown: {error}."
    model = nn.ModuleDict({"body": subject.classifier.body, "head": subject.classifier.head})
    prepared = strategy.prepare(copied(model), 0)
    ran = int(result["starts"][0]["epochs"] or 1)
    epochs = int(chosen.get("epochs") or result.get("epochs") or ran)  # which rates go by; patience may end it before
    images = result.get("batch_size", 32) * result.get("accumulate", 1)
    per_epoch = max(1, math.ceil(result["train_images"] / images))
    steps, last = max(1, epochs * per_epoch), min(epochs, ran) * per_epoch - 1
    at = sorted({round(i * last / (_SAMPLES - 1)) for i in range(_SAMPLES)})
    rates = [strategy.rates(groups_of(prepared), step, steps, per_epoch) for step in at]
    states = {layer.path: _state([_factor(r, layer.path) for r in rates], at, steps) for layer in layers}
    return states, f"The strategy is {text}."


def _factor(rates: Mapping[str, float], path: str) -> float:
    """The largest factor of the rate in a step among the parameters in a layer, those that a strategy adds too."""
    return max((rate for name, rate in rates.items() if is_of(name, path)), default=0.0)


def _state(factors: list[float], at: list[int], steps: int) -> str:
    """In words: from which share of the steps on it moves, and at which factor of the rate at most."""
    first = next((step for step, factor in zip(at, factors, strict=True) if factor > 0), None)
    if first is None:
        return FROZEN
    more = [f"from {100 * first / steps:.0f} % of the fit's steps on"] if first else []
    most = max(factors)
    more += [f"at {most:.3g} of the rate"] if most != 1 else []
    return f"{TRAINED}, {', '.join(more)}" if more else TRAINED
