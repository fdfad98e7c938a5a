"""Fine-tuning, one visible loop. Every random choice is a function of (seed, epoch)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metaft import schedules
from metaft.errors import NonFiniteError
from metaft.finetune import heads, optim, strategies
from metaft.finetune.augment import of_epoch
from metaft.finetune.averaged import follow
from metaft.finetune.batches import batches_of, cut
from metaft.finetune.examples import Prepared, like_of
from metaft.finetune.extras import Batch, Extra, Origin, all_named, composed
from metaft.finetune.features import Features, evaluating, features_of, in_parts, takes_alone
from metaft.finetune.measuring import Measuring
from metaft.finetune.outcomes import Outcome, outcome_of
from metaft.finetune.strategies import Groups, Strategy
from metaft.inputs import Inputs
from metaft.inputs.base import Examples
from metaft.models.blocks import blocks_of
from metaft.models.handed import copied
from metaft.models.stored import with_stored_moments
from metaft.runs.checkpoint import under
from metaft.sampler import Stream, raw_words
from metaft.settings import Recipe

SMALLER = "try a smaller --lr"

PARTS = ("model", "best", "average")
"""Of a fit's state, those that have a model's values."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A backbone with stored moments, its head, and how they came about."""

    body: nn.Module
    head: nn.Module
    curve: list[dict[str, float]]
    """Per epoch: "epoch", "loss" and, with validation examples, "val_loss" and "val_accuracy" or, of numbers,
    "val_rmse"."""
    trained: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of the backbone, where gradients trained it: "numbers" that moved in some step, "of" how many it has, and the
    names of weights that the strategy had to leave ("stays")."""

    @property
    def kept(self) -> int:
        """The epoch whose parameters these are: that of the lowest validation loss, or the last."""
        validated = [row for row in self.curve if "val_loss" in row]
        return int(min(validated, key=lambda row: row["val_loss"])["epoch"] if validated else self.curve[-1]["epoch"])


# Above 60 lines: the one loop, to be seen whole.
def fit(
    body: nn.Module,
    inputs: Inputs,
    examples: Examples,
    labels: Tensor,
    classes: int,
    recipe: Recipe,
    *,
    seed: int = 0,
    val_examples: Examples | None = None,
    val_labels: Tensor | None = None,
    strategy: Strategy | None = None,
    extras: Sequence[Extra] | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    each_epoch: bool = True,
    should_stop: Callable[[], None] = lambda: None,
    resume: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    log_every: int = 10,
    on_update: Callable[[Mapping[str, Any]], None] | None = None,
) -> Fitted:
    """Fine-tune a copy of `body` (features [n, D] out, EpisodeNorm inside) and a fresh head on raw examples [n, ...],
    which go to the body's device batch by batch. `labels` [n] are int64 of so many `classes`, or numbers where that is
    0: the head then has one output, and the loss is the squared error. `known` are the features of training and
    validation examples, where the caller has them.

    `strategy` says what trains and at which rate in each step, `extras` change the loss (None: as the recipe says). The
    rate of a parameter in a step is the recipe's times the schedule's factor times the strategy's. Training batches are
    normalised with their own statistics; the result with those of all training examples, stored at the end. Epochs up
    to the first in which the body moves are on features that were computed once, where those do not depend on the
    batch. With validation examples the epoch of the lowest validation loss is kept (inductively, as the result will
    predict) and training stops after `patience` epochs without a better one; without `each_epoch` they judge the last
    epoch alone, and neither happens. `on_epoch` gets a copy of all that `resume` needs for the same bits, `on_update`
    every `log_every` steps, or fewer (see `metaft.updates`), how far the step moved each layer. Raises
    NonFiniteError where the training or validation loss is not finite; that of the last step, which no loss has seen,
    shows in the result alone.
    """
    strategy = strategies.named(recipe.trains) if strategy is None else strategy
    extras = all_named(recipe.extra) if extras is None else extras
    schedule = schedules.make(recipe.anneals)
    like = like_of(body)
    train, labels = Prepared(examples, inputs, like), labels.to(like.device)
    outcome = outcome_of(recipe, labels, classes, like)
    targets = outcome.prepared(labels)
    val = None if val_examples is None or val_labels is None else Prepared(val_examples, inputs, like)
    val = val if val is not None and len(val) else None
    per_epoch = len(batches_of(len(train), recipe.images_per_step, seed, 0))
    steps = recipe.passes * per_epoch
    model, groups, begun, still = _start(
        body, train, labels, outcome, recipe, seed, strategy, per_epoch, None if known is None else known[0]
    )
    # A parameter is a group of the optimiser by itself: its rate may change with every step.
    optimizer = optim.named(recipe.optimizer)([(n, p) for n, p in _learning(model) if n not in still], recipe.rate)
    origin = Origin({n: p.detach().clone() for n, p in model.named_parameters()}, seed, classes, inputs)
    objective = composed(extras, origin, outcome.loss, recipe.dropout)
    measuring = Measuring(model, recipe, origin.params, log_every, on_update)
    alone = nn.ModuleDict({"body": nn.Identity(), "head": model.get_submodule("head")})  # on features
    features = Features(model.get_submodule("body"), train, val, begun, None if known is None else known[1])
    curve: list[dict[str, float]] = []
    best = (math.inf, {})
    average = {} if recipe.ema is None else _values(model, still)
    judged = model if recipe.ema is None else copied(model)
    if resume is not None:
        resume = dict(_copied(resume))  # an optimiser would go on to write into the tensors that it is given
        model.load_state_dict(resume["model"])
        optim.put_moments(optimizer, resume["adam"], strategy.rates(groups, 0, steps, per_epoch))
        curve, best = resume["curve"], (resume["best_loss"], resume["best"])
        average = resume.get("average", {})
    judge = "val_loss" if val is not None and each_epoch else "loss"  # of what a schedule may follow
    settled = _settled(strategy, groups, recipe.passes, per_epoch)
    stayed = recipe.augment == "none" and not any(extra.of_inputs for extra in extras)
    # Features are those of the start, as long as this is true.
    stayed = stayed and _stays(strategy, groups, recipe.passes, per_epoch, range(len(curve)))
    for epoch in range(len(curve), recipe.passes):
        if recipe.patience is not None and _stale(curve[settled:], recipe.patience):
            break
        total, change = 0.0, of_epoch(recipe.augment, len(train), seed, epoch)
        x: Tensor | None = None  # of a batch that passes through the body
        batches = batches_of(len(train), recipe.images_per_step, seed, epoch)
        stayed = stayed and (bool(still) or _stays(strategy, groups, recipe.passes, per_epoch, [epoch]))
        computed = features.train if stayed else None
        lowered = schedules.lowered(schedule, [row[judge] for row in curve[settled:]])
        for number, batch in enumerate(batches):
            step = epoch * len(batches) + number
            rates = {n: r for n, r in strategy.rates(groups, step, steps, per_epoch).items() if n not in still}
            optim.set_rates(optimizer, rates, recipe.rate * lowered * schedule(step, steps))
            optimizer.zero_grad()
            for rows in map(torch.from_numpy, cut(batch, recipe.batch_size)):
                y = targets[rows.to(targets.device)]
                if computed is not None:
                    loss = objective(alone, Batch(computed[rows.to(computed.device)], y, rows, epoch))
                else:
                    raw = examples[rows] if change is None else change(examples[rows].to(like.device), rows)
                    x = train.prepare(raw)
                    loss = objective(model, Batch(x, y, rows, epoch))
                if len(rows) < len(batch):  # its share of the step's mean
                    loss = loss * (outcome.weight(y) / outcome.weight(targets[torch.from_numpy(batch)]))
                if loss.requires_grad:
                    loss.backward()
                total += float(loss.detach()) * len(batch)
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            before = measuring.before(step + 1, rates, x)
            optimizer.step()
            measuring.after(step + 1, epoch + 1, before, x)
            if recipe.ema is not None:
                follow(average, model.state_dict(), recipe.ema, step, still)
            should_stop()
        if not math.isfinite(total):
            raise NonFiniteError(f"epoch {epoch + 1}: the training loss is {total}; {SMALLER}")
        row = {"epoch": float(epoch + 1), "loss": total / len(train)}
        if val is not None and val_labels is not None and (each_epoch or epoch + 1 == recipe.passes):
            judged.load_state_dict(average or model.state_dict())
            outputs = _outputs(judged, train, val, features.val if stayed else None)
            row |= outcome.validated(outputs, outcome.prepared(val_labels))
            if not math.isfinite(row["val_loss"]):
                raise NonFiniteError(f"epoch {epoch + 1}: the validation loss is {row['val_loss']}; {SMALLER}")
            if row["val_loss"] < best[0]:
                best = (row["val_loss"], _values(judged, still))
        curve.append(row)
        if on_epoch is not None:
            state = {"adam": optim.moments_of(optimizer), "curve": curve, "average": average}
            on_epoch({**_copied(state), "model": _values(model, still), "best_loss": best[0], "best": best[1]})
    if kept := best[1] or average:
        model.load_state_dict(kept)
    moved = _moved(strategy, groups, recipe.passes, per_epoch, range(len(curve)))
    trained: dict[str, Any] = {"numbers": sum(model.get_parameter(name).numel() for name in moved)}
    trained |= {"of": sum(p.numel() for p in body.parameters()), "stays": strategy.stays(body)}
    model = strategy.finish(model)
    stored, head = _stored(model.get_submodule("body"), train), outcome.finished(model.get_submodule("head"))
    return Fitted(stored, head, curve, trained)


def _copied(state: Any) -> Any:
    """A tree of tensors and plain data, for as long as training goes on with the original."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), state)


