"""Features that are computed once, for as long as a backbone stays as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from metaft.finetune.examples import Prepared
from metaft.inputs.base import at_most
from metaft.models.norm import EpisodeNorm
from metaft.runs.checkpoint import digest
from metaft.support.cache import cached

CACHED_FROM, CACHED_TO = 64, 2**28
"""Examples from which features are kept on disk, and bytes up to which: fewer are soon computed, and more would fill
the folder."""


@torch.no_grad()
def in_parts(module: nn.Module, x: Prepared) -> Tensor:
    """What a module that treats each row by itself makes of x, part by part."""
    return torch.cat([module(part) for part in dataclasses.replace(x, at_once=at_most(x.inputs.shape, 256))])


@contextlib.contextmanager
def evaluating(body: nn.Module) -> Iterator[None]:
    """Inside, it is in evaluation mode; afterwards each part is as it was."""
    in_training = [part for part in body.modules() if part.training]
    body.eval()
    try:
        yield
    finally:
        for part in in_training:
            part.training = True


def takes_alone(body: nn.Module) -> bool:
    """Whether no layer looks at more than one example, as those do that normalise with a batch's own statistics."""
    return not any(isinstance(part, EpisodeNorm) for part in body.modules())


def features_of(body: nn.Module, x: Prepared) -> Tensor:
    """[n, D] of all examples, from the cache where the same backbone has computed them of the same examples."""
    if len(x) < CACHED_FROM:
        return in_parts(body, x)
    device, dtype = x.like.device, x.like.dtype
    first = in_parts(body, dataclasses.replace(x, examples=x.examples[torch.arange(1)]))
    if first.nbytes * len(x) > CACHED_TO:
        return in_parts(body, x)
    key = f"features {digest('', body.state_dict())} {x.inputs.plain()} {type(body).__name__} {device.type} {dtype} "
    key += f"{torch.__version__} {torch.get_num_threads()} {_digest(x)}"
    arrays = cached("features", key, lambda: {"features": in_parts(body, x).cpu().numpy()})
    features = torch.from_numpy(arrays["features"]).to(device)
    # The key knows a backbone's values and not its code, which may have changed.
    same = (features[:1] - first).norm() <= 1e-3 * first.norm() + 1e-6
    return features if same else in_parts(body, x)


def _digest(x: Prepared) -> str:
    """Of raw examples, part by part."""
    sha = hashlib.sha256()
    for rows in torch.arange(len(x)).split(1024):
        raw = x.examples[rows]
        sha.update(f"{raw.dtype} {list(raw.shape)}".encode())
        sha.update(np.ascontiguousarray(raw.cpu().numpy()).data)
    return sha.hexdigest()


class Features:
    """Of training and validation examples, computed when first asked for.

    None where a feature depends on its neighbours in a batch: layers that normalise with a batch's own statistics.
    Whoever moves the backbone is to ask no more.
    """

    def __init__(
        self,
        body: nn.Module,
        train: Prepared,
        val: Prepared | None,
        of_train: Tensor | None = None,
        of_val: Tensor | None = None,
    ) -> None:
        """`of_train` and `of_val` are the features that are known."""
        self._body, self._parts = body, {"train": train, "val": val}
        self._kept = {name: x for name, x in (("train", of_train), ("val", of_val)) if x is not None}
        self._alone = takes_alone(body)

    @property
    def train(self) -> Tensor | None:
        return self._of("train")

    @property
    def val(self) -> Tensor | None:
        return self._of("val")

    def _of(self, name: str) -> Tensor | None:
        part = self._parts[name]
        if part is None or not self._alone:
            return None
        if name not in self._kept:
            self._kept[name] = features_of(self._body, part)
        return self._kept[name]
