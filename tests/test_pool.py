"""Episodes of a class pool. The pixels of `coded_pool` say which class, instance and rotation they are."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from metaft.errors import DataError
from metaft.inputs import ImageInputs
from metaft.tasks.pool import ClassPool, Draw
from metaft.types import SPLITS, Source

CLASSES, SIDE = 30, 4


def coded_pool(counts: list[int] | None = None, turns: np.ndarray | None = None) -> ClassPool:
    """Corner (0, 0) is 255 and the other corners 0, so the bright one tells the rotation; the centre holds the code."""
    sizes = np.array(counts or [7] * CLASSES, np.int64)
    images = torch.zeros(int(sizes.sum()), 1, SIDE, SIDE, dtype=torch.uint8)
    images[:, :, 0, 0] = 255
    row = 0
    for c, size in enumerate(sizes):
        for i in range(size):
            images[row, :, 1:3, 1:3] = torch.tensor([[c, i], [c, i]], dtype=torch.uint8)
            row += 1
    n = len(sizes)
    if turns is None:
        starts = np.cumsum(sizes) - sizes
    else:  # a class and its turned companions share rows
        starts = np.repeat(np.cumsum(sizes) - sizes, 4)
        sizes, n = np.repeat(sizes, 4), 4 * n
    third = n // 3
    return ClassPool(
        name="coded",
        images=images,
        class_names=tuple(f"class {c}" for c in range(n)),
        starts=starts,
        counts=sizes,
        splits={s: np.arange(i * third, (i + 1) * third, dtype=np.int64) for i, s in enumerate(SPLITS)},
        inputs=ImageInputs(1, SIDE, SIDE),
        turns=turns,
    )


def decode(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float [..., 1, 4, 4] to (class, instance, quarter turns) of every image, from its pixels alone."""
    pixels = (images * 255).round().to(torch.int64).numpy()[..., 0, :, :].reshape(-1, SIDE, SIDE)
    codes = []
    for picture in pixels:
        turn = next(t for t in range(4) if np.rot90(picture, -t)[0, 0] == 255)
        upright = np.rot90(picture, -turn)
        codes.append((upright[1, 1], upright[1, 2], turn))
    c, i, t = np.array(codes).T.reshape(3, *images.shape[:-3])
    return c, i, t


@pytest.mark.parametrize(("ways", "shots", "query_shots"), [(5, 1, 1), (5, 3, 4), (2, 2, 5), (10, 1, 6), (2, 1, 1)])
@pytest.mark.parametrize("rotate", [False, True])
def test_pixels_tell_that_an_episode_is_right(ways: int, shots: int, query_shots: int, rotate: bool) -> None:
    source = coded_pool().source(ways=ways, shots=shots, query_shots=query_shots, rotate=rotate)
    episode = source.episodes(3, "val", range(20))
    support_c, support_i, support_t = decode(episode.support_x)
    query_c, query_i, query_t = decode(episode.query_x)
    class_ids = episode.class_ids.numpy()
    assert episode.support_x.shape == (20, ways * shots, 1, SIDE, SIDE)
    assert episode.query_x.shape == (20, ways * query_shots, 1, SIDE, SIDE)
    assert set(np.unique(class_ids)) <= set(range(10, 20)), "classes of another split"

    for b in range(20):
        assert len(set(class_ids[b])) == ways
        np.testing.assert_array_equal(class_ids[b][episode.support_y[b].numpy()], support_c[b])
        np.testing.assert_array_equal(class_ids[b][episode.query_y[b].numpy()], query_c[b])
        assert Counter(support_c[b].tolist()) == dict.fromkeys(class_ids[b].tolist(), shots)
        assert Counter(query_c[b].tolist()) == dict.fromkeys(class_ids[b].tolist(), query_shots)
        support = set(zip(support_c[b], support_i[b], strict=True))
        query = set(zip(query_c[b], query_i[b], strict=True))
        assert len(support) == ways * shots, "an image twice"
        assert len(query) == ways * query_shots, "an image twice"
        assert not support & query
        for c in class_ids[b]:
            turned = set(support_t[b][support_c[b] == c]) | set(query_t[b][query_c[b] == c])
            assert len(turned) == 1, "support and query of one class rotated differently"
    assert set(support_t.ravel().tolist()) == ({0, 1, 2, 3} if rotate else {0})


