"""Every data set that `load` knows: what it reads, how it splits, and what it says when its data is bad."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metaft.errors import DataError, MetaftError, MetaftWarning
from metaft.inputs.reading import open_image, read
from metaft.support.cache import cached
from metaft.tasks import ClassPool, Sinusoid, folder, glyphs, load, omniglot
from metaft.tasks.folder import rank_split
from metaft.tasks.letters import SAME_SHAPE, SCRIPTS, clean, faces_of, table
from metaft.tasks.omniglot import HELD_OUT_ALPHABETS, OMNIGLOT_SPLITS, Character, characters, find
from metaft.types import SPLITS, Dataset, Source, Split

REAL = Path(os.environ.get("METAFT_DATA", "")) / "omniglot"
needs_omniglot = pytest.mark.skipif(
    not (os.environ.get("METAFT_DATA") and REAL.is_dir()), reason="METAFT_DATA names no folder with omniglot/"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for the whole session, away from the user's."""
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sha256(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).astype("<i8").tobytes() for a in arrays)).hexdigest()


def picture(path: Path, values: np.ndarray | int, mode: str = "L", size: tuple[int, int] = (12, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, values) if isinstance(values, int) else Image.fromarray(values)
    image.save(path)
    return path


# --- cache ---


def test_the_second_call_reads_what_the_first_one_built(empty_cache: Path) -> None:
    built = []

    def build() -> dict[str, np.ndarray]:
        built.append(1)
        return {"a": np.arange(6).reshape(2, 3), "none": np.empty((0, 2), np.uint8)}

    first, second = cached("x", "key", build), cached("x", "key", build)
    assert built == [1]
    for field in ("a", "none"):
        np.testing.assert_array_equal(first[field], second[field])
        assert first[field].dtype == second[field].dtype
        assert set(second) == {"a", "none"}
    cached("x", "another key", build)
    assert built == [1, 1]
    assert not list(empty_cache.glob("*.tmp"))


@pytest.mark.parametrize("harm", ["cut", "garbage", "empty", "edited", "pickle", "no digest"])
def test_a_harmed_cache_file_is_built_again(empty_cache: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    def build() -> dict[str, np.ndarray]:
        return {"a": np.arange(1000)}

    cached("x", "key", build)
    (path,) = empty_cache.iterdir()
    whole = path.read_bytes()
    if harm == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif harm == "garbage":
        path.write_bytes(b"not a zip file")
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "edited":
        with np.load(path) as file:
            np.savez(path, a=np.zeros(1000, np.int64), sha256=file["sha256"])
    elif harm == "pickle":
        np.savez(path, a=np.array([{}], object))
    else:
        np.savez(path, a=np.zeros(1000, np.int64))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(cached("x", "key", build)["a"], np.arange(1000))
    assert str(path) in caplog.text
    caplog.clear()
    cached("x", "key", build)
    assert not caplog.text, "the harmed file was not replaced"


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "file.png", 0)
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path / "file.png" / "cache"))
    assert cached("x", "key", lambda: {"a": np.ones(3)})["a"].sum() == 3


