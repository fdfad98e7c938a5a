"""Random choice: stable for ever, without replacement, fair."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaft.errors import MetaftError
from metaft.sampler import Stream, choose, raw_words, uniform
from metaft.types import SPLITS

SEEDS = st.integers(0, 2**64 - 1)


def sha256(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


def test_the_stream_is_frozen() -> None:
    """A published number is about these episodes: if this changes, every committed table is void."""
    words = raw_words(7, "val", [0, 1, 2, 10**9], 13)
    assert sha256(words.astype("<u8")) == "d2f41ec41ac21ae268a5b1680fc1ea0874b0a9acb4279c1138719993bba77462"
    chosen = choose(words, np.array([13, 20, 600, 13]))
    assert sha256(chosen.astype("<i8")) == "1abdc2e3ee19a8726b443f2462ef5d359fb154a0750230947d46e8ee3ef1f88c"


@given(SEEDS, st.sampled_from(SPLITS), st.lists(st.integers(0, 10**9), min_size=1, max_size=5), st.integers(1, 40))
def test_an_item_does_not_depend_on_its_neighbours(seed: int, split, indices: list[int], words: int) -> None:
    together = raw_words(seed, split, indices, words)
    assert together.shape == (len(indices), words)
    for row, index in zip(together, indices, strict=True):
        np.testing.assert_array_equal(row, raw_words(seed, split, [index], words)[0])


@given(SEEDS, st.integers(0, 10**6), st.integers(1, 9))
def test_a_contiguous_stretch_equals_scattered_items(seed: int, first: int, words: int) -> None:
    straight = raw_words(seed, "train", range(first, first + 6), words)
    shuffled = raw_words(seed, "train", [first + i for i in (3, 0, 5, 1, 4, 2)], words)
    np.testing.assert_array_equal(straight[[3, 0, 5, 1, 4, 2]], shuffled)


def test_items_seeds_splits_and_streams_share_no_words() -> None:
    """Of 64-bit words even one in common means overlapping stretches."""
    draws = [
        raw_words(seed, split, range(50), 11, stream=Stream(stream))
        for seed in (0, 1, 2**64 - 1)
        for split in SPLITS
        for stream in (0, 1, 2)
    ]
    words = np.concatenate([d.ravel() for d in draws])
    assert len(np.unique(words)) == len(words)


def test_no_items_give_no_rows() -> None:
    assert raw_words(0, "train", [], 5).shape == (0, 5)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_named(seed: int) -> None:
    with pytest.raises(MetaftError, match=str(seed)):
        raw_words(seed, "train", [0], 4)


def test_a_negative_index_is_named() -> None:
    with pytest.raises(MetaftError, match="-3"):
        raw_words(0, "train", [4, -3], 4)


@given(SEEDS, st.lists(st.integers(1, 30), min_size=1, max_size=6), st.data())
def test_choice_is_without_replacement_and_in_range(seed: int, sizes: list[int], data: st.DataObject) -> None:
    m = data.draw(st.integers(1, min(sizes)))
    chosen = choose(raw_words(seed, "train", range(len(sizes)), m), np.array(sizes))
    assert chosen.shape == (len(sizes), m)
    for row, size in zip(chosen, sizes, strict=True):
        assert len(set(row.tolist())) == m
        assert row.min() >= 0
        assert row.max() < size


def test_a_row_does_not_depend_on_the_sizes_of_others() -> None:
    words = raw_words(3, "train", range(2), 4)
    np.testing.assert_array_equal(choose(words, np.array([5, 900]))[0], choose(words[:1], np.array([5]))[0])


def test_every_value_comes_equally_often_at_every_place() -> None:
    """Chi-square per place: 9 degrees of freedom, 33.7 is exceeded once in 10,000."""
    chosen = choose(raw_words(11, "train", range(20_000), 4), np.full(20_000, 10))
    for place in chosen.T:
        counts = np.bincount(place, minlength=10)
        assert ((counts - 2000.0) ** 2 / 2000.0).sum() < 33.7


def test_uniform_covers_the_unit_interval_and_never_one() -> None:
    edges = uniform(np.array([0, 2**64 - 1], np.uint64))
    assert edges.tolist() == [0.0, 1.0 - 2.0**-53]
    values = uniform(raw_words(5, "train", [0], 40_000))
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(values.var() - 1 / 12) < 0.005
