"""`metaft.choose`: scores against their definitions, and a ranking that reads no test image."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import meta_trained, one_thread, write_folder, write_target
from PIL import Image
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from metaft import adapt, choose
from metaft.config import ChooseConfig
from metaft.finetune import ranking
from metaft.finetune.contenders import Images
from metaft.finetune.probe import ITERATIONS, STRENGTH
from metaft.finetune.transferability import folds_of, h_score, leep, logme, right_in_folds
from metaft.settings.data import TargetSettings
from metaft.starts.run import from_run
from metaft.targets import Target
from metaft.targets.draws import grouped_fold

Text = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def labelled(n: int = 30, width: int = 6, classes: int = 3, apart: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    return rng.normal(size=(n, width)) + apart * rng.normal(size=(classes, width))[labels], labels


# ---- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "width"), [(30, 6), (12, 20), (40, 1)])
def test_logme_is_the_largest_evidence(n: int, width: int) -> None:
    """Of the definition, a normal distribution of y with covariance FF'/alpha + I/beta, maximised by scipy."""
    from scipy.stats import multivariate_normal

    features, labels = labelled(n, width)
    total = 0.0
    for k in range(3):
        y = (labels == k).astype(float)

        def cost(logs: np.ndarray, y: np.ndarray = y) -> float:
            alpha, beta = np.exp(logs)
            covariance = features @ features.T / alpha + np.eye(n) / beta
            return -float(multivariate_normal(np.zeros(n), covariance).logpdf(y))

        total -= min(minimize(cost, start, method="Nelder-Mead").fun for start in ([0, 0], [3, 2], [-2, 3]))
    assert logme(features, labels) == pytest.approx(total / (3 * n), abs=1e-5)


def test_logme_of_features_that_say_all_and_nothing() -> None:
    labels = np.arange(30) % 3
    told = np.eye(3)[labels] + 0.01 * np.random.default_rng(1).normal(size=(30, 3))
    assert logme(told, labels) > 1 > logme(np.random.default_rng(2).normal(size=(30, 3)), labels)
    for odd in (np.eye(3)[labels], np.zeros((30, 4)), np.ones((30, 4)), np.eye(30)):
        assert math.isfinite(logme(odd, labels))


def test_h_score_is_its_definition() -> None:
    from sklearn.covariance import ledoit_wolf_shrinkage

    features, labels = labelled()
    x = features - features.mean(0)
    share = ledoit_wolf_shrinkage(x, assume_centered=True)
    plain = sum(np.outer(row, row) for row in x) / len(x)
    shrunk = (1 - share) * plain + share * np.trace(plain) / 6 * np.eye(6)
    between = sum(np.outer(m, m) for m in (x[labels == k].mean(0) for k in labels)) / len(x)
    assert h_score(features, labels) == pytest.approx((1 - share) * np.trace(np.linalg.inv(shrunk) @ between))
    far, near = labelled(apart=5.0), labelled(apart=0.1)
    assert h_score(*far) > h_score(*near)


def test_leep_is_its_definition() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(4), size=12)
    labels = np.arange(12) % 3
    total = 0.0
    for i in range(12):
        chance = 0.0
        for z in range(4):
            joint = sum(p[j, z] for j in range(12) if labels[j] == labels[i]) / 12
            chance += joint / (p[:, z].sum() / 12) * p[i, z]
        total += math.log(chance)
    assert leep(p, labels) == pytest.approx(total / 12)
    assert leep(np.eye(3)[labels], labels) == pytest.approx(0.0), "each source class is one of the target's"
    assert leep(np.full((12, 4), 0.25), labels) == pytest.approx(math.log(1 / 3)), "the source's say nothing"


def test_each_image_is_labelled_by_those_of_other_folds() -> None:
    features, labels = labelled(30, 6, apart=0.7)
    groups = np.arange(30)
    judged = right_in_folds(features, labels, groups, seed=3)
    assert judged is not None
    nearest, probed = np.zeros(30, bool), np.zeros(30, bool)
    for number in range(5):
        train, test = grouped_fold(labels, groups, 5, number, 3)
        fit = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS).fit(features[train], labels[train])
        probed[test] = fit.predict(features[test]) == labels[test]
        for i in test:
            cosines = [f @ features[i] / np.linalg.norm(f) for f in features[train]]
            nearest[i] = labels[train][int(np.argmax(cosines))] == labels[i]
    np.testing.assert_array_equal(judged[0], nearest)
    np.testing.assert_array_equal(judged[1], probed)
    assert 0.3 < probed.mean() < 1 and nearest.mean() < 1


