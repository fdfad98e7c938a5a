"""What `--data` names beside folders: tables of pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import one_line
from PIL import Image

from metaft import adapt, targets
from metaft.errors import DataError
from metaft.inputs import ImageInputs
from metaft.targets.draws import draw
from metaft.targets.duplicates import groups_of

GREY = ImageInputs(1, 8, 8, polarity="bright-on-black")
WHOLE: dict[str, Any] = {"keep_some": True, "skipped": {}}
"""How parts are drawn from data without any."""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Six pictures of two classes in folders that say nothing, with parts."""
    (tmp_path / "pictures").mkdir()
    lines = ["path,label,part"]
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 90, (8, 8), np.uint8) + np.uint8(80 * (i % 2))
        Image.fromarray(pixels).save(tmp_path / f"pictures/{i}.png")
        lines.append(f"pictures/{i}.png,{['a10', 'a9'][i % 2]},{'train' if i < 8 else 'test'}")
    file = tmp_path / "table.csv"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_a_table_is_what_folders_of_the_same_pictures_are(table: Path, tmp_path: Path) -> None:
    for line in table.read_text().splitlines()[1:]:
        path, label, part = line.split(",")
        to = tmp_path / "folders" / part / label / Path(path).name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes((tmp_path / path).read_bytes())
    mine, theirs = targets.load(f"csv:{table}", GREY), targets.load(f"folder:{tmp_path}/folders", GREY)
    assert mine.class_names == theirs.class_names == ("a9", "a10")  # in natural order
    for part in ("train", "test"):
        pictures = [
            {(int(t.labels[i]), t.examples[i].numpy().tobytes()) for i in t.parts[part].tolist()}
            for t in (mine, theirs)
        ]
        assert pictures[0] == pictures[1]
    assert mine.name == f"csv:{table}"
    assert targets.shape_of(f"csv:{table}") == targets.shape_of(f"folder:{tmp_path}/folders")


