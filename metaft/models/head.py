"""What a head is given, where it is the last thing that a module does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# A context variable is local to its thread, as the one of `metaft.models.norm`.
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


class Watch(TorchFunctionMode):
    """Sees one forward pass of a `watched` body: what comes to the place of its head, and all that is done to tensors,
    so that a change in place of what the head gave does not escape it."""

    def __init__(self) -> None:
        super().__init__()
        self._met: list[Tensor] = []
        self._over = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._over = False
        return func(*args, **(kwargs or {}))

    def meets(self, features: Tensor) -> None:
        self._met.append(features)
        self._over = True

    @property
    def features(self) -> Tensor | None:
        """What the head is given; None where it is used more than once, or something is done after it."""
        return self._met[0] if self._over and len(self._met) == 1 else None


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Inside is one forward pass of a `watched` body."""
    watch = Watch()
    token = _watch.set(watch)
    try:
        with watch:
            yield watch
    finally:
        _watch.reset(token)


def watched(body: nn.Module, head: str) -> nn.Module:
    """The body itself, in which what stands in the place of its head tells what comes to it."""

    def tell(place: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        watch = _watch.get()
        if watch is not None:
            watch.meets(inputs[0])

    body.get_submodule(head).register_forward_hook(tell)
    return body