def test_processes_may_write_one_cache_file_at_once(empty_cache: Path) -> None:
    code = (
        "import numpy as np; from metaft.support.cache import cached\n"
        "for k in range(20):\n"
        "    a = cached('x', str(k), lambda: {'a': np.full(50_000, k)})['a']\n"
        "    assert (a == k).all() and len(a) == 50_000"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [run.communicate()[1] for run in runs]
    assert all(run.returncode == 0 for run in runs)
    assert errors == [""] * 3
    assert len(list(empty_cache.iterdir())) == 20


# --- images ---


def test_one_bit_pictures_keep_their_grey_levels_when_resized(tmp_path: Path) -> None:
    strokes = np.zeros((105, 105), bool)
    strokes[np.abs(np.subtract.outer(np.arange(105), np.arange(105))) < 3] = True
    small = read(picture(tmp_path / "a.png", strokes), 1, 28)
    assert len(np.unique(small)) > 5, "nearest-pixel resize of mode 1"


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 144).astype(np.uint16).reshape(12, 12)
    values = np.asarray(open_image(picture(tmp_path / "a.png", ramp)))
    np.testing.assert_allclose(values, ramp / 257, atol=0.51)


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    values = np.zeros((10, 20, 3), np.uint8)
    values[:, 10:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(open_image(tmp_path / "a.png"))
    assert upright.shape == (20, 10, 3)
    assert upright[:10].max() == 0
    assert upright[10:].min() == 255


@pytest.mark.parametrize(("ink", "ground"), [(0, 255), (255, 0)])
def test_transparent_drawings_get_a_ground_that_shows_them(tmp_path: Path, ink: int, ground: int) -> None:
    rgba = np.zeros((12, 12, 4), np.uint8)
    rgba[4:8, 4:8] = (ink, ink, ink, 255)
    image = open_image(picture(tmp_path / "a.png", rgba))
    values = np.asarray(image)
    assert image.mode == "L"
    assert values[0, 0] == ground
    assert values[5, 5] == ink


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    frames = [Image.new("L", (12, 12), value) for value in (200, 10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(open_image(tmp_path / "a.gif").convert("L")).mean() == pytest.approx(200, abs=2)


def test_letters_are_padded_and_photographs_are_cropped(tmp_path: Path) -> None:
    wide = np.full((10, 30), 255, np.uint8)
    wide[:, :2] = wide[:, -2:] = 0
    letter = read(picture(tmp_path / "letter.png", wide), 1, 30)[0]
    assert letter[15, 0] == 0, "cut off"
    assert letter[15, -1] == 0, "cut off"
    assert letter[0].min() == 255, "padded with another grey than the border's"
    photo = read(picture(tmp_path / "photo.png", np.stack([wide] * 3, -1)), 3, 10)
    assert photo.shape == (3, 10, 10)
    assert photo.min() == 255


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_a_broken_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png") as caught:
        open_image(path)
    assert "\n" not in str(caught.value)


# --- folder ---


def class_folders(root: Path, names: str, images: int = 3, **kwargs) -> Path:
    """Class `c` holds `images` pictures of one value: 10 times its place plus their number."""
    for place, name in enumerate(names):
        for i in range(images):
            picture(root / name / f"{i}.png", 10 * place + i, **kwargs)
    return root


def test_one_folder_of_classes_is_split_by_name_alone(tmp_path: Path, empty_cache: Path) -> None:
    pool = folder(class_folders(tmp_path / "d", "ABCDEFGHIJ"))
    assert {split: len(pool.splits[split]) for split in SPLITS} == {"train": 6, "val": 2, "test": 2}
    assert pool.class_names == tuple("ABCDEFGHIJ")
    assert pool.shape == (1, 28, 28)
    assert [pool.class_names[c] for c in pool.splits["test"]] == ["B", "F"]
    for c in range(10):
        rows = pool.images[pool.starts[c] : pool.starts[c] + pool.counts[c]]
        assert rows[:, 0, 0, 0].tolist() == [10 * c, 10 * c + 1, 10 * c + 2]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 7, 10, 100, 1623])
def test_rank_split_leaves_no_class_out_and_no_part_empty(n: int) -> None:
    names = [f"class {i}" for i in range(n)]
    parts = rank_split(names)
    assert sorted(parts["train"] + parts["val"] + parts["test"]) == sorted(names)
    assert n < 3 or all(parts.values())
    assert n != 100 or [len(parts[s]) for s in SPLITS] == [64, 16, 20]


def test_given_splits_are_kept(tmp_path: Path) -> None:
    for split, names in zip(SPLITS, ("abc", "de", "fg"), strict=True):
        class_folders(tmp_path / split, names, images=2)
    pool = load(f"folder:{tmp_path}")
    assert isinstance(pool, ClassPool)
    found = {split: "".join(pool.class_names[c] for c in pool.splits[split]) for split in SPLITS}
    assert found == {"train": "abc", "val": "de", "test": "fg"}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "bus", "ship"):
        picture(tmp_path / name / "1.png", 5)
    assert folder(tmp_path).class_names == ("bus", "ship", "train")


@pytest.mark.parametrize("ground", [0, 255])
def test_grey_pools_are_stored_bright_on_black(tmp_path: Path, ground: int) -> None:
    ink = np.full((28, 28), ground, np.uint8)
    ink[10:18, 10:18] = 255 - ground
    for name in "abc":
        picture(tmp_path / name / "1.png", ink)
    pool = folder(tmp_path)
    assert pool.inputs.polarity == "bright-on-black"
    assert pool.images[:, 0, 0, 0].max() == 0
    assert pool.images[:, 0, 14, 14].min() == 255


