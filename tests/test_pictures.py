"""Picture files as people have them: what is read, how, and what is said of the rest."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import mmap
import os
import shutil
import struct
import threading
import unicodedata
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    TARGET,
    base_of,
    finished,
    images,
    meta_trained,
    one_line,
    one_thread,
    words,
    write_folder,
    write_target,
)
from PIL import Image, ImageOps

import metaft
from metaft import adapt, meta_train, predict, targets
from metaft.errors import DataError, MetaftError, MetaftWarning
from metaft.finetune import report
from metaft.finetune.classifier import Classifier, save
from metaft.inputs import ImageInputs, listing
from metaft.inputs.depth import bits_for, maximum
from metaft.inputs.fitting import pixels_of
from metaft.inputs.flaws import about, noted
from metaft.inputs.formats import starts_as_picture
from metaft.inputs.listing import list_below, list_images
from metaft.inputs.pictures import looks_grey, read_all
from metaft.inputs.reading import open_image, read
from metaft.runs import checkpoint
from metaft.support import large
from metaft.tasks import folder, load

Text = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "draw_pictures", lambda *_: [])
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("runs")
    return meta_trained(base / "maml", write_folder(base / "squares"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, init: Path) -> Path:
    base = tmp_path_factory.mktemp("adapted")
    return finished(words(init, write_target(base / "data", {"train": 4, "test": 2}), base / "o", epochs=1))


def notes_of(path: Path) -> list[str]:
    return json.loads((path / "result.json").read_text(encoding="utf-8"))["notes"]


def square(value: int, side: int = 8) -> Image.Image:
    pixels = np.random.default_rng(value).integers(0, 120, (side, side), dtype=np.uint8)
    pixels[0] = pixels[-1] = pixels[:, 0] = pixels[:, -1] = 0
    return Image.fromarray(pixels)


def spoil(file: Path) -> None:
    """Cut a picture short, in the midst of its pixels."""
    file.write_bytes(file.read_bytes()[:-30])


# ---- what is a picture --------------------------------------------------------------------------------------------


def strangers(place: Path) -> dict[str, str]:
    """Files of every sort that is not taken, in one folder: name -> kind."""
    (place / "gone.png").symlink_to("/none/there.png")
    (place / "round.png").symlink_to("round.png")
    os.mkfifo(place / "pipe.png")
    (place / "nothing").touch()
    (place / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(range(200)))
    (place / "photo.nef").write_bytes(b"II*\0" + bytes(100))
    (place / "noise").write_bytes(bytes(range(128, 256)) * 3)
    (place / ".hidden.png").write_bytes(b"")
    (place / ".DS_Store").write_bytes(b"")
    (place / "notes.txt").write_text("BMW and PNG")
    (place / "README").write_text("P1 is the first page, Python the second")
    (place / "boxes.json").write_text("{}")
    (place / "mask.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (place / "folder.png").mkdir()
    unread = "file in a format that is not read"
    return {
        "gone.png": "broken link",
        "round.png": "endless link",
        "pipe.png": "special file (a pipe, socket or device)",
        "nothing": "empty file",
        "photo.heic": f"{unread} (.heic)",
        "photo.nef": f"{unread} (.nef)",
        "noise": f"{unread} (no ending)",
        ".hidden.png": "hidden file",
        **dict.fromkeys(("notes.txt", "README", "boxes.json", "mask.npy"), "file that is no picture"),
    }


LOST = {"gone.png", "round.png", "pipe.png", "nothing", "photo.heic", "photo.nef", "noise"}


def test_pictures_are_known_by_what_is_in_them(tmp_path: Path) -> None:
    square(1).save(tmp_path / "a.jfif", "JPEG")
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        square(1).save(tmp_path / f"{kind} without an ending", kind)
        square(1).save(tmp_path / f"{kind}.txt", kind)
    square(1).save(tmp_path / "a.tga")  # which nothing but its name tells
    good = sorted(tmp_path.iterdir())
    kinds = strangers(tmp_path)
    listed = list_images(tmp_path)
    assert listed.files == good
    assert {left.path.name: left.kind for left in listed.left} == kinds
    assert {left.path.name for left in listed.left if left.lost} == LOST
    for file in good:
        assert open_image(file).size == (8, 8)


def test_nothing_but_a_pictures_decoder_is_run(tmp_path: Path) -> None:
    """PostScript, under whatever name, would be handed to Ghostscript."""
    for name in ("a.png", "a.eps", "a"):
        (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
        with pytest.raises(DataError, match="is no picture that can be read here"):
            open_image(tmp_path / name)
    assert list_images(tmp_path).files == [tmp_path / "a.png"]  # whose name says that it is one: it is not passed over


def test_a_damaged_picture_without_an_ending_is_still_one(tmp_path: Path) -> None:
    square(1).save(tmp_path / "a", "PNG")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:20])
    assert starts_as_picture(tmp_path / "a")
    assert list_images(tmp_path).files == [tmp_path / "a"]


@pytest.mark.parametrize("name", ["pipe.png", "gone.png", "round.png", "folder.png", "nothing", "none.png"])
def test_what_is_no_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    strangers(tmp_path)
    with pytest.raises(DataError, match=f"{name} cannot be read: (a |an |No such|Is a dir)"):
        open_image(tmp_path / name)


def test_a_picture_too_large_to_be_meant_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    square(1, 12).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with pytest.raises(DataError, match=r"a\.png cannot be read: .*bomb"):
        open_image(tmp_path / "a.png")


def test_a_thread_that_meets_a_strange_file_waits_for_nobody(tmp_path: Path) -> None:
    """Whoever started it waits inside `noted` until it is done: a wait for the same lock would never end."""
    (tmp_path / "a").write_bytes(bytes(range(128, 256)) * 8)
    caught: list[str] = []

    def reads() -> None:
        with pytest.raises(DataError, match="is no picture that can be read here") as error:
            open_image(tmp_path / "a")
        caught.append(error.value.kind)  # pyright: ignore[reportAttributeAccessIssue]

    thread = threading.Thread(target=reads, daemon=True)
    with noted():
        thread.start()
        thread.join(10)
        assert caught == ["file in a format that is not read (no ending)"]
    thread.join()


# ---- what is said -------------------------------------------------------------------------------------------------

NOTE = "ignored 12 of {} files: 4 files that are no pictures, such as "


def test_adapt_says_what_it_does_not_take(init: Path, tmp_path: Path, capsys: Text) -> None:
    data = write_target(tmp_path / "d", {"train": 4, "test": 2})
    strangers(data / "train" / TARGET[0])
    square(1).save(data / "loose.png")
    square(1).save(data / "train" / "loose.png")
    (data / "train" / "lost class").symlink_to("/none/there")
    (data / "train" / "__more").mkdir()
    square(1).save(data / "train" / "__more" / "a.png")
    assert adapt.main(words(init, data, tmp_path / "o", epochs=1)) == 0
    note, beside, hidden, *_ = notes_of(tmp_path / "o")
    assert note.startswith("ignored 14 of 32 files: 4 files that are no pictures, such as ")
    for part in (
        f"2 broken links, such as {data}/train/lost class",
        f"1 endless link ({data}/train/{TARGET[0]}/round.png)",
        "1 special file (a pipe, socket or device)",
        "1 empty file (",
        "1 file in a format that is not read (.heic) (",
        "1 hidden file (",
        f"1 picture file beside the class folders ({data}/train/loose.png)",
    ):
        assert part in note
    assert beside == f"ignored beside train/ and test/: {data}/loose.png"
    assert hidden.endswith(f"hidden or an archive's: {data}/train/__more")
    assert f"note: {note}" in capsys.readouterr().out


def test_meta_training_says_it_too(tmp_path: Path, capsys: Text) -> None:
    data = write_folder(tmp_path / "d")
    strangers(data / "train" / "class00")
    (data / "train/class00/deep").mkdir()
    square(1).save(data / "train/class00/deep/a.png")
    argv = {"dataset": f"folder:{data}", "image_size": 8, "iterations": 1, "test_episodes": 2, "eval_episodes": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as for people; in tests they are errors
        meta_trained(tmp_path / "o", data, **argv)
    said = capsys.readouterr().err
    assert said.count(f"metaft: note: {data}: {NOTE.format(152)}") == 1
    assert f"metaft: note: {data}: ignored, since they are inside class folders: {data}/train/class00/deep" in said


def test_predict_says_it_too(run: Path, tmp_path: Path, capsys: Text) -> None:
    for i in range(8):
        square(i).save(tmp_path / f"{i}.jfif", "JPEG")
    strangers(tmp_path)
    assert predict.main([str(run), str(tmp_path), "--csv", str(tmp_path / "o.csv")]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 8
    lines = said.err.splitlines()
    unreadable = [line for line in lines if line.startswith("metaft: unreadable: ")]
    assert len(unreadable) == len(LOST)
    assert all(any(f"/{name} cannot be read: " in line for line in unreadable) for name in LOST)
    assert "metaft: note: ignored 5 of 20 files: 4 files that are no pictures, such as " in said.err
    assert lines[-1].startswith("metaft: 7 of 15 files cannot be read (1 broken link, ")
    assert (tmp_path / "o.csv").read_text().count("\n") == 16


def test_a_folder_that_holds_nothing_says_what_is_in_it(run: Path, tmp_path: Path, capsys: Text) -> None:
    (tmp_path / "notes.txt").write_text("text")
    assert predict.main([str(run), str(tmp_path)]) == 2
    one_line(capsys, f"images: folder {tmp_path} holds no pictures (1 file that is no picture ({tmp_path}/notes.txt))")


@pytest.mark.parametrize("place", [".", "more", "train/{}/deep"])
def test_lost_pictures_where_nobody_looks_are_said_too(place: str, tmp_path: Path) -> None:
    data = write_target(tmp_path / "d", {"train": 2, "test": 1})
    where = data / place.format(TARGET[0])
    where.mkdir(exist_ok=True)
    (where / "notes.txt").write_text("text")
    assert targets.load(f"folder:{data}").notes == ()
    for name in ("gone.png", "link.png"):
        (where / name).symlink_to("/none/there.png")
    (where / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\xff")
    [note] = targets.load(f"folder:{data}").notes
    first = where / "a.heic" if place == "." else where
    why = "since they are inside class folders" if "deep" in place else "beside train/ and test/"
    assert note.startswith(f"ignored{', ' if 'deep' in place else ' '}{why}: {first}")


@pytest.mark.parametrize("sort", ["link", "heic", "json"])
def test_more_than_half_gone_is_an_error_unless_asked_for(sort: str, init: Path, tmp_path: Path, capsys: Text) -> None:
    """Notes and tables beside pictures do not count."""
    data = write_target(tmp_path / "d", {".": 4})
    for name in TARGET:
        for i in range(5):
            file = data / name / f"more {i}.{sort}"
            if sort == "link":
                file.symlink_to("/none/a.png")
            else:
                file.write_bytes(b"\0\0\0\x18ftypheic\xff" if sort == "heic" else b"{}")
    argv = words(init, data, tmp_path / "o", epochs=1)
    assert adapt.main(argv) == (0 if sort == "json" else 2)
    if sort != "json":
        kinds = {"link": "15 broken links", "heic": "15 files in a format that is not read (.heic)"}
        one_line(capsys, "data: 15 of the 27 pictures, more than half", kinds[sort][:13], "--skip-bad")
        with pytest.raises(DataError, match="15 of the 27 pictures, more than half"):
            folder(data)
        with pytest.warns(MetaftWarning, match="ignored 15 of 27"):
            folder(data, skip_bad=True)
        assert adapt.main([*argv, "--skip-bad"]) == 0
    assert notes_of(tmp_path / "o")[0].startswith("ignored 15 of 27 files")


def test_predict_ends_with_an_error_where_more_than_half_is_gone(run: Path, tmp_path: Path, capsys: Text) -> None:
    for i in range(30):
        (tmp_path / f"{i:02d}.png").write_text("text")
    for i in range(30, 35):
        square(i).save(tmp_path / f"{i}.png")
    csv = tmp_path / "o.csv"
    assert predict.main([str(run), str(tmp_path), "--csv", str(csv)]) == 2
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 5, "what can be read is labelled all the same"
    assert said.err.count("metaft: unreadable: ") == 10
    assert "metaft: error: images: 30 of 35 files cannot be read (30 damaged files)" in said.err
    assert csv.read_text().count("cannot be read") == 30
    assert predict.main([str(run), str(tmp_path), "--skip-bad"]) == 0


def test_paths_that_do_not_exist_are_all_named(run: Path, tmp_path: Path, capsys: Text) -> None:
    square(1).save(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to("/none/there.png")
    assert predict.main([str(run), "x.png", str(tmp_path / "a.png"), "y.png"]) == 2
    one_line(capsys, "images: 2 paths do not exist: x.png, y.png")
    assert predict.main([str(run), str(tmp_path / "gone.png"), str(tmp_path / "a.png")]) == 0
    assert "gone.png cannot be read: a broken link" in capsys.readouterr().err


# ---- names in two forms -------------------------------------------------------------------------------------------


def test_class_folders_whose_names_differ_in_unicode_form_alone_are_refused(tmp_path: Path) -> None:
    data = write_target(tmp_path / "d", {".": 3}, classes=("caf\u00e9", "the"))
    shutil.copytree(data / "caf\u00e9", data / "cafe\u0301")
    if len(list(data.iterdir())) < 3:
        pytest.skip("this file system knows one form")
    for call in (lambda: folder(data), lambda: targets.load(f"folder:{data}")):
        with pytest.raises(DataError, match=r"'caf\\xe9' and 'cafe\\u0301'|'cafe\\u0301' and 'caf\\xe9'") as caught:
            call()
        assert "two Unicode forms" in str(caught.value)


def test_the_forms_may_differ_between_the_parts(tmp_path: Path) -> None:
    data = write_target(tmp_path / "d", {"train": 3}, classes=("caf\u00e9", "the"))
    write_target(tmp_path / "d", {"test": 3}, classes=("cafe\u0301", "the"))
    assert targets.load(f"folder:{data}").class_names == ("caf\u00e9", "the")
    assert all(unicodedata.is_normalized("NFC", name) for name in targets.load(f"folder:{data}").class_names)


def test_a_part_that_holds_no_class_folders_is_not_called_missing(tmp_path: Path) -> None:
    data = write_target(tmp_path / "d", {"train": 2})
    with pytest.raises(DataError, match=rf"^data: {data}/test is missing; give train/ and test/"):
        targets.load(f"folder:{data}")
    for part, there in (("test", "train"), ("train", "test")):
        flat = write_target(tmp_path / part, {there: 2})
        (flat / part).mkdir()
        square(1).save(flat / part / "a.png")
        with pytest.raises(DataError, match=rf"^data: {flat}/{part} holds no class folders"):
            targets.load(f"folder:{flat}")
    (data / "test").touch()
    with pytest.raises(DataError, match=rf"^data: {data}/test is not a folder"):
        targets.load(f"folder:{data}")


# ---- broken ones --------------------------------------------------------------------------------------------------


def broken(path: Path, count: int, **parts: Any) -> tuple[Path, list[Path]]:
    """A target of which the first `count` pictures, class by class in turn, cannot be read."""
    data = write_target(path, parts or {".": 9})
    files = [data / ("train" if parts else ".") / name / f"{i:02d}.png" for i in range(9) for name in TARGET][:count]
    for file in files:
        spoil(file)
    return data, files


@pytest.mark.parametrize(("count", "more"), [(1, ""), (3, ""), (13, " and 3 more")])
def test_all_broken_pictures_are_named_at_once(count: int, more: str, init: Path, tmp_path: Path, capsys: Text) -> None:
    data, files = broken(tmp_path / "d", count)
    (data / TARGET[0] / "lost.png").symlink_to("/none")
    for argv in (words(init, data, tmp_path / "o"), words(Path("none"), data, tmp_path / "o")):
        assert adapt.main(argv) == 2
        line = one_line(capsys, "data: ", "1 broken link", "--skip-bad")
        assert sum(str(file) in line for file in files) == min(count, 10)
        assert (f"{count} of 27 images cannot be read" in line and f"{more};" in line) or count == 1
    assert meta_train.main(["--dataset", f"folder:{data}"]) == 2
    line = one_line(capsys, "dataset: ", "--skip-bad")
    assert sum(str(file) in line for file in files) == min(count, 10)


def test_all_class_folders_without_pictures_are_named_at_once(tmp_path: Path) -> None:
    data = write_target(tmp_path / "d", {"train": 2, "test": 2}, classes="abcd")
    for place in ("train/b", "test/b", "train/d", "test/c"):
        for file in (data / place).iterdir():
            file.unlink()
            file.symlink_to("/none")
    for call in (lambda: folder(data / "train"), lambda: targets.load(f"folder:{data}")):
        with pytest.raises(
            DataError, match=r"2 class folders hold no images: .*/b, .*/d \(4 broken links, such as .*/b"
        ):
            call()
    for place in ("train/b", "test/b", "train/d", "test/c"):
        shutil.rmtree(data / place)
    with pytest.raises(DataError, match=r"2 classes, 'c', 'd', are not in every part of .* \(train, test\)"):
        targets.load(f"folder:{data}")


def test_where_all_are_broken_that_is_said_first(tmp_path: Path, capsys: Text, in_tmp: Path) -> None:
    data, _ = broken(tmp_path / "d", 27)
    assert adapt.main(["--data", f"folder:{data}"]) == 2
    one_line(capsys, "data: 27 of 27 images cannot be read", " and 17 more")


def test_skip_bad_goes_on_without_them_and_a_run_keeps_it(init: Path, tmp_path: Path, capsys: Text) -> None:
    data, files = broken(tmp_path / "d", 2)
    assert (
        adapt.main([*words(init, data, tmp_path / "o", epochs=1)[:-2], "--skip-bad", "--out", str(tmp_path / "o")]) == 0
    )
    assert notes_of(tmp_path / "o")[0].startswith("skipped 2 of 27 pictures that cannot be read: ")
    result = json.loads((tmp_path / "o/result.json").read_text())
    assert result["test_images"] == 25, "each is tested in one of the folds"
    assert "skip_bad = true" in (tmp_path / "o/config.toml").read_text()
    assert adapt.main(["--resume", str(tmp_path / "o")]) == 0
    whole = shutil.copytree(data, tmp_path / "whole")
    for file in files:
        (whole / file.relative_to(data)).unlink()
    assert torch.equal(targets.load(f"folder:{data}", skip_bad=True).examples, targets.load(f"folder:{whole}").examples)
    (tmp_path / "c.toml").write_text(f'skip-bad = true\ndata = "folder:{data}"\ninit = "{init}"\nepochs = 1\n')
    assert adapt.main(["--config", str(tmp_path / "c.toml"), "--out", str(tmp_path / "p")]) == 0


@pytest.mark.slow
def test_meta_training_and_evaluation_skip_them_too(tmp_path: Path, capsys: Text) -> None:
    data = write_folder(tmp_path / "d")
    whole = shutil.copytree(data, tmp_path / "whole")
    for place in ("train/class00/3.png", "test/class11/0.png"):
        spoil(data / place)
        (whole / place).unlink()
    with pytest.warns(MetaftWarning, match=r"skipped 2 of 140 pictures .*class00/3\.png \("):
        pool = folder(data, skip_bad=True)
    same = folder(whole)
    assert torch.equal(pool.images, same.images)
    assert pool.counts.tolist() == same.counts.tolist() == [9, *[10] * 10, 9, 10, 10]
    assert pool.starts.tolist() == same.starts.tolist()
    config = images(tmp_path / "o", dataset=f"folder:{data}", image_size=8, skip_bad=True, iterations=1)
    with pytest.warns(MetaftWarning, match="skipped 2"):
        meta_train.run(config)
    with pytest.warns(MetaftWarning, match="skipped 2"):
        metaft.evaluate.run(tmp_path / "o", metaft.EvaluateConfig(episodes=2))
    with pytest.raises(
        DataError, match=r"'class00' .* 9 images \(1 more cannot be read and were skipped\), fewer than"
    ):
        pool.source(ways=3, shots=5, query_shots=5, splits=("train",))


def test_a_class_that_has_too_few_left_is_refused(tmp_path: Path) -> None:
    data, _ = broken(tmp_path / "d", 3)
    for i in range(1, 9):
        spoil(data / TARGET[1] / f"{i:02d}.png")
    word = f"class '{TARGET[1]}' has no picture left"
    with pytest.raises(DataError, match=f"{word} in {data}: 9 cannot be read"):
        targets.load(f"folder:{data}", skip_bad=True)
    with pytest.raises(DataError, match=word), pytest.warns(MetaftWarning):
        folder(data, skip_bad=True)
    made = targets.load(f"folder:{broken(tmp_path / 'e', 3)[0]}", skip_bad=True)
    with pytest.raises(DataError, match=r"has 8 images to draw from \(1 more cannot be read and were skipped\)"):
        made.rows(shots_per_class=8, seed=0)
    data, _ = broken(tmp_path / "f", 0, train=3, test=1)
    spoil(data / "test" / TARGET[2] / "00.png")
    with pytest.raises(DataError, match=f"'{TARGET[2]}' has no picture left in {data}/test: 1 cannot"):
        targets.load(f"folder:{data}", skip_bad=True)


def test_skip_bad_goes_on_where_every_picture_of_the_sample_is_broken(tmp_path: Path) -> None:
    """Of 201 pictures every third is looked at for grey or colour, and each of those is broken."""
    data = write_target(tmp_path / "d", {".": 67}, channels=3)
    files = sorted(data.glob("*/*.png"))
    for file in files[::3]:
        spoil(file)
    with pytest.warns(MetaftWarning, match="skipped 67 of 201"):
        pool = folder(data, image_size=8, skip_bad=True)
    assert pool.shape == (3, 8, 8), "what can be read says that it is in colour"
    assert len(pool.images) == 134
    with pytest.raises(DataError, match=r"67 of 201 images cannot be read: .*--skip-bad"):
        folder(data)


def test_where_all_are_broken_nobody_is_told_to_go_on_without(tmp_path: Path) -> None:
    data, files = broken(tmp_path / "d", 27)
    for skip_bad in (False, True):
        for call in (folder, lambda path, **more: targets.load(f"folder:{path}", **more)):
            with pytest.raises(DataError, match="27 of 27 images cannot be read: ") as error:
                call(data, skip_bad=skip_bad)
            assert str(error.value).endswith("; mend or remove them")
    assert looks_grey(files[:0])


def test_a_mended_picture_is_read_again(tmp_path: Path) -> None:
    data, [file] = broken(tmp_path / "d", 1)
    for _ in range(2):
        with pytest.warns(MetaftWarning, match="skipped 1"):
            assert len(folder(data, skip_bad=True).images) == 26
    shutil.copy(data / TARGET[0] / "01.png", file)
    assert len(folder(data, skip_bad=True).images) == 27


def test_a_classifier_names_all_that_it_cannot_read(run: Path, tmp_path: Path) -> None:
    names = [tmp_path / f"{i}.png" for i in range(12)]
    with pytest.raises(DataError, match=r"12 of 12 images cannot be read: .* and 2 more"):
        metaft.load(run).label(names)


# ---- more than 8 bits ---------------------------------------------------------------------------------------------


def deep_target(path: Path, bits: int, *, mode: str = "I;16", dim: int = 1) -> Path:
    """Classes of greys of so many bits in files of 16; those of the first class are `dim` times darker."""
    rng = np.random.default_rng(bits)
    for c, name in enumerate("abc"):
        (path / name).mkdir(parents=True)
        for i in range(6):
            values = rng.integers(0, 2**bits, (12, 12))
            values[0, 0], values[5, 5] = 0, 2**bits - 1
            values //= dim if c == 0 else 1
            image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
            image.save(path / name / f"{i}.{'png' if mode == 'I;16' else 'tif'}")
    return path


def test_the_range_of_deep_greys_is_that_of_the_whole_set(tmp_path: Path) -> None:
    assert [bits_for(n) for n in (0, 255, 256, 1023, 1024, 4095, 4096, 16384, 65535)] == [
        8,
        8,
        10,
        10,
        12,
        12,
        14,
        16,
        16,
    ]
    for bits in (8, 10, 12, 14, 16):
        for mode in ("I;16", "I"):
            data = deep_target(tmp_path / f"{bits} {mode}", bits, mode=mode, dim=20)
            made = targets.load(f"folder:{data}", ImageInputs(1, 12, 12))
            assert made.inputs.plain()["bits"] == bits
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                pool = folder(data, image_size=12)
            assert pool.inputs.bits == bits
            assert len(said) == (bits < 16)
            note = f"18 files hold {bits}-bit greys in 16 bits: their range is 0 to {2**bits - 1}"
            assert (note in made.notes) == (bits < 16)
            for files, got in ((made.files, made.examples), (sorted(made.files), None)):
                if got is None:
                    continue
                for i, file in enumerate(files):
                    values = np.asarray(Image.open(file)).astype(np.float64)
                    np.testing.assert_allclose(got[i, 0].numpy(), values * 255 / (2**bits - 1), atol=0.51)
            assert len(np.unique(read(Path(made.files[-1]), 1, 12))) > 50


def test_deep_and_shallow_files_lie_side_by_side(tmp_path: Path) -> None:
    data = deep_target(tmp_path / "d", 12)
    grey = np.asarray(square(3, 12))
    Image.fromarray(grey).save(data / "a" / "8 bit.png")
    made = targets.load(f"folder:{data}", ImageInputs(3, 12, 12))
    place = made.files.index(str(data / "a" / "8 bit.png"))
    assert made.inputs.plain()["bits"] == 12
    assert np.array_equal(made.examples[place].numpy(), np.stack([grey] * 3))
    values = np.asarray(Image.open(made.files[0])).astype(np.float64)
    np.testing.assert_allclose(made.examples[0, 2].numpy(), values / 4095 * 255, atol=0.51)


def test_deep_greys_are_fitted_as_others_are(tmp_path: Path) -> None:
    """The same picture in 8 bits and in 12, neither of them square: padded for grey, cropped for colour."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 15)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray((pixels.astype(np.int64) * 4095 // 255).astype(np.uint16)).save(tmp_path / "b.png")
    for channels in (1, 3):
        np.testing.assert_allclose(read(tmp_path / "b.png", channels, 7).astype(int),
                                   read(tmp_path / "a.png", channels, 7), atol=1)  # fmt: skip


