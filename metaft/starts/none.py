"""No start but chance: an architecture whose parameters are drawn, or a module from Python as it was handed over."""

from __future__ import annotations

import dataclasses

from torch import nn

from metaft.defaults import model_for
from metaft.inputs import Inputs
from metaft.models import class_of
from metaft.models.architecture import NormOf, build
from metaft.models.stored import has_statistics
from metaft.starts.base import RANDOM, Start, check_module

OWN = "module"
"""The name of the start that a module's own values are."""

WIDTH = 64  # of a backbone that no run has chosen


def from_nothing(inputs: Inputs, module: nn.Module | None = None, *, keep: bool = False) -> Start:
    """The architecture that meta-training would choose for such images, or the user's own module: with parameters that
    are drawn, or beside those with its own (`keep`). Raises MetaftError for a module that metaft does not take."""
    shape = list(inputs.shape)
    named = {"name": model_for(tuple(shape)), "ways": 2, "shape": shape, "width": WIDTH}
    handed = None if module is None else {"name": "custom", "class": class_of(module)}
    start = Start("none", handed or named, shape, inputs, None, None, {}, module, {}, label=RANDOM)
    check_module(start)
    if keep and module is not None:
        norm: NormOf = "keep" if any(map(has_statistics, module.modules())) else "adapt"
        whole, _ = build(start.architecture, None, module=module, norm=norm)
        values = {name: p.detach() for name, p in whole.named_parameters()}
        return dataclasses.replace(start, name=OWN, meta=values, label="own values", norm=norm)
    return start