def test_grey_or_colour_is_told_by_the_pixels(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / name / "1.png", 7, mode="RGB")  # red only
    pool = folder(tmp_path)
    assert pool.shape == (3, 84, 84)
    assert pool.inputs.polarity == "as-is"
    assert pool.inputs.mean == (0.485, 0.456, 0.406)
    assert folder(tmp_path, image_size=32, channels=1).shape == (1, 32, 32)
    picture(tmp_path / "a" / "1.png", np.full((9, 9, 3), 50, np.uint8))
    assert folder(tmp_path).shape == (3, 84, 84), "one grey picture among colour ones"
    for name in "bc":
        picture(tmp_path / name / "1.png", np.full((9, 9, 3), 50, np.uint8))
    assert folder(tmp_path).shape == (1, 28, 28), "colour files of equal channels"


def test_names_sizes_and_strangers(tmp_path: Path) -> None:
    class_folders(tmp_path / "d", "äß文", images=2)
    picture(tmp_path / "d" / "文" / "more.JPG", 9)
    picture(tmp_path / "d" / "文" / ".hidden.png", 9)
    (tmp_path / "d" / "文" / "notes.txt").write_text("x")
    (tmp_path / "d" / ".git").mkdir()
    with pytest.warns(MetaftWarning, match="1 hidden file .*; 1 file that is no picture"):
        pool = folder(tmp_path / "d")
    assert dict(zip(pool.class_names, pool.counts.tolist(), strict=True)) == {"ß": 2, "ä": 2, "文": 3}


def test_a_changed_picture_is_read_again(tmp_path: Path) -> None:
    class_folders(tmp_path, "abc")
    before = folder(tmp_path).images
    picture(tmp_path / "b" / "1.png", 99)
    assert not torch.equal(before, folder(tmp_path).images)


def test_paths_are_taken_as_people_write_them(
    tiny_omniglot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        picture(tmp_path / f"g/c{i}/a.png", i)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in (Path("~/g"), "~/g", "g", Path("g")):
        assert len(folder(path).images) == 3
    assert folder("~/g").name == f"folder:{tmp_path}/g"
    monkeypatch.setenv("HOME", str(tiny_omniglot))
    for root in (Path("~"), "~", str(tiny_omniglot)):
        assert len(omniglot(root).images) == 20 * len(TINY)
    assert find("~") == tiny_omniglot / "omniglot"


def test_bad_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(path: Path, *words: str, **kwargs) -> None:
        with pytest.raises(DataError) as caught:
            folder(path, **kwargs)
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in words), message

    refused(tmp_path / "nowhere", "nowhere", "does not exist")
    refused(picture(tmp_path / "file.png", 0), "file.png", "is a file")
    (tmp_path / "bare").mkdir()
    refused(tmp_path / "bare", "bare", "no class folders")

    root = class_folders(tmp_path / "d", "abc")
    refused(root, "image_size", "0", image_size=0)
    refused(root, "channels", "2", channels=2)
    (root / "d").mkdir()
    refused(root, str(root / "d"), "no images")
    (root / "d" / "x.png").write_bytes(b"broken")
    refused(root, str(root / "d" / "x.png"), "cannot be read")

    split = tmp_path / "split"
    class_folders(split / "train", "abc")
    class_folders(split / "test", "cde")
    refused(split, str(split / "val"), "missing")
    (split / "val").mkdir()
    refused(split, str(split / "val"), "no class folders")
    class_folders(split / "val", "f")
    refused(split, "'c'", str(split / "train"), str(split / "test"))


# --- omniglot ---


@pytest.mark.parametrize(
    ("split", "digest"),
    [("finn", "4d8a5ff9ab8a7d3d"), ("vinyals", "90c4c687f9bbf98f"), ("alphabets", "a51f87bb151d693c")],
)
def test_omniglots_splits_are_frozen(split: str, digest: str) -> None:
    """A figure means nothing once a class has moved from training to test."""
    lines = "\n".join(f"{c.name}\t{OMNIGLOT_SPLITS[split](c)}" for c in characters())
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == digest


