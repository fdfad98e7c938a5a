"""Which examples are trained on together, a function of (seed, epoch)."""

from __future__ import annotations

import numpy as np

from metaft.sampler import Stream, raw_words


def batches_of(n: int, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Rows of each batch of one epoch; a last batch of one image joins the one before, where it has statistics."""
    order = np.argsort(raw_words(seed, "train", [epoch], n, stream=Stream.FINE_TUNING)[0], kind="stable")
    return cut(order, size)


def cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows in parts of this size; a last one of one image joins the one before."""
    cuts = list(range(size, len(order), size))
    if cuts and len(order) - cuts[-1] == 1:
        cuts.pop()
    return np.split(order, cuts)
