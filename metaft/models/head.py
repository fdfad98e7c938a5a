"""What a head is given, where it is the last thing that a module does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metaft.models.handed import copied

# A context variable is local to its thread, as the one of `metaft.models.norm`.
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


class Watch(TorchFunctionMode):
    """Sees one forward pass of a `watched` module: what comes to its head, and all that is done to tensors, so that a
    change in place of what the head gave does not escape it."""

    def __init__(self) -> None:
        super().__init__()
        self._met: list[tuple[Tensor, Tensor]] = []
        self._over = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._over = False
        return func(*args, **(kwargs or {}))

    def meets(self, features: Tensor, logits: Tensor) -> None:
        self._met.append((features, logits))
        self._over = True

    def features(self, result: Tensor) -> Tensor | None:
        """What the head was given; None where it was used more than once, or is not what gave the module's result."""
        if not self._over or len(self._met) != 1:
            return None
        features, logits = self._met[0]
        return features if result is logits else None


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Inside is one forward pass of a `watched` module."""
    watch = Watch()
    token = _watch.set(watch)
    try:
        with watch:
            yield watch
    finally:
        _watch.reset(token)


def watched(module: nn.Module, head: str) -> nn.Module:
    """A copy whose head tells what comes to it and what it gives."""

    def tell(place: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        watch = _watch.get()
        if watch is not None:
            (features,) = (*inputs, *named.values())
            watch.meets(features, output)

    module = copied(module)
    module.get_submodule(head).register_forward_hook(tell, with_kwargs=True)
    return module
