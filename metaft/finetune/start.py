"""What fine-tuning begins with: a run's meta-learned parameters, or random ones in the same architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaft import algorithms, models
from metaft.assemble import open_run
from metaft.config import Settled, from_mapping
from metaft.defaults import hyper, model_for
from metaft.errors import CheckpointError, MetaftError, NonFiniteError
from metaft.finetune import heads
from metaft.finetune.fit import Fitted
from metaft.inner import at_step
from metaft.metrics import loss_value
from metaft.models import check_repeats, class_of, taken, with_constants
from metaft.models.functional import is_plain, linear, prepared, probe_of
from metaft.models.handed import copied, said
from metaft.models.head import body_of, why_apart
from metaft.models.stored import with_stored_moments
from metaft.tasks.pool import Preprocessing
from metaft.types import Fast, Params

FEWER = "try fewer --inner-steps"

OWN = "module"
"""The name of the start that a module's own values are."""

WIDTH = 64  # of a backbone that no run has chosen


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """A backbone to start from. `settings`, `meta` and `state` are a run's, and None or empty without one."""

    name: str
    """The run folder, or "none"."""
    architecture: Mapping[str, Any]
    """As in a checkpoint; its head and ways are those of meta-training."""
    shape: list[int]
    """Of one input, e.g. [C, H, W]."""
    preprocessing: Preprocessing | None
    """None where the inputs are not images."""
    settings: Settled | None
    meta: Params | None
    state: Params
    module: nn.Module | None
    """The user's own module, where the architecture has no name; what nothing learns in it is the run's."""
    about: Mapping[str, Any]
    """Data set, algorithm, meta-step: what the report says of it."""
    frozen: frozenset[str] = frozenset()
    """Names of the parameters in `meta` that the run kept as they were handed over."""
    label: str = "meta-learned"
    """What `meta` is."""

    @property
    def head_rows(self) -> int | None:
        """Classes of the head that the run learned; None where it learned none, or one row that all classes share."""
        module, head = build(self.architecture, None, module=self.module)
        weight = (self.meta or {}).get(f"{head}.weight")
        if weight is None:  # of a head that is no plain linear layer the parameters have other names
            layer = linear(module, head)
            learned = any(f"{head}.{part}" in (self.meta or {}) for part, _ in layer.named_parameters())
            return layer.out_features if learned else None
        return None if len(weight) == 1 else len(weight)


def from_run(path: Path, module: nn.Module | None = None) -> Start:
    """The checkpoint of a meta-training run that was best on validation.

    Raises CheckpointError where it cannot be read or is not of this module, and MetaftError where the run is of another
    command, or the module is the user's own and was not handed over.
    """
    try:
        _, _, snapshot = open_run(path, field="init")
    except CheckpointError as error:
        raise CheckpointError(f"init: {error}") from None
    header = snapshot.header
    architecture = header["architecture"]
    if (architecture["name"] == "custom") != (module is not None):
        raise MetaftError(
            f"init: {path} was trained with a module from Python; hand it over there (module=...)"
            if module is None
            else f"init: {path} was trained with {architecture['name']}, not with a module from Python"
        )
    p = Preprocessing.from_plain(header["preprocessing"]) if "preprocessing" in header else None
    if module is not None:
        module = with_constants(taken(module).cpu(), snapshot.frozen, snapshot.buffers)
    start = Start(
        name=str(path),
        architecture=architecture,
        shape=list(architecture["shape"]) if p is None else [p.channels, p.height, p.width],
        preprocessing=p,
        settings=from_mapping(Settled, header["config"], origin=f"checkpoint of {path}"),
        meta={**snapshot.meta, **snapshot.frozen},
        state=snapshot.state,
        module=module,
        about={
            "dataset": header["dataset"],
            "algorithm": header["config"]["algorithm"],
            "step": snapshot.position.step,
            **({"loss": header["loss"]} if "loss" in header else {}),
        },
        frozen=frozenset(snapshot.frozen),
    )
    _check_fits(start)
    return start


