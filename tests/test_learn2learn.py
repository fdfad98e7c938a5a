"""Labelled data sets as class pools, and learn2learn's by name: with a stand-in, and with the library where it is."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import IMAGES, one_line, options
from PIL import Image
from torch.utils.data import Dataset, Subset

from metaft import meta_train
from metaft.errors import DataError, MetaftError, MetaftWarning
from metaft.tasks import load
from metaft.tasks.learn2learn import NAMES, pool

SITE = Path(os.environ.get("METAFT_PEERS") or Path(__file__).parents[1] / "benchmarks/peers/.site")


class Listed(Dataset[Any]):
    """Labelled images in a list."""

    def __init__(self, items: list[tuple[Any, Any]], classes: list[str] | None = None) -> None:
        self.items = items
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.items[index]


def pixels(classes: int = 5, each: int = 4, side: int = 6, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [classes, each, side, side, channels], with a black border, so that none is turned around."""
    made = np.random.default_rng(seed).integers(0, 256, (classes, each, side, side, channels), dtype=np.uint8)
    made[:, :, [0, -1]] = 0
    made[:, :, :, [0, -1]] = 0
    return made


def listed(made: np.ndarray, form: Callable[[np.ndarray], Any], label: Callable[[int], Any] = int) -> Listed:
    """Images in an order in which classes alternate."""
    return Listed([(form(made[c, i]), label(c)) for i in range(made.shape[1]) for c in range(made.shape[0])])


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "pil": lambda a: Image.fromarray(a if a.shape[-1] == 3 else a[..., 0]),
    "array": lambda a: a,
    "array-chw": lambda a: np.moveaxis(a, -1, 0),
    "tensor": lambda a: torch.from_numpy(a).permute(2, 0, 1),
    "float-255": lambda a: torch.from_numpy(a).permute(2, 0, 1).float(),
    "float-1": lambda a: torch.from_numpy(a).permute(2, 0, 1).float() / 255,
    "double-array": lambda a: a / 255,
    "int64": lambda a: torch.from_numpy(a).permute(2, 0, 1).long(),
}


def test_class_names_are_compared_in_one_unicode_form() -> None:
    """As class folders are, which file systems may hand over in either form."""
    composed, loose = "caf\u00e9", "cafe\u0301"
    images = pixels(classes=3)
    assert pool(listed(images, FORMS["array"], lambda c: ["a", "b", loose][c])).class_names == ("a", "b", composed)
    clash = r"'caf\\xe9' and 'cafe\\u0301'|'cafe\\u0301' and 'caf\\xe9'"
    with pytest.raises(DataError, match=clash) as caught:
        pool(listed(images, FORMS["array"], lambda c: ["a", loose, composed][c]), name="mine")
    assert str(caught.value).startswith("mine: ")
    assert "two Unicode forms" in str(caught.value)
    parts = [Listed([(images[0, 0], 0)], [name]) for name in (composed, "b", loose)]
    with pytest.raises(DataError, match=clash):
        pool(*parts)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_pixels_come_through_whatever_form_they_have(form: str, channels: int) -> None:
    made = pixels(channels=channels)
    found = pool(listed(made, FORMS[form]), name="mine")
    assert found.name == "mine"
    assert found.shape == (channels, 6, 6)
    for c in range(5):
        own = found.class_names.index(str(c))
        assert found.counts[own] == 4
        rows = found.images[found.starts[own] :][:4]
        assert torch.equal(rows, torch.from_numpy(np.moveaxis(made[c], -1, 1)))


def test_grey_images_without_a_channel_axis_are_stored_bright_on_black() -> None:
    made = pixels(channels=1)
    for form in (lambda a: 255 - a[..., 0], lambda a: 1 - torch.from_numpy(a[..., 0]) / 255):
        found = pool(listed(made, form))
        assert found.inputs.polarity == "bright-on-black"
        assert torch.equal(found.images[found.starts[0] :][:4], torch.from_numpy(np.moveaxis(made[0], -1, 1)))


