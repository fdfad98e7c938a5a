"""Data sets whose splits stand in tables, and mini-ImageNet in the three forms in which it goes around."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import os
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metaft import evaluate, meta_train
from metaft.errors import DataError, MetaftError, MetaftWarning
from metaft.inputs import unpickled
from metaft.tasks import ClassPool, load, mini_imagenet, tables
from metaft.types import SPLITS

mini = importlib.import_module("metaft.tasks.mini_imagenet")

CLASSES = {"train": 3, "val": 2, "test": 2}
IMAGES = 4
NAMES = {"train": ["n01", "n05", "n07"], "val": ["n02", "n04"], "test": ["n03", "n06"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if mini-ImageNet had seven classes of four photos."""
    monkeypatch.setattr(mini, "CLASSES", CLASSES)
    monkeypatch.setattr(mini, "IMAGES", IMAGES)


def photo(name: str, number: int) -> np.ndarray:
    """uint8 [84, 84, 3], of no other class and number."""
    return np.random.default_rng([int(name[1:]), number]).integers(0, 256, (84, 84, 3), np.uint8)


def as_folders(root: Path) -> Path:
    for split, names in NAMES.items():
        for name in names:
            for number in range(IMAGES):
                file = root / split / name / f"{name}{number:08d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(photo(name, number)).save(file)
    return root


