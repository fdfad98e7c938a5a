"""Fine-tuning by Adam and cross-entropy, one visible loop. Every random choice is a function of (seed, epoch)."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.errors import CheckpointError, MetaftError, NonFiniteError
from metaft.finetune import heads
from metaft.finetune.examples import Prepared
from metaft.finetune.extras import Batch, Extra, Origin, composed
from metaft.finetune.strategies import STRATEGIES, Groups, Strategy
from metaft.inputs import Inputs
from metaft.inputs.base import Examples, at_most
from metaft.models.handed import copied
from metaft.models.stored import with_stored_moments
from metaft.runs.checkpoint import under
from metaft.sampler import Stream, raw_words, uniform
from metaft.settings import Recipe

SMALLER = "try a smaller --lr"

OF_FREEZE = {"none": "full", "backbone": "head"}
"""The strategy that each value of `Recipe.freeze` is."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A backbone with stored moments, its head, and how they came about."""

    body: nn.Module
    head: nn.Module
    curve: list[dict[str, float]]
    """Per epoch: "epoch", "loss" and, with validation examples, "val_loss" and "val_accuracy"."""

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
    extras: Sequence[Extra] = (),
    should_stop: Callable[[], None] = lambda: None,
    resume: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Mapping[str, Any]], None] = lambda state: None,
) -> Fitted:
    """Fine-tune a copy of `body` (features [n, D] out, EpisodeNorm inside) and a fresh head on raw examples [n, ...],
    which go to the body's device batch by batch.

    `strategy` says what trains and at which rate in each step (None: as `recipe.freeze` says), `extras` change the
    loss. Training batches are normalised with their own statistics; the result with those of all training examples,
    stored at the end. With validation examples the epoch of the lowest validation loss is kept (inductively, as the
    result will predict) and training stops after `patience` epochs without a better one. `on_epoch` gets a copy of all
    that `resume` needs for the same bits. Raises NonFiniteError where the training or validation loss is not finite;
    that of the last step, which no loss has seen, shows in the result alone.
    """
    strategy = STRATEGIES[OF_FREEZE[recipe.freeze]]() if strategy is None else strategy
    like = _like(body)
    train, labels = Prepared(examples, inputs, like), labels.to(like.device)
    steps = recipe.epochs * len(_batches(len(train), recipe.batch_size, seed, 0))
    model, groups = _start(body, train, labels, classes, recipe, seed, strategy, steps)
    # A parameter is a group of the optimiser by itself: its rate may change with every step.
    optimizer = torch.optim.Adam([{"params": [p], "name": name} for name, p in _learning(model)], lr=recipe.lr)
    objective = composed(extras, Origin({n: p.detach().clone() for n, p in model.named_parameters()}, seed))
    curve: list[dict[str, float]] = []
    best = (math.inf, {})
    if resume is not None:
        resume = copy.deepcopy(dict(resume))  # Adam would go on to write into the tensors that it is given
        model.load_state_dict(resume["model"])
        _put_moments(optimizer, resume["adam"], strategy.rates(groups, 0, steps))
        curve, best = resume["curve"], (resume["best_loss"], resume["best"])
    settled = _settled(strategy, groups, recipe.epochs, steps)
    for epoch in range(len(curve), recipe.epochs):
        if _stale(curve[settled:], recipe.patience):
            break
        total, moves = 0.0, _moves(len(train), recipe, seed, epoch)
        batches = _batches(len(train), recipe.batch_size, seed, epoch)
        for number, batch in enumerate(batches):
            rows = torch.from_numpy(batch)
            raw = examples[rows] if moves is None else _augmented(examples[rows].to(like.device), moves[rows])
            set_rates(optimizer, strategy.rates(groups, epoch * len(batches) + number, steps), recipe.lr)
            loss = objective(model, Batch(train.prepare(raw), labels[rows.to(labels.device)], rows, epoch))
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
            should_stop()
        if not math.isfinite(total):
            raise NonFiniteError(f"epoch {epoch + 1}: the training loss is {total}; {SMALLER}")
        row = {"epoch": float(epoch + 1), "loss": total / len(train)}
        if val_examples is not None and val_labels is not None and len(val_examples):
            row |= _validate(model, train, Prepared(val_examples, inputs, like), val_labels.to(like.device))
            if not math.isfinite(row["val_loss"]):
                raise NonFiniteError(f"epoch {epoch + 1}: the validation loss is {row['val_loss']}; {SMALLER}")
            if row["val_loss"] < best[0]:
                best = (row["val_loss"], copy.deepcopy(model.state_dict()))
        curve.append(row)
        state = {"model": model.state_dict(), "adam": _moments(optimizer), "curve": curve}
        on_epoch(copy.deepcopy({**state, "best_loss": best[0], "best": best[1]}))
    if best[1]:
        model.load_state_dict(best[1])
    model = strategy.finish(model)
    return Fitted(_stored(model.get_submodule("body"), train), model.get_submodule("head"), curve)


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `fit` gives `on_epoch`, as named tensors and plain data, for a checkpoint."""
    tensors = {f"{part}/{k}": v for part in ("model", "best") for k, v in state[part].items()}
    tensors |= {f"adam/{name}/{slot}": v for name, slots in state["adam"].items() for slot, v in slots.items()}
    return tensors, {"curve": state["curve"], "best_loss": state["best_loss"]}


def unflatten(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    adam: dict[str, dict[str, Tensor]] = {}
    for key, value in under(tensors, "adam").items():
        name, _, slot = key.rpartition("/")
        adam.setdefault(name, {})[slot] = value
    return {
        "model": under(tensors, "model"),
        "best": under(tensors, "best"),
        "adam": adam,
        "curve": plain["curve"],
        "best_loss": plain["best_loss"],
    }


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Adam's state by the parameters' names; of those that never moved there is none."""
    parameters = {group["name"]: p for group in optimizer.param_groups for p in group["params"]}
    return {name: dict(optimizer.state[p]) for name, p in parameters.items() if p in optimizer.state}