def test_the_range_travels_with_the_classifier_and_what_lies_beyond_is_said(tmp_path: Path, capsys: Text) -> None:
    data = deep_target(tmp_path / "d", 12)
    assert adapt.main(words(Path("none"), data, tmp_path / "o", epochs=1)) == 0
    made = metaft.load(tmp_path / "o")
    assert made.inputs.plain()["bits"] == 12
    dim = np.zeros((28, 28), np.uint16)
    dim[5:9] = 455
    Image.fromarray(dim).save(tmp_path / "dim.png")
    inverted = made.inputs.plain()["invert"]
    assert (made.read(tmp_path / "dim.png")[0, 0, 7] == (255 - 28 if inverted else 28)).all(), "by its own range"
    dim[5:9] = 5000
    Image.fromarray(dim).save(tmp_path / "bright.png")
    note = f"1 picture has greys beyond the 4095 of the training images, cut off there, such as {tmp_path}/bright.png"
    with pytest.warns(MetaftWarning, match=note):
        assert (made.read(tmp_path / "bright.png")[0, 0, 7] == (0 if inverted else 255)).all()
    with pytest.warns(MetaftWarning, match=note):
        made.label([tmp_path / "dim.png", tmp_path / "bright.png"])
    capsys.readouterr()
    assert predict.main([str(tmp_path / "o"), str(tmp_path / "dim.png"), str(tmp_path / "bright.png")]) == 0
    assert capsys.readouterr().err.splitlines() == [f"metaft: note: {note}"]