def test_greys_of_more_than_8_bits_have_one_range_and_flaws_one_note(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 8)).astype(np.uint16)
    values[5, 3, 3] = 1023
    shown = Image.fromarray(np.full((8, 8), 5, np.uint8))
    shown.save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")

    class Lazy(Listed):
        def __getitem__(self, index: int) -> tuple[Any, Any]:
            return (Image.open(tmp_path / "a.jpg"), 2) if index == 6 else super().__getitem__(index)

    items = [(Image.fromarray(value), i // 2) for i, value in enumerate(values)]
    with pytest.warns(MetaftWarning) as said:
        made = pool(Lazy([*items, (None, 2)]), name="x")
    assert [str(warning.message).partition(" (")[0] for warning in said] == [
        "x: 6 files hold 10-bit greys in 16 bits: their range is 0 to 1023",
        "x: 1 picture is read in spite of flaws, such as train item 6",
    ]
    assert made.inputs.bits == 10
    np.testing.assert_allclose(made.images[:6, 0].numpy(), values / 1023 * 255, atol=0.51)


def test_pictures_are_turned_as_their_exif_data_say(tmp_path: Path) -> None:
    """As those of a folder are."""
    made, exif = pixels(), Image.Exif()
    exif[0x0112] = 6  # stored so that it is shown turned clockwise

    class Files(Listed):
        def __getitem__(self, index: int) -> tuple[Any, Any]:
            image, label = super().__getitem__(index)
            image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"{index}.png", exif=exif)
            return Image.open(tmp_path / f"{index}.png"), label

    plain, turned = pool(listed(made, FORMS["pil"])), pool(Files(listed(made, FORMS["pil"]).items))
    assert torch.equal(turned.images, plain.images)


def test_images_of_several_sizes_are_fitted_and_a_size_can_be_asked_for() -> None:
    made, wide = pixels(side=40), pixels(side=50)
    mixed = Listed([*listed(made, FORMS["pil"]).items, *listed(wide, FORMS["pil"]).items])
    assert pool(mixed).shape == (3, 84, 84)
    assert pool(mixed, image_size=16, channels=1).shape == (1, 16, 16)
    oblong = listed(made[:, :, :20], FORMS["tensor"])
    assert pool(oblong).shape == (3, 84, 84)


def test_classes_of_one_data_set_are_split_as_a_folders_are() -> None:
    names = [f"name {c}" for c in range(10)]
    found = pool(Listed(listed(pixels(10, 2), FORMS["pil"]).items, names))
    assert found.class_names == tuple(names)
    assert [len(found.splits[s]) for s in ("train", "val", "test")] == [6, 2, 2]
    assert sorted(np.concatenate(list(found.splits.values()))) == list(range(10))
    wrapped = pool(Subset(Listed(listed(pixels(10, 2), FORMS["pil"]).items, names), list(range(20))))
    assert wrapped.split_hash == found.split_hash
    shuffled = Listed(listed(pixels(10, 2), FORMS["pil"]).items[::-1], names)
    assert pool(shuffled).split_hash == found.split_hash


def test_three_data_sets_are_the_three_splits() -> None:
    parts = [listed(pixels(3, 2, seed=s), FORMS["tensor"], torch.tensor) for s in range(3)]
    found = pool(*parts)
    assert found.class_names == tuple(f"{s}/{c}" for s in ("train", "val", "test") for c in range(3))
    assert {s: c.tolist() for s, c in found.splits.items()} == {"train": [0, 1, 2], "val": [3, 4, 5], "test": [6, 7, 8]}
    images = torch.from_numpy(np.moveaxis(pixels(3, 2, seed=1)[2], -1, 1))
    assert torch.equal(found.images[found.starts[5] :][:2], images)
    source = found.source(ways=3, shots=1, query_shots=1)
    assert source.episodes(0, "test", [0]).support_x.shape == (1, 3, 3, 6, 6)
    named = [Listed(p.items, [f"{chr(97 + s)}{c}" for c in range(3)]) for s, p in enumerate(parts)]
    assert pool(*named).class_names == ("a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2")


class Record:
    """Fields by name."""

    def __getitem__(self, name: Any) -> Any:
        raise KeyError(name)


def unpaired(item: Any) -> Listed:
    return Listed([item] * 3)


GOOD = listed(pixels(3, 2), FORMS["pil"])
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "one of two": (lambda: pool(GOOD, GOOD), "data sets for both val and test"),
    "empty": (lambda: pool(Listed([])), "a data set without images"),
    "twice": (
        lambda: pool(*[Listed(GOOD.items, ["a", "b", s]) for s in "xyz"]),
        "'a' names two classes",
    ),
    "no pair": (lambda: pool(unpaired(5)), r"item 0 is not \(image, label\) but int"),
    "one": (lambda: pool(unpaired((torch.zeros(1, 4, 4),))), r"item 0 is not \(image, label\) but tuple"),
    "dict": (lambda: pool(unpaired({"image": 1, "label": 0})), r"item 0 is not \(image, label\) but dict"),
    # As a dict answers to a slice from Python 3.12 on, where a slice has a hash.
    "record": (lambda: pool(unpaired(Record())), r"item 0 is not \(image, label\) but Record"),
    "labels": (lambda: pool(Listed([(GOOD[0][0], torch.zeros(3))])), "the label of item 0 must be a number or a name"),
    "normalised": (
        lambda: pool(listed(pixels(), lambda a: (torch.from_numpy(a).permute(2, 0, 1).float() - 128) / 64)),
        r"numbers of an image are from -2 to 1\.\d+, not in 0\.\.255; hand the data set over without its normalisation",
    ),
    "nan": (lambda: pool(Listed([(torch.full((3, 4, 4), torch.nan), 0)])), r"from nan to nan, not in 0\.\.255"),
    "shape": (lambda: pool(Listed([(torch.zeros(2, 5, 5), 0)])), r"1, 3 or 4 channels, got \[2, 5, 5\]"),
    "mode F": (lambda: pool(Listed([(Image.new("F", (4, 4)), 0)])), "learn2learn: floating-point pixels"),
    "text": (lambda: pool(Listed([("cat.png", 0)])), r"got \[\]"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_what_is_no_labelled_image_is_named(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        call()


# ---- by name, with a stand-in -------------------------------------------------------------------------------------


class Stand:
    """As learn2learn's own: (root, mode, transform, target_transform, download)."""

    asked: list[dict[str, Any]]

    def __init__(self, root: str, mode: str = "all", download: bool = False) -> None:
        print("Downloading")
        self.asked.append({"root": root, "mode": mode, "download": download})
        if not Path(root).exists():
            raise FileNotFoundError(f"no file\nin {root}")
        seed = ["train", "validation", "test", "all"].index(mode)
        self.items = listed(pixels(12 if mode == "all" else 4, 5, side=8, seed=seed), FORMS["float-255"]).items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.items[index]


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    made = types.ModuleType("learn2learn.vision.datasets")
    Stand.asked = []
    for name in NAMES.values():
        setattr(made, name, Stand)
    for module in ("learn2learn", "learn2learn.vision"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setitem(sys.modules, "learn2learn.vision.datasets", made)
    return Stand.asked


def test_learn2learns_data_sets_by_name(stand: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load("l2l:cifarfs", data_root=str(tmp_path))
    assert stand == [{"root": str(tmp_path), "mode": m, "download": False} for m in ("train", "validation", "test")]
    assert (found.name, found.shape) == ("l2l:cifarfs", (3, 8, 8))
    assert capsys.readouterr().out == "", "stdout is for results"
    whole = load("l2l:omniglot", data_root=str(tmp_path), download=True)
    assert stand[3:] == [{"root": str(tmp_path), "mode": "all", "download": True}]
    classes: Any = whole.describe()["classes"]
    assert [len(classes[s]) for s in ("train", "val", "test")] == [8, 2, 2]
    assert load("l2l:fc100", data_root=str(tmp_path), image_size=16, channels=1).shape == (1, 16, 16)


@pytest.mark.usefixtures("stand")
def test_a_run_on_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    words = {**IMAGES, "dataset": "l2l:mini-imagenet", "data_root": tmp_path, "image_size": 16, "iterations": 2}
    assert meta_train.main(options(words, out=tmp_path / "run")) == 0
    assert (tmp_path / "run/result.json").exists()


@pytest.mark.usefixtures("stand")
def test_errors_of_the_names_and_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MetaftError, match=r"learn2learn has no 'cifar'.*did you mean 'cifarfs'"):
        load("l2l:cifar", data_root=str(tmp_path))
    with pytest.raises(MetaftError, match="write 'l2l:NAME', not 'l2l'"):
        load("l2l")
    missing = rf"l2l:fc100: learn2learn cannot read it under {tmp_path}/x \(no file in {tmp_path}/x\); --download"
    with pytest.raises(DataError, match=missing):
        load("l2l:fc100", data_root=f"{tmp_path}/x")
    monkeypatch.delenv("METAFT_DATA", raising=False)
    with pytest.raises(DataError, match="l2l:fc100: where is it"):
        load("l2l:fc100")


def test_without_learn2learn_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("learn2learn", *(name for name in sys.modules if name.startswith("learn2learn."))):
        monkeypatch.setitem(sys.modules, name, None)
    argv = ["--dataset", "l2l:cifarfs", "--data-root", str(tmp_path), "--out", str(tmp_path / "run")]
    assert meta_train.main(argv) == 2
    one_line(capsys, "needs learn2learn", "pip install learn2learn==0.2.0", "benchmarks/peers/install.sh")
    assert (Path(__file__).parents[1] / "benchmarks/peers/install.sh").exists()


# ---- the library itself -------------------------------------------------------------------------------------------


@pytest.fixture
def _learn2learn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path, str(SITE)])
    importlib.invalidate_caches()
    if importlib.util.find_spec("learn2learn") is None:
        pytest.skip("learn2learn is not installed; benchmarks/peers/install.sh does it")
    yield
    for name in set(sys.modules) - before:  # other tests are to find what they found before
        if name.partition(".")[0] in ("learn2learn", "gym"):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.usefixtures("_learn2learn")
def test_the_real_mini_imagenet_and_cifarfs(tmp_path: Path) -> None:
    """Files as learn2learn keeps them, with a few pictures."""
    made = {mode: pixels(3, 4, side=84, seed=s) for s, mode in enumerate(("train", "validation", "test"))}
    for mode, images in made.items():
        rows = {f"n{mode}{c}": list(range(4 * c, 4 * c + 4)) for c in range(3)}
        data = {"image_data": images.reshape(12, 84, 84, 3), "class_dict": rows}
        (tmp_path / f"mini-imagenet-cache-{mode}.pkl").write_bytes(pickle.dumps(data))
        folder = tmp_path / "cifarfs/processed" / ("val" if mode == "validation" else mode)
        for c in range(3):
            (folder / f"{mode} {c}").mkdir(parents=True)
            for i in range(4):
                Image.fromarray(images[c, i, :32, :32]).save(folder / f"{mode} {c}" / f"{i}.png")
    mini: Any = load("l2l:mini-imagenet", data_root=str(tmp_path))
    small: Any = load("l2l:cifarfs", data_root=str(tmp_path))
    assert (mini.shape, small.shape) == ((3, 84, 84), (3, 32, 32))
    for split, mode in (("train", "train"), ("val", "validation"), ("test", "test")):
        assert [small.class_names[c] for c in small.splits[split]] == [f"{mode} {c}" for c in range(3)]
        for i, c in enumerate(mini.splits[split]):
            expected = torch.from_numpy(np.moveaxis(made[mode][i], -1, 1))
            assert torch.equal(mini.images[mini.starts[c] :][:4], expected)
            assert torch.equal(small.images[small.starts[c] :][:4], expected[..., :32, :32])


@pytest.mark.slow
@pytest.mark.usefixtures("_learn2learn")
def test_the_real_meta_datasets() -> None:
    learn2learn = importlib.import_module("learn2learn")
    plain = Listed(listed(pixels(10, 4), FORMS["tensor"]).items, [f"name {c}" for c in range(10)])
    meta = learn2learn.data.MetaDataset(plain)
    assert pool(meta).split_hash == pool(plain).split_hash
    assert torch.equal(pool(meta).images, pool(plain).images)
    some = pool(learn2learn.data.FilteredMetaDataset(meta, labels=[1, 4, 7]))
    assert some.class_names == ("name 1", "name 4", "name 7")
    union = learn2learn.data.UnionMetaDataset([meta, learn2learn.data.MetaDataset(plain)])
    assert len(pool(union).class_names) == 20