def _put_moments(
    optimizer: torch.optim.Optimizer, moments: Mapping[str, Mapping[str, Tensor]], rates: Mapping[str, float]
) -> None:
    """The inverse of `_moments`. Older checkpoints have numbers of what trained in the place of names."""
    parameters = {g["name"]: p for g in optimizer.param_groups for p in g["params"]}
    trained = [name for name in parameters if rates.get(name)]
    for key, slots in moments.items():
        numbered = key.isdecimal()
        name = key if not numbered else trained[int(key)] if int(key) < len(trained) else ""
        p = parameters.get(name)
        if p is None or any(slot != "step" and value.shape != p.shape for slot, value in slots.items()):
            raise CheckpointError(f"resume: the state of Adam for {key!r} in the checkpoint is of no parameter here")
        optimizer.state[p] = {slot: value if slot == "step" else value.to(p) for slot, value in slots.items()}


def groups_of(model: nn.Module) -> Groups:
    """Names of the parameters that can learn, layer by layer from the input to the head, which is one group."""
    layers: dict[str, list[str]] = {}
    for name, _ in _learning(model):
        layers.setdefault("head" if name.startswith("head.") else name.rpartition(".")[0], []).append(name)
    head = layers.pop("head", [])
    return (*map(tuple, layers.values()), tuple(head))


def _learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that the user did not freeze, by name, as long as no strategy has set any rate."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def set_rates(optimizer: torch.optim.Optimizer, rates: Mapping[str, float], lr: float) -> None:
    """Give each parameter its factor of `lr`; those of factor 0 get no gradient, so that Adam leaves them alone. Raises
    MetaftError for a rate of what is no parameter."""
    if unknown := rates.keys() - {group["name"] for group in optimizer.param_groups}:
        raise MetaftError(f"strategy: it has rates for {sorted(unknown)[:4]}, which are no parameters that can train")
    for group in optimizer.param_groups:
        factor = rates.get(group["name"], 0.0)
        group["lr"] = lr * factor
        for p in group["params"]:
            p.requires_grad_(factor > 0)