def _values(model: nn.Module, still: Collection[str]) -> dict[str, Tensor]:
    """A copy of a model's values; of parameters that are `still`, which nothing moves, they themselves."""
    return {k: v if k in still else v.detach().clone() for k, v in model.state_dict().items()}


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `fit` gives `on_epoch`, as named tensors and plain data, for a checkpoint."""
    tensors = {f"{part}/{k}": v for part in PARTS for k, v in state[part].items()}
    tensors |= {f"adam/{name}/{slot}": v for name, slots in state["adam"].items() for slot, v in slots.items()}
    return tensors, {"curve": state["curve"], "best_loss": state["best_loss"]}


def unflatten(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    adam: dict[str, dict[str, Tensor]] = {}
    for key, value in under(tensors, "adam").items():
        name, _, slot = key.rpartition("/")
        adam.setdefault(name, {})[slot] = value
    return {
        **{part: under(tensors, part) for part in PARTS},
        "adam": adam,
        "curve": plain["curve"],
        "best_loss": plain["best_loss"],
    }


def groups_of(model: nn.Module) -> Groups:
    """Names of the parameters that can learn, block by block from the input to the head, which is one group."""
    body = tuple(tuple(f"body.{name}" for name in block) for block in blocks_of(model.get_submodule("body")))
    return (*body, tuple(name for name, _ in _learning(model) if name.startswith("head.")))


def _learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that the user did not freeze, by name, as long as no strategy has set any rate."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _start(
    body: nn.Module,
    train: Prepared,
    labels: Tensor,
    outcome: Outcome,
    recipe: Recipe,
    seed: int,
    strategy: Strategy,
    per_epoch: int,
    known: Tensor | None,
) -> tuple[nn.Module, Groups, Tensor | None, frozenset[str]]:
    """A copy of the body and a head that starts from its features, as the strategy wants them, the groups of their
    parameters, the features, where the strategy put nothing else in the body's place, and the names of the body's
    parameters, if none of them ever moves."""
    body = copied(body)
    # Of a body that needs no moments of these examples, others have use for the features too: they are cached.
    features = known
    if features is None:
        features = (features_of if takes_alone(body) else in_parts)(_stored(body, train), train)
    head = outcome.begun(heads.build(recipe.head, features, labels, outcome.outputs, head_seed(seed)))
    model = strategy.prepare(nn.ModuleDict({"body": body, "head": head}), seed)
    same_body = model.get_submodule("body") is body
    groups, still = groups_of(model), set()
    if _stays(strategy, groups, recipe.passes, per_epoch, range(recipe.passes)):
        # Nothing below the head may ever change, statistics included.
        still = {name for group in groups[:-1] for name in group}
        model.set_submodule("body", with_stored_moments(model.get_submodule("body"), train).eval())
        for name in still:
            model.get_parameter(name).requires_grad_(False)
    return model, groups, features if same_body else None, frozenset(still)


def head_seed(seed: int) -> int:
    """A seed for the head, of which a random backbone of this seed knows nothing."""
    return int(raw_words(seed, "train", [0], 1, stream=Stream.HEADS)[0, 0])


def _settled(strategy: Strategy, groups: Groups, epochs: int, per_epoch: int) -> int:
    """The epoch from which the same parameters train to the end: patience is for that phase, since in those before it
    the next one would be waited for in vain."""
    steps = epochs * per_epoch
    trained = [
        {n for n, r in strategy.rates(groups, i * per_epoch, steps, per_epoch).items() if r} for i in range(epochs)
    ]
    return max((i for i in range(1, epochs) if trained[i] != trained[i - 1]), default=0)


def _stays(strategy: Strategy, groups: Groups, epochs: int, per_epoch: int, some: Iterable[int]) -> bool:
    """Whether no parameter below the head moves in any step of `some` of the epochs."""
    of_body = {name for group in groups[:-1] for name in group}
    return not any(
        of_body & {name for name, rate in strategy.rates(groups, step, epochs * per_epoch, per_epoch).items() if rate}
        for epoch in some
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)
    )


def _moved(strategy: Strategy, groups: Groups, epochs: int, per_epoch: int, some: Iterable[int]) -> set[str]:
    """Names of the parameters below the head that move in the first or the last step of `some` of the epochs."""
    steps = [step for epoch in some for step in (epoch * per_epoch, (epoch + 1) * per_epoch - 1)]
    moved = {n for i in steps for n, rate in strategy.rates(groups, i, epochs * per_epoch, per_epoch).items() if rate}
    return moved & {name for group in groups[:-1] for name in group}


def _stale(curve: list[dict[str, float]], patience: int) -> bool:
    """Whether the lowest validation loss is `patience` epochs old."""
    losses = [row["val_loss"] for row in curve if "val_loss" in row]
    return bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience


def _stored(body: nn.Module, train: Prepared) -> nn.Module:
    return with_stored_moments(body, train).eval()


@torch.no_grad()
def _outputs(model: nn.Module, train: Prepared, val: Prepared, features: Tensor | None) -> Tensor:
    """Of validation examples, as the result would predict them."""
    if features is None:
        features = _evaluated(model.get_submodule("body"), train, val)
    return model.get_submodule("head")(features)


def _evaluated(body: nn.Module, train: Prepared, val: Prepared) -> Tensor:
    """Features of val as the result would have them. The body is copied only where it needs the moments of train."""
    if not takes_alone(body):
        return in_parts(_stored(body, train), val)
    with evaluating(body):
        return in_parts(body, val)