def test_a_half_copy_is_completed_by_download_and_a_whole_one_preferred(tmp_path: Path) -> None:
    (tmp_path / "omniglot" / "images_background").mkdir(parents=True)
    assert find(tmp_path) == tmp_path / "omniglot"
    assert find(tmp_path, whole=True) is None
    for part in ("images_background", "images_evaluation"):
        (tmp_path / "omniglot-py" / part).mkdir(parents=True)
    assert find(tmp_path) == find(tmp_path, whole=True) == tmp_path / "omniglot-py"


TINY = tuple(
    Character(f"{alphabet}/character0{i}", part, finn, vinyals)
    for alphabet, part, finn, vinyals in (
        ("Greek", "background", "train", "val"),
        ("Korean", "background", "val", "train"),
        ("Oriya", "evaluation", "test", "test"),
    )
    for i in (1, 2)
)


@pytest.fixture
def tiny_omniglot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six characters in the release's layout; drawing j of character c has its ink at a place of its own."""
    monkeypatch.setattr(importlib.import_module("metaft.tasks.omniglot"), "characters", lambda: TINY)
    for c, character in enumerate(TINY):
        for j in range(20):
            paper = np.ones((105, 105), bool)
            paper[10 * c : 10 * c + 12, 4 * j : 4 * j + 12] = False
            picture(tmp_path / "omniglot" / f"images_{character.part}" / character.name / f"{j:02d}.png", paper)
    return tmp_path


@pytest.mark.parametrize("layout", ["omniglot", "omniglot-py", "."])
def test_omniglot_is_found_in_three_layouts(tiny_omniglot: Path, layout: str) -> None:
    base = tiny_omniglot / "omniglot"
    if layout == "omniglot-py":
        base = base.rename(tiny_omniglot / layout)
    pool = omniglot(base if layout == "." else tiny_omniglot)
    assert pool.images.shape == (120, 1, 28, 28)
    assert pool.class_names == tuple(c.name for c in TINY)
    for row in range(120):
        c, j = divmod(row, 20)
        y, x = (float((pool.images[row, 0].float().sum(d) * torch.arange(28)).sum()) for d in (1, 0))
        ink = float(pool.images[row].float().sum())
        assert (y / ink, x / ink) == pytest.approx(((10 * c + 5.5) / 3.75 - 0.4, (4 * j + 5.5) / 3.75 - 0.4), abs=0.5)


def test_omniglot_splits(tiny_omniglot: Path) -> None:
    def members(split: str) -> dict[str, list[str]]:
        pool = load("omniglot", data_root=str(tiny_omniglot), split=split)
        assert isinstance(pool, ClassPool)
        return {s: [pool.class_names[c] for c in pool.splits[s]] for s in SPLITS}

    names = [c.name for c in TINY]
    assert members("finn") == members("alphabets") == {"train": names[:2], "val": names[2:4], "test": names[4:]}
    turned = members("vinyals")
    assert turned["val"] == [f"{name}@{turn}" for name in names[:2] for turn in (0, 90, 180, 270)]
    pool = omniglot(tiny_omniglot, "vinyals")
    assert len(pool.images) == 120
    assert pool.turns is not None
    assert pool.turns[:5].tolist() == [0, 1, 2, 3, 0]
    assert pool.starts[:5].tolist() == [0, 0, 0, 0, 20]


