"""The classifier that adapt leaves: back from its file, alone with an image or not, and as the command that labels."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    ONE_PASS,
    TARGET,
    files_of,
    finished,
    images,
    inner_words,
    meta_trained,
    one_line,
    one_thread,
    pixels_of,
    pool,
    same,
    words,
    write_folder,
    write_target,
)
from PIL import Image
from torch import Tensor, nn

import metaft
from metaft import adapt, meta_train, predict
from metaft.__main__ import main as command_line
from metaft.config import AdaptConfig, PredictConfig
from metaft.errors import CheckpointError, DataError, MetaftError
from metaft.finetune import report, study
from metaft.finetune.classifier import Classifier
from metaft.inputs import ImageInputs, of_header
from metaft.models import initialise
from metaft.options import options as options_of
from metaft.runs.snapshot import load_snapshot

Text = pytest.CaptureFixture[str]

BRIGHT = ImageInputs(1, 8, 8, polarity="bright-on-black")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_pictures", lambda *_: [])


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A meta-training run."""
    base = tmp_path_factory.mktemp("runs")
    return meta_trained(base / "maml", write_folder(base / "squares"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("data") / "Bilder ü", {"train": 9, "test": 6}, noise=90)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, init: Path, data: Path) -> Path:
    """A finished adapt run that can tell its classes apart."""
    out = tmp_path_factory.mktemp("runs") / "an adapt run's"
    return finished(words(init, data, out, epochs=15, lr=0.05))


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Classifier]:
    """Fills up with the classifiers that are written, as they were in memory."""
    made: list[Classifier] = []
    real = study.save

    def save(path: Path, classifier: Classifier, *rest: Any) -> None:
        made.append(classifier)
        real(path, classifier, *rest)

    monkeypatch.setattr(study, "save", save)
    return made


def unseen(data: Path) -> list[Path]:
    return files_of(data / "test")[0]


# ---- back from its file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", ["none", "backbone"])
@pytest.mark.parametrize("head", ["linear", "cosine", "prototype"])
@pytest.mark.parametrize("classes", [2, 5])
@torch.no_grad()
def test_it_comes_back_to_the_bit_with_any_head_and_number_of_classes(
    classes: int, head: str, freeze: str, init: Path, tmp_path: Path, saved: list[Classifier]
) -> None:
    data = write_target(tmp_path / "d", {"train": 4, "test": 2}, classes="abcde"[:classes])
    with torch.enable_grad():
        assert adapt.main(words(init, data, tmp_path / "o", head=head, freeze=freeze, epochs=2)) == 0
    (made,) = saved
    x = pixels_of(files_of(data)[0])
    assert made(x).shape == (6 * classes, classes)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "o/classifier.safetensors", tmp_path / "elsewhere")
    for path in (tmp_path / "o", str(tmp_path / "o"), tmp_path / "elsewhere/classifier.safetensors"):
        loaded = metaft.load(path)
        assert isinstance(loaded, nn.Module)
        assert not any(part.training for part in loaded.modules())
        assert torch.equal(loaded(x), made(x))
        assert torch.equal(loaded(x[:1]), made(x[:1]))
        assert loaded.class_names == tuple("abcde"[:classes])
        assert loaded.inputs == BRIGHT
    meta = load_snapshot(init / "checkpoints/best.safetensors").meta
    backbone = {k: v for k, v in meta.items() if not k.startswith("head.")}
    assert same(dict(metaft.load(tmp_path / "o").body.named_parameters()), backbone) == (freeze == "backbone")


def test_it_is_a_plain_module(run: Path, data: Path) -> None:
    """It can be moved, saved and trained as any other, and loading it leaves the random generator alone."""
    before = torch.get_rng_state()
    made, x = metaft.load(run), pixels_of(unseen(data))
    assert torch.equal(torch.get_rng_state(), before)
    other = metaft.load(run)
    other.load_state_dict({k: torch.zeros_like(v) for k, v in made.state_dict().items()})
    assert not torch.equal(other(x), made(x))
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), made(x))
    double = metaft.load(run).double()(x)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), made(x), rtol=0, atol=ONE_PASS)
    made(x).sum().backward()
    assert all(p.grad is not None for p in made.head.parameters())