def test_a_classifier_that_knows_no_range_takes_the_files_own_and_says_so(
    run: Path, tmp_path: Path, capsys: Text
) -> None:
    """As every classifier of older versions does."""
    values = np.full((8, 8), 1023, np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    made = metaft.load(run)
    plain = {k: v for k, v in vars(made.inputs).items() if k != "bits"}
    assert ImageInputs.from_plain(plain) == made.inputs
    with pytest.warns(MetaftWarning, match="hold no more than 10 bits"):
        assert (made.read(tmp_path / "a.png") == round(1023 / 257)).all()
    assert predict.main([str(run), str(tmp_path / "a.png")]) == 0
    assert "1 16-bit files, such as " in (line := capsys.readouterr().err)
    assert "hold no more than 10 bits" in line


def test_a_pgm_has_its_whole_range_whatever_the_training_images_have(tmp_path: Path) -> None:
    """Pillow scales a PGM's greys up to 16 bits by the largest number that the file says it may hold."""
    data = deep_target(tmp_path / "d", 12)
    values = np.linspace(0, 4095, 144).reshape(12, 12).astype(np.uint16)
    seen = values * (255 / 4095)
    pgm = data / "a" / "x.pgm"
    for form in ("P5", "P2"):
        body = values.astype(">u2").tobytes() if form == "P5" else " ".join(map(str, values.ravel())).encode()
        pgm.write_bytes(f"{form}\n12 12\n4095\n".encode() + body)
        made = targets.load(f"folder:{data}", ImageInputs(1, 12, 12))
        assert made.inputs.plain()["bits"] == 12, "the range is that of the files which say nothing of theirs"
        np.testing.assert_allclose(made.examples[made.files.index(str(pgm)), 0].numpy(), seen, atol=1)
        np.testing.assert_allclose(read(pgm, 1, 12)[0], seen, atol=1)
        picture = open_image(pgm, deep=True)
        np.testing.assert_allclose(pixels_of(picture, 1, 12, 12)[0], seen, atol=1)
    full = np.full((12, 12), 4095, ">u2")
    pgm.write_bytes(b"P5\n12 12\n65535\n" + full.tobytes())
    assert maximum(open_image(pgm, deep=True)) == 4095, "a largest number of 65535 is a container's, not a range"


def deep_colour(path: Path, kind: int) -> Path:
    """A PNG of 16 bits a channel of that colour type, all of it 4000; Pillow cannot write one."""
    channels = {2: 3, 4: 2, 6: 4}[kind]
    rows = b"".join(b"\0" + np.full((8, channels), 4000, ">u2").tobytes() for _ in range(8))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def test_levels_that_pillow_does_not_hand_over_are_said(run: Path, tmp_path: Path, capsys: Text) -> None:
    data = write_target(tmp_path / "d", {".": 3}, channels=3)
    files = [deep_colour(data / TARGET[0] / f"{kind}.png", kind) for kind in (2, 4, 6)]
    Image.new("RGB", (8, 8)).save(data / TARGET[1] / "a.bmp")
    (data / TARGET[1] / "b.bmp").write_bytes(  # 5, 6 and 5 bits, which no byte is too small for
        b"BM" + struct.pack("<IHHI", 66 + 8, 0, 0, 66) + struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0)
        + struct.pack("<III", 0xF800, 0x7E0, 0x1F) + bytes(8)
    )  # fmt: skip
    flawed(data / TARGET[2] / "00.png")
    note = (
        "3 pictures have 16 bits for each colour or for transparency, of which only the high 8 are read, "
        f"such as {files[0]}; what uses fewer bits is too dark: scale it up first"
    )
    made = targets.load(f"folder:{data}")
    assert note in made.notes
    assert sum("flaws" in text for text in made.notes) == 1
    for _ in range(2):  # from the cache too
        with pytest.warns(MetaftWarning) as said:
            folder(data)
        assert f"{data}: {note}" in map(str, (warning.message for warning in said))
    predict.main([str(run), *map(str, files)])
    assert note in capsys.readouterr().err
    with pytest.warns(MetaftWarning, match="1 picture has 16 bits for each colour"):
        metaft.load(run).read(files[1])