def test_omniglot_that_is_not_whole_is_refused(tiny_omniglot: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(DataError, match=r"--data-root.*METAFT_DATA.*--download"):
        omniglot(tmp_path_factory.mktemp("nothing"))
    with pytest.raises(MetaftError, match=r"'fin'.*finn, vinyals, alphabets; did you mean 'finn'"):
        omniglot(tiny_omniglot, "fin")
    folder_ = tiny_omniglot / "omniglot" / "images_background" / "Greek" / "character02"
    (folder_ / "07.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"character02/07\.png cannot be read"):
        omniglot(tiny_omniglot)
    (folder_ / "07.png").unlink()
    with pytest.raises(DataError, match=r"character02 holds 19 images, not 20"):
        omniglot(tiny_omniglot)
    for file in folder_.iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"character02 holds no images"):
        omniglot(tiny_omniglot)
    folder_.rmdir()
    with pytest.raises(DataError, match=r"1 of 6 characters are missing.*'Greek/character02'"):
        omniglot(tiny_omniglot)


def test_omniglot_without_drawings_that_cannot_be_read(tiny_omniglot: Path) -> None:
    place = tiny_omniglot / "omniglot" / "images_background" / "Greek"
    whole = omniglot(tiny_omniglot, "vinyals")
    for name in ("character01/03.png", "character02/07.png"):
        (place / name).write_bytes(b"broken")
    (place / "character02/08.png").unlink()
    (place / "character02/08.png").symlink_to("/none")
    with pytest.raises(DataError, match=r"character02 holds 19 images \(1 broken link .*\), not 20"):
        omniglot(tiny_omniglot)
    with pytest.warns(MetaftWarning) as said:
        pool = omniglot(tiny_omniglot, "vinyals", skip_bad=True)
    assert [str(warning.message)[:30] for warning in said] == [
        "omniglot: ignored 1 of 120 fil", "omniglot: skipped 2 of 119 pic"
    ]  # fmt: skip
    assert pool.counts.tolist() == [19] * 4 + [18] * 4 + [20] * 16
    rows = [row for row in range(120) if row not in (3, 27, 28)]
    assert torch.equal(pool.images, whole.images[rows])
    assert pool.starts[::4].tolist() == [0, 19, 37, 57, 77, 97]


def test_the_omniglot_table() -> None:
    table_ = characters()
    names = [c.name for c in table_]
    assert len(set(names)) == 1623
    assert names == sorted(names)
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    finn = {c.name: c.finn for c in table_}
    assert [finn[name] for name in ranked] == ["train"] * 1100 + ["val"] * 100 + ["test"] * 423
    assert [sum(c.vinyals == s for c in table_) for s in SPLITS] == [1028, 172, 423]
    assert [sum(c.part == p for c in table_) for p in ("background", "evaluation")] == [964, 659]
    assert [sum(c.alphabets == s for c in table_) for s in SPLITS] == [790, 174, 659]
    assert set(HELD_OUT_ALPHABETS) == {c.name.split("/")[0] for c in table_ if c.alphabets == "val"}


def test_download_goes_through_torchvision_and_fails_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metaft.support import vision

    asked = []

    def no_network(root: str, background: bool, download: bool) -> None:
        asked.append((root, background, download))
        raise OSError("<urlopen error\n[Errno -2]>")

    monkeypatch.setattr(vision.datasets, "Omniglot", no_network)
    with pytest.raises(DataError, match=r"omniglot: download to .* failed: <urlopen error \[Errno -2\]>"):
        load("omniglot", data_root=str(tmp_path), download=True)
    assert asked == [(str(tmp_path), True, True)]


@needs_omniglot
@pytest.mark.parametrize(("split", "sizes"), [("finn", [1100, 100, 423]), ("vinyals", [4112, 688, 1692])])
@pytest.mark.slow
def test_the_real_omniglot(split: str, sizes: list[int]) -> None:
    pool = omniglot(REAL.parent, split)
    assert pool.images.shape == (32460, 1, 28, 28)
    assert len({name.split("@")[0] for name in pool.class_names}) == 1623
    assert [len(pool.splits[s]) for s in SPLITS] == sizes
    assert len(np.unique(pool.images[:100].numpy())) > 50, "resized as one-bit pictures"
    edges = torch.cat([pool.images[:, 0, 0], pool.images[:, 0, -1]], -1)
    assert edges.float().mean() < 10 < pool.images.float().mean(), "not bright on black"


# --- glyphs ---


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> ClassPool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return glyphs()


def test_the_first_episodes_of_glyphs_are_frozen(letters: ClassPool) -> None:
    digest = hashlib.sha256()
    for part in letters.source(ways=5, shots=1, query_shots=5).draw(0, "train", range(3)):
        digest.update(str(part.tolist()).encode())
    assert digest.hexdigest()[:16] == "5258df0d587fe765"


def test_glyphs_have_enough_classes_in_disjoint_scripts(letters: ClassPool) -> None:
    assert {s: len(letters.splits[s]) for s in SPLITS} == {"train": 867, "val": 122, "test": 285}
    scripts = {s: {letters.class_names[c].split("/")[0] for c in letters.splits[s]} for s in SPLITS}
    assert scripts["train"] == {"Latin", "Cyrillic", "Canadian", "Arabic"}
    assert scripts["val"] == {"Armenian", "Lao", "Old Italic", "Coptic"}
    assert scripts["test"] == {"Greek", "Georgian", "Hebrew", "Lisu"}
    assert letters.images.shape == (1274 * 20, 1, 28, 28)
    assert set(letters.counts) == {20}
    assert "Greek/U+03B1 GREEK SMALL LETTER ALPHA" in letters.class_names


def test_the_split_of_the_glyphs_is_frozen(letters: ClassPool) -> None:
    assert letters.split_hash == "d54d820ed4c91ffd4cc870f1a33ee8c42792d2ecbf393210d50094e31f938ae8"


def test_no_letter_has_the_shape_of_another() -> None:
    """With some room for other versions of FreeType than the table was made with."""
    points = [c for script in table().values() for c in script]
    shapes = clean(points)
    similar = shapes @ shapes.T - np.eye(len(points))
    assert similar.max() < SAME_SHAPE + 0.02
    assert min(len(faces_of(c)) for c in points) >= 4
    for script, members in table().items():
        assert all(any(a <= c <= b for a, b in SCRIPTS[script][1]) for c in members)


def test_instances_are_visible_differ_and_stay_in_the_picture(letters: ClassPool) -> None:
    images = letters.images.view(-1, 20, 28 * 28)
    bright = (images > 127).sum(-1)
    assert bright.min() >= 4
    assert bright.max() < 28 * 28 // 2
    assert len(torch.unique(letters.images.flatten(1), dim=0)) == len(letters.images)
    edge = torch.cat([letters.images[..., 0, :], letters.images[..., -1, :]], -1).amax(-1)
    assert (edge > 127).float().mean() < 0.03, "letters cut off at the edge"


def test_glyph_episodes_are_neither_trivial_nor_hopeless(letters: ClassPool) -> None:
    episode = letters.source(ways=5, shots=1, query_shots=5).episodes(0, "test", range(200))
    nearest = torch.cdist(episode.query_x.flatten(2), episode.support_x.flatten(2)).argmin(-1)
    accuracy = (episode.support_y.gather(1, nearest) == episode.query_y).float().mean()
    assert 0.3 < accuracy < 0.5


def test_the_table_follows_the_selection() -> None:
    letters_module = importlib.import_module("metaft.tasks.letters")
    chosen = {c for _, c in letters_module.distinct()}
    committed = {c for script in table().values() for c in script}
    assert len(chosen ^ committed) <= 0.02 * len(committed)


# --- sinusoid ---


def test_sinusoid_tasks_are_sine_waves() -> None:
    source = Sinusoid().source(shots=10, query_shots=40)
    assert isinstance(source, Source)
    assert source.ways == 1
    assert source.loss == "mse"
    episode = source.episodes(0, "train", range(500))
    x = torch.cat([episode.support_x, episode.query_x], 1).double()
    y = torch.cat([episode.support_y, episode.query_y], 1).double()
    assert episode.support_x.shape == (500, 10, 1)
    assert episode.query_y.shape == (500, 40, 1)
    assert episode.support_x.dtype == torch.float32
    assert not episode.class_ids.any()
    # y = a sin x + b cos x, by least squares, with a = A cos p and b = -A sin p
    basis = torch.cat([x.sin(), x.cos()], -1)
    solution = torch.linalg.lstsq(basis, y).solution
    # x of up to 5 and y of up to 5 in float32, 2^-24 each: 25 * 6e-8 + 5 * 6e-8.
    assert (basis @ solution - y).abs().max() < 1e-5
    amplitude = solution.norm(dim=1).squeeze()
    phase = torch.atan2(-solution[:, 1], solution[:, 0]).squeeze()
    for values, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, math.pi), (x, -5.0, 5.0)):
        span = high - low
        assert low - 1e-4 <= values.min() < low + 0.05 * span
        assert high - 0.05 * span < values.max() <= high + 1e-4
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=0.06 * span)


