"""Fine-tuning by Adam and cross-entropy, one visible loop. Every random choice is a function of (seed, epoch)."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.checkpoint import under
from metaft.errors import NonFiniteError
from metaft.finetune import heads
from metaft.inputs import Inputs
from metaft.models.handed import copied
from metaft.models.stored import with_stored_moments
from metaft.sampler import Stream, raw_words, uniform
from metaft.settings import Recipe

SMALLER = "try a smaller --lr"


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A backbone with stored moments, its head, and how they came about."""

    body: nn.Module
    head: nn.Module
    curve: list[dict[str, float]]
    """Per epoch: "epoch", "loss" and, with validation images, "val_loss" and "val_accuracy"."""

    @property
    def kept(self) -> int:
        """The epoch whose parameters these are: that of the lowest validation loss, or the last."""
        validated = [row for row in self.curve if "val_loss" in row]
        return int(min(validated, key=lambda row: row["val_loss"])["epoch"] if validated else self.curve[-1]["epoch"])


def fit(
    body: nn.Module,
    inputs: Inputs,
    examples: Tensor,
    labels: Tensor,
    classes: int,
    recipe: Recipe,
    *,
    seed: int = 0,
    val_examples: Tensor | None = None,
    val_labels: Tensor | None = None,
    should_stop: Callable[[], None] = lambda: None,
    resume: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Mapping[str, Any]], None] = lambda state: None,
) -> Fitted:
    """Fine-tune a copy of `body` (features [n, D] out, EpisodeNorm inside) and a fresh head on raw examples.

    Training batches are normalised with their own statistics; the result with those of all training images, stored in
    one last pass. With validation images the epoch of the lowest validation loss is kept (inductively, as the result
    will predict) and training stops after `patience` epochs without a better one. `on_epoch` gets a copy of all that
    `resume` needs for the same bits. Raises NonFiniteError where the training or validation loss is not finite; that of
    the last step, which no loss has seen, shows in the result alone.
    """
    like = _like(body)
    examples, labels = examples.to(like.device), labels.to(like.device)
    x_all = inputs(examples).to(like.dtype)
    model = _start(body, x_all, labels, classes, recipe, seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=recipe.lr)
    curve: list[dict[str, float]] = []
    best = (math.inf, {})
    if resume is not None:
        resume = copy.deepcopy(dict(resume))  # Adam would go on to write into the tensors that it is given
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        curve, best = resume["curve"], (resume["best_loss"], resume["best"])
    for epoch in range(len(curve), recipe.epochs):
        if _stale(curve, recipe.patience):
            break
        loss = _epoch(model, optimizer, inputs, examples, labels, recipe, seed, epoch, should_stop)
        row = {"epoch": float(epoch + 1), "loss": loss}
        if val_examples is not None and val_labels is not None and len(val_examples):
            x_val = inputs(val_examples.to(like.device)).to(like.dtype)
            row |= _validate(model, x_all, x_val, val_labels.to(like.device))
            if not math.isfinite(row["val_loss"]):
                raise NonFiniteError(f"epoch {epoch + 1}: the validation loss is {row['val_loss']}; {SMALLER}")
            if row["val_loss"] < best[0]:
                best = (row["val_loss"], copy.deepcopy(model.state_dict()))
        curve.append(row)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
        on_epoch(copy.deepcopy({**state, "best_loss": best[0], "best": best[1]}))
    if best[1]:
        model.load_state_dict(best[1])
    return Fitted(_stored(model["body"], x_all), model["head"], curve)


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `fit` gives `on_epoch`, as named tensors and plain data, for a checkpoint."""
    adam = state["optimizer"]
    tensors = {f"{part}/{k}": v for part in ("model", "best") for k, v in state[part].items()}
    tensors |= {f"adam/{i}/{slot}": v for i, slots in adam["state"].items() for slot, v in slots.items()}
    plain = {"curve": state["curve"], "best_loss": state["best_loss"], "adam": adam["param_groups"]}
    return tensors, plain


def unflatten(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in under(tensors, "adam").items():
        number, _, slot = name.partition("/")
        slots.setdefault(int(number), {})[slot] = value
    return {
        "model": under(tensors, "model"),
        "best": under(tensors, "best"),
        "optimizer": {"state": slots, "param_groups": plain["adam"]},
        "curve": plain["curve"],
        "best_loss": plain["best_loss"],
    }


def _like(body: nn.Module) -> Tensor:
    """A tensor of the device and type that a body computes with; where it holds none, as pictures come."""
    tensors = itertools.chain(body.parameters(), body.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


def _start(body: nn.Module, x: Tensor, labels: Tensor, classes: int, recipe: Recipe, seed: int) -> nn.ModuleDict:
    """A copy of the body, as far as it is to be trained, and a head that starts from its features."""
    body = copied(body)
    head = heads.build(recipe.head, in_parts(_stored(body, x), x), labels, classes, seed)
    for p in body.parameters():
        p.requires_grad_(p.requires_grad and recipe.freeze == "none")
    if recipe.freeze == "backbone":
        body = with_stored_moments(body, x)  # nothing below the head may change, statistics included
    return nn.ModuleDict({"body": body, "head": head})


def _epoch(
    model: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    examples: Tensor,
    labels: Tensor,
    recipe: Recipe,
    seed: int,
    epoch: int,
    should_stop: Callable[[], None],
) -> float:
    """One pass over the training examples; gives their mean loss. Raises NonFiniteError where there is none."""
    dtype = next(model.parameters()).dtype
    moves = _moves(len(examples), recipe, seed, epoch)
    total = 0.0
    for batch in _batches(len(examples), recipe.batch_size, seed, epoch):
        rows = torch.from_numpy(batch)
        x = examples[rows.to(examples.device)]
        if moves is not None:
            x = _augmented(x, moves[rows])
        features = model["body"](inputs(x).to(dtype))
        loss = F.cross_entropy(model["head"](features), labels[rows.to(labels.device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) * len(rows)
        should_stop()
    if not math.isfinite(total):
        raise NonFiniteError(f"epoch {epoch + 1}: the training loss is {total}; {SMALLER}")
    return total / len(examples)


def _stale(curve: list[dict[str, float]], patience: int) -> bool:
    """Whether the lowest validation loss is `patience` epochs old."""
    losses = [row["val_loss"] for row in curve if "val_loss" in row]
    return bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience


def _stored(body: nn.Module, x: Tensor) -> nn.Module:
    return with_stored_moments(body, x).eval()


@torch.no_grad()
def in_parts(module: nn.Module, x: Tensor, at_once: int = 256) -> Tensor:
    """What a module that treats each row by itself makes of x [n, ...], `at_once` rows at a time."""
    return torch.cat([module(part) for part in x.split(at_once)])


@torch.no_grad()
def _validate(model: nn.ModuleDict, x_train: Tensor, x: Tensor, y: Tensor) -> dict[str, float]:
    logits = model["head"](in_parts(_stored(model["body"], x_train), x))
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