@pytest.mark.parametrize("kind", ["finetune", "inner", "frozen", "cosine", "prototype"])
def test_an_image_gets_the_same_label_in_any_company(kind: str, init: Path, data: Path, tmp_path: Path) -> None:
    changes = {"frozen": {"freeze": "backbone"}, "finetune": {}}.get(kind, {"head": kind})
    out = tmp_path / "o"
    made = metaft.load(finished(inner_words(init, data, out) if kind == "inner" else words(init, data, out, **changes)))
    x = pixels_of(files_of(data)[0])
    with torch.no_grad():
        logits, names = made(x), made.names(x)
        assert len(set(names)) > 1
        assert (logits - logits[0]).abs().max() > 0.1
        assert torch.equal(made(torch.cat([x[:1], 255 - x[1:]]))[0], logits[0]), "its neighbours are looked at"
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        alone = torch.cat([made(one[None]) for one in x])
        parts = torch.cat([made(x[:5]), made(x[5:])])
        # To rounding, since a batch of another size is summed otherwise, and on some processors another row of one.
        for other in (alone, parts, made(x.flip(0)).flip(0), made(x[order])[order.argsort()], made.train()(x)):
            torch.testing.assert_close(other, logits, rtol=0, atol=ONE_PASS)
    assert [made.names(one[None])[0] for one in x] == names