def test_sinusoid_episodes_are_frozen() -> None:
    episode = Sinusoid().source(shots=5, query_shots=10).episodes(1, "test", range(8))
    exact = [1e4 * e.numpy().astype(np.float64) for e in episode[:4]]
    rounded = [np.round(values) for values in exact]
    # Whole numbers. x is exact arithmetic; y's last bit in float32, 5e-3 here, may be another sine's to set.
    assert all(np.abs(exact[part] - rounded[part]).max() < 0.5 - 5e-3 for part in (1, 3))
    assert sha256(*rounded, episode.key.numpy()) == "17b22f8213880be317eb59137aadb1f7dfc08a454baf1f04798ff5b435696f3c"


def test_sinusoid_batches_have_a_task_for_every_point() -> None:
    source = Sinusoid().source(shots=5, query_shots=5)
    batch = source.batches(0, "train", [0, 5], 4000)
    assert batch.x.shape == batch.y.shape == (2, 4000, 1)
    assert batch.key.shape == (2,)
    near = batch.y[(batch.x - 1.0).abs() < 0.2]
    assert near.std() > 1.0, "points at one x are all of one task"
    assert torch.equal(source.batches(0, "train", [5], 4000).x[0], batch.x[1])


def test_sinusoid_seeds_splits_and_indices_differ() -> None:
    source = Sinusoid().source(shots=5, query_shots=5)
    draws: list[tuple[int, Split, int]] = [
        (0, "train", 0),
        (1, "train", 0),
        (0, "val", 0),
        (0, "test", 0),
        (0, "train", 1),
    ]
    firsts = {float(source.episodes(seed, split, [i]).support_x[0, 0, 0]) for seed, split, i in draws}
    assert len(firsts) == 5