def _like(body: nn.Module) -> Tensor:
    """A tensor of the device and type that a body computes with; where it holds none, as pictures come."""
    tensors = itertools.chain(body.parameters(), body.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


def _start(
    body: nn.Module,
    train: Prepared,
    labels: Tensor,
    classes: int,
    recipe: Recipe,
    seed: int,
    strategy: Strategy,
    steps: int,
) -> tuple[nn.Module, Groups]:
    """A copy of the body and a head that starts from its features, as the strategy wants them, and the groups of their
    parameters."""
    body = copied(body)
    features = in_parts(_stored(body, train), train)
    head = heads.build(recipe.head, features, labels, classes, head_seed(seed))
    model = strategy.prepare(nn.ModuleDict({"body": body, "head": head}), seed)
    groups = groups_of(model)
    of_body = {name for group in groups[:-1] for name in group}
    if not any(of_body & {n for n, r in strategy.rates(groups, s, steps).items() if r} for s in range(max(1, steps))):
        # Nothing below the head may ever change, statistics included.
        model.set_submodule("body", with_stored_moments(model.get_submodule("body"), train).eval())
    return model, groups


def head_seed(seed: int) -> int:
    """A seed for the head, of which a random backbone of this seed knows nothing."""
    return int(raw_words(seed, "train", [0], 1, stream=Stream.HEADS)[0, 0])


def _settled(strategy: Strategy, groups: Groups, epochs: int, steps: int) -> int:
    """The epoch from which the same parameters train to the end: patience is for that phase, since in those before it
    the next one would be waited for in vain."""
    per_epoch = steps // max(1, epochs)
    trained = [{n for n, r in strategy.rates(groups, i * per_epoch, steps).items() if r} for i in range(epochs)]
    return max((i for i in range(1, epochs) if trained[i] != trained[i - 1]), default=0)


def _stale(curve: list[dict[str, float]], patience: int) -> bool:
    """Whether the lowest validation loss is `patience` epochs old."""
    losses = [row["val_loss"] for row in curve if "val_loss" in row]
    return bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience


def _stored(body: nn.Module, train: Prepared) -> nn.Module:
    return with_stored_moments(body, train).eval()


@torch.no_grad()
def in_parts(module: nn.Module, x: Prepared) -> Tensor:
    """What a module that treats each row by itself makes of x, part by part."""
    return torch.cat([module(part) for part in dataclasses.replace(x, at_once=at_most(x.inputs.shape, 256))])


@torch.no_grad()
def _validate(model: nn.Module, train: Prepared, val: Prepared, y: Tensor) -> dict[str, float]:
    logits = model.get_submodule("head")(in_parts(_stored(model.get_submodule("body"), train), val))
    return {
        "val_loss": float(F.cross_entropy(logits, y)),
        "val_accuracy": float((logits.argmax(-1) == y).float().mean()),
    }


def _batches(n: int, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Rows of each batch of one epoch; a last batch of one image joins the one before, where it has statistics."""
    order = np.argsort(raw_words(seed, "train", [epoch], n, stream=Stream.FINE_TUNING)[0], kind="stable")
    cuts = list(range(size, n, size))
    if cuts and n - cuts[-1] == 1:
        cuts.pop()
    return np.split(order, cuts)


def _moves(n: int, recipe: Recipe, seed: int, epoch: int) -> Tensor | None:
    """[n, 3] uniform in -1..1 for n pictures' angles and shifts in an epoch, or None where they stay as they are."""
    if recipe.augment == "none":
        return None
    words = raw_words(seed, "val", [epoch], 3 * n, stream=Stream.FINE_TUNING)[0].reshape(n, 3)
    return torch.from_numpy(2 * uniform(words) - 1).float()


def _augmented(images: Tensor, moves: Tensor) -> Tensor:
    """uint8 [n, C, H, W] turned by up to 10 degrees and moved by up to 8 %, as `moves` [n, 3] in -1..1 say."""
    moves = moves.to(images.device)
    angle, shift = moves[:, 0] * math.radians(10), moves[:, 1:] * 0.16  # in units of half the picture
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], -1), torch.stack([sin, cos, shift[:, 1]], -1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8)