def test_what_holds_no_classifier_is_refused_with_what_to_do(init: Path, run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "early")
    (tmp_path / "early/classifier.safetensors").unlink()
    shutil.copytree(tmp_path / "early", tmp_path / "small")
    (tmp_path / "small/compress.toml").touch()
    damaged = bytearray((run / "classifier.safetensors").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    for path, match in (
        (init, f"make one with: python -m metaft.adapt --init {re.escape(str(init))}"),
        (tmp_path / "early", r"did metaft\.adapt finish there"),
        (tmp_path / "small", r"did metaft\.compress finish there"),
        (data, "is not a run folder"),
        (tmp_path / "nowhere", r"^there is no run .*nowhere"),
        (run / "checkpoints/last.safetensors", "holds no classifier"),
        (run / "report.txt", "damaged or not a metaft checkpoint"),
        (tmp_path / "damaged.safetensors", r"damaged\.safetensors: damaged or edited"),
    ):
        with pytest.raises(CheckpointError, match=match):
            metaft.load(path)
    with pytest.raises(CheckpointError, match="its architecture is conv4, not a module of your own"):
        metaft.load(run, module=nn.Linear(3, 3))


# ---- labels -------------------------------------------------------------------------------------------------------


def by_hand(run: Path, files: list[Path], *, invert: bool = False) -> tuple[list[str], np.ndarray]:
    """(label, probabilities [n, classes]) of files that are of the run's size already, one by one."""
    made = metaft.load(run)
    pixels = pixels_of(files)
    with torch.no_grad():
        logits = torch.cat([made(one[None]) for one in (255 - pixels if invert else pixels)]).double().numpy()
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return [TARGET[i] for i in logits.argmax(1)], powers / powers.sum(1, keepdims=True)


def printed(said: str) -> list[list[str]]:
    return [line.split("\t") for line in said.splitlines()]


def test_labels_of_files_and_folders(run: Path, data: Path, capsys: Text) -> None:
    files = unseen(data)
    labels, probabilities = by_hand(run, files)
    assert set(labels) == set(TARGET)
    assert np.mean([label == file.parent.name for label, file in zip(labels, files, strict=True)]) > 0.7
    assert metaft.load(run).label(files) == metaft.load(run).label(map(str, files)) == labels
    for argv in ([*map(str, files)], [str(data / "test")]):
        assert predict.main([str(run), *argv]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        rows = printed(said.out)
        assert [row[:2] for row in rows] == [[str(file), label] for file, label in zip(files, labels, strict=True)]
        assert [float(row[2]) for row in rows] == pytest.approx(probabilities.max(1), abs=5e-5 + ONE_PASS)
    assert predict.main([str(run), str(files[3]), str(data / "test/apple"), str(files[0])]) == 0
    order = [files[3], *(file for file in files[:6] if file != files[3])]  # each file once
    assert [row[0] for row in printed(capsys.readouterr().out)] == [str(file) for file in order]


def test_a_folder_is_searched_to_the_bottom(run: Path, data: Path, tmp_path: Path, capsys: Text) -> None:
    picture = unseen(data)[0]
    places = ["b/z.png", "b/c/deep.PNG", "x.png", "ä.png", "picture"]
    hidden = [".hidden.png", ".git/a.png", "__MACOSX/a.png"]
    for name in [*places, *hidden]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert predict.main([str(run), str(tmp_path)]) == 0
    said = [str(Path(row[0]).relative_to(tmp_path)) for row in printed(capsys.readouterr().out)]
    assert said == ["picture", "x.png", "ä.png", "b/z.png", "b/c/deep.PNG"]
    for name in ("picture", ".hidden.png"):  # one that is named is taken whatever it is called
        assert predict.main([str(run), str(tmp_path / name)]) == 0
        assert len(printed(capsys.readouterr().out)) == 1


@pytest.mark.parametrize("top", [1, 2, 3])
def test_the_most_probable_classes(top: int, run: Path, data: Path, tmp_path: Path, capsys: Text) -> None:
    files, out = unseen(data), tmp_path / "ä b.csv"
    argv = [str(run), str(data / "test"), "--top", str(top), "--csv", str(out), "--device", "cpu"]
    for ordered in (argv, [*argv[2:], *argv[:2]]):
        out.unlink(missing_ok=True)
        assert predict.main(ordered) == 0
        lines = printed(capsys.readouterr().out)
        _, probabilities = by_hand(run, files)
        order = np.argsort(-probabilities, 1)[:, :top]
        names = ["file", *(f"{what}_{i + 1}" for i in range(top) for what in ("label", "probability")), "error"]
        with open(out, encoding="utf-8", newline="") as file:
            head, *rows = csv.reader(file)
        assert head == names
        assert len(rows) == len(lines) == len(files)
        for path, row, line, best, p in zip(files, rows, lines, order, probabilities, strict=True):
            assert (row[0], row[-1], line[0]) == (str(path), "", str(path))
            assert row[1:-1:2] == line[1::2] == [TARGET[i] for i in best]
            assert [float(cell) for cell in row[2:-1:2]] == pytest.approx(p[best], abs=ONE_PASS)
            assert line[2::2] == [f"{float(cell):.4f}" for cell in row[2:-1:2]]


def test_probabilities_are_of_all_classes(run: Path, data: Path, capsys: Text) -> None:
    assert predict.main([str(run), str(data / "test"), "--top", "3"]) == 0
    for row in printed(capsys.readouterr().out):
        values = [float(cell) for cell in row[2::2]]
        assert math.fsum(values) == pytest.approx(1, abs=2e-4)
        assert values == sorted(values, reverse=True)
        assert sorted(row[1::2]) == sorted(TARGET)


def test_many_images_are_labelled_as_few(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    (data / "text.png").write_text("no picture")
    try:
        said = []
        for at_once in (1, 4, 256):
            monkeypatch.setattr(predict, "AT_ONCE", at_once)
            assert predict.main([str(run), str(data)]) == 0
            said.append([row[:2] for row in printed(capsys.readouterr().out)])
    finally:
        (data / "text.png").unlink()
    assert len(said[0]) == 45
    assert said[0] == said[1] == said[2]


def test_dark_on_bright_images_are_turned_as_in_training(init: Path, data: Path, tmp_path: Path, capsys: Text) -> None:
    """A classifier of the same pictures the other way round gives the same labels for pictures the other way round."""
    dark = write_target(tmp_path / "dark", {"train": 9, "test": 6}, noise=90, dark=True)
    told = {}
    for name, folder in (("bright", data), ("dark", dark)):
        out = finished(words(init, folder, tmp_path / f"{name}-run", epochs=15, lr=0.05))
        capsys.readouterr()
        assert predict.main([str(out), str(folder / "test")]) == 0
        told[name] = [row[1:] for row in printed(capsys.readouterr().out)]
    assert told["dark"] == told["bright"]
    labels, _ = by_hand(tmp_path / "dark-run", unseen(dark), invert=True)
    wrong, _ = by_hand(tmp_path / "dark-run", unseen(dark))
    assert labels == metaft.load(tmp_path / "dark-run").label(unseen(dark)) != wrong
    assert torch.equal(metaft.load(tmp_path / "dark-run").read(unseen(dark)[0]), pixels_of(unseen(data)[:1]))


def test_files_of_any_size_and_kind_are_read_as_in_training(run: Path, data: Path, tmp_path: Path) -> None:
    """Larger, colour, with transparency, as JPEG: what comes out is what the data sources read."""
    made, picture = metaft.load(run), Image.open(unseen(data)[0])
    large = picture.resize((24, 24), Image.Resampling.NEAREST)
    large.save(tmp_path / "large.png")
    large.convert("RGB").save(tmp_path / "colour.png")
    expected = np.asarray(large.resize((8, 8), Image.Resampling.LANCZOS))
    for name in ("large", "colour"):
        assert np.array_equal(made.read(tmp_path / f"{name}.png")[0, 0].numpy(), expected)
    alpha = picture.convert("RGBA")
    alpha.save(tmp_path / "alpha.png")
    assert torch.equal(made.read(tmp_path / "alpha.png"), pixels_of(unseen(data)[:1]))
    with pytest.raises(DataError, match=r"nowhere\.png cannot be read"):
        made.label([tmp_path / "nowhere.png"])


# ---- what cannot be labelled --------------------------------------------------------------------------------------


def test_unreadable_images_are_listed_and_the_others_labelled(
    run: Path, data: Path, tmp_path: Path, capsys: Text
) -> None:
    good = unseen(data)[:2]
    text, cut, empty = (tmp_path / name for name in ("text.png", "cut ü.png", "empty.jpg"))
    text.write_text("no picture")
    cut.write_bytes(good[0].read_bytes()[:60])
    empty.touch()
    paths, out = [text, good[0], cut, empty, good[1]], tmp_path / "out.csv"
    assert predict.main([str(run), *map(str, paths), "--csv", str(out), "--skip-bad"]) == 0
    said = capsys.readouterr()
    labels, _ = by_hand(run, good)
    assert [row[:2] for row in printed(said.out)] == [[str(f), label] for f, label in zip(good, labels, strict=True)]
    lines = said.err.splitlines()
    assert len(lines) == 4
    for line, path in zip(lines, (text, cut, empty), strict=False):
        assert line.startswith(f"metaft: unreadable: image {path} cannot be read")
    kinds = "2 damaged files, 1 empty file"
    assert lines[3] == f"metaft: 3 of 5 files cannot be read ({kinds}); the others are labelled"
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    assert [row["label_1"] for row in rows] == ["", labels[0], "", "", labels[1]]
    assert [bool(row["error"]) for row in rows] == [True, False, True, True, False]
    assert str(cut) in rows[2]["error"]
    assert [row["probability_1"] == "" for row in rows] == [True, False, True, True, False]


def test_what_lies_beside_pictures_does_not_count_against_them(
    run: Path, data: Path, tmp_path: Path, capsys: Text
) -> None:
    """A shell's `*` names the descriptions too, and the status is that of the folder itself."""
    good = unseen(data)[0].read_bytes()
    for name, content in {
        "1.png": good, "2.png": good, "1.json": b"{}", "2.json": b"", "notes": b"a text", "names.npy": b"\x93NUMPY\0",
        "3.png": good[:60], "4.png": b"text",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    out = tmp_path.parent / "labels.csv"
    files = sorted(map(str, tmp_path.iterdir()))
    assert predict.main([str(run), *files, "--csv", str(out)]) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    kinds = "3 files that are no pictures, 2 damaged files, 1 empty file"
    assert line == f"metaft: 6 of 8 files cannot be read ({kinds}); the others are labelled"
    assert len(out.read_text(encoding="utf-8").splitlines()) == 9  # all that was named is in it
    assert predict.main([str(run), str(tmp_path)]) == 0
    for name in ("5.heic", "6.png"):  # the one is a picture all the same, the other pretends to be
        (tmp_path / name).write_bytes(b"\0\1\2\xff")
        assert predict.main([str(run), *files, str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("metaft: error: images: 7 of 9 files cannot be read")
    assert predict.main([str(run), *(file for file in files if file.endswith(("json", "notes")))]) == 2


def test_where_no_image_can_be_read_the_status_is_2(run: Path, tmp_path: Path, capsys: Text) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("no picture")
    assert predict.main([str(run), str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    *lines, last = said.err.splitlines()
    assert last == "metaft: error: images: none of the 2 files can be read"
    for line, name in zip(lines, ("a.png", "b.png"), strict=True):
        assert line.startswith(f"metaft: unreadable: image {tmp_path / name}")


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory, init: Path, run: Path, data: Path) -> dict[str, str]:
    """Paths that go wrong, and some that do not, by name."""
    base = tmp_path_factory.mktemp("falsch ß")
    (base / "empty").mkdir()
    (base / "deep/down").mkdir(parents=True)
    (base / "deep/down/notes.txt").write_text("")
    shutil.copytree(run, base / "early")
    (base / "early/classifier.safetensors").unlink()
    shutil.copytree(run, base / "damaged")
    (base / "damaged/classifier.safetensors").write_bytes(b"nothing")
    paths = {path.name: path for path in base.iterdir()}
    paths |= {"init": init, "run": run, "data": data, "picture": unseen(data)[0]}
    return {name: str(path) for name, path in paths.items()}


BAD = [
    (["/none/x", "{picture}"], ["run: there is no run /none/x"]),
    (["{init}", "{picture}"], ["{init} holds no classifier", "python -m metaft.adapt --init {init}"]),
    (["{data}", "{picture}"], ["{data} is not a run folder"]),
    (["{early}", "{picture}"], ["{early} holds no classifier", "did metaft.adapt finish there"]),
    (["{damaged}", "{picture}"], ["{damaged}/classifier.safetensors", "damaged"]),
    (["{picture}", "{picture}"], ["{picture}", "not a metaft checkpoint"]),
    (["{run}", "/none/ü.png"], ["images: /none/ü.png does not exist"]),
    (["{run}", "{picture}", "/none/x"], ["images: /none/x does not exist"]),
    (["{run}", "{empty}"], ["images: folder {empty} holds no pictures"]),
    (["{run}", "{deep}"], ["images: folder {deep} holds no pictures"]),
    (["{run}", "{picture}", "--top", "4"], ["top must be at most the 3 classes", "got 4"]),
    (["{run}", "{picture}", "--top", "0"], ["top must be at least 1, got 0"]),
    (["{run}", "{picture}", "--top", "two"], ["top must", "'two'"]),
    (["{run}", "{picture}", "--tops", "2"], ["--tops", "did you mean '--top'"]),
    (["{run}", "{picture}", "--device", "gpu"], ["device must be", "'gpu'"]),
    (["{run}", "{picture}", "--device", "cuda:77"], ["device", "'cuda:77'"]),
    (["{run}"], ["images: IMAGE|FOLDER... is missing"]),
    ([], ["RUN"]),
]


@pytest.mark.parametrize(("argv", "parts"), BAD, ids=lambda value: " ".join(value))
def test_bad_input_is_one_line_status_2_and_writes_nothing(
    in_tmp: Path, capsys: Text, named: dict[str, str], argv: list[str], parts: list[str]
) -> None:
    extra = ["--csv", "out.csv"] if argv else []
    assert predict.main([word.format(**named) for word in argv] + extra) == 2
    one_line(capsys, *(part.format(**named) for part in parts))
    assert list(in_tmp.iterdir()) == []


def test_a_csv_that_cannot_be_written_is_one_line(run: Path, data: Path, tmp_path: Path, capsys: Text) -> None:
    argv = [str(run), str(unseen(data)[0]), "--csv", str(tmp_path / "none/out.csv")]
    assert predict.main(argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"metaft: error: csv: {tmp_path}/none/out.csv cannot be written (No such file or directory)"


@pytest.mark.parametrize("place", ["none/out.csv", "file/out.csv", "."])
def test_a_csv_that_cannot_be_written_is_known_before_anything_is_labelled(
    place: str, run: Path, data: Path, tmp_path: Path, capsys: Text
) -> None:
    (tmp_path / "file").touch()
    assert predict.main([str(run), str(data), "--csv", str(tmp_path / place)]) == 2
    one_line(capsys, "csv: ", tmp_path, "cannot be written (")


@pytest.mark.parametrize("there", ["a picture to label", "labels of one's own"])
def test_what_is_no_table_of_predictions_is_not_replaced_by_one(
    there: str, run: Path, data: Path, tmp_path: Path, capsys: Text
) -> None:
    picture = shutil.copy(unseen(data)[0], tmp_path / "p.png")
    mine = tmp_path / "labels.csv"
    mine.write_text("path,label\np.png,a\n")
    place = picture if there == "a picture to label" else mine
    before = Path(place).read_bytes()
    assert predict.main([str(run), str(picture), "--csv", str(place)]) == 2
    one_line(capsys, f"csv: {place} is there, and is no table of this command; name another file")
    assert Path(place).read_bytes() == before


def test_an_earlier_table_is_replaced_and_so_is_an_empty_file(run: Path, data: Path, tmp_path: Path) -> None:
    out, files = tmp_path / "out.csv", unseen(data)[:3]
    out.touch()
    for count in (3, 1):
        assert predict.main([str(run), *map(str, files[:count]), "--csv", str(out)]) == 0
        with open(out, encoding="utf-8", newline="") as file:
            assert len(list(csv.DictReader(file))) == count


def locked(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Have folders that nobody may list or enter; permissions would not stop a superuser."""

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *rest: Any, **others: Any) -> Any:
            if not isinstance(path, int):  # an open file
                inside = any(folder in Path(path).parents for folder in folders)
                if inside or (real is scandir and Path(path) in folders):
                    raise PermissionError(13, "Permission denied", str(path))
            return real(path, *rest, **others)

        return call

    scandir = os.scandir
    for name in ("scandir", "stat"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))


def test_a_locked_folder_is_listed_and_the_others_labelled(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    here = shutil.copytree(data / "test", tmp_path / "here")
    closed, inside = here / "c d", tmp_path / "closed/a.png"
    inside.parent.mkdir()
    with monkeypatch.context() as patch:
        locked(patch, closed, inside.parent)
        assert predict.main([str(run), str(here), str(inside), "--csv", str(tmp_path / "o.csv")]) == 0
    said = capsys.readouterr()
    assert [Path(row[0]).parent.name for row in printed(said.out)] == ["apple"] * 6 + ["βητα"] * 6
    first, second, third = said.err.splitlines()
    assert first == f"metaft: unreadable: folder {closed} cannot be read (Permission denied)"
    assert second.startswith(f"metaft: unreadable: image {inside} cannot be read")
    kinds = "1 folder that cannot be read, 1 locked file"
    assert third == f"metaft: 2 of 14 files cannot be read ({kinds}); the others are labelled"
    with open(tmp_path / "o.csv", encoding="utf-8", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file) if row["error"]] == [str(closed), str(inside)]


def test_a_locked_run_folder_is_one_line(run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text) -> None:
    with monkeypatch.context() as patch:
        locked(patch, run)
        assert predict.main([str(run), str(data)]) == 2
    one_line(capsys, f"run folder {run} cannot be read (Permission denied)")


def test_links_in_a_circle_are_followed_once(run: Path, data: Path, tmp_path: Path, capsys: Text) -> None:
    here = shutil.copytree(data / "test/apple", tmp_path / "here/apple")
    (here / "up").symlink_to(tmp_path / "here")
    (here / "self.png").symlink_to("self.png")
    (here / "own").symlink_to("own")
    assert predict.main([str(run), str(tmp_path / "here")]) == 0
    said = capsys.readouterr()
    assert [Path(row[0]).name for row in printed(said.out)] == [f"{i:02d}.png" for i in range(6)]
    lines = [f"metaft: unreadable: image {here}/{name} cannot be read: an endless link" for name in ("own", "self.png")]
    assert said.err.splitlines()[:-1] == lines
    assert predict.main([str(run), str(here / "self.png")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "metaft: error: images: none of the 1 files can be read"


def test_colour_that_is_lost_is_noted_once(run: Path, data: Path, tmp_path: Path, capsys: Text) -> None:
    for i, file in enumerate(unseen(data)[:3]):
        grey = np.asarray(Image.open(file))
        shown = grey if i == 0 else np.stack([grey, grey // 2, grey // 2], -1)
        Image.fromarray(shown).save(tmp_path / f"{i}.png")
    assert predict.main([str(run), str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert len(printed(said.out)) == 3
    assert said.err == (
        f"metaft: note: 2 of the 3 images are in colour, such as {tmp_path}/1.png, but the run takes grey ones; they "
        "were made grey\n"
    )


def test_a_run_that_is_not_finished_says_so(run: Path, data: Path, tmp_path: Path, capsys: Text) -> None:
    part = shutil.copytree(run, tmp_path / "part")
    (part / "result.json").unlink()
    said = f"run folder {part} has no result.json: its classifier is trained, but metaft.adapt did not finish there"
    with pytest.warns(UserWarning, match=re.escape(said)):
        made = metaft.load(part)
    assert torch.equal(made(pixels_of(unseen(data))), metaft.load(run)(pixels_of(unseen(data))))
    assert predict.main([str(part), str(unseen(data)[0])]) == 0
    assert capsys.readouterr().err == f"metaft: note: {said}; go on with --resume {part}\n"
    (part / "compress.toml").touch()
    said = f"metaft.compress did not finish there; go on with metaft.compress RUN --out {part} --resume"
    with pytest.warns(UserWarning, match=re.escape(said)):
        metaft.load(part)


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.zeros(2, 1, 8, 8), "float32 [2, 1, 8, 8]"),
        (torch.zeros(2, 1, 8, 9, dtype=torch.uint8), "uint8 [2, 1, 8, 9]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8 [2, 3, 8, 8]"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), "uint8 [1, 8, 8]"),
    ],
    ids=str,
)
def test_other_inputs_are_refused_with_both(images: Tensor, got: str, run: Path) -> None:
    match = re.escape(f"images: the classifier takes uint8 [n, 1, 8, 8], got {got}")
    with pytest.raises(MetaftError, match=match):
        metaft.load(run)(images)


def test_no_paths_and_a_lone_path_have_no_labels(run: Path) -> None:
    with pytest.raises(MetaftError, match="label takes one path or more, got none"):
        metaft.load(run).label([])
    with pytest.raises(MetaftError, match=r"label takes a list of paths, got 'a\.png'"):
        metaft.load(run).label("a.png")


@pytest.mark.slow
def test_names_that_are_not_utf_8(run: Path, data: Path, tmp_path: Path) -> None:
    """Linux allows any bytes in a name. A real process, since the test's own stdout takes anything."""
    odd = tmp_path / os.fsdecode(b"caf\xe9.png")
    try:
        shutil.copy(unseen(data)[0], odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    argv = [sys.executable, "-m", "metaft.predict", str(run), str(odd), "--csv", str(tmp_path / "out.csv")]
    done = subprocess.run(argv, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr.decode(errors="replace").splitlines()[-1]
    assert b"caf" in done.stdout
    assert os.fsencode(odd) in (tmp_path / "out.csv").read_bytes()


# ---- with a module of one's own -----------------------------------------------------------------------------------


class Own(nn.Module):
    """A user's network, whose batch normalisation has running statistics."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())
        self.classify = nn.Linear(width * 6 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.body(x))


def own(width: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        return initialise(Own(width), 0)


@pytest.fixture(scope="module")
def own_init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A meta-training run on a module from Python."""
    out = tmp_path_factory.mktemp("runs") / "own"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
        meta_train.run(images(out, model=None, width=None), dataset=pool(), module=own())
    return out


def settings(init: Path, data: Path, out: Path, method: str) -> AdaptConfig:
    loop: dict[str, Any] = {"epochs": 2, "lr": 0.02, "batch_size": 7} if method == "finetune" else {"method": "inner"}
    return AdaptConfig(init=str(init), data=f"folder:{data}", out=str(out), device="cpu", **loop)


METHODS = pytest.mark.parametrize("method", ["finetune", "inner"])


@METHODS
def test_a_module_of_ones_own(
    method: str, own_init: Path, data: Path, tmp_path: Path, saved: list[Classifier], capsys: Text
) -> None:
    module, out = own(), tmp_path / "o"
    before = {k: v.clone() for k, v in module.state_dict().items()}
    result = adapt.run(settings(own_init, data, out, method), module=module)
    assert same(module.state_dict(), before), "the user's module was changed"
    assert result["classes"] == list(TARGET)
    assert "metaft.predict" not in capsys.readouterr().out  # it could not bring the module
    x = pixels_of(files_of(data)[0])
    loaded = metaft.load(out, module=own())
    assert torch.equal(loaded(x), saved[0](x))
    torch.testing.assert_close(torch.cat([loaded(one[None]) for one in x]), loaded(x), rtol=0, atol=ONE_PASS)
    wrong = sum(a != b.parent.name for a, b in zip(loaded.label(unseen(data)), unseen(data), strict=True))
    assert result["accuracy"] == pytest.approx(1 - wrong / 18)
    kept = {file: file.read_bytes() for file in (out / "classifier.safetensors", out / "metrics.jsonl")}
    adapt.resume_run(out, module=own())
    assert kept == {file: file.read_bytes() for file in kept}
    for there, match in ((None, r"its module came from Python; hand it over"), (own(5), "not of this architecture")):
        with pytest.raises(CheckpointError, match=match):
            metaft.load(out, module=there)
    with pytest.raises(MetaftError, match=r"^init: .* was trained with a module from Python; hand it over"):
        adapt.resume_run(out)
    capsys.readouterr()
    assert predict.main([str(out), str(unseen(data)[0])]) == 2
    one_line(capsys, out, "its module came from Python; hand it over (module=...)")


@METHODS
def test_a_module_is_refused_where_it_does_not_belong(
    method: str, own_init: Path, init: Path, data: Path, tmp_path: Path
) -> None:
    for run, module, match in (
        (own_init, None, r"^init: .*own was trained with a module from Python"),
        (init, own(), r"^init: .*maml was trained with conv4, not with a module"),
    ):
        with pytest.raises(MetaftError, match=match):
            adapt.run(settings(run, data, tmp_path / "o", method), module=module)
    assert list(tmp_path.iterdir()) == []


@METHODS
def test_another_module_than_the_runs_is_refused(method: str, own_init: Path, data: Path, tmp_path: Path) -> None:
    shapes = r"^init: body.0.weight has shape \[4, 1, 3, 3\] in the run, \[5, 1, 3, 3\]"
    with pytest.raises(MetaftError, match=shapes):
        adapt.run(settings(own_init, data, tmp_path / "o", method), module=own(5))
    assert list(tmp_path.iterdir()) == []


@METHODS
def test_a_module_from_none(method: str, data: Path, tmp_path: Path) -> None:
    """Without a run the module itself is trained, from random parameters and for images as they come."""
    config = dataclasses.replace(settings(Path("none"), data, tmp_path / "o", method))
    if method == "inner":
        with pytest.raises(MetaftError, match=r"^method: .*--init RUN instead of none"):
            adapt.run(config, module=nn.Sequential(nn.Flatten(), nn.Linear(784, 3)))
        return
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.ReLU(), nn.Linear(5, 7))
    result = adapt.run(config, module=module)
    assert (result["init"], result["scratch"]) == ("none", None)
    logits = metaft.load(tmp_path / "o", module=module)(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    assert logits.shape == (2, 3)


# ---- the command --------------------------------------------------------------------------------------------------


def test_help_lists_every_field(capsys: Text) -> None:
    assert command_line(["predict", "--help"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "RUN" in said.out
    for name in options_of(PredictConfig):
        assert re.search(rf"^  --{name.replace('_', '-')}\b", said.out, re.MULTILINE), name


def test_it_stops_at_ctrl_c(run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text):
    monkeypatch.setattr(ImageInputs, "read", lambda *_: signal.raise_signal(signal.SIGINT))
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may start without it
    try:
        assert predict.main([str(run), str(data), "--csv", str(tmp_path / "out.csv")]) == 130
    finally:
        signal.signal(signal.SIGINT, former)
    assert capsys.readouterr().err == "metaft: stopped\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_real_process(run: Path, data: Path, tmp_path: Path) -> None:
    """Warnings are errors there; and neither --help nor a bad option waits for torch."""
    argv = [sys.executable, "-W", "error", "-m", "metaft.predict", str(run)]
    done = subprocess.run([*argv, str(data / "test")], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [row[1] for row in printed(done.stdout)] == by_hand(run, unseen(data))[0]
    done = subprocess.run([*argv, "none.png"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "metaft: error: images: none.png does not exist\n"
    code = (
        "import sys; from metaft import predict\n"
        "assert predict.main(['--help']) == 0 and predict.main(['--nonsense']) == 2\n"
        "print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([*argv[:3], "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_header_of_before_there_were_kinds_of_input_says_the_same() -> None:
    inputs = ImageInputs(1, 8, 8, polarity="bright-on-black", bits=12, invert=True)
    plain = {k: v for k, v in inputs.plain().items() if k not in ("kind", "invert")}
    assert of_header(json.loads(json.dumps({"preprocessing": plain, "invert": True}))) == inputs
    assert of_header(json.loads(json.dumps({"inputs": inputs.plain()}))) == inputs
    lighter = dataclasses.replace(inputs, invert=False, mean=(0.5,))
    assert of_header({"preprocessing": {**plain, "mean": [0.5]}}) == lighter
    assert of_header({}) is None
    with pytest.raises(CheckpointError, match=r"^inputs: .*no kind 'smell', known are image"):
        of_header({"inputs": {"kind": "smell"}})
