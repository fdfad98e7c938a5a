"""Dropout whose masks are a function of a task's key: reproducible on every engine, and off unless asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft import keyed
from metaft.errors import MetaftError

_SALT = 1
"""Tells these words from those that other uses draw of the same key."""


@dataclasses.dataclass
class _Frame:
    key: Tensor
    step: int
    met: int = 0
    """Dropout layers that the forward pass has met so far."""


# A context variable is local to its thread, as the one of `metaft.models.norm`.
_frame: ContextVar[_Frame | None] = ContextVar("dropout_frame", default=None)


@contextlib.contextmanager
def use_dropout(key: Tensor, step: int) -> Iterator[None]:
    """Inside, for one forward pass, every EpisodeDropout drops; `key` [] int64 is the task's, `step` the inner step."""
    token = _frame.set(_Frame(key, step))
    try:
        yield
    finally:
        _frame.reset(token)


def in_use() -> tuple[Tensor, int] | None:
    """What the `use_dropout` was given that this is in."""
    frame = _frame.get()
    return None if frame is None else (frame.key, frame.step)


class EpisodeDropout(nn.Module):
    """Sets each entry of [batch, C, ...] to 0 with probability p and divides the others by 1 - p.

    Only inside `use_dropout`; everywhere else x passes unchanged. The mask is a function of (key, step, how many such
    layers the forward pass has met, entry). `channels` drops whole maps: one decision for each of [batch, C].
    """

    def __init__(self, p: float, *, channels: bool = False) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise MetaftError(f"dropout must be at least 0 and below 1, got {p}")
        self.p = p
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        frame = _frame.get()
        if frame is None or self.p == 0:
            return x
        frame.met += 1
        return self._dropped(x, functools.partial(keyed.words, frame.key, _SALT, frame.step, frame.met))

    def _dropped(self, x: Tensor, words: Callable[..., Tensor]) -> Tensor:
        """x by the mask that `words(count=...)` of this layer and step make."""
        shape = (*x.shape[:2], *[1] * (x.dim() - 2)) if self.channels else x.shape
        kept = (words(count=math.prod(shape)) >= round(self.p * 2**32)).view(shape)
        return x * (kept.to(x.dtype) / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}, channels={self.channels}"


class EpisodeDropBlock(EpisodeDropout):
    """Sets squares of [batch, C, H, W] to 0 so that about a share p of each map is, and scales what is left.

    Ghiasi, Lin and Le 2018, https://arxiv.org/abs/1810.12890, algorithm 1: centres of squares of `size` x `size` (or as
    many pixels as the map has) fall where the whole square is on the map, each with a probability of
    gamma = p / size^2 * H W / ((H - size + 1) (W - size + 1)) (equation 1), and x is multiplied by the mask and by its
    entries' number over their sum. The mask is a function of (key, step, layer) as that of `EpisodeDropout`.
    """

    def __init__(self, p: float, size: int) -> None:
        super().__init__(p)
        if size < 1:
            raise MetaftError(f"size of a block must be at least 1, got {size}")
        self.size = size

    def _dropped(self, x: Tensor, words: Callable[..., Tensor]) -> Tensor:
        *lead, height, width = x.shape
        size = min(self.size, height, width)
        centres = (*lead, height - size + 1, width - size + 1)
        gamma = self.p / size**2 * height * width / (centres[-2] * centres[-1])
        hit = (words(count=math.prod(centres)) < round(min(1.0, gamma) * 2**32)).view(centres)
        hit = hit.to(torch.promote_types(x.dtype, torch.float32))  # types of fewer bits could not count the entries
        # A pixel is dropped where any square that holds it was hit: squares begin at their centre's place here.
        kept = 1 - F.max_pool2d(F.pad(hit, [size - 1] * 4), size, stride=1)
        return x * (kept * (kept.numel() / kept.sum().clamp(min=1))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}, size={self.size}"


def episode_dropout(module: nn.Module) -> nn.Module:
    """Replace dropout layers by EpisodeDropout, in place; returns the module.

    Raises MetaftError for a layer that draws from the global random generator and has no such form, naming it.
    """
    for path, part in list(module.named_modules(remove_duplicate=False)):
        if isinstance(part, nn.modules.dropout._DropoutNd):
            if isinstance(part, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
                if part.p == 0:
                    continue
                raise _draws(path, part, "p", part.p)
            new = EpisodeDropout(part.p, channels=not isinstance(part, nn.Dropout))
            if not path:
                return new
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, new)
        inner = part.dropout if isinstance(part, (nn.MultiheadAttention, nn.RNNBase)) else 0
        if inner:
            raise _draws(path, part, "dropout", inner)
    return module


def drops(module: nn.Module) -> bool:
    """Whether any layer would drop something inside `use_dropout`."""
    return any(isinstance(part, EpisodeDropout) and part.p > 0 for part in module.modules())


def _draws(path: str, part: nn.Module, field: str, p: float) -> MetaftError:
    return MetaftError(
        f"layer {path!r} ({type(part).__name__}, {field}={p}) draws from the global random generator, which is not "
        f"reproducible over tasks; set its {field} to 0"
    )