def test_rotation_turns_like_rot90() -> None:
    pool = coded_pool()
    source = pool.source(ways=5, shots=1, query_shots=2, rotate=True)
    draw = source.draw(0, "train", range(8))
    episode = source.episodes(0, "train", range(8))
    x = torch.cat([episode.support_x, episode.query_x], 1).numpy()
    for b, j in np.ndindex(draw.rows.shape):
        wanted = np.rot90(pool.images[int(draw.rows[b, j])].numpy(), int(draw.turns[b, j]), axes=(1, 2)) / 255.0
        np.testing.assert_allclose(x[b, j], wanted, atol=1e-6)


def test_every_class_and_every_instance_is_drawn_in_support_and_in_query() -> None:
    source = coded_pool().source(ways=5, shots=1, query_shots=1)
    draw = source.draw(0, "train", range(600))
    assert set(draw.class_ids.ravel()) == set(range(10))
    assert set(draw.rows[:, :5].ravel()) == set(range(70))
    assert set(draw.rows[:, 5:].ravel()) == set(range(70))


def test_position_and_class_tell_nothing_about_the_label() -> None:
    draw = coded_pool().source(ways=5, shots=2, query_shots=3).draw(0, "train", range(4000))
    for place in draw.labels.T:  # 4 degrees of freedom: 23.5 is exceeded once in 10,000
        counts = np.bincount(place, minlength=5)
        assert ((counts - 800.0) ** 2 / 800.0).sum() < 23.5
    for label in range(5):
        assert set(draw.class_ids[:, label]) == set(range(10)), "a class always has one label"


def test_contiguous_and_scattered_indices_agree() -> None:
    source = coded_pool().source(ways=3, shots=2, query_shots=2, rotate=True)
    straight = source.episodes(9, "test", range(100, 106))
    order = [4, 0, 5, 2, 1, 3]
    scattered = source.episodes(9, "test", [100 + i for i in order])
    for a, b in zip(straight, scattered, strict=True):
        assert torch.equal(a[order], b)


def test_seeds_and_splits_and_indices_differ() -> None:
    source = coded_pool().source(ways=5, shots=1, query_shots=1)
    base = source.draw(0, "train", range(10))
    assert not np.array_equal(base.rows, source.draw(1, "train", range(10)).rows)
    assert not np.array_equal(base.rows, source.draw(0, "train", range(10, 20)).rows)
    assert not np.array_equal(base.rows, source.draw(0, "val", range(10)).rows - 70), "splits share a stream"
    assert len(set(base.key.tolist())) == 10
    assert base.key.min() >= 0


def test_the_first_episodes_are_frozen() -> None:
    """These very tasks stand behind committed numbers; a change of digest voids them."""
    draw = coded_pool().source(ways=5, shots=2, query_shots=3, rotate=True).draw(1, "test", range(16))
    assert digest(draw) == "85dff28c5602d76b7ee3fe76dbbb1d12286c0e64e42f452a0eef5ef6d3cb5950"


def digest(draw: Draw) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).astype("<i8").tobytes() for a in draw)).hexdigest()


