"""Changes to the loss of a fit: one file per extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.finetune.dropout import outputs
from metaft.finetune.extras.adversarial import adversarial
from metaft.finetune.extras.base import Batch, Extra, Objective, Origin
from metaft.finetune.extras.cutmix import cutmix
from metaft.finetune.extras.distil import distil
from metaft.finetune.extras.l2_sp import l2_sp
from metaft.finetune.extras.mixup import mixup
from metaft.spec import bind, made_for, name_of, parse, takes, write
from metaft.support.paths import absolute

__all__ = ["EXTRAS", "Batch", "Extra", "Objective", "Origin", "all_named", "composed", "named", "plain_loss"]

EXTRAS: dict[str, Callable[..., Extra]] = {
    "l2-sp": l2_sp,
    "mixup": mixup,
    "cutmix": cutmix,
    "adversarial": adversarial,
    "distil": distil,
}


def named(text: str) -> Extra:
    """`NAME[:key=value,...]`. Raises MetaftError that begins with `extra`."""
    return bind("extra", text, EXTRAS)()


def all_named(texts: Sequence[str]) -> tuple[Extra, ...]:
    """Likewise of each. Raises MetaftError for one that is there twice, too."""
    extras = tuple(made_for("extra", text, named) for text in texts)
    names = [name_of(text, EXTRAS) for text in texts]
    for name, text in zip(names, texts, strict=True):
        if names.count(name) > 1:
            raise MetaftError(f"extra: {name} is given twice (given {text!r})")
    return extras


def in_full(text: str) -> str:
    """The same with an absolute path of the run that it names, where it names one. Raises MetaftError as `named`."""
    members = {name: takes(factory) for name, factory in EXTRAS.items()}
    spec = parse("extra", text, members)
    options = tuple((key, str(absolute(value)) if key == "teacher" else value) for key, value in spec.options)
    return write(spec._replace(options=options), members[spec.name])


def plain_loss(
    model: nn.Module,
    batch: Batch,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    *,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """The loss of a batch's outputs and labels, with dropout before the head while the model is in training mode."""
    return loss(outputs(model, batch, seed, dropout), batch.y)


def composed(
    extras: Sequence[Extra],
    origin: Origin,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    dropout: float = 0.0,
) -> Objective:
    """The loss as these extras change it, the first one first."""
    objective: Objective = partial(plain_loss, loss=loss, dropout=dropout, seed=origin.seed)
    for extra in extras:
        objective = extra.wrap(objective, origin._replace(dropout=dropout))
    return objective
