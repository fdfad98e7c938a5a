"""Adapting by the run's own inner loop, as in meta-training, instead of fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metaft import algorithms, models
from metaft.defaults import hyper
from metaft.errors import MetaftError, NonFiniteError
from metaft.finetune import heads
from metaft.finetune.fit import Fitted
from metaft.inner import at_step
from metaft.metrics import loss_value
from metaft.models.architecture import build, filled, is_of
from metaft.models.functional import is_plain, linear
from metaft.models.head import body_of
from metaft.models.stored import with_stored_moments
from metaft.starts.base import Start
from metaft.types import Fast, Params

FEWER = "try fewer --inner-steps"


def check_inner(start: Start, classes: int) -> None:
    """Raises MetaftError where the run's inner loop cannot tell this number of classes apart, or is not to be had."""
    if "loss" in start.about:
        raise MetaftError(
            f"method: the inner loop of {start.name} goes down {start.about['loss']}, a loss from Python that its "
            "folder does not hold; take --method finetune"
        )
    module, head = build(start.architecture, None, module=start.module)
    layer, others = linear(module, head), start.head_rows not in (None, classes)
    if others and not (is_plain(layer) and all(p.requires_grad for p in layer.parameters())):
        raise MetaftError(
            f"method: the head of the run is frozen or no plain nn.Linear ({type(layer).__name__}), so its inner loop "
            f"cannot have the {classes} classes of the target; take --method finetune"
        )
    algorithm = _algorithm(start, classes)[2]
    if start.module is not None and start.frozen != models.functional(start.module).frozen.keys():
        raise MetaftError(
            f"method: frozen in the run are {sorted(start.frozen)[:6]}, so its inner loop needs a module of which the "
            "same are frozen; take --method finetune"
        )
    if others and not algorithm.adapts_head:
        raise MetaftError(
            f"method: {start.about['algorithm']} keeps the head of its {start.head_rows}-way tasks as it is, so its "
            f"inner loop cannot learn the {classes} classes of the target; take --method finetune"
        )


def _algorithm(
    start: Start, classes: int, *, seed: int = 0, device: str = "cpu"
) -> tuple[nn.Module, str, algorithms.Algorithm]:
    """A fresh module for this number of classes, the name of its head, and the run's algorithm over it."""
    assert start.settings is not None
    module, head = build(start.architecture, seed, outputs=classes, module=start.module)
    module = models.with_constants(module, {}, start.buffers)
    model = models.functional(module.to(device), head=head, architecture=start.architecture)
    return (
        module,
        head,
        algorithms.build(start.settings.learner.algorithm, model, hyper(start.settings, "cross_entropy")),
    )


def inner(
    start: Start,
    examples: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int,
    steps: int | None,
    device: str,
) -> Fitted:
    """The algorithm's own inner loop on raw inputs [n, ...], as in training and meta-test.

    A learned head has one row per class of a task; where the target has another number of classes, each of them starts
    from the mean row (and moves at its mean rates, where rates are learned, and with its mean moments, where those are
    kept). A start without parameters takes the algorithm's initialisation from `seed` instead of the run's. The curve
    has the training loss before the first step and after each one, as "epoch" 0, 1, ...
    """
    settings, inputs = start.settings, start.inputs
    assert settings is not None and inputs is not None
    module, head, algorithm = _algorithm(start, classes, seed=seed, device=device)
    meta, state = algorithm.init(seed)
    if start.meta is not None:
        meta, state = (
            {k: v.to(device) for k, v in _for_classes(of_run, fresh, head).items()}
            for of_run, fresh in ((start.meta, meta), (start.state, state))
        )
    like = next(module.parameters())
    x, y = inputs(examples.to(device)).to(like.dtype), labels.to(device)
    key = torch.zeros((), dtype=torch.int64, device=device)
    steps = settings.test.test_inner_steps if steps is None else steps
    every = algorithm.adapt(meta, state, x, y, key, ways=classes, steps=steps, trajectory=True)
    curve = []
    for step in range(steps + 1):
        with torch.no_grad():
            loss = loss_value("cross_entropy", algorithm.predict(at_step(every, step), x, "transductive"), y)
        if not loss.isfinite():
            raise NonFiniteError(f"inner step {step}: the training loss is {float(loss)}; {FEWER}")
        curve.append({"epoch": float(step), "loss": float(loss)})
    fast = at_step(every, -1)
    bare = filled(body_of(module, head), fast.params).to(device)
    return Fitted(with_stored_moments(bare, x, fast.moments).eval(), _head(fast, module, head), curve)


def _for_classes(learned: Params, fresh: Params, head: str) -> Params:
    """What a run learned; of a head with another number of rows, and of its rates and moments, the mean row each."""
    learned = {k: learned[k] for k in fresh}  # and nothing that is constant
    others = {k: v for k, v in learned.items() if is_of(k, head) and v.shape != fresh[k].shape}
    return {**learned, **{k: v.mean(0, keepdim=True).expand(fresh[k].shape).clone() for k, v in others.items()}}


def _head(fast: Fast, module: nn.Module, head: str) -> nn.Module:
    """What turns features into logits at these fast weights. Raises MetaftError where that is no head that we know."""
    if fast.extra.keys() == {"prototypes"}:
        return heads.Prototype(fast.extra["prototypes"])
    if fast.extra.keys() == {"support", "labels", "scale"}:
        return heads.Matching(**fast.extra)
    if fast.extra:
        raise MetaftError(f"method: the fast weights hold {sorted(fast.extra)}, which no classifier head can store")
    tensors = {k.removeprefix(f"{head}."): v for k, v in fast.params.items() if is_of(k, head)}
    layer = linear(module, head)
    if not is_plain(layer) or not all(p.requires_grad for p in layer.parameters()):
        return filled(layer, tensors)
    return heads.filled("cosine" if "scale" in tensors else "linear", tensors)