def test_drawing_touches_no_pixels() -> None:
    class NoPixels(torch.Tensor):
        """Has a shape and a type, and nothing else may be asked of it."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") == "__get__":
                return super().__torch_function__(func, types, args, kwargs or {})
            raise AssertionError(f"pixels were touched by {func}")

    pool = coded_pool()
    object.__setattr__(pool, "images", pool.images.as_subclass(NoPixels))
    source = pool.source(ways=5, shots=1, query_shots=2, rotate=True)
    assert source.draw(0, "train", range(100)).rows.shape == (100, 15)
    with pytest.raises(AssertionError, match="pixels were touched"):
        source.episodes(0, "train", [0])


def test_classes_that_are_turned_others_share_rows() -> None:
    pool = coded_pool(counts=[3] * 9, turns=np.tile(np.arange(4), 9))
    source = pool.source(ways=5, shots=1, query_shots=2)
    episode = source.episodes(0, "val", range(50))
    for images, labels in ((episode.support_x, episode.support_y), (episode.query_x, episode.query_y)):
        c, _, t = decode(images)
        classes = np.take_along_axis(episode.class_ids.numpy(), labels.numpy(), 1)
        np.testing.assert_array_equal(classes, 4 * c + t)


def test_turns_of_the_class_reach_its_images() -> None:
    pool = coded_pool(counts=[3] * 9, turns=np.tile(np.arange(4), 9))
    draw = pool.source(ways=5, shots=1, query_shots=1).draw(0, "train", range(40))
    np.testing.assert_array_equal(draw.turns, (draw.class_ids % 4)[np.arange(40)[:, None], draw.labels])


def test_turning_classes_that_are_turns_is_refused() -> None:
    """Two classes of one task could come out as the same picture."""
    pool = coded_pool(counts=[3] * 9, turns=np.tile(np.arange(4), 9))
    with pytest.raises(DataError, match="rotate must be false"):
        pool.source(ways=5, shots=1, query_shots=1, rotate=True)


def test_unequal_classes_are_used_to_their_own_end() -> None:
    pool = coded_pool(counts=[2, 9, 4] * 3)
    draw = pool.source(ways=3, shots=1, query_shots=1).draw(0, "train", range(400))
    assert set(draw.rows.ravel()) == set(range(15))


def test_too_many_images_asked_for() -> None:
    with pytest.raises(DataError, match=r"'class 0'.* 7 images.*5 \+ 3 = 8"):
        coded_pool().source(ways=5, shots=5, query_shots=3)


def test_too_many_ways_asked_for() -> None:
    with pytest.raises(DataError, match=r"'train' has 10 classes.*ways = 11"):
        coded_pool().source(ways=11, shots=1, query_shots=1)


@pytest.mark.parametrize("field", ["ways", "shots", "query_shots"])
def test_counts_start_at_one(field: str) -> None:
    counts = {"ways": 2, "shots": 1, "query_shots": 1, field: 0}
    with pytest.raises(DataError, match=f"{field} .*got 0"):
        coded_pool().source(ways=counts["ways"], shots=counts["shots"], query_shots=counts["query_shots"])


def test_only_the_splits_that_were_asked_for_are_checked_and_given() -> None:
    pool = coded_pool(counts=[7] * 10 + [1] * 20)
    source = pool.source(ways=5, shots=1, query_shots=1, splits=("train",))
    with pytest.raises(DataError, match="'val' is not one of train, which"):
        source.draw(0, "val", [0])


def test_a_class_in_two_splits_is_refused() -> None:
    pool = coded_pool()
    splits = {**pool.splits, "val": np.array([3])}
    with pytest.raises(DataError, match=r"'class 3'.*'train'.*'val'"):
        dataclasses.replace(pool, splits=splits)


def test_batches_cover_all_classes_with_labels_within_the_split() -> None:
    # Five divides ten: a class and an image chosen by one and the same word would not make all pairs.
    source = coded_pool(counts=[5] * CLASSES).source(ways=5, shots=1, query_shots=1)
    batch = source.batches(0, "test", range(20), 50)
    c, i, _ = decode(batch.x)
    np.testing.assert_array_equal(c - 20, batch.y.numpy())
    drawn = set(zip(c.ravel().tolist(), i.ravel().tolist(), strict=True))
    assert drawn == {(a, b) for a in range(20, 30) for b in range(5)}
    one = source.batches(0, "test", [7], 50)
    assert torch.equal(one.x[0], batch.x[7])
    assert torch.equal(one.key[0], batch.key[7])


def test_normalisation_is_in_units_of_the_pixel_range() -> None:
    p = ImageInputs(2, 1, 2, mean=(0.5, 0.0), std=(0.25, 1.0))
    x = p(torch.tensor([[[0, 255]], [[0, 255]]], dtype=torch.uint8))
    torch.testing.assert_close(x, torch.tensor([[[-2.0, 2.0]], [[0.0, 1.0]]]))


def test_the_split_hash_follows_membership_alone() -> None:
    pool = coded_pool()

    def hash_of(**splits: np.ndarray) -> str:
        return dataclasses.replace(pool, splits={**pool.splits, **splits}).split_hash

    assert hash_of() == pool.split_hash == hash_of(train=pool.splits["train"][::-1])
    assert hash_of(train=pool.splits["train"][1:]) != pool.split_hash
    assert hash_of(train=pool.splits["val"], val=pool.splits["train"]) != pool.split_hash


def test_the_protocols_are_met() -> None:
    assert isinstance(coded_pool().source(ways=2, shots=1, query_shots=1), Source)
