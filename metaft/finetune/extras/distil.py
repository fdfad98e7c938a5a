"""Distillation: a fit follows the probabilities of a classifier that was trained before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.finetune.extras.base import Batch, Extra, Objective, Origin
from metaft.inputs import Inputs

if TYPE_CHECKING:
    from metaft.finetune.classifier import Classifier

T, SHARE = 2.0, 0.5
"""The temperature, and how much of the loss is the teacher's."""


def divergence(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """t^2 KL(teacher || student) of logits [n, classes] over t, the mean over examples (Hinton et al. 2015, section 2):
    the factor leaves gradients as large as those of labels, whatever t is."""
    of_student, of_teacher = ((logits / t).log_softmax(-1) for logits in (student, teacher))
    return t**2 * F.kl_div(of_student, of_teacher, reduction="batchmean", log_target=True)


def followed(objective: Objective, origin: Origin, *, teacher: str, t: float, share: float) -> Objective:
    from metaft.finetune.classifier import load

    like = next(iter(origin.params.values()))
    return following(objective, origin, teacher=load(teacher).to(like), t=t, share=share)


def following(objective: Objective, origin: Origin, *, teacher: Classifier, t: float, share: float) -> Objective:
    def of(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = teacher.head(teacher.body(batch.x))
        outputs = model.get_submodule("head")(model.get_submodule("body")(batch.x))
        return (1 - share) * objective(model, batch) + share * divergence(outputs, wanted, t)

    return of


def check(teacher: str, inputs: Inputs, class_names: Sequence[str]) -> None:
    """Raises MetaftError for a teacher that is not there, or of other classes or inputs."""
    from metaft.finetune.classifier import load

    try:
        known = load(teacher)
    except MetaftError as error:
        raise MetaftError(f"extra: teacher: {error}") from None
    if known.class_names != tuple(class_names):
        other = sorted({*known.class_names} ^ {*class_names}) or ["their order"]
        raise MetaftError(
            f"extra: the teacher {teacher} knows {len(known.class_names)} classes, which are not the "
            f"{len(class_names)} of the images; such as {other[0]!r}"
        )
    if known.inputs.plain() != inputs.plain():
        own, given = known.inputs.plain(), inputs.plain()
        key = next((key for key in own if own[key] != given.get(key)), "kind")
        raise MetaftError(
            f"extra: the teacher {teacher} takes other inputs than the start: {key} {own.get(key)}, "
            f"not {given.get(key)}"
        )


def distil(*, teacher: str, t: float = T, share: float = SHARE) -> Extra:
    """(1 - share) loss + share t^2 KL(teacher || student) at temperature t (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531). The teacher is the folder of an adapt run of the same classes and inputs, and
    sees what the student sees. A step costs a second pass of the student."""
    if not 0 < t <= 1000:
        raise MetaftError(f"extra: t must be above 0 and at most 1000, got {t:g}")
    if not 0 <= share <= 1:
        raise MetaftError(f"extra: share must be 0 to 1, got {share:g}")
    return Extra(
        partial(followed, teacher=teacher, t=t, share=share), "following a teacher",
        of_classes=True, check=partial(check, teacher), run=Path(teacher),
    )  # fmt: skip


def of_classifier(teacher: Classifier) -> Extra:
    """The same of a classifier that is at hand, of the same classes and inputs."""
    return Extra(partial(following, teacher=teacher, t=T, share=SHARE), "following a teacher", of_classes=True)
