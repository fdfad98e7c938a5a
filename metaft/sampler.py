"""Random choice that stays the same for ever: raw words of a counter-based generator, and our own selection.

numpy promises stable raw streams of its bit generators, but not a stable `choice` or `permutation`; so only raw words
are taken from it. Episode i reads its own stretch of the counter, and no sampler has a state to save.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np

from metaft.errors import MetaftError
from metaft.types import SPLITS, Split


class Stream(enum.IntEnum):
    """Uses of random words that must not share any. Never renumber: every drawn figure would change."""

    EPISODES = 0
    BATCHES = 1
    GLYPHS = 2
    TARGET_DRAWS = 3
    FINE_TUNING = 4
    HEADS = 5
    BASELINES = 6
    CONTEXT = 7
    LOW_RANK = 8
    EXTRAS = 9
    SEARCH = 10
    SOUPS = 11
    TASKS = 12


def raw_words(
    seed: int, split: Split, indices: Sequence[int], words: int, *, stream: Stream = Stream.EPISODES
) -> np.ndarray:
    """uint64 [len(indices), words]: row j holds the Philox words of item `indices[j]`."""
    if not 0 <= seed < 2**64:
        raise MetaftError(f"seed must be in 0..2**64-1, got {seed}")
    blocks = -(-words // 4)  # Philox yields four words per count
    key = seed | (SPLITS.index(split) << 64) | (stream << 72)
    index = np.asarray(indices, dtype=np.int64)
    if index.size and index.min() < 0:
        raise MetaftError(f"episode index must not be negative, got {int(index.min())}")

    def stretch(first: int, items: int) -> np.ndarray:
        generator = np.random.Philox(key=key, counter=first * blocks)
        return generator.random_raw(items * blocks * 4).reshape(items, blocks * 4)[:, :words]

    if index.size == 0:
        return np.empty((0, words), np.uint64)
    if np.all(np.diff(index) == 1):  # a meta-batch is one contiguous stretch
        return stretch(int(index[0]), len(index))
    return np.concatenate([stretch(int(i), 1) for i in index])


def choose(words: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Draw without replacement: uint64 words [R, m] and sizes [R] to int64 [R, m], row r distinct in 0..sizes[r]-1.

    The first m swaps of a Fisher-Yates shuffle, all rows at once; a row's order is random too. The modulus favours
    small values by less than size / 2**64.
    """
    rows, m = words.shape
    deck = np.broadcast_to(np.arange(int(sizes.max()), dtype=np.int64), (rows, int(sizes.max()))).copy()
    row = np.arange(rows)
    for j in range(m):
        pick = j + (words[:, j] % (sizes - j).astype(np.uint64)).astype(np.int64)
        deck[row, j], deck[row, pick] = deck[row, pick], deck[row, j].copy()
    return deck[:, :m]


def uniform(words: np.ndarray) -> np.ndarray:
    """uint64 words to float64 in [0, 1): the top 53 bits, so that every value is exact."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