def _check_fits(start: Start) -> None:
    """Raises CheckpointError where the run's parameters are not this architecture's, naming the first that differs."""
    module, head = build(start.architecture, None, module=start.module)
    for name, p in module.named_parameters():
        of_head, found = _of(name, head), (start.meta or {}).get(name)
        if found is None and not of_head:
            raise CheckpointError(f"init: {start.name} has no parameter {name!r}, which this architecture needs")
        # The head's rows are classes, and another number of them is what adapting is for.
        if found is not None and found.shape[of_head:] != p.shape[of_head:]:
            raise CheckpointError(
                f"init: {name} has shape {list(found.shape)} in the run, {list(p.shape)} in this architecture"
            )
    _check_module(start)


def from_nothing(preprocessing: Preprocessing, module: nn.Module | None = None, *, keep: bool = False) -> Start:
    """The architecture that meta-training would choose for such images, or the user's own module: with parameters that
    are drawn, or beside those with its own (`keep`). Raises MetaftError for a module that metaft does not take."""
    shape = [preprocessing.channels, preprocessing.height, preprocessing.width]
    named = {"name": model_for(tuple(shape)), "ways": 2, "shape": shape, "width": WIDTH}
    own = None if module is None else {"name": "custom", "class": class_of(module)}
    start = Start("none", own or named, shape, preprocessing, None, None, {}, module, {})
    _check_module(start)
    if keep and module is not None:
        whole, _ = prepared(taken(module).cpu())
        values = {name: p.detach() for name, p in whole.named_parameters()}
        return dataclasses.replace(start, name=OWN, meta=values, label="own values")
    return start


def _check_module(start: Start) -> None:
    """Raises MetaftError where the user's module is not one that meta-training would take, cannot be drawn, or is more
    than a body and a head, which is what adapting trains and a classifier holds."""
    if start.module is not None:
        check_repeats(models.functional(taken(start.module).cpu()), tuple(start.shape))
        build(start.architecture, 0, module=start.module)
    elif models.is_ours(start.architecture["name"]):
        return
    whole, head = build(start.architecture, None, module=start.module)
    x = probe_of(start.shape, next(whole.parameters()).dtype)
    if why := why_apart(whole, head, x):
        raise MetaftError(f"module: adapt takes {class_of(whole)} for a body and a head, and {why}")


def constants(start: Start) -> Params:
    """What the user's module holds and nothing learns."""
    if start.module is None:
        return {}
    model = models.functional(start.module)
    return {f"still/{name}": value for name, value in {**model.frozen, **model.buffers}.items()}


def said_of(start: Start) -> str:
    """What a run's first line says of the user's module."""
    return "" if start.module is None else said(start.module)


def body(start: Start, seed: int, *, learned: bool) -> nn.Module:
    """The backbone, features [n, D] out: with the run's parameters, or with random ones drawn from `seed`."""
    bare = body_of(*build(start.architecture, None if learned else seed, module=start.module))
    return _filled(bare, start.meta or {}) if learned else bare


def build(
    architecture: Mapping[str, Any], seed: int | None, *, outputs: int | None = None, module: nn.Module | None = None
) -> tuple[nn.Module, str]:
    """A checkpoint's architecture with random parameters drawn from `seed`, and the name of its head; None draws none,
    for parameters that are to be filled in.

    `outputs` gives it another number of classes; `module` is the user's own, where the architecture has no name: it
    keeps its frozen parameters and buffers. Raises MetaftError for a module that metaft does not take.
    """
    if module is None:
        outputs = architecture["ways"] if outputs is None else outputs
        own, head = models.skeleton({**architecture, "ways": outputs}), "head"
        if not models.is_ours(architecture["name"]):
            own, head = prepared(own)
    else:
        own, head = prepared(taken(module).cpu())
        old = linear(own, head)
        if outputs is not None and outputs != old.out_features:
            with torch.device("meta"):  # the constructor would draw from the global generator
                new = nn.Linear(old.in_features, outputs, bias=old.bias is not None, dtype=old.weight.dtype)
            own.set_submodule(head, new.to_empty(device="cpu"))
    return own if seed is None else models.initialise(own, seed), head


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
    model = models.functional(module.to(device), head=head, architecture=start.architecture)
    return module, head, algorithms.build(start.settings.algorithm, model, hyper(start.settings, "cross_entropy"))


