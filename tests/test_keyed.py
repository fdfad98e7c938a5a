"""Choices that depend on a key and on nothing else."""

from __future__ import annotations

import warnings

import pytest
import torch

from metaft.keyed import minibatches, permutation, words

KEYS = torch.tensor([0, 1, 7, 2**62 + 3, -5])


def test_orders_are_those_that_they_were() -> None:
    """Another order would change every trained Reptile."""
    assert permutation(KEYS[2], 8).tolist() == [5, 0, 6, 2, 7, 4, 1, 3]
    assert permutation(KEYS[2], 8, 3).tolist() == [5, 3, 1, 7, 4, 0, 6, 2]
    assert permutation(KEYS[4], 8).tolist() == [5, 0, 3, 1, 6, 2, 7, 4]


def test_under_vmap_each_key_has_its_own_order() -> None:
    together = torch.func.vmap(lambda key: minibatches(key, 7, 3, 5))(KEYS)
    for key, batches in zip(KEYS, together, strict=True):
        assert torch.equal(batches, minibatches(key, 7, 3, 5))
    assert len({tuple(b.flatten().tolist()) for b in together}) == len(KEYS)


@pytest.mark.parametrize(("n", "size", "steps"), [(7, 3, 5), (6, 3, 4), (5, 5, 3), (4, 1, 9), (3, 2, 0)])
def test_batches_pass_over_everything_again_and_again(n: int, size: int, steps: int) -> None:
    batches = minibatches(KEYS[1], n, size, steps)
    assert batches.shape == (steps, size)
    flat = batches.flatten().tolist()
    passes = [flat[i : i + n] for i in range(0, len(flat), n)]
    assert all(sorted(p) == list(range(n)) for p in passes[: len(flat) // n])
    assert all(len(set(p)) == len(p) for p in passes)
    assert len({tuple(p) for p in passes}) == len(passes)


def test_every_place_is_equally_likely() -> None:
    """20,000 orders of 5 things: each count is binomial with a standard deviation of 57."""
    orders = torch.func.vmap(lambda key: permutation(key, 5))(torch.arange(20_000))
    for place in range(5):
        counts = torch.bincount(orders[:, place], minlength=5)
        assert float((counts - 4000).abs().max()) < 5 * 57
    pairs = torch.bincount(orders[:-1, 0] * 5 + orders[1:, 0], minlength=25)  # neighbouring keys are independent
    assert float((pairs - 800).abs().max()) < 5 * 28


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    """A compiler may work out what does not depend on the key, and must not do so in other integers than torch."""

    def both(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return permutation(key, 9, 2), words(key, 1, 2, count=9)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts
        found = torch.compile(both)(KEYS[3])
    for a, b in zip(found, both(KEYS[3]), strict=True):
        assert torch.equal(a, b)
