"""Adversarial training: each step is on images that were changed, within a bound, so that the loss rises."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.finetune.attacks import attacked, span_of, within
from metaft.finetune.extras.base import Batch, Extra, Objective, Origin
from metaft.finetune.extras.pairs import words_of
from metaft.finetune.features import evaluating, takes_alone
from metaft.inputs import Inputs
from metaft.models.stored import with_stored_moments

USE = 3
"""Of the random words of examples."""


def adverse(objective: Objective, origin: Origin, model: nn.Module, batch: Batch, eps: float, steps: int) -> Tensor:
    """The batch's images after an attack on the objective, in evaluation mode: without dropout, and with the moments
    of the images as they were where layers normalise with a batch's own, so that no image helps to attack another."""
    assert origin.inputs is not None
    body = model.get_submodule("body")
    if not takes_alone(body):
        model = nn.ModuleDict({"body": with_stored_moments(body, batch.x), "head": model.get_submodule("head")})
    keys = torch.from_numpy(words_of(batch, origin.seed, USE)[:, 0].astype(np.int64))
    with evaluating(model):
        return attacked(
            lambda x: objective(model, batch._replace(x=x)), batch.x, span_of(origin.inputs, batch.x),
            eps=eps, steps=steps, begin=None if steps == 1 else within(keys, batch.x),
        )  # fmt: skip


def on_adverse(objective: Objective, origin: Origin, *, eps: float, steps: int, share: float) -> Objective:
    def of(model: nn.Module, batch: Batch) -> Tensor:
        if eps == 0 or share == 0:
            return objective(model, batch)
        changed = batch._replace(x=adverse(objective, origin, model, batch, eps, steps))
        if share == 1:
            return objective(model, changed)
        return (1 - share) * objective(model, batch) + share * objective(model, changed)

    return of


def check_pictures(inputs: Inputs, class_names: Sequence[str]) -> None:
    """Raises MetaftError where inputs are no pixels, whose values a bound could be about."""
    if inputs.kind != "image":
        raise MetaftError(f"extra: adversarial is for pictures, and inputs are {inputs.kind}")


def adversarial(*, eps: float = 2 / 255, steps: int = 3, share: float = 1.0) -> Extra:
    """PGD's images in the place of those that are there (Madry et al. 2018, https://arxiv.org/abs/1706.06083, eq. 2.1);
    FGSM's with one step. `share` of the loss is theirs: 0.5 is Goodfellow et al. 2015, section 6. A step costs `steps`
    passes more. Several extras: those before it are attacked too, those behind it come first."""
    if not 0 <= eps <= 1:
        raise MetaftError(f"extra: eps must be 0 to 1, in units of pixel values 0..1, got {eps:g}")
    if steps < 1:
        raise MetaftError(f"extra: steps must be at least 1, got {steps}")
    if not 0 <= share <= 1:
        raise MetaftError(f"extra: share must be 0 to 1, got {share:g}")
    return Extra(
        partial(on_adverse, eps=eps, steps=steps, share=share), "images attacked in each step", check=check_pictures
    )