# ---- order of classes ---------------------------------------------------------------------------------------------


def test_classes_are_in_natural_order_and_joined_by_name(tmp_path: Path, capsys: Text) -> None:
    names = ["10", "2", "1", "class 9", "class 10"]
    data = write_target(tmp_path / "d", {"train": 5}, classes=names)
    write_target(tmp_path / "d", {"test": 2}, classes=names[::-1])
    order = ["1", "2", "10", "class 9", "class 10"]
    made = targets.load(f"folder:{data}", ImageInputs(1, 8, 8))
    assert list(made.class_names) == order
    for file, label in zip(made.files, made.labels.tolist(), strict=True):
        assert Path(file).parent.name == order[label]
    run = finished(words(Path("none"), data, tmp_path / "o", epochs=1))
    result = json.loads((run / "result.json").read_text())
    assert result["classes"] == [row["class"] for row in result["per_class"]] == order
    assert metaft.load(run).class_names == tuple(order)
    capsys.readouterr()
    assert folder(data / "train").class_names == tuple(sorted(names)), "a pool's order is its episodes'"


def test_a_classifier_keeps_the_order_it_was_saved_with(run: Path, tmp_path: Path) -> None:
    made = metaft.load(run)
    old = Classifier(made.body, made.head, made.inputs, ("10", "2", "1"))
    architecture = checkpoint.load(run / "classifier.safetensors")[1]["architecture"]
    save(tmp_path / "c.safetensors", old, architecture, {})
    assert metaft.load(tmp_path / "c.safetensors").class_names == ("10", "2", "1")


