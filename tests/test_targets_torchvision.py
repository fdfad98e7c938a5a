"""`--data torchvision:NAME`: data sets as torchvision stores them, here written by the tests in its formats."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import one_line
from PIL import Image

from metaft import adapt, targets
from metaft.errors import DataError, MetaftError
from metaft.inputs import ImageInputs
from metaft.support.vision import datasets

GREY = ImageInputs(1, 28, 28, polarity="bright-on-black")
COLOUR = ImageInputs(3, 32, 32)
TRAIN, TEST = 40, 20


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist_labels(n: int) -> np.ndarray:
    return (np.arange(n) * 3 % 10).astype(np.uint8)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A root with MNIST's idx files; the pixel of each picture's corner is its number, the middle its label."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", TRAIN), ("t10k", TEST)):
        images = np.zeros((n, 28, 28), np.uint8)
        images[:, 5, 5], images[:, 14, 14] = np.arange(n), 20 * mnist_labels(n)
        images[:, 8:12, 8:20] = np.random.default_rng(n).integers(0, 256, (n, 4, 12))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(mnist_labels(n)))
    return tmp_path


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with CIFAR-10's pickles, five files to train on and one to test."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": rng.permutation(10).tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    return tmp_path


def test_grey_pictures_keep_their_pixels_labels_and_parts(mnist: Path) -> None:
    target = targets.load("torchvision:MNIST", GREY, data_root=str(mnist))
    assert {part: rows.tolist() for part, rows in target.parts.items()} == {
        "train": list(range(TRAIN)), "test": list(range(TRAIN, TRAIN + TEST)),
    }  # fmt: skip
    assert target.labels.tolist() == [*mnist_labels(TRAIN), *mnist_labels(TEST)]
    assert target.examples.shape == (TRAIN + TEST, 1, 28, 28) and target.examples.dtype == torch.uint8
    assert target.examples[:, 0, 5, 5].tolist() == [*range(TRAIN), *range(TEST)]
    assert target.examples[:, 0, 14, 14].tolist() == (20 * target.labels).tolist()
    assert (target.name, target.class_names[3], target.changes) == ("torchvision:MNIST", "3 - three", ())
    assert (target.asked, target.inputs) == (GREY, GREY)
    assert target.files[TRAIN + 2] == "MNIST/test/2"
    assert targets.shape_of("torchvision:MNIST", str(mnist)) == ([1, 28, 28], True)


def test_colour_pictures_are_those_of_torchvision(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFT_DATA", str(cifar))
    target = targets.load("torchvision:CIFAR10", COLOUR)
    theirs = [datasets.CIFAR10(str(cifar), train=train) for train in (True, False)]
    expected = np.concatenate([of.data for of in theirs]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(target.examples.numpy(), expected)
    assert target.labels.tolist() == [*theirs[0].targets, *theirs[1].targets]
    assert target.class_names[:2] == ("airplane", "automobile")
    assert targets.shape_of("torchvision:CIFAR10") == ([3, 84, 84], True)
    fitted = targets.load("torchvision:CIFAR10", ImageInputs(3, 20, 20))
    assert fitted.examples.shape[1:] == (3, 20, 20) and fitted.changes == ("resized from 32x32 to 20x20",)


def test_grey_ones_become_colour_and_colour_ones_are_refused_where_the_run_is_grey(mnist: Path, cifar: Path) -> None:
    target = targets.load("torchvision:MNIST", COLOUR, data_root=str(mnist))
    assert target.examples.shape[1:] == (3, 32, 32) and "grey to colour" in target.changes
    with pytest.raises(MetaftError, match=r"images of torchvision:CIFAR10 are in colour, \[3, 32, 32\]") as error:
        targets.load("torchvision:CIFAR10", GREY, data_root=str(cifar))
    assert type(error.value) is MetaftError, "the data themselves are sound"


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    """A root with DTD's files: three parts, of which one names the classes in another order."""
    folder = tmp_path / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for number, part in enumerate(("train", "val", "test")):
        lines = []
        for label, name in enumerate(("banded", "woven")):
            (folder / "images" / name).mkdir(parents=True, exist_ok=True)
            for i in range(3):
                picture = Image.new("RGB", (40, 30), (200, 50 * label, 40 * number + i))
                picture.save(folder / "images" / name / f"{part}{i}.png")
                lines.append(f"{name}/{part}{i}.png")
        (folder / "labels" / f"{part}1.txt").write_text("\n".join(lines[::-1] if number else lines) + "\n")
    return tmp_path


def test_a_val_part_is_taken_where_there_is_one(textures: Path) -> None:
    target = targets.load("torchvision:DTD", COLOUR, data_root=str(textures))
    assert {part: len(rows) for part, rows in target.parts.items()} == {"train": 6, "val": 6, "test": 6}
    assert target.class_names == ("banded", "woven")
    assert target.examples[:, 1, 0, 0].tolist() == (50 * target.labels).tolist()
    assert target.examples[:, 2, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 42, 41, 40, 42, 41, 40, 82, 81, 80, 82, 81, 80]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pictures_are_turned_as_their_exif_data_say(kind: str, textures: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :4] = 200
    file, exif = textures / "dtd/dtd/images/banded/train0.png", Image.Exif()
    exif[0x0112] = 6  # stored so that it is shown turned clockwise
    Image.fromarray(np.rot90(pixels)).save(file, kind, exif=exif)
    target = targets.load("torchvision:DTD", ImageInputs(3, 8, 8), data_root=str(textures))
    shown = target.examples[target.files.index("DTD/train/0")]
    assert (shown.permute(1, 2, 0).numpy() > 100).tolist() == (pixels > 100).tolist()


