"""Episodes out of pictures without labels, and the views that they are made of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import IMAGES, one_line, options, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metaft import engines, evaluate, meta_train
from metaft.errors import DataError, MetaftError, MetaftWarning
from metaft.inputs import ImageInputs
from metaft.tasks import ClassPool, UnlabelledPool, hide, load, unlabelled, warps
from metaft.tasks.unlabelled import Views
from metaft.types import SPLITS


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path / "cache"))


def pool(channels: int = 1, classes: int = 9, each: int = 4, **changes: Any) -> ClassPool:
    """Pictures of noise: no two are alike."""
    images = np.random.default_rng(0).integers(0, 256, (classes * each, channels, 12, 12), np.uint8)
    third = np.array_split(np.arange(classes), 3)
    return ClassPool(
        "noise", torch.from_numpy(images), tuple(f"c{i}" for i in range(classes)), np.arange(classes) * each,
        np.full(classes, each), dict(zip(SPLITS, third, strict=True)), ImageInputs(channels, 12, 12), **changes,
    )  # fmt: skip


# --- episodes ---


@given(
    ways=st.integers(2, 6), shots=st.integers(1, 4), queries=st.integers(1, 4), seed=st.integers(0, 2**40),
    first=st.integers(0, 50),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_classes_of_an_episode_are_pictures(ways: int, shots: int, queries: int, seed: int, first: int) -> None:
    hidden = hide(pool())
    source = hidden.source(ways=ways, shots=shots, query_shots=queries, splits=("train",))
    indices = range(first, first + 3)
    draw, episodes = source.draw(seed, "train", indices), source.episodes(seed, "train", indices)
    plain = hidden.inputs(hidden.images)
    train_rows = {row for c in hidden.splits["train"] for row in range(hidden.starts[c], hidden.starts[c] + 4)}
    for b in range(3):
        of_label = {}
        for row, label in zip(draw.rows[b], draw.labels[b], strict=True):
            assert of_label.setdefault(label, row) == row, "one picture for each class"
        assert len(set(of_label.values())) == ways
        assert set(of_label.values()) <= train_rows
        for part, count in ((episodes.support_y[b], shots), (episodes.query_y[b], queries)):
            assert part.bincount(minlength=ways).tolist() == [count] * ways
        x, y = episodes.support_x[b], episodes.support_y[b]
        for label in range(ways):
            same = [bool(torch.equal(image, plain[of_label[label]])) for image in x[y == label]]
            assert same == [True] + [False] * (shots - 1), "the first is the picture itself"
        for image, label in zip(episodes.query_x[b], episodes.query_y[b].tolist(), strict=True):
            assert not torch.equal(image, plain[of_label[label]])
    again = source.episodes(seed, "train", [first + 1])
    for one, both in zip(again, episodes, strict=True):
        assert torch.equal(one[0], both[1])


def test_labels_count_where_they_are_not_hidden() -> None:
    labelled, hidden = pool(), hide(pool())
    how: Any = {"ways": 3, "shots": 1, "query_shots": 2, "splits": ("val", "test")}
    for split in ("val", "test"):
        one, two = (p.source(**how).episodes(5, split, range(4)) for p in (labelled, hidden))
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)
    assert hidden.describe()["classes"] == {**labelled.describe()["classes"], "train": []}  # type: ignore[dict-item]
    assert hidden.split_hash == labelled.split_hash
    moved = hidden.to("cpu")
    assert isinstance(moved, UnlabelledPool)
    assert moved.hidden == ("train",)
    every = hide(pool(), SPLITS).source(**how).episodes(5, "test", range(4))
    assert not torch.equal(every.query_x, labelled.source(**how).episodes(5, "test", range(4)).query_x)


def test_more_shots_than_a_class_has_are_views() -> None:
    hidden = hide(pool(each=1))
    episodes = hidden.source(ways=3, shots=5, query_shots=5, splits=("train",)).episodes(0, "train", [0])
    assert episodes.support_x.shape == (1, 15, 1, 12, 12)
    with pytest.raises(DataError, match="class 'c3' of split 'val' has 1 images"):
        hidden.source(ways=3, shots=5, query_shots=5)
    with pytest.raises(DataError, match="split 'train' has 3 pictures, fewer than ways = 4"):
        hidden.source(ways=4, shots=1, query_shots=1, splits=("train",))
    with pytest.raises(DataError, match="no labels to train on"):
        hidden.source(ways=2, shots=1, query_shots=1, splits=("train",)).batches(0, "train", [0], 4)


def test_turns_that_make_a_class_belong_to_its_pictures() -> None:
    turned = dataclasses.replace(pool(), turns=np.arange(9) % 4)
    source = hide(turned).source(ways=12, shots=1, query_shots=1, splits=("train",))
    draw = source.draw(0, "train", range(5))
    assert np.array_equal(draw.turns, (draw.rows // 4) % 4)
    rotated = hide(pool()).source(ways=4, shots=2, query_shots=1, rotate=True, splits=("train",))
    draw = rotated.draw(0, "train", range(20))
    assert set(draw.turns.ravel().tolist()) == {0, 1, 2, 3}
    for labels, turns in zip(draw.labels, draw.turns, strict=True):
        assert all(len(set(turns[labels == label].tolist())) == 1 for label in range(4))


def test_indices_and_gather_are_episodes() -> None:
    """What is recorded as a whole step on a GPU."""
    source = hide(pool(3)).source(ways=3, shots=2, query_shots=2, splits=("train",))
    drawn = source.indices(1, "train", range(2))
    assert isinstance(drawn, Views)
    assert drawn.still.sum(1).tolist() == [3, 3]
    for one, two in zip(source.gather(drawn), source.episodes(1, "train", range(2)), strict=True):
        assert torch.equal(one, two)


def test_the_first_episodes_are_frozen() -> None:
    source = hide(pool()).source(ways=3, shots=1, query_shots=2, splits=("train",))
    draw = source.draw(3, "train", [7])
    moves = source.indices(3, "train", [7]).moves  # type: ignore[union-attr]
    assert draw.rows[0].tolist() == [2, 3, 10, 3, 2, 10, 10, 3, 2]
    assert draw.labels[0].tolist() == [0, 1, 2, 1, 0, 2, 2, 1, 0]
    assert moves.shape == (1, 9, warps.DRAWING)
    torch.testing.assert_close(moves[0, 0, :3], torch.tensor([0.291253, 0.569223, -0.80577]), rtol=0, atol=1e-6)
    assert float(moves.abs().max()) <= 1


# --- views ---


def test_views_by_nothing_are_the_picture() -> None:
    x = torch.rand(3, 1, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(warps.drawing(x, torch.zeros(3, warps.DRAWING, dtype=torch.float64)), x)
    colour = torch.rand(3, 3, 12, 12, dtype=torch.float64)
    u = torch.zeros(3, warps.PHOTO, dtype=torch.float64)
    u[:, 0], u[:, 3] = 1, 1  # the whole picture, not mirrored
    torch.testing.assert_close(warps.photo(colour, u), colour)
    u[:, 3] = -1
    torch.testing.assert_close(warps.photo(colour, u), colour.flip(-1))


def test_a_drawing_is_shifted_and_turned_by_what_it_is_told() -> None:
    x = torch.zeros(1, 1, 20, 20, dtype=torch.float64)
    x[..., 8:12, 8:12] = 1
    u = torch.zeros(1, warps.DRAWING, dtype=torch.float64)
    u[:, 4] = 1
    torch.testing.assert_close(warps.drawing(x, u), x.roll(-round(20 * warps.SHIFT), -1))
    u[:, 4], u[:, 5] = 0, -1
    torch.testing.assert_close(warps.drawing(x, u), x.roll(round(20 * warps.SHIFT), -2))


@pytest.mark.parametrize(
    ("view", "channels", "numbers"), [(warps.drawing, 1, warps.DRAWING), (warps.photo, 3, warps.PHOTO)]
)
def test_each_picture_has_a_view_of_its_own(view: Any, channels: int, numbers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, channels, 16, 16, generator=generator)
    u = 2 * torch.rand(8, numbers, generator=generator) - 1
    seen = view(x, u)
    assert seen.shape == x.shape
    assert bool(seen.isfinite().all())
    for i in range(8):
        torch.testing.assert_close(view(x[i : i + 1], u[i : i + 1])[0], seen[i])
        assert not torch.equal(seen[i], x[i])


def test_cut_out_photos_hold_nothing_from_outside() -> None:
    """The border is never repeated: what is cut out lies on the picture, at every bound."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6)
    u = torch.cat([corners, torch.zeros(len(corners), 4)], 1)
    ramp = torch.linspace(0, 1, 32).expand(3, 32, 32)
    seen = warps.photo(ramp.expand(len(u), 3, 32, 32), u)[:, 0, 16]
    steps = (seen[:, 1:] - seen[:, :-1]).abs()
    assert float(steps[:, 1:-1].min()) > 0.3 / 32