# ---- what Pillow warns of -----------------------------------------------------------------------------------------


def flawed(file: Path) -> Path:
    """Give a picture EXIF data that says nothing; Pillow warns of it."""
    shown = Image.open(file).convert("L")
    shown.save(file.with_suffix(".jpg"), exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    file.unlink()
    return file.with_suffix(".jpg")


def test_pillows_warnings_become_one_note(init: Path, run: Path, tmp_path: Path, capsys: Text) -> None:
    data = write_target(tmp_path / "d", {".": 40})
    files = [flawed(data / TARGET[c] / f"{i:02d}.png") for c, i in ((0, 3), (1, 5), (2, 39))]
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as for people; in tests they are errors
        assert adapt.main(words(init, data, tmp_path / "o", epochs=1)) == 0
        assert capsys.readouterr().err.count("Warning") == 0
        [note] = [note for note in notes_of(tmp_path / "o") if "flaws" in note]
        assert note.startswith(f"3 pictures are read in spite of flaws, such as {files[0]} (Corrupt EXIF")
        assert predict.main([str(run), str(data)]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"metaft: note: {note}"]
        for _ in range(2):  # from the cache too
            meta_train.main(["--dataset", f"folder:{data}", "--ways", "50"])
            said = capsys.readouterr().err
            assert said.count("flaws") == 1
            assert "Warning" not in said
    with pytest.warns(MetaftWarning, match="1 picture is read in spite of flaws"):
        metaft.load(run).read(files[1])


def of_bands(file: Path, bands: int) -> Path:
    """A TIFF file of 2 x 2 pixels with so many bands. Pillow logs an error of one with more than it can take."""
    size = 4 * bands
    fields = {
        256: (3, 2), 257: (3, 2), 258: (3, 8), 259: (3, 1), 262: (3, 1), 273: (4, 8), 277: (3, bands), 278: (3, 2),
        279: (4, size),
    }  # fmt: skip
    rows = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in fields.items())
    ifd = struct.pack("<H", len(fields)) + rows + bytes(4)
    file.write_bytes(b"II*\0" + struct.pack("<I", 8 + size) + bytes(size) + ifd)
    return file


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Inside, without the handlers that pytest sets up, as in a program that sets up none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])
        yield


