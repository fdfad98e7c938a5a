"""Dropout of the features that a head sees in training, a function of (seed, epoch, example)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from metaft import keyed
from metaft.finetune.extras.base import Batch
from metaft.finetune.extras.pairs import words_of

USE = 2
"""Of the random words of examples."""


def dropped(features: Tensor, batch: Batch, seed: int, share: float) -> Tensor:
    """Each of the features [n, D] is 0 with probability `share` and divided by 1 - share otherwise (Srivastava et al.
    2014, https://jmlr.org/papers/v15/srivastava14a.html, in its inverted form)."""
    keys = torch.from_numpy(words_of(batch, seed, USE)[:, 0].astype(np.int64))
    words = torch.func.vmap(lambda key: keyed.words(key, count=features.shape[1]))(keys)
    kept = (words >= share * 2.0**32).to(features)
    return features * kept / (1 - share)


def outputs(model: nn.Module, batch: Batch, seed: int, share: float) -> Tensor:
    """What a model of "body" and "head" makes of a batch, without this `share` of its features while it is in training
    mode: the same ones in each pass of a step."""
    features = model.get_submodule("body")(batch.x)
    if share and model.training:
        features = dropped(features, batch, seed, share)
    return model.get_submodule("head")(features)