# --- by name ---


def picture(file: Path, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 20), np.uint8)).save(file)


def test_any_folder_of_pictures(tmp_path: Path) -> None:
    for number in range(30):
        picture(tmp_path / "d" / ("a" if number % 2 else "b/c") / f"{number}.png", number)
    found = load(f"unlabelled:{tmp_path / 'd'}")
    assert isinstance(found, UnlabelledPool)
    assert found.hidden == SPLITS
    assert [len(found.splits[split]) for split in SPLITS] == [24, 3, 3]
    assert found.shape == (1, 28, 28)
    assert json.dumps(found.describe())
    small = unlabelled(tmp_path / "d", 16, 3)
    assert small.shape == (3, 16, 16)
    (tmp_path / "d/a/1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"a/1\.png cannot be read.*--skip-bad"):
        unlabelled(tmp_path / "d")
    with pytest.warns(MetaftWarning, match="skipped 1 of 30"):
        left = unlabelled(tmp_path / "d", skip_bad=True)
    assert sum(len(left.splits[split]) for split in SPLITS) == 29
    assert torch.equal(left.images, found.images[[i for i, n in enumerate(found.class_names) if n != "a/1.png"]])
    for _ in range(21):
        next((tmp_path / "d").rglob("*.png")).unlink()
    with pytest.raises(DataError, match="holds 9 pictures to train on, fewer than 10"):
        unlabelled(tmp_path / "d")
    with pytest.raises(DataError, match="does not exist"):
        unlabelled(tmp_path / "none")


@pytest.mark.parametrize("place", ["train/{n}.png", "train/a/{n}.png", "train/a/b/{n}.png"])
def test_no_picture_of_the_test_part_is_trained_on(place: str, tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / place.format(n=number), number)
    for split in ("val", "test"):
        for name in ("x", "y"):
            for number in range(3):
                picture(tmp_path / split / f"{split}-{name}" / f"{number}.png", 100 + number)
    found = unlabelled(tmp_path)
    assert found.hidden == ("train",)
    assert [len(found.splits[split]) for split in SPLITS] == [12, 2, 2]
    assert all(found.class_names[c].startswith("train/") for c in found.splits["train"])
    assert [found.class_names[c] for c in found.splits["test"]] == ["test-x", "test-y"]
    (tmp_path / "val").rename(tmp_path / "others")
    with pytest.raises(DataError, match=r"has train/ but no val/; give all of"):
        unlabelled(tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="val holds no class folders"):
        unlabelled(tmp_path)


@pytest.mark.slow
def test_a_named_set_without_its_labels() -> None:
    found = load("unlabelled:glyphs")
    assert isinstance(found, UnlabelledPool)
    assert (found.name, found.hidden) == ("unlabelled:glyphs", ("train",))
    given: dict[str, Any]
    for option, value, words in (
        ("image_size", 20, "image_size: unlabelled has its own"), ("download", True, "download: unlabelled is not"),
        ("split", "finn", "split: unlabelled has no 'finn', only scripts"),
    ):  # fmt: skip
        given = {option: value}
        with pytest.raises(MetaftError, match=words):
            load("unlabelled:glyphs", **given)


@pytest.mark.slow
def test_a_run_without_labels_is_stopped_resumed_and_tested(in_tmp: Path, capsys: Any) -> None:
    write_folder(in_tmp / "data")  # has train/, val/ and test/: the labels of training are hidden
    words = options(IMAGES, dataset="unlabelled:data", image_size=8, iterations=2, out="run", algorithm="protonet")
    assert meta_train.main(words) == 0
    assert f'dataset = "unlabelled:{in_tmp / "data"}"' in (in_tmp / "run/config.toml").read_text()
    assert evaluate.main(["run", "--dataset", "folder:data"]) == 0
    capsys.readouterr()
    for algorithm in ("baseline", "baseline++"):
        words = options(IMAGES, dataset="unlabelled:data", image_size=8, out="other", algorithm=algorithm)
        assert meta_train.main(words) == 2
        one_line(capsys, f"algorithm: {algorithm} trains on labels, and unlabelled:", "has none")
    assert meta_train.main(options(IMAGES, dataset="unlabelled:nowhere", out="x")) == 2
    one_line(capsys, "dataset: unlabelled: ", "nowhere does not exist")


@pytest.mark.slow
def test_it_learns_without_labels() -> None:
    """On glyphs, whose test scripts have labels."""
    from metaft import algorithms, models, outer
    from metaft.testing import score_episodes

    hidden = load("unlabelled:glyphs")
    train = hidden.source(ways=5, shots=1, query_shots=3, splits=("train",))
    test = hidden.source(ways=5, shots=1, query_shots=5, splits=("test",))
    model = models.build("conv4", ways=5, shape=hidden.shape, width=16, seed=0)
    protonet = algorithms.build("protonet", model, {"loss": "cross_entropy"})
    meta, state = protonet.init(0)
    engine = engines.Threads(1, 8)

    def accuracy() -> float:
        how: Any = {"split": "test", "seed": 1, "episodes": 60, "steps": 0}
        return float(score_episodes(engine, protonet, meta, state, test, **how)[:, 0, -1].mean())

    before = accuracy()
    optimizer = torch.optim.Adam(meta.values(), 3e-3)
    for step in range(60):
        found = outer.meta_gradient(
            engine, protonet, meta, state, train.episodes(0, "train", range(8 * step, 8 * step + 8))
        )
        for name, value in meta.items():
            value.grad = found.grads[name]
        optimizer.step()
    assert accuracy() > before + 0.08