def test_a_broken_picture_is_named_or_left_out(textures: Path) -> None:
    (textures / "dtd/dtd/images/woven/train1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match="data: image DTD/train/4 cannot be read"):
        targets.load("torchvision:DTD", COLOUR, data_root=str(textures))
    target = targets.load("torchvision:DTD", COLOUR, data_root=str(textures), skip_bad=True)
    assert len(target.labels) == 17 and target.skipped == {"woven": 1}


def test_signs_without_class_names_are_numbered(tmp_path: Path) -> None:
    base = tmp_path / "gtsrb"
    (base / "GTSRB/Final_Test/Images").mkdir(parents=True)
    lines = ["Filename;ClassId"]
    for label in range(3):
        (base / f"GTSRB/Training/{label:05}").mkdir(parents=True)
        for i in range(2):
            picture = Image.new("RGB", (20, 20), (60 * label, 10 * i, 255))
            picture.save(base / f"GTSRB/Training/{label:05}/{i}.ppm")
            picture.save(base / f"GTSRB/Final_Test/Images/{label}{i}.ppm")
            lines.append(f"{label}{i}.ppm;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(lines))
    target = targets.load("torchvision:GTSRB", COLOUR, data_root=str(tmp_path))
    assert target.class_names == ("0", "1", "2") and target.labels.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert target.examples[:, 0, 0, 0].tolist() == (60 * target.labels).tolist()


def test_a_val_part_is_the_test_where_there_is_no_other(tmp_path: Path) -> None:
    for part, n in (("train", 2), ("val", 1)):
        for number in ("n01440764", "n02102040"):
            folder = tmp_path / "imagenette2" / part / number
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (20, 20), (200, 10 * i, 90)).save(folder / f"{i}.JPEG")
    target = targets.load("torchvision:Imagenette", COLOUR, data_root=str(tmp_path))
    assert {part: len(rows) for part, rows in target.parts.items()} == {"train": 4, "test": 2}
    assert target.class_names == ("tench, Tinca tinca", "English springer, English springer spaniel")
    assert target.notes[0] == "torchvision:Imagenette has no test part; its val part is the test"


def test_labels_are_those_that_come_with_the_pictures(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = datasets.MNIST.__getitem__
    monkeypatch.setattr(
        datasets.MNIST, "__getitem__", lambda self, i: (given(self, i)[0], (given(self, i)[1] + 1) % 10)
    )
    with pytest.raises(DataError, match="MNIST/train/0 has label 1, but is listed with 0"):
        targets.load("torchvision:MNIST", GREY, data_root=str(mnist))


def test_a_class_that_a_part_lacks_is_named(mnist: Path) -> None:
    file = mnist / "MNIST/raw/t10k-labels-idx1-ubyte"
    file.write_bytes(idx(np.where(mnist_labels(TEST) == 7, 1, mnist_labels(TEST)).astype(np.uint8)))
    with pytest.raises(DataError, match="data: class '7 - seven' has no picture in part 'test' of torchvision:MNIST"):
        targets.load("torchvision:MNIST", GREY, data_root=str(mnist))


@pytest.mark.parametrize(
    ("name", "place", "call"),
    [
        ("CIFAR10", "/cifar-10-batches-py: ", "CIFAR10('{root}', train=True, download=True)"),
        ("KMNIST", ": ", "KMNIST('{root}', train=False, download=True)"),
        ("SVHN", ": ", "SVHN('{root}', split='test', download=True)"),
        ("OxfordIIITPet", ": ", "OxfordIIITPet('{root}', split='trainval', download=True)"),
        ("Flowers102", ": ", "Flowers102('{root}', split='val', download=True)"),
        ("FER2013", ": ", "torchvision does not fetch it"),
    ],
)
def test_what_is_missing_is_named_with_the_way_to_fetch_it(name: str, place: str, call: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        targets.load(f"torchvision:{name}", data_root=str(tmp_path))
    said = str(error.value)
    assert said.startswith(f"data: torchvision:{name} cannot be read from {tmp_path}{place}") and "\n" not in said
    assert call.format(root=tmp_path) in said and "Unknown value" not in said
    assert list(tmp_path.iterdir()) == []


def test_names_and_roots_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METAFT_DATA", raising=False)
    with pytest.raises(DataError, match="data: torchvision:MNIST: where is it\\? pass --data-root or set METAFT_DATA"):
        targets.load("torchvision:MNIST")
    with pytest.raises(MetaftError, match=r"data: .* 'Cifar10', it has .*; did you mean 'CIFAR10'\?"):
        targets.load("torchvision:Cifar10", data_root="/none")
    for name in ("FakeData", "ImageFolder", "CocoDetection", "PhotoTour", "Cityscapes", "utils"):
        with pytest.raises(MetaftError, match=f"no data set of labelled parts '{name}'"):
            targets.load(f"torchvision:{name}", data_root="/none")
    with pytest.raises(MetaftError, match="write 'torchvision:NAME'"):
        targets.load("torchvision:")


def test_the_command_takes_a_data_set_wherever_it_is_resumed(
    mnist: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(mnist)
    argv = ["--init", "none", "--data", "torchvision:MNIST", "--data-root", ".", "--epochs", "1", "--device", "cpu"]
    assert adapt.main([*argv, "--out", "o"]) == 0
    result = json.loads((mnist / "o/result.json").read_text())
    assert (result["data"], result["train_images"], result["test_images"]) == ("torchvision:MNIST", TRAIN, TEST)
    monkeypatch.chdir("/")
    assert adapt.main(["--resume", str(mnist / "o"), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert adapt.main([*argv[:4], "--data-root", str(mnist / "none"), "--out", str(mnist / "p")]) == 2
    assert "torchvision:MNIST cannot be read" in one_line(capsys) and not (mnist / "p").exists()