def test_duplicates_stay_in_one_fold_and_few_images_make_few_folds() -> None:
    rng = np.random.default_rng(0)
    single, labels = rng.normal(size=(6, 40)), np.repeat([0, 1], 12)
    features, groups = np.repeat(single, 4, axis=0), np.repeat(np.arange(6) * 4, 4)
    assert folds_of(labels, groups) == 3
    judged = right_in_folds(features, labels, groups, seed=0)
    assert judged is not None and judged[0].mean() < 1, "a copy would give each of them away"
    assert folds_of(labels, np.arange(24)) == 5
    assert right_in_folds(features[::12], labels[::12], np.arange(2), seed=0) is None


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("choices ü")


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    return write_target(base / "target", {"train": 12, "test": 6}, noise=90)


@pytest.fixture(scope="module")
def init(base: Path) -> Path:
    return meta_trained(base / "run", write_folder(base / "squares"))


def asked(data: Path, *starts: object, **more: Any) -> ChooseConfig:
    return ChooseConfig(data=f"folder:{data}", starts=tuple(map(str, starts)), **more)


def test_what_it_writes_and_says(init: Path, data: Path, in_tmp: Path, capsys: Text) -> None:
    argv = ["--data", f"folder:{data}", "--starts", str(init), "none", "--shots-per-class", "6", "--seed", "2"]
    assert choose.main(argv) == 0
    (out,) = Path("runs").iterdir()
    assert sorted(os.listdir(out)) == ["choice.json", "ranking.png", "table.txt"]
    result = json.loads((out / "choice.json").read_text())
    assert [row["images"] for row in result["starts"]] == [18, 18] and result["recommended"] == result["starts"][0][
        "start"
    ]
    assert {row["start"] for row in result["starts"]} == {str(init), "none"}
    assert all(row["leep"] is None for row in result["starts"]), "neither has a head on classes of its own"
    said = capsys.readouterr().out
    assert (out / "table.txt").read_text().rstrip() in said
    words = said.splitlines()[-1].partition("python -m metaft.adapt ")[2]
    assert "--shots-per-class 6 --seed 2" in words
    import shlex

    assert adapt.main([*shlex.split(words), "--epochs", "1", "--no-probe", "--out", "next"]) == 0
    trained = json.loads(Path("next/result.json").read_text())
    assert (trained["train_images"] + trained["val_images"], trained["init"]) == (18, result["recommended"])


