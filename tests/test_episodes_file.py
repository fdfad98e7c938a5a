"""Meta-tests on episodes that a file lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import IMAGES, one_line, options, write_folder
from PIL import Image
from test_examples import run_example

from metaft import evaluate, meta_train
from metaft.errors import DataError, MetaftError
from metaft.inputs import ImageInputs
from metaft.tasks import folder
from metaft.tasks.episodes import listed_episodes

INPUTS = ImageInputs(1, 8, 8, polarity="bright-on-black")

Line = dict[str, list[list[str]]]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Bright pictures on black, 0.png to 11.png, each of a level of its own."""
    for number in range(12):
        pixels = np.zeros((8, 8), np.uint8)
        pixels[2:6, 2:6] = 100 + 10 * number
        (tmp_path / "p").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "p" / f"{number}.png")
    return tmp_path


LINES: list[Line] = [
    {
        "support": [["p/0.png", "a"], ["p/1.png", "b"]],
        "query": [["p/3.png", "b"], ["p/2.png", "a"], ["p/4.png", "a"], ["p/5.png", "b"]],
    },
    {
        "support": [["p/6.png", "b"], ["p/0.png", "z"]],
        "query": [["p/7.png", "z"], ["p/8.png", "z"], ["p/9.png", "b"], ["p/10.png", "b"]],
    },
]


def write(root: Path, lines: Any) -> Path:
    file = root / "episodes.jsonl"
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return file


def test_episodes_are_those_of_the_lines(pictures: Path) -> None:
    listed = listed_episodes(write(pictures, LINES), INPUTS)
    assert (len(listed), listed.ways, listed.shots, listed.query_shots, listed.shape) == (2, 2, 1, 2, (1, 8, 8))
    source = listed.source(ways=2, shots=1, query_shots=2)
    found = source.episodes(0, "test", [1, 0])
    assert found.support_y.tolist() == [[0, 1], [0, 1]]
    assert found.query_y.tolist() == [[1, 1, 0, 0], [1, 0, 0, 1]]
    levels = [[[6, 0], [7, 8, 9, 10]], [[0, 1], [3, 2, 4, 5]]]
    for i, parts in enumerate(levels):
        for x, numbers in zip((found.support_x[i], found.query_x[i]), parts, strict=True):
            expected = torch.tensor([[(100 + 10 * n) / 255] for n in numbers])
            torch.testing.assert_close(x[:, 0, 3, 3:4], expected)
    assert torch.equal(found.key, torch.stack([source.episodes(0, "test", [i]).key[0] for i in (1, 0)]))
    assert not torch.equal(found.key, source.episodes(1, "test", [1, 0]).key)
    with pytest.raises(DataError, match="2-way 1-shot with 2 queries"):
        listed.source(ways=2, shots=1, query_shots=5)


def test_dark_drawings_are_turned_as_a_folders_are(pictures: Path) -> None:
    bright = listed_episodes(write(pictures, LINES), INPUTS).episodes(0, "test", [0])
    for file in (pictures / "p").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    dark = listed_episodes(pictures / "episodes.jsonl", INPUTS).episodes(0, "test", [0])
    assert torch.equal(bright.query_x, dark.query_x)


def changed(part: str, place: int, pair: Any) -> Callable[[list[Any]], list[Any]]:
    def change(lines: list[Any]) -> list[Any]:
        lines[1][part][place] = pair
        return lines

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [], "holds no episodes"),
        (lambda lines: [*lines, "{"], "line 3, is no JSON"),
        (lambda lines: [*lines, [1]], r'line 3: an episode is \{"support": .* holds list'),
        (lambda lines: [*lines, '{"support": [], "query": [], "support": []}'], "line 3: 'support' stands there twice"),
        (lambda lines: [*lines, {"support": []}], "line 3: an episode is .* holds support"),
        (lambda lines: [lines[0], {**lines[1], "query": []}], r"line 2: query is no list of \[PATH, LABEL\] pairs"),
        (changed("support", 0, ["p/6.png"]), r"line 2: support: \['p/6.png'\] is no \[PATH, LABEL\]"),
        (changed("support", 0, ["p/6.png", 3]), r"line 2: support: .* is no \[PATH, LABEL\]"),
        (changed("support", 0, ["p/66.png", "b"]), r"line 2: support: .*p/66\.png is not there"),
        (changed("support", 0, ["p", "b"]), r"line 2: support: .*p is no file"),
        (changed("query", 0, ["p/7.png", "q"]), "line 2: query label 'q' has no support picture"),
        (changed("query", 0, ["p/6.png", "z"]), r"line 2: .*p/6\.png is in both support and query"),
        (changed("query", 0, ["./p/../p/6.png", "z"]), r"line 2: .*p/6\.png is in both support and query"),
        (changed("query", 1, ["p/7.png", "z"]), r"line 2: .*p/7\.png is twice in query"),
        (changed("query", 0, ["p/7.png", "b"]), "line 2: class 'z' has 1 query pictures, another one 3"),
        (
            lambda lines: [lines[0], {**lines[1], "query": lines[1]["query"][1:3]}],
            "line 2: 2 classes of 1 support and 1 query pictures, where line 1 has 2 classes of 1 support and 2 query",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    change: Callable[[list[Any]], list[Any]], words: str, pictures: Path
) -> None:
    file = write(pictures, change(json.loads(json.dumps(LINES))))
    with pytest.raises(DataError, match=words) as caught:
        listed_episodes(file, INPUTS)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_label_may_hold_what_else_ends_a_line(pictures: Path) -> None:
    text = json.dumps(LINES[0]).replace('"a"', '"a\u2028\x85b"') + "\r\n"
    (pictures / "x.jsonl").write_text(text, encoding="utf-8", newline="")
    assert listed_episodes(pictures / "x.jsonl", INPUTS).ways == 2


