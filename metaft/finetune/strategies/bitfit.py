"""BitFit (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199): the head and all biases of the backbone train,
among them the shifts of normalisation layers; their scales stay, as all weights do."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from metaft.errors import MetaftError
from metaft.finetune.strategies.base import Groups, Strategy, every


def is_bias(name: str) -> bool:
    """By a parameter's name: `conv.bias`, attention's `in_proj_bias`, a recurrent layer's `bias_hh_l0`; but no table of
    them (`relative_position_bias_table`), which is what attention to places is learned in."""
    last = name.rpartition(".")[2]
    return last == "bias" or last.startswith("bias_") or last.endswith("_bias")


def rates(groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
    biases = tuple(name for group in groups[:-1] for name in group if is_bias(name))
    return every((biases, groups[-1]))


def with_biases(model: nn.Module, seed: int) -> nn.Module:
    """Raises MetaftError for a backbone of which this would train nothing."""
    if not any(is_bias(name) and p.requires_grad for name, p in model.get_submodule("body").named_parameters()):
        raise MetaftError("strategy: bitfit trains biases, and the backbone has none that could train")
    return model


def bitfit() -> Strategy:
    return Strategy(rates, with_biases, few=True)