def test_sinusoid_refuses_what_has_no_meaning() -> None:
    for ways, shots, rotate, words in ((5, 1, False, "ways .*5"), (1, 0, False, "shots.*0"), (1, 1, True, "rotate")):
        with pytest.raises(DataError, match=words):
            Sinusoid().source(ways=ways, shots=shots, query_shots=5, rotate=rotate)
    with pytest.raises(DataError, match="'test'"):
        Sinusoid().source(shots=1, query_shots=1, splits=("train",)).episodes(0, "test", [0])


# --- load ---


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("glyph", {}, r"'glyph'.*folder:PATH.*did you mean 'glyphs'"),
        ("folder", {}, r"'folder:PATH'"),
        ("folder:", {}, r"'folder:PATH'"),
        ("glyphs:x", {}, r"'glyphs'"),
        ("omniglot", {"split": "vinyal"}, r"split: omniglot has no 'vinyal'.*alphabets; did you mean 'vinyals'"),
        ("glyphs", {"split": "finn"}, r"'finn', only scripts"),
        ("sinusoid", {"split": "finn"}, r"'finn'"),
        ("glyphs", {"download": True}, r"download: glyphs"),
        ("glyphs", {"image_size": 84}, r"image_size: glyphs.*84"),
        ("omniglot", {"channels": 3}, r"channels: omniglot.*3"),
    ],
)
def test_load_names_what_is_wrong(name: str, options: dict, words: str) -> None:
    with pytest.raises(MetaftError, match=words) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)


def test_load_looks_for_data_where_the_environment_says(tiny_omniglot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METAFT_DATA", raising=False)
    with pytest.raises(DataError, match=r"--data-root.*METAFT_DATA"):
        load("omniglot")
    monkeypatch.setenv("METAFT_DATA", str(tiny_omniglot))
    assert load("omniglot").name == "omniglot"


def test_every_data_set_describes_itself_in_plain_data(letters: ClassPool) -> None:
    for data in (letters, load("sinusoid")):
        assert json.loads(json.dumps(data.describe()))
        assert len(data.split_hash) == 64
        assert data.to("cpu").shape == data.shape


def test_rotation_is_the_default_only_where_the_protocol_has_it(tiny_omniglot: Path, letters: ClassPool) -> None:
    def turned(name: str, split: str | None = None) -> bool:
        return load(name, data_root=str(tiny_omniglot), split=split).default_rotate  # type: ignore[reportAttributeAccessIssue]

    assert turned("omniglot")
    assert turned("unlabelled:omniglot", "finn")
    assert not any(turned("omniglot", split) for split in ("vinyals", "alphabets"))
    assert not letters.default_rotate


def test_data_sets_and_pools_meet_the_protocol(letters: ClassPool) -> None:
    datasets: list[Dataset] = [letters, Sinusoid()]
    assert [d.loss for d in datasets] == ["cross_entropy", "mse"]


def test_importing_tasks_does_not_import_what_it_may_not_need() -> None:
    code = "import sys, metaft.tasks; print({'torchvision', 'matplotlib', 'fontTools'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
