"""L2-SP: what is fine-tuned is pulled back to its start, and the head, which has none, to nothing."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.finetune.extras.base import Batch, Extra, Objective, Origin


def penalty(model: nn.Module, origin: Origin, alpha: float, beta: float) -> Tensor:
    """alpha / 2 sum (w - w0)^2 over the body + beta / 2 sum w^2 over the head (Li et al. 2018, eq. 3)."""
    body, head = [torch.zeros(())], [torch.zeros(())]
    for name, p in model.named_parameters():
        if name.startswith("head."):
            head.append(p.square().sum())
        else:
            body.append((p - origin.params[name]).square().sum())
    far, large = (sum(parts[1:], parts[0].to(parts[-1])) for parts in (body, head))
    return alpha / 2 * far + beta / 2 * large


def pulled(objective: Objective, origin: Origin, *, alpha: float, beta: float) -> Objective:
    def of(model: nn.Module, batch: Batch) -> Tensor:
        return objective(model, batch) + penalty(model, origin, alpha, beta)

    return of


def l2_sp(*, alpha: float = 0.01, beta: float = 0.01) -> Extra:
    """Li et al. 2018, https://arxiv.org/abs/1802.01483, section 3. As `alpha` grows the backbone stays what it was.

    It is part of the loss, so that Adam scales its gradient with the rest, which weight decay of AdamW is not.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value < 0:
            raise MetaftError(f"extra: {name} must be at least 0, got {value}")
    return Extra(partial(pulled, alpha=alpha, beta=beta), "pulled to its start", of_inputs=False, of_start=True)