@pytest.mark.parametrize("form", ["bom", "spaces", "columns", "no part", "quoted"])
def test_tables_are_read_as_people_write_them(form: str, table: Path) -> None:
    rows = [line.split(",") for line in table.read_text().splitlines()]
    if form == "bom":
        table.write_text("\ufeff" + table.read_text(), encoding="utf-8")
    elif form == "spaces":
        table.write_text("\r\n".join([",".join(rows[0]), *(" , ".join(row) for row in rows[1:])]))
    elif form == "columns":
        table.write_text("\n".join(",".join([row[2], "x", row[1], row[0]]) for row in rows))
    elif form == "no part":
        table.write_text("\n".join(",".join(row[:2]) for row in rows))
    else:
        table.write_text("\n".join([",".join(rows[0]), *(f'"{p}","{n}, so",{of}' for p, n, of in rows[1:])]))
    target = targets.load(f"csv:{table}", GREY)
    assert list(target.notes) == ([f"columns of {table} that are not read: 'x'"] if form == "columns" else [])
    assert len(target.labels) == 12
    assert target.parts.keys() == ({"all"} if form == "no part" else {"train", "test"})
    assert torch.bincount(target.labels).tolist() == [6, 6]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("path,name,part", "{file} has no column 'label' in its first line, which holds path, name, part"),
        ("", "{file} has no column 'path' in its first line, which holds nothing"),
        ("path,label,label", "{file} has 2 columns 'label' in its first line"),
        ("path,label,parts", "{file}: column 'parts' is none of label, part, path; did you mean 'part'?"),
        ("path,label, Part", "{file}: column ' Part' is none of label, part, path; did you mean 'part'?"),
        ("pictures/1.png,,train", "{file}, line 14: label is empty"),
        ("pictures/99.png,a9,train", "{file}, line 14: {folder}/pictures/99.png is not there"),
        ("pictures,a9,train", "{file}, line 14: {folder}/pictures is no file"),
        ("pictures/1.png,a9,tset", "{file}, line 14: part 'tset' is none of train, val, test"),
        ("pictures/1.png,a9,train", "{file}, line 14: {folder}/pictures/1.png stands in line 3 already"),
        ("pictures/1.png,a9,train,x", "{file}, line 14: more values than columns"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_its_line(line: str, said: str, table: Path) -> None:
    text = table.read_text().splitlines()
    whole = [line] if "line 14" not in said else [*text, line]
    if whole == [line] and line:
        whole.append("pictures/1.png,a9,train")
    table.write_text("\n".join(whole))
    with pytest.raises(DataError) as caught:
        targets.load(f"csv:{table}", GREY)
    assert str(caught.value).startswith("data: " + said.format(file=table, folder=table.parent))


def test_parts_and_classes_have_to_be_whole(table: Path) -> None:
    text = table.read_text()
    table.write_text(text.replace("test", "val"))
    with pytest.raises(DataError, match=r"has no row of part 'test'"):
        targets.load(f"csv:{table}", GREY)
    table.write_text("\n".join(line for line in text.splitlines() if "a9,test" not in line))
    with pytest.raises(DataError, match=r"class 'a9' has no row of part 'test'"):
        targets.load(f"csv:{table}", GREY)
    table.write_text("path,label\npictures/1.png,a\npictures/2.png,a\n")
    with pytest.raises(DataError, match=r"holds 1 classes, fewer than 2"):
        targets.load(f"csv:{table}", GREY)
    table.write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(DataError, match=r"is no table in UTF-8"):
        targets.load(f"csv:{table}", GREY)


def test_the_command_takes_a_table_wherever_it_is_resumed(
    table: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(table.parent)
    argv = ["--init", "none", "--data", "csv:table.csv", "--epochs", "1", "--device", "cpu", "--out", "o"]
    assert adapt.main(argv) == 0
    result = json.loads(Path("o/result.json").read_text())
    assert (result["data"], result["train_images"], result["test_images"]) == (f"csv:{table}", 8, 4)
    monkeypatch.chdir("/")
    assert adapt.main(["--resume", str(table.parent / "o"), "--seeds", "2"]) == 0
    capsys.readouterr()
    assert adapt.main(["--init", "none", "--data", "csv:/none/t.csv", "--out", str(table.parent / "p")]) == 2
    one_line(capsys, "data: /none/t.csv cannot be read (No such file or directory)")


# ---- duplicates ----------------------------------------------------------------------------------------------------


def photo(seed: int, side: int = 64) -> Image.Image:
    """Colours that change slowly, as those of photographs do."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def stack(images: list[Image.Image]) -> torch.Tensor:
    pixels = [np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def test_copies_in_another_size_format_or_brightness_are_found_and_others_are_not() -> None:
    originals = [photo(i) for i in range(30)]
    jpeg = io.BytesIO()
    originals[3].save(jpeg, "JPEG", quality=60)
    copies = [
        originals[0],
        originals[1].resize((23, 23)),
        Image.fromarray(np.minimum(np.asarray(originals[2]), 253) + np.uint8(2)),
        Image.open(jpeg),
    ]
    groups = groups_of(stack([*originals, *copies]))
    assert groups.tolist() == [*range(30), 0, 1, 2, 3]


def test_blank_pictures_are_one_group_and_take_no_square_of_time() -> None:
    blank = torch.zeros(3000, 1, 8, 8, dtype=torch.uint8)
    blank[:, 0, 0, 0] = torch.arange(3000).remainder(3).to(torch.uint8)
    assert set(groups_of(blank).tolist()) == {0}


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_duplicates_stay_in_one_part_where_parts_are_drawn(kind: str, tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(12):
            photo(i + 100 * (label == "b")).save(tmp_path / label / f"{i}.png")
        for i in range(6):
            photo(i + 100 * (label == "b")).resize((50, 50)).save(tmp_path / label / f"copy{i}.png")
    files = [file.relative_to(tmp_path) for file in sorted(tmp_path.rglob("*.png"))]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *(f"{file},{file.parent}" for file in files)]))
    named = f"csv:{tmp_path}/t.csv" if kind == "csv" else f"folder:{tmp_path}"
    target = targets.load(named, ImageInputs(3, 32, 32))
    assert (target.groups != np.arange(36)).sum() == 12
    for seed in range(5):
        drawn = target.rows(shots_per_class=10, seed=seed)
        folds = [target.rows_of_fold(k, seed=seed) for k in range(3)]
        for rows in (drawn, *folds):
            train, val, test = (set(target.groups[part].tolist()) for part in rows)
            assert not train & val and not train & test and not val & test
            assert min(map(len, (rows.train, rows.test))) > 0
        assert sorted(np.concatenate([rows.test for rows in folds]).tolist()) == list(range(36))


def test_a_test_of_nothing_but_duplicates_is_refused_whichever_draw_it_is_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("a", "b"):
        (tmp_path / "d" / label).mkdir(parents=True)
        for i in range(4):
            photo((i if i < 3 else 2) + 100 * (label == "b")).save(tmp_path / "d" / label / f"{i}.png")
    target = targets.load(f"folder:{tmp_path}/d", ImageInputs(3, 32, 32))
    fails = []
    for seed in range(20):
        left = draw(target.labels.numpy(), np.arange(8), 3, seed, ("a", "b"), **WHOLE)[1]
        fails.append(set(left.tolist()) <= {2, 3, 6, 7})
    first = next(i for i in range(20) if fails[i + 1] and not fails[i])
    assert len(target.rows(shots_per_class=3, seed=first).test) > 0
    argv = ["--init", "none", "--data", f"folder:{tmp_path}/d", "--shots-per-class", "3", "--seed", str(first)]
    assert adapt.main([*argv, "--seeds", "2", "--out", str(tmp_path / "o")]) == 2
    one_line(
        capsys,
        f"data: with seed {first + 1} each of the 2 images that are left to test is also one of the 6 to train on",
    )
    assert not (tmp_path / "o").exists()


def test_without_duplicates_draws_are_as_ever(table: Path) -> None:
    table.write_text("\n".join(",".join(line.split(",")[:2]) for line in table.read_text().splitlines()))
    target = targets.load(f"csv:{table}", GREY)
    rows = target.rows(shots_per_class=3, seed=0)
    drawn, left = draw(target.labels.numpy(), target.parts["all"], 3, 0, ("a9", "a10"), **WHOLE)
    assert rows.train.tolist() == drawn.tolist() and rows.test.tolist() == left.tolist()
