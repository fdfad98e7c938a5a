"""The state of a fit, of which a checkpoint holds all that a resume needs for the same bits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaft.runs.checkpoint import under

PARTS = ("model", "best", "average")
"""Of a fit's state, those that have a model's values."""


def cloned(state: Any) -> Any:
    """A tree of tensors and plain data, for as long as training goes on with the original."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), state)


def copy_of(values: Mapping[str, Tensor], still: Collection[str]) -> dict[str, Tensor]:
    """A copy of a model's values; of parameters that are `still`, which nothing moves, they themselves."""
    return {k: v if k in still else v.detach().clone() for k, v in values.items()}


def whole(values: Mapping[str, Tensor], begun: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's values with those of the backbone that did not move since a fit `begun`, which a checkpoint leaves out.
    Older ones have all."""
    return {**{k: v.clone() for k, v in begun.items() if k.startswith("body.")}, **values}


def _moved_from(begun: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: without the backbone's parameters that are what a fit began with, to the bit."""
    of_body = {name for name in values if name.startswith("body.") and name in begun}
    return {k: v for k, v in values.items() if k not in of_body or not torch.equal(v, begun[k])}


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `fit` gives `on_epoch`, as named tensors and plain data, for a checkpoint, which need not hold a backbone
    that stays: whoever resumes has what the fit began with ("begun"; a state that was read and goes on has none)."""
    begun = state.get("begun", {})
    tensors = {f"{part}/{k}": v for part in PARTS for k, v in _moved_from(begun, state[part]).items()}
    tensors |= {f"adam/{name}/{slot}": v for name, slots in state["adam"].items() for slot, v in slots.items()}
    return tensors, {"curve": state["curve"], "best_loss": state["best_loss"]}


def unflatten(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`, but for what did not move."""
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