def test_the_command_that_goes_on_leaves_out_what_was_left_out(
    init: Path, base: Path, in_tmp: Path, capsys: Text
) -> None:
    broken = write_target(base / "broken", {"train": 4, "test": 2})
    next((broken / "train").rglob("*.png")).write_bytes(b"\x89PNG\r\n\x1a\n cut")
    argv = ["--data", f"folder:{broken}", "--starts", str(init), "--only", "--shots-per-class", "2"]
    assert choose.main(argv) == 2
    assert choose.main([*argv, "--skip-bad"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" --shots-per-class 2 --skip-bad")


def test_runs_at_hand_take_part_unless_only_some_are_asked_for(init: Path, data: Path, in_tmp: Path) -> None:
    import shutil

    shutil.copytree(init, "runs/mine")
    found = {row["start"] for row in choose.run(asked(data, "none", out="all"))["starts"]}
    assert found == {"none", str((in_tmp / "runs/mine").absolute())}
    assert [row["start"] for row in choose.run(asked(data, "none", only=True, out="o"))["starts"]] == ["none"]


def test_only_training_images_are_read(init: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[int] = set()

    class Watched:
        def __init__(self, whole: Tensor) -> None:
            self.whole, self.shape = whole, whole.shape

        def __len__(self) -> int:
            return len(self.whole)

        def __getitem__(self, rows: Tensor) -> Tensor:
            read.update(rows.tolist())
            return self.whole[rows]

    images, start = Images(TargetSettings(data=f"folder:{data}")), from_run(init)
    target = images.of(start)
    groups = target.groups  # of all of them, by their pixels
    monkeypatch.setattr(Images, "of", lambda *_: dataclasses.replace(target, examples=Watched(target.examples)))
    monkeypatch.setattr(Target, "groups", groups)
    ranking.measured(start, images.of(start), shots_per_class=11, seed=1)
    drawn = target.rows(shots_per_class=11, seed=1, validate=False)
    assert read == set(drawn.train.tolist()) and not read & set(drawn.test.tolist())


def test_a_source_head_gives_leep(data: Path) -> None:
    images, start = (
        Images(TargetSettings(data=f"folder:{data}")),
        ranking.at_hand(Images(TargetSettings(data=f"folder:{data}")), "starts", named=["none"], only=True)[0],
    )
    head = {"weight": torch.zeros(4, 64), "bias": torch.zeros(4)}
    begun = dataclasses.replace(start, source=head)
    row = ranking.measured(begun, images.of(begun), shots_per_class=None, seed=0)
    assert row["leep"] == pytest.approx(math.log(1 / 3), abs=1e-9)


def test_one_image_per_class_is_ranked_by_logme(init: Path, data: Path, in_tmp: Path, capsys: Text) -> None:
    result = choose.run(asked(data, init, "none", only=True, shots_per_class=1, out="o"))
    rows = result["starts"]
    assert [row["probe"] for row in rows] == [None, None] and rows[0]["logme"] >= rows[1]["logme"]
    assert "there are no folds" in capsys.readouterr().out
    assert Path("o/ranking.png").exists()


BAD = [
    (["--only"], ["only: goes with --starts"]),
    (["--starts", "/none/x"], ["starts: ", "/none/x"]),
    (["--starts", "efficientnet"], ["starts: ", "did you mean 'efficientnet-lite0'"]),
    (["--starts", "{odd}"], ["starts: ", "odd does not fit: ", "takes inputs"]),
    (["--starts", "{init}", "--data", "folder:{coloured}"], ["starts: ", "/run does not fit: 4 of the 4 images of "]),
    (["--data", "folder:{single}"], ["data: class 'a' has 1 image", "without a test part needs 2"]),
    (["--data", "folder:/none/x"], ["data: ", "/none/x"]),
    (["--out", "{data}"], ["out: ", "exists already"]),
    (["--shots-per-class", "99"], ["shots_per_class = 99"]),
    ([], ["starts: nothing at hand takes images of shape [1, 28, 28]"]),
]


@pytest.mark.parametrize(("argv", "parts"), BAD, ids=[" ".join(argv)[-30:] or "nothing" for argv, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(
    argv: list[str], parts: list[str], base: Path, data: Path, init: Path, in_tmp: Path, capsys: Text
) -> None:
    from helpers import sinusoid

    from metaft import meta_train

    odd = base / "odd"
    if "{odd}" in argv and not odd.exists():
        meta_train.run(dataclasses.replace(sinusoid(odd), iterations=3))
    capsys.readouterr()
    more = [] if "--starts" in argv or not argv else ["--starts", "none"] if "--only" not in argv else []
    single = base / "single"
    if not single.exists():
        write_target(single, {".": 1}, classes=("a", "b"))
    coloured = base / "coloured"
    if not coloured.exists():
        write_target(coloured, {".": 2}, classes=("a", "b"))
        for file in coloured.rglob("*.png"):
            Image.new("RGB", (8, 8), "red").save(file)
    given = [word.format(data=data, odd=odd, single=single, init=init, coloured=coloured) for word in argv]
    assert choose.main(["--data", f"folder:{data}", *more, *given]) == 2
    err = capsys.readouterr().err.splitlines()
    line = err[-1]
    assert line.startswith("metaft: error: ") and all(part in line for part in parts), err
    assert list(in_tmp.iterdir()) == []


def test_a_signal_leaves_nothing(data: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return [{}]

    monkeypatch.setattr(ranking, "ranked", stopped)
    argv = ["--data", f"folder:{data}", "--starts", "none", "--out", "o"]
    assert choose.main(argv) == 128 + signal.SIGTERM
    assert "stopped; nothing was written" in capsys.readouterr().err and list(in_tmp.iterdir()) == []