@unlogged()
def test_what_pillow_logs_of_a_picture_is_not_on_the_terminal(run: Path, tmp_path: Path, capsys: Text) -> None:
    assert open_image(of_bands(tmp_path / "1.tif", 1)).mode == "L"
    capsys.readouterr()
    many = of_bands(tmp_path / "8.tif", 8)
    assert predict.main([str(run), str(tmp_path)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["metaft"] * 2
    assert lines[0].startswith(f"metaft: unreadable: image {many} cannot be read")
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "data/b").mkdir()
    for name in ("a/1.tif", "b/2.tif"):
        of_bands(tmp_path / "data" / name, 8)
    assert adapt.main(["--init", "none", "--data", f"folder:{tmp_path}/data", "--out", str(tmp_path / "o")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("metaft: error: data: ")


@unlogged()
def test_what_is_logged_of_a_readable_picture_is_its_flaw_and_other_logs_are_as_ever(capsys: Text) -> None:
    log, file = logging.getLogger("PIL.SomePlugin"), Path("x.tif")
    former = list(logging.getLogger("PIL").handlers)
    with noted() as outer:
        with noted() as flaws:
            with about(file):
                log.debug("nothing of note")
                log.error("too many %s.", "bands")
            log.error("no picture's")
        with about(Path("y.tif")):
            log.warning("later")
    assert (flaws, outer) == ({file: "too many bands"}, {Path("y.tif"): "later"})
    assert capsys.readouterr().err == "no picture's\n"
    assert logging.getLogger("PIL").handlers == former


def test_warnings_of_other_threads_and_of_other_things_are_shown_as_ever(tmp_path: Path) -> None:
    file = flawed(write_target(tmp_path, {".": 1}) / TARGET[0] / "00.png")
    shown: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: shown.append(str(message))
        former, filters = warnings.showwarning, list(warnings.filters)
        inside, outside = threading.Event(), threading.Event()

        def other() -> None:
            inside.wait(10)
            warnings.warn("another thread", stacklevel=1)
            outside.set()

        thread = threading.Thread(target=other)
        thread.start()
        with noted() as flaws:
            inside.set()
            outside.wait(10)
            with noted() as inner:
                open_image(file)
            warnings.warn("no picture", stacklevel=1)
        thread.join()
        assert shown == ["another thread", "no picture"]
        assert list(inner) == [file]
        assert flaws == {}
        assert warnings.showwarning is former
        assert warnings.filters == filters
    with about(file), pytest.warns(UserWarning, match="Corrupt EXIF"):
        open_image(file)


# ---- as a person sees them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "tif"])
def test_every_exif_orientation_is_seen_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    seen = np.zeros((16, 24, 3), np.uint8)
    seen[:8, :8], seen[:8, 16:], seen[8:, :8] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    turns: dict[int, Any] = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],  # stored so that it is shown turned clockwise
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = Image.fromarray(seen)
    for turn in turns.get(orientation, []):
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    extra: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "jpg" else {}
    stored.save(tmp_path / f"a.{kind}", exif=exif, **extra)
    upright = np.asarray(open_image(tmp_path / f"a.{kind}"))
    assert upright.shape == seen.shape
    assert np.abs(upright.astype(int) - seen).mean() < 4


def test_palette_alpha_cmyk_and_others_are_read_by_their_colours(tmp_path: Path) -> None:
    seen = np.zeros((16, 16, 3), np.uint8)
    seen[:8], seen[8:, :8], seen[8:, 8:] = (250, 250, 250), (200, 30, 20), (20, 60, 200)
    rgb = Image.fromarray(seen)
    palette = rgb.quantize(4)
    clear = palette.copy()
    clear.info["transparency"] = bytes([255] * 4)
    files: dict[str, Image.Image] = {
        "palette.png": palette, "palette.gif": palette, "clear palette.png": clear, "cmyk.tif": rgb.convert("CMYK"),
        "cmyk.jpg": rgb.convert("CMYK"), "ycc.tif": rgb.convert("YCbCr"), "alpha.png": rgb.convert("RGBA"),
    }  # fmt: skip
    for name, image in files.items():
        extra: dict[str, Any] = {"quality": 98, "subsampling": 0} if name.endswith("jpg") else {}
        image.save(tmp_path / name, **extra)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = np.asarray(open_image(tmp_path / name))
        assert got.shape == seen.shape, name
        assert np.abs(got.astype(int) - seen).mean() < 6, name


def test_what_is_transparent_is_not_seen(tmp_path: Path) -> None:
    """Colour under full transparency does not show; half of it mixes with white."""
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., :3] = (200, 0, 0)
    rgba[:4, :, 3], rgba[4:6, :, 3] = 255, 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    got = np.asarray(open_image(tmp_path / "a.png"))
    assert got[0, 0].tolist() == [200, 0, 0]
    assert np.abs(got[5, 0].astype(int) - [227, 127, 127]).max() <= 1
    assert got[7, 0].tolist() == [255, 255, 255]


def test_grey_of_16_bits_keeps_its_levels_beside_a_picture_of_its_8(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp.astype(">u2")).save(tmp_path / "b.tif")
    for name in ("a.png", "b.tif"):
        assert len(np.unique(np.asarray(open_image(tmp_path / name)))) == 256


def test_a_flaw_in_the_exif_data_does_not_cost_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    square(1).save(tmp_path / "a.png")

    def raises(image: Image.Image) -> Image.Image:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(ImageOps, "exif_transpose", raises)
    assert open_image(tmp_path / "a.png").size == (8, 8)


def test_read_all_reads_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for i in range(5):
        square(i).save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    real, opened = Image.open, []
    monkeypatch.setattr(Image, "open", lambda path, *rest, **more: opened.append(path) or real(path, *rest, **more))
    assert list_below(tmp_path).files == files
    assert opened == [], "a file whose name says that it is a picture is opened to be judged"
    read_all(files, 1, 8)
    assert sorted(opened) == files


def test_what_was_to_be_a_picture_keeps_its_place_among_the_files(tmp_path: Path) -> None:
    for name in ("a.png", "c.png"):
        square(1).save(tmp_path / name)
    (tmp_path / "b").write_bytes(b"\0\0 neither text nor a picture")
    (tmp_path / "d.jxl").symlink_to(tmp_path / "gone")
    (tmp_path / "z.png").symlink_to(tmp_path / "a.png")
    whole = list_below(tmp_path, lost=True)
    assert [file.name for file in whole.files] == ["a.png", "b", "c.png", "d.jxl", "z.png"] and whole.left == []
    some = list_below(tmp_path)
    assert [file.name for file in some.files] == ["a.png", "c.png", "z.png"]
    assert {left.path.name: left.lost for left in some.left} == {"b": True, "d.jxl": True}


def test_a_file_that_refuses_a_look_is_left_to_its_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scan").write_bytes(b"bytes")

    def raises(path: Path, **_: Any) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    assert list_images(tmp_path).files == []
    monkeypatch.setattr(listing, "starts_as_picture", raises)
    assert list_images(tmp_path) == ([tmp_path / "scan"], [])


def test_load_takes_the_wish_from_python(tmp_path: Path) -> None:
    data, _ = broken(tmp_path / "d", 1)
    with pytest.raises(MetaftError, match="--skip-bad"):
        load(f"folder:{data}")
    with pytest.warns(MetaftWarning, match="skipped 1"):
        load(f"folder:{data}", skip_bad=True)


def test_many_pictures_lie_in_a_file_that_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file has no room, or pictures are few, they lie in memory; which is which shows in no pixel."""
    data = write_folder(tmp_path / "d")
    files = sorted((data / "test").rglob("*.png"))
    in_memory = read_all(files, 1, 8)
    monkeypatch.setattr(large, "MAPPED_FROM", 1)
    asked: list[int] = []
    reserve = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda f, start, size: asked.append(size) or reserve(f, start, size))
    mapped = read_all(files, 1, 8)
    assert asked == [len(files) * 64]
    assert isinstance(base_of(mapped.images), mmap.mmap)
    assert np.array_equal(mapped.images, in_memory.images)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    unmapped = read_all(files, 1, 8)
    assert base_of(unmapped.images) is None
    assert np.array_equal(unmapped.images, in_memory.images)


def test_pictures_that_cannot_be_read_leave_no_gap(tmp_path: Path) -> None:
    files = sorted((write_folder(tmp_path / "d") / "test").rglob("*.png"))
    whole = read_all(files, 1, 8).images
    for i in (0, 3, len(files) - 1):
        files[i].write_bytes(b"no picture")
    left = read_all(files, 1, 8)
    assert left.good.tolist() == [i for i in range(len(files)) if i not in (0, 3, len(files) - 1)]
    assert np.array_equal(left.images, whole[left.good])