def as_tables(root: Path, place: str = "images/{filename}", column: str = "filename") -> Path:
    for split, names in NAMES.items():
        rows = [(f"{name}{number:08d}.png", name) for name in names for number in range(IMAGES)]
        for filename, label in rows:
            file = root / place.format(filename=filename, label=label, split=split)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo(label, int(filename[3:11]))).save(file)
        with (root / f"{split}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([(column, "label"), *rows])
    return root


def held(split: str) -> dict[str, Any]:
    """What a pickle of the split holds: classes in another order than their names'."""
    names = NAMES[split][::-1]
    pixels = np.stack([photo(name, number) for name in names for number in range(IMAGES)])
    return {
        "image_data": pixels,
        "class_dict": {name: list(range(i * IMAGES, (i + 1) * IMAGES)) for i, name in enumerate(names)},
    }


def as_pickles(root: Path, protocol: int = 2) -> Path:
    root.mkdir()
    for split in SPLITS:
        (root / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(held(split), protocol))
    return root


def check_pool(pool: ClassPool) -> None:
    """It holds every photo in its class and split."""
    assert pool.class_names == tuple(sorted(name for names in NAMES.values() for name in names))
    for split, names in NAMES.items():
        assert [pool.class_names[c] for c in pool.splits[split]] == names
    for c, name in enumerate(pool.class_names):
        own = pool.images[pool.starts[c] : pool.starts[c] + pool.counts[c]]
        np.testing.assert_array_equal(
            own.numpy(), np.stack([photo(name, k) for k in range(IMAGES)]).transpose(0, 3, 1, 2)
        )


def first_episode(pool: ClassPool) -> Any:
    return pool.source(ways=2, shots=1, query_shots=2).episodes(3, "test", [0, 1])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("form", [as_folders, as_tables, as_pickles])
def test_every_form_of_mini_imagenet_is_one_pool(form: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.warns(MetaftWarning, match="not those of Ravi and Larochelle"):
        pool = mini_imagenet(form(tmp_path / "mini_imagenet").parent)
    check_pool(pool)
    assert pool.name == "mini-imagenet"
    with pytest.warns(MetaftWarning):
        again = mini_imagenet(tmp_path / "mini_imagenet")  # the folder itself, and from the cache
    assert pool.digest() == again.digest()
    with pytest.warns(MetaftWarning):
        other = mini_imagenet(as_folders(tmp_path / "other"))
    for one, two in zip(first_episode(pool), first_episode(other), strict=True):
        assert torch.equal(one, two)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    with pytest.warns(MetaftWarning):
        check_pool(mini_imagenet(as_pickles(tmp_path / "data", protocol)))


def python2(split: str) -> bytes:
    """What Python 2 wrote of the split: bytes for text, and for an array's values and type."""
    data = held(split)
    pixels = data["image_data"]
    raw = pixels.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR(I1\n("
        + b"".join(b"I%d\n" % side for side in pixels.shape)
        + b"tcnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntbI00\nT"
        + len(raw).to_bytes(4, "little") + raw + b"tb"
    )  # fmt: skip
    classes = b"".join(
        b"U%c%s(%sl" % (len(name), name.encode(), b"".join(b"I%d\n" % row for row in rows))
        for name, rows in data["class_dict"].items()
    )
    return b"\x80\x02(U\nimage_data" + array + b"U\nclass_dict(" + classes + b"dd."


@pytest.mark.usefixtures("tiny")
def test_pickles_of_python_2_are_read(tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / f"mini-imagenet-cache-{split}.pkl").write_bytes(python2(split))
    with pytest.warns(MetaftWarning):
        check_pool(mini_imagenet(tmp_path))


class Calls:
    """What pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@dataclasses.dataclass
class Own:
    x: int = 1


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Calls(os.system, "touch called"), r"names posix\.system"),
        (Calls(eval, "open('called', 'w')"), r"names \w+\.eval"),
        (Calls(exec, "open('called', 'w')"), r"names \w+\.exec"),
        (Calls(getattr, "x", "upper"), r"names \w+\.getattr"),
        (Calls(np.load, "called"), r"names numpy\S*\.load"),
        ({"x": [Own()]}, r"names \S*Own|names copy_?reg\._reconstructor"),
        (np.array([Calls(os.system, "touch called")], object), r"array of 'O|names posix"),
        (np.zeros(2, [("a", "i4")]), r"array of 'V"),
        (np.zeros(2, "M8[s]"), r"array of 'M"),
        (np.dtype("i4"), r"Dtype in the place"),
        (np.ndarray, r"Kind|in the place"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pickle_calls_nothing(
    value: Any, words: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "x.pkl"
    file.write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(DataError, match=words) as caught:
        unpickled.arrays(file)
    assert str(caught.value).startswith(f"{file} is not read: ")
    assert os.listdir(tmp_path) == ["x.pkl"]


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">i4"),
        np.zeros((0, 2), np.float32),
        np.array(7, np.int16),
        np.arange(10)[::3],
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}",
)
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_come_back_as_they_were(value: np.ndarray, protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "x.pkl"
    holds = {"a": [value, np.int64(3)], "b": ({"c"}, None, True, 1.5, b"bytes" if protocol > 2 else "text")}
    file.write_bytes(pickle.dumps(holds, protocol))
    found = unpickled.arrays(file)
    np.testing.assert_array_equal(found["a"][0], value, strict=True)
    assert found["a"][0].dtype == value.dtype
    assert found["a"][1] == 3
    assert found["b"] == ({"c"}, None, True, 1.5, "bytes" if protocol > 2 else "text")


def refusal_of(file: Path) -> str | None:
    try:
        unpickled.arrays(file)
    except DataError as error:
        return str(error)
    return None


def test_the_bytes_of_a_broken_pickle_end_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.pkl"
    whole = pickle.dumps(held("val"), 2)
    ends = [0, 1, 2, 10, 40, 90, 200, len(whole) - 1]
    broken = [whole[:end] for end in ends] + [b"\x80\x02" + bytes([code]) + b"1\n." for code in range(256)]
    for content in broken:
        file.write_bytes(content)
        said = refusal_of(file)
        assert said is None or (str(file) in said and "\n" not in said)
    with pytest.raises(DataError, match="cannot be read"):
        unpickled.arrays(tmp_path / "none.pkl")


def reclassed(**classes: Any) -> Callable[[Any], Any]:
    """Other rows for some classes."""
    return lambda data: {**data, "class_dict": {**data["class_dict"], **classes}}


DEEP = b")" + b"\x85" * 300_000
OURS = b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x04}" + DEEP + b"K\x01s.", "has a tuple for a key"),  # whose hash overflows C's stack
        (b"\x80\x04(" + DEEP + b"K\x01d.", "has a tuple for a key"),
        (b"\x80\x04\x8f(" + DEEP + b"\x90.", "has a tuple for a key"),
        (OURS + b"(N}X\x0c\0\0\0__defaults__(K\x01K\x02tstb.", "gives a state to a function"),
        (b"\x80\x02cnumpy\nndarray\n}X\x03\0\0\0fooK\x01sb.", "gives a state to a type"),
        (b"\x80\x04\x8e" + (1 << 45).to_bytes(8, "little") + b"x.", "no pickle of arrays"),  # a length that is a lie
        (b"\x80\x04B\xff\xff\xff\x7fx.", "no pickle of arrays"),
        (b"\x80\x02Pname\n.", "names an object outside"),
        (b"\x80\x02]K\x01K\x02s.", "sets items of what is no dict"),
    ],
    ids=range(9),
)  # fmt: skip
def test_pickles_that_would_harm_an_unpickler_are_refused(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "x.pkl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=words):
        unpickled.arrays(file)
    assert unpickled._reconstruct.__defaults__ is None  # nothing of it stays
    file.write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")  # a memo with room for two billion
    assert unpickled.arrays(file) == []


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda d: [d], r"train\.pkl: image_data must be uint8 \[12, 84, 84, 3\], got none"),
        (lambda d: {**d, "image_data": d["image_data"][:5]}, r"got uint8 \[5, 84, 84, 3\]"),
        (lambda d: {**d, "image_data": d["image_data"] / 1.0}, r"got float64"),
        (lambda d: {**d, "class_dict": 3}, r"class_dict must hold .* got int"),
        (reclassed(n01=[0, 1, 2]), r"class 'n01' must have 4 different"),
        (reclassed(n01=[0, 1, 2, 2]), r"class 'n01' must have 4 different"),
        (reclassed(n01="0123"), r"class 'n01' must have 4 different"),
        (reclassed(n01=[0, 1, 2, 99]), r"class 'n01' has an image 99, of 12"),
        (reclassed(n01=[-1, 1, 2, 3]), r"class 'n01' has an image -1, of 12"),
        (lambda d: {**d, "class_dict": {"n01": [0, 1, 2, 3]}}, r"its 1 classes are not 3"),
        (reclassed(n01=[0, 1, 2, 3], n05=[3, 4, 5, 6]), r"image 0 is in two classes, 'n07' and 'n01'"),
        (
            lambda d: {**d, "class_dict": dict(zip(["n02", "n05", "n07"], d["class_dict"].values(), strict=True))},
            r"val\.pkl: class 'n02' is in .*train\.pkl too",
        ),
    ],
)
def test_pickles_of_something_else_are_refused(harm: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    root = as_pickles(tmp_path / "data")
    (root / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(harm(held("train"))))
    with pytest.raises(DataError, match=words) as caught:
        load("mini-imagenet", data_root=str(root))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("tiny")
def test_what_mini_imagenet_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(words: str, **options: Any) -> None:
        with pytest.raises(MetaftError, match=words) as caught:
            load("mini-imagenet", **{"data_root": str(tmp_path), **options})
        assert "\n" not in str(caught.value)

    monkeypatch.delenv("METAFT_DATA", raising=False)
    refuses(r"METAFT_DATA$", data_root=None)
    refuses(r"data_root: mini-imagenet: neither .*mini_imagenet nor .* holds train/, val/ and test/")
    base = as_folders(tmp_path / "mini-imagenet")
    refuses("channels: mini-imagenet has 3, got 1", channels=1)
    refuses("split: mini-imagenet has no 'ravi'", split="ravi")
    (base / "test/n03/n0300000000.png").write_bytes(b"broken")
    refuses(r"n0300000000\.png cannot be read")
    with pytest.warns(MetaftWarning):
        assert load("mini-imagenet", data_root=str(tmp_path), skip_bad=True).counts.tolist() == [4, 4, 3, 4, 4, 4, 4]  # type: ignore[attr-defined]
    (base / "test/n03/n0300000000.png").unlink()
    refuses(r"class 'n03' of .* has 3 photos, not 4")
    for file in (base / "val/n02").iterdir():
        file.unlink()
    (base / "val/n02").rmdir()
    refuses(r"holds 1 classes for val, not 2")
    refuses(r"image_size: the pickles in .* 64", data_root=str(as_pickles(tmp_path / "pickles")), image_size=64)


# --- tables of other sets ---


@pytest.mark.parametrize("column", ["filename", "path"])
@pytest.mark.parametrize("place", importlib.import_module("metaft.tasks.tables")._PLACES)
def test_tables_find_their_pictures(place: str, column: str, tmp_path: Path) -> None:
    pool = tables(as_tables(tmp_path / "birds", place, column))
    check_pool(pool)
    assert pool.name == f"csv:{tmp_path / 'birds'}"
    small = load(f"csv:{tmp_path / 'birds'}", image_size=16, channels=1)
    assert small.shape == (1, 16, 16)


def rewrite(file: Path, change: Callable[[str], str]) -> None:
    file.write_text(change(file.read_text()))


ROW = "n0100000000.png,n01\n"


def put(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


def add(line: str) -> Callable[[str], str]:
    return lambda text: text + line


@pytest.mark.parametrize(
    ("split", "change", "words"),
    [
        ("val", None, r"val\.csv cannot be read \(No such file"),
        ("val", lambda text: "filename,label\n", r"val\.csv has no rows"),
        ("val", lambda text: "", r"val\.csv has no column 'filename' or 'path' .* holds nothing"),
        ("test", put("label", "wnid"), r"test\.csv has no column 'label' .* holds filename, wnid"),
        ("test", put("label", "label,path"), r"test\.csv has columns 'filename' and 'path', which say the same"),
        ("train", put(ROW, "n0100000000.png,\n"), r"train\.csv, line 2: label is empty"),
        ("train", put(ROW, "a,b,c\n"), r"train\.csv, line 2: more values than columns"),
        ("train", put(ROW, "no.png,n01\n"), r"train\.csv, line 2: .*images/no\.png is not there; .*--skip-bad"),
        ("train", put(ROW, 'n0100000000.png,"n01\n'), r"label goes over several lines, .*; is a quote left open"),
        (
            "test",
            add("./../images/n0100000000.png,n03\n"),
            r"test\.csv, line 10: .* stands in train\.csv, line 2 already",
        ),
        ("train", add("no.png,n01\n"), r"train\.csv, line 14: .*images/no\.png is not there; .*--skip-bad"),
        ("train", add(ROW), r"train\.csv, line 14: n0100000000\.png stands in train\.csv, line 2 already"),
        ("val", add(ROW), r"val\.csv, line 10: class 'n01' is in train\.csv too"),
    ],
)
def test_tables_that_are_wrong_are_named_with_the_line(
    split: str, change: Callable[[str], str] | None, words: str, tmp_path: Path
) -> None:
    root = as_tables(tmp_path / "d")
    (root / f"{split}.csv").unlink() if change is None else rewrite(root / f"{split}.csv", change)
    with pytest.raises(DataError, match=words) as caught:
        load(f"csv:{root}")
    assert str(caught.value).startswith("dataset: ")
    assert "\n" not in str(caught.value)


def test_pictures_that_are_gone_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    root = as_tables(tmp_path / "d")
    (root / "images/n0200000001.png").unlink()
    with pytest.raises(DataError, match=r"val\.csv, line 3: .*n0200000001\.png is not there"):
        tables(root)
    with pytest.warns(MetaftWarning, match="ignored 1 of 28 files: 1 missing file"):
        assert tables(root, skip_bad=True).counts.tolist() == [4, 3, 4, 4, 4, 4, 4]
    (root / "images/n0100000000.png").unlink()  # of the first row, which says no longer where the others are
    with pytest.warns(MetaftWarning, match="ignored 2 of 28 files: 2 missing files"):
        assert tables(root, skip_bad=True).counts.tolist() == [3, 3, 4, 4, 4, 4, 4]
    for number in (0, 2, 3):
        (root / f"images/n020000000{number}.png").unlink()
    with pytest.raises(DataError, match=r"val\.csv: class 'n02' has no picture"):
        tables(root, skip_bad=True)


def test_names_of_folders_are_taken_as_they_are_written(tmp_path: Path) -> None:
    """macOS writes accents as letters of their own, which are one in a class's name."""
    as_tables(tmp_path / "d", "{label}/{filename}")
    decomposed = unicodedata.normalize("NFD", "oiseau é")
    (tmp_path / "d/n01").rename(tmp_path / "d" / decomposed)
    rewrite(tmp_path / "d/train.csv", lambda text: text.replace(",n01", f",{decomposed}"))
    pool = tables(tmp_path / "d")
    assert unicodedata.normalize("NFC", decomposed) in pool.class_names
    shuffled = "\n".join(
        ["filename,label", *sorted((tmp_path / "d/train.csv").read_text().splitlines()[1:], reverse=True)]
    )
    (tmp_path / "d/train.csv").write_text(shuffled + "\n")
    assert tables(tmp_path / "d").digest() == pool.digest(), "pictures of a class are in the order of a folder's"


def test_no_picture_at_all_is_said_with_the_places(tmp_path: Path) -> None:
    as_tables(tmp_path / "d")
    (tmp_path / "d/images").rename(tmp_path / "away")
    for skip_bad in (False, True):
        with pytest.raises(
            DataError, match=r"train\.csv, line 2: neither n0100000000\.png nor any other .*d/images/n01"
        ):
            tables(tmp_path / "d", skip_bad=skip_bad)


def test_a_run_of_tables_is_tested_where_they_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    as_tables(tmp_path / "birds")
    words = ["--ways", "2", "--shots", "1", "--query-shots", "2", "--test-query-shots", "2", "--image-size", "16"]
    words += ["--iterations", "1", "--eval-episodes", "2", "--test-episodes", "2", "--meta-batch", "2", "--width", "4"]
    assert meta_train.main(["--dataset", "csv:birds", *words, "--out", "run"]) == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "birds").rename(tmp_path / "elsewhere/birds")
    assert evaluate.main(["run", "--episodes", "2", "--data-root", "elsewhere"]) == 0
    assert meta_train.main(["--dataset", "csv:birds", *words, "--out", "other"]) == 2


# --- the real one ---

REAL = Path(os.environ.get("METAFT_DATA", "none"))


@pytest.mark.slow
@pytest.mark.skipif(
    not (REAL / "mini_imagenet/train").is_dir(), reason="METAFT_DATA names no folder with mini_imagenet/"
)
@pytest.mark.filterwarnings("error")
def test_the_real_mini_imagenet() -> None:
    pool = load("mini-imagenet", data_root=str(REAL))
    assert isinstance(pool, ClassPool)
    assert pool.images.shape == (60000, 3, 84, 84)
    assert [len(pool.splits[split]) for split in SPLITS] == [64, 16, 20]
    assert pool.split_hash == mini.SPLIT_HASH
    assert 100 < pool.images[::600].float().mean() < 130
