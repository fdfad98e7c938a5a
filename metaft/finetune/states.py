"""The state of a fit, of which a checkpoint holds all that a resume needs for the same bits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metaft.runs.checkpoint import under

PARTS = ("model", "best", "average")
"""Of a fit's state, those that have a model's values."""


def cloned(state: Any) -> Any:
    """A tree of tensors and plain data, for as long as training goes on with the original."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), state)


def values_of(model: nn.Module, still: Collection[str]) -> dict[str, Tensor]:
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