def inner(
    start: Start,
    images: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int,
    learned: bool,
    steps: int | None,
    device: str,
) -> Fitted:
    """The algorithm's own inner loop on uint8 images [n, C, H, W], as in training and meta-test.

    A learned head has one row per class of a task; where the target has another number of classes, each of them starts
    from the mean row (and moves at its mean rates, where rates are learned, and with its mean moments, where those are
    kept). `learned=False` takes the algorithm's initialisation from `seed` instead of the run's. The curve has the
    training loss before the first step and after each one, as "epoch" 0, 1, ...
    """
    settings, preprocessing = start.settings, start.preprocessing
    assert settings is not None and preprocessing is not None
    module, head, algorithm = _algorithm(start, classes, seed=seed, device=device)
    meta, state = algorithm.init(seed)
    if learned:
        assert start.meta is not None
        meta, state = (
            {k: v.to(device) for k, v in _for_classes(of_run, fresh, head).items()}
            for of_run, fresh in ((start.meta, meta), (start.state, state))
        )
    like = next(module.parameters())
    x, y = preprocessing.normalise(images.to(device)).to(like.dtype), labels.to(device)
    key = torch.zeros((), dtype=torch.int64, device=device)
    steps = settings.test_inner_steps if steps is None else steps
    every = algorithm.adapt(meta, state, x, y, key, ways=classes, steps=steps, trajectory=True)
    curve = []
    for step in range(steps + 1):
        with torch.no_grad():
            loss = loss_value("cross_entropy", algorithm.predict(at_step(every, step), x, "transductive"), y)
        if not loss.isfinite():
            raise NonFiniteError(f"inner step {step}: the training loss is {float(loss)}; {FEWER}")
        curve.append({"epoch": float(step), "loss": float(loss)})
    fast = at_step(every, -1)
    bare = _filled(body_of(module, head), fast.params).to(device)
    return Fitted(with_stored_moments(bare, x, fast.moments).eval(), _head(fast, module, head), curve)


def _for_classes(learned: Params, fresh: Params, head: str) -> Params:
    """What a run learned; of a head with another number of rows, and of its rates and moments, the mean row each."""
    learned = {k: learned[k] for k in fresh}  # and nothing that is constant
    others = {k: v for k, v in learned.items() if _of(k, head) and v.shape != fresh[k].shape}
    return {**learned, **{k: v.mean(0, keepdim=True).expand(fresh[k].shape).clone() for k, v in others.items()}}


def _head(fast: Fast, module: nn.Module, head: str) -> nn.Module:
    """What turns features into logits at these fast weights. Raises MetaftError where that is no head that we know."""
    if fast.extra.keys() == {"prototypes"}:
        return heads.Prototype(fast.extra["prototypes"])
    if fast.extra.keys() == {"support", "labels", "scale"}:
        return heads.Matching(**fast.extra)
    if fast.extra:
        raise MetaftError(f"method: the fast weights hold {sorted(fast.extra)}, which no classifier head can store")
    own = {k.removeprefix(f"{head}."): v for k, v in fast.params.items() if _of(k, head)}
    layer = linear(module, head)
    if not is_plain(layer) or not all(p.requires_grad for p in layer.parameters()):
        return _filled(layer, own)
    return heads.filled("cosine" if "scale" in own else "linear", own)


def _of(name: str, head: str) -> bool:
    return name.startswith(f"{head}.")


def _filled(module: nn.Module, params: Params) -> nn.Module:
    """A copy with these parameters, of which there may be more; buffers stay, and frozen ones that are not in them."""
    module = copied(module)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name in params or p.requires_grad:
                p.copy_(params[name])
    return module