def test_files_that_cannot_be_read_are_named(pictures: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        listed_episodes(pictures / "none.jsonl", INPUTS)
    (pictures / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        listed_episodes(pictures / "x.jsonl", INPUTS)
    Image.new("RGB", (8, 8), "red").save(pictures / "p/3.png")
    with pytest.raises(
        MetaftError, match=r"^1 of the \d+ images of .*episodes\.jsonl are in colour.*but the run takes grey"
    ):
        listed_episodes(write(pictures, LINES), INPUTS)
    (pictures / "p/3.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"^image .*p/3\.png cannot be read"):
        listed_episodes(write(pictures, LINES), INPUTS)
    with pytest.raises(MetaftError, match="skip_bad: an episode without one"):
        listed_episodes(write(pictures, LINES), INPUTS, skip_bad=True)
    with pytest.raises(MetaftError, match="the run's inputs are no pictures"):
        listed_episodes(write(pictures, LINES), None)


def drawn_as_a_file(data: Path, file: Path, episodes: int) -> None:
    """The episodes that evaluate draws of a folder, as lines. Pictures of a class are known by their pixels."""
    pool = folder(data, 8)
    source = pool.source(ways=2, shots=1, query_shots=2)
    draw = source.draw(1234, "test", range(episodes))
    paths = [path for name in pool.class_names for path in sorted((data / "test" / name).glob("*.png"))]
    first = min(int(pool.starts[c]) for c in pool.splits["test"])
    lines = []
    for rows, labels in zip(draw.rows.tolist(), draw.labels.tolist(), strict=True):
        pairs = [[str(paths[row - first]), str(label)] for row, label in zip(rows, labels, strict=True)]
        # A class's number is its place in the support here, so that it has to come in the order of the labels.
        lines.append({"support": sorted(pairs[:2], key=lambda pair: pair[1]), "query": pairs[2:]})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_is_tested_on_the_file_as_on_drawn_episodes_without_its_data(in_tmp: Path, capsys: Any) -> None:
    data = write_folder(in_tmp / "data")
    words = options(
        IMAGES, dataset="folder:data", image_size=8, iterations=2, out="run", ways=2, shots=1, query_shots=2
    )
    assert meta_train.main(words) == 0
    assert evaluate.main(["run", "--episodes", "6", "--query-shots", "2", "--out", "drawn.json"]) == 0
    drawn_as_a_file(data, in_tmp / "episodes.jsonl", 6)
    (in_tmp / "data/train").rename(in_tmp / "away")  # the run's own data are not looked for
    assert evaluate.main(["run", "--episodes-file", "episodes.jsonl", "--out", "listed.json"]) == 0
    drawn, listed = (json.loads((in_tmp / name).read_text()) for name in ("drawn.json", "listed.json"))
    for mode in ("transductive", "inductive"):
        assert listed["test"][mode]["accuracy"] == pytest.approx(drawn["test"][mode]["accuracy"], abs=1e-6)
    assert listed["test"]["transductive"]["episodes"] == 6
    assert len(listed["episodes_sha256"]) == 64
    assert listed["dataset"] == f"episodes:{in_tmp / 'episodes.jsonl'}"
    capsys.readouterr()
    for flag, value in (("--shots", "1"), ("--dataset", "glyphs"), ("--episodes", "3"), ("--set", "val")):
        assert evaluate.main(["run", "--episodes-file", "episodes.jsonl", flag, value]) == 2
        one_line(capsys, f"metaft: error: {flag[2:]}: the episodes are those of ")
    (in_tmp / "episodes.jsonl").write_text("{}\n")
    assert evaluate.main(["run", "--episodes-file", "episodes.jsonl"]) == 2
    one_line(capsys, "episodes_file: ", "line 1: an episode is")


def test_omniglots_runs_become_such_a_file(tmp_path: Path, capsys: Any) -> None:
    for run in ("run01", "run02"):
        for part, name in (("training", "class"), ("test", "item")):
            (tmp_path / run / part).mkdir(parents=True)
            for number in (1, 2, 3):
                pixels = np.full((20, 20), 255, np.uint8)
                pixels[4 : 4 + 3 * number, 5:9] = 0
                Image.fromarray(pixels).convert("1").save(tmp_path / run / part / f"{name}{number:02d}.png")
        rows = [f"{run}/test/item{i:02d}.png {run}/training/class{j:02d}.png" for i, j in ((1, 2), (2, 3), (3, 1))]
        (tmp_path / run / "class_labels.txt").write_text("\n".join(rows) + "\n")
    assert run_example("omniglot_runs", str(tmp_path)) == 0
    file = tmp_path / "runs.jsonl"
    file.write_text(capsys.readouterr().out)
    listed = listed_episodes(file, ImageInputs(1, 28, 28, polarity="bright-on-black"))
    assert (len(listed), listed.ways, listed.shots, listed.query_shots) == (2, 3, 1, 1)
    assert listed.episodes(0, "test", [0]).query_y.tolist() == [[1, 2, 0]]
    (tmp_path / "run02/class_labels.txt").write_text("one\n")
    assert run_example("omniglot_runs", str(tmp_path)) == 2
    assert "line 1: 'one' is not two paths" in capsys.readouterr().err
    assert run_example("omniglot_runs", str(tmp_path / "run01/test")) == 2
