"""What a head makes of features, apart from the module that it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


class Watch(TorchFunctionMode):
    """Sees what passes the place of the head in one forward pass, and whether anything is done to tensors after it."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: list[Tensor] = []
        self._after = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._after = True
        return func(*args, **(kwargs or {}))

    def passes(self, features: Tensor, *, flat: bool) -> None:
        self._passed += [features] * (1 if flat else 2)
        self._after = False

    def ends_with(self, returned: Tensor) -> bool:
        """Whether one matrix [n, D] came by, and nothing followed: no other result, nor a change in place."""
        return len(self._passed) == 1 and returned is self._passed[0] and not self._after


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Inside, a body of `watched` tells what it yields about the place of its head."""
    watch = Watch()
    token = _watch.set(watch)
    try:
        with watch:
            yield watch
    finally:
        _watch.reset(token)


def watched(body: nn.Module, head: str) -> nn.Module:
    """The body itself; what stands in the place of its head now tells of what passes it."""

    def tell(place: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        watch = _watch.get()
        if watch is not None:
            watch.passes(output, flat=inputs[0].dim() == 2)

    body.get_submodule(head).register_forward_hook(tell)
    return body
