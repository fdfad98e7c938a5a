"""The two parts of a module: its body, and the head that is the last thing it does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metaft.errors import class_and_words
from metaft.models.handed import copied, eagerly
from metaft.support.foreign import ran_out

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


def body_of(module: nn.Module, head: str = "head") -> nn.Module:
    """A copy of a backbone that ends in features [n, D]: its head passes them on."""
    body = copied(module)
    body.set_submodule(head, nn.Flatten())
    return body


def why_apart(module: nn.Module, head: str, x: Tensor) -> str:
    """Why a module is not its head on what `body_of` gives, tried on a batch x; "" where it is."""
    given: list[tuple[Any, int]] = []

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        given.append((output, output._version))

    whole, body = copied(module), body_of(module, head)
    layer = whole.get_submodule(head)
    layer.register_forward_hook(note)
    mend = f"let the forward pass end with {head!r}, and use it once"
    with eagerly():
        result = whole(x)
        # A view is the same result; it shares the count of changes in place.
        if not given or _place(result) != _place(given[-1][0]) or result._version != given[-1][1]:
            return f"what {head!r}, its last nn.Linear, gives is not the result; {mend}"
        try:
            same = torch.equal(layer(body(x)), result)
        except Exception as error:  # whatever the user's forward pass does with a head that is not there
            if ran_out(error):
                raise
            return f"nothing runs without {head!r} ({class_and_words(error)}); {mend}"
    return "" if same else f"more than the last layer depends on {head!r}; {mend}"


def _place(t: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return t.data_ptr(), t.shape, t.stride()


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[classes, D] mean feature of each class; every class needs at least one example."""
    member = (labels.unsqueeze(1) == torch.arange(classes, device=labels.device)).to(features.dtype)
    return (member.T @ features) / member.sum(0).unsqueeze(1)


def matched(features: Tensor, support: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """[n, classes] logarithms of the attention of features [n, D] on the support images [m, D] of each class.

    `labels` [m, classes] is 1 where an image is of a class, else 0; every class needs at least one.
    """
    attention = (scale * F.normalize(features, dim=-1) @ F.normalize(support, dim=-1).T).log_softmax(-1)
    return attention.unsqueeze(-1).masked_fill(labels == 0, -torch.inf).logsumexp(-2)
