"""What of a model trains in which epochs, as a strategy's rates say."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from metaft.finetune.strategies import Groups, Strategy
from metaft.models.blocks import blocks_of


def groups_of(model: nn.Module) -> Groups:
    """Names of the parameters that can learn, block by block from the input to the head, which is one group (of
    several targets all heads together)."""
    body = tuple(tuple(f"body.{name}" for name in block) for block in blocks_of(model.get_submodule("body")))
    return (*body, tuple(name for name, _ in learning(model) if not name.startswith("body.")))


def learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that the user did not freeze, by name, as long as no strategy has set any rate."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def settled(strategy: Strategy, groups: Groups, epochs: int, per_epoch: int) -> int:
    """The epoch from which the same parameters train to the end: patience is for that phase, since in those before it
    the next one would be waited for in vain."""
    steps = epochs * per_epoch
    trained = [
        {n for n, r in strategy.rates(groups, i * per_epoch, steps, per_epoch).items() if r} for i in range(epochs)
    ]
    return max((i for i in range(1, epochs) if trained[i] != trained[i - 1]), default=0)


def stays(strategy: Strategy, groups: Groups, epochs: int, per_epoch: int, some: Iterable[int]) -> bool:
    """Whether no parameter below the head moves in any step of `some` of the epochs."""
    of_body = {name for group in groups[:-1] for name in group}
    return not any(
        of_body & {name for name, rate in strategy.rates(groups, step, epochs * per_epoch, per_epoch).items() if rate}
        for epoch in some
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)
    )


def moved(strategy: Strategy, groups: Groups, epochs: int, per_epoch: int, some: Iterable[int]) -> set[str]:
    """Names of the parameters below the head that move in the first or the last step of `some` of the epochs."""
    steps = [step for epoch in some for step in (epoch * per_epoch, (epoch + 1) * per_epoch - 1)]
    moving = {n for i in steps for n, rate in strategy.rates(groups, i, epochs * per_epoch, per_epoch).items() if rate}
    return moving & {name for group in groups[:-1] for name in group}
