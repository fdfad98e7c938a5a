"""`metaft.look --landscape`: planes, surfaces and paths against closed forms, and snapshots that change nothing."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import finished, one_line, one_thread, remains, same, sinusoid, words, write_target
from torch import Tensor, nn

from metaft import look, meta_train
from metaft.config import LookConfig
from metaft.engines import engine
from metaft.finetune.fit import fit
from metaft.finetune.journal import read
from metaft.finetune.retraced import Retraced, retraced
from metaft.finetune.setup import prepared
from metaft.inputs import ImageInputs
from metaft.plots.landscape import landscape_figure
from metaft.runs import checkpoint, trail
from metaft.runs.folder import RunFolder
from metaft.runs.trail import Trail, files_of, kept, read_trail
from metaft.settings.finetuning import Recipe
from metaft.testing import score_episodes
from metaft.types import Params
from metaft.views import VIEWS
from metaft.views.base import Missing, Picture, Table, View
from metaft.views.landscape import INNER, TASKS, _inner_scene, _joint, _meta_loss
from metaft.views.planes import filter_normalised, principal_plane, span, surface
from metaft.views.subject import open_subject

Text = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# ---- planes ---------------------------------------------------------------------------------------------------------

VALUES = (3.0, 0.5)
"""Curvatures of the quadratic in the two directions that its descent moves in."""


def quadratic() -> tuple[Tensor, Tensor, Tensor]:
    """(matrix [40, 40], its minimum, where the descent begins), which is two eigenvectors of it from there."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    values = torch.cat([torch.tensor(VALUES, dtype=torch.float64), torch.linspace(0.1, 2, 38, dtype=torch.float64)])
    minimum = torch.randn(40, generator=generator, dtype=torch.float64)
    return basis * values @ basis.T, minimum, minimum + 2 * basis[:, 0] - 5 * basis[:, 1]


def named(vector: Tensor) -> Params:
    """As a layer's weight and bias."""
    return {"weight": vector[:36].view(4, 9), "bias": vector[36:]}


def flat(params: Params) -> Tensor:
    return torch.cat([params["weight"].flatten(), params["bias"]])


def test_path_and_contours_of_a_quadratic_are_exact() -> None:
    matrix, minimum, w = quadratic()
    path = [w]
    for _ in range(20):
        path.append(path[-1] - 0.2 * matrix @ (path[-1] - minimum))
    projected = principal_plane([named(w) for w in path], named(path[-1]))
    assert projected is not None and projected.residual < 1e-6 and sum(projected.shares) == pytest.approx(1)
    for w, (a, b) in zip(path, projected.points, strict=True):
        torch.testing.assert_close(flat(projected.plane.at(a, b)), w, rtol=0, atol=1e-9)
    for step, (a, b) in enumerate(projected.points):  # eigen-coordinates shrink by 1 - rate * value in each step
        away = [c * (1 - 0.2 * v) ** step - c * (1 - 0.2 * v) ** 20 for c, v in zip((2.0, -5.0), VALUES, strict=True)]
        assert np.hypot(a, b) == pytest.approx(math.hypot(*away), abs=1e-9)

    def loss(params: Params) -> float:
        away = flat(params) - minimum
        return float(away @ matrix @ away) / 2

    xs, ys = span(projected.points, 5)
    found = surface(loss, projected.plane, xs, ys, lambda: None)
    first, second, end = flat(projected.plane.first), flat(projected.plane.second), path[-1] - minimum
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            constant, linear = end @ matrix @ end / 2, end @ matrix @ (x * first + y * second)
            squares = [x * x * first @ matrix @ first, y * y * second @ matrix @ second]
            expected = constant + linear + sum(squares) / 2 + x * y * (first @ matrix @ second)
            assert found[i, j] == pytest.approx(float(expected), rel=1e-9)
    assert (xs[0], ys[0]) < tuple(projected.points.min(0)) and (xs[-1], ys[-1]) > tuple(projected.points.max(0))


def test_directions_are_those_of_a_singular_value_decomposition() -> None:
    points = np.random.default_rng(0).normal(size=(6, 40)) * np.linspace(0.1, 3, 40)
    rows = [named(torch.from_numpy(row)) for row in points]
    projected = principal_plane(rows, rows[-1])
    assert projected is not None
    u, s, vt = np.linalg.svd(points - points[-1], full_matrices=False)
    np.testing.assert_allclose(np.abs(projected.points), np.abs(u[:, :2] * s[:2]), atol=1e-9)
    np.testing.assert_allclose(projected.residual, (s[2:] ** 2).sum() / (s**2).sum(), rtol=1e-9)
    for direction, row in zip((projected.plane.first, projected.plane.second), vt, strict=False):
        np.testing.assert_allclose(np.abs(flat(direction).numpy()), np.abs(row), atol=1e-9)
    assert (projected.points[0] >= 0).all() and np.allclose(projected.points[-1], 0)
    line = [named(t * torch.ones(40)) for t in (1.0, 2.0, 4.0)]
    assert principal_plane(line, line[-1]) is None and principal_plane([line[0]] * 3, line[0]) is None


def test_a_random_plane_is_as_long_as_the_filters_and_leaves_what_is_none() -> None:
    origin = {
        "conv": torch.randn(5, 3, 2, 2),
        "bias": torch.randn(5),
        "zero": torch.zeros(2, 4),
        "other": torch.ones(3, 3),
    }
    plane = filter_normalised(origin, ["conv", "bias", "zero"])
    assert plane.first.keys() == plane.second.keys() == {"conv", "zero"}
    for direction in (plane.first, plane.second):
        torch.testing.assert_close(direction["conv"].flatten(1).norm(dim=1), origin["conv"].flatten(1).norm(dim=1))
        assert not direction["zero"].any()
    cosine = nn.functional.cosine_similarity(plane.first["conv"].flatten(), plane.second["conv"].flatten(), dim=0)
    assert abs(float(cosine)) < 0.6
    moved = plane.at(0.5, 0.0)
    assert moved["other"] is origin["other"] and not torch.equal(moved["conv"], origin["conv"])
    for names in (["conv", "bias", "zero"], ["zero", "conv"]):
        assert torch.equal(filter_normalised(origin, names).first["conv"], plane.first["conv"])
    one, other = (filter_normalised(origin, names) for names in (["conv", "other"], ["other", "conv"]))
    assert torch.equal(one.first["other"], other.first["other"]) and torch.equal(
        one.second["conv"], other.second["conv"]
    )


def test_a_loss_that_is_not_finite_is_left_white() -> None:
    origin = {"w": torch.zeros(1, 1)}
    plane = filter_normalised(origin, ["w"])._replace(first={"w": torch.ones(1, 1)}, second={"w": torch.zeros(1, 1)})
    xs, ys = np.linspace(-1, 1, 5), np.linspace(0, 1, 3)
    values = surface(lambda p: float(p["w"].log()), plane, xs, ys, lambda: None)
    assert np.isnan(values[:, :3]).all() and np.isfinite(values[:, 3:]).all()
    flat = landscape_figure(xs, ys, np.ones((3, 5)), ("a", "b"), {"$x": np.zeros((2, 2))})
    assert not flat.axes[0].collections, "a flat loss has no contours"


# ---- snapshots ------------------------------------------------------------------------------------------------------


def test_snapshots_are_evenly_spread_and_never_too_many() -> None:
    for every, most in ((1, 24), (10, 4), (7, 2)):
        for done in range(1000):
            steps = kept(done, every, most)
            assert len(steps) <= most and steps[0] == 0 and steps[-1] <= done
            assert done < steps.step * (len(steps)), "none is missing at the end"
            assert len(steps) > most // 2 or steps.step == every


def walked(folder: Path, steps: range, end: int | None = None, asked: int | None = 5) -> Trail:
    made = Trail(folder, "x", asked=asked)
    for step in steps:
        made.visit(step, {"w": torch.full((2,), float(step))})
    if end is not None:
        made.visit(end, {"w": torch.full((2,), float(end))}, last=True)
    return made


@pytest.mark.parametrize("length", [2, 4, 5, 9, 30, 31])
def test_a_trail_that_was_stopped_anywhere_ends_with_the_same_snapshots(length: int, tmp_path: Path) -> None:
    walked(tmp_path / "whole", range(length + 1), length)
    expected = {*kept(length, 1, 4), length}
    assert files_of(tmp_path / "whole", "x").keys() == expected and len(expected) <= 5
    for killed, checkpoint_of in ((length - 1, 0), (length, length // 2), (length, length)):
        folder = tmp_path / f"{killed}-{checkpoint_of}"
        walked(folder, range(killed + 1))
        walked(folder, range(checkpoint_of, length + 1), length)
        contents = {step: path.read_bytes() for step, path in files_of(folder, "x").items()}
        assert contents == {step: path.read_bytes() for step, path in files_of(tmp_path / "whole", "x").items()}
    for step, params in read_trail(tmp_path / "whole", "x"):
        assert params["w"].tolist() == [step, step]


def test_large_models_keep_fewer_or_none_and_a_full_disk_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    monkeypatch.setattr(trail, "BYTES", 8 * 4)
    walked(tmp_path / "few", range(9), 8, asked=25)
    assert files_of(tmp_path / "few", "x").keys() == {0, 4, 8}
    assert capsys.readouterr().err == "metaft: note: 4 snapshots fit into 0 MB, not 25\n"
    monkeypatch.setattr(trail, "SMALL", 8 * 25 - 1)
    walked(tmp_path / "auto", range(9), 8, asked=None)
    walked(tmp_path / "off", range(9), 8, asked=0)
    assert not (tmp_path / "auto").exists() and not (tmp_path / "off").exists()
    monkeypatch.setattr(trail, "BYTES", 8 * 2)
    walked(tmp_path / "large", range(9), 8, asked=5)
    assert not (tmp_path / "large").exists() and "0 snapshots fit" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    walked(tmp_path / "file", range(9), 8)
    assert re.fullmatch(r"metaft: note: no more snapshots for --landscape \(.*\)\n", capsys.readouterr().err)


def test_a_fit_that_goes_on_leaves_the_same_snapshots_and_is_the_same_with_and_without(tmp_path: Path) -> None:
    inputs = ImageInputs(1, 4, 4)
    examples = torch.randint(0, 255, (9, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    body = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    labels, states = torch.arange(9) % 3, []
    recipe = Recipe(epochs=7, lr=0.01, batch_size=4, strategy="lp-ft:share=0.5")
    plain = fit(body, inputs, examples, labels, 3, recipe, on_epoch=states.append)
    whole = fit(body, inputs, examples, labels, 3, recipe, trail=Trail(tmp_path / "a", "0", asked=5))
    assert all(map(torch.equal, plain.body.state_dict().values(), whole.body.state_dict().values()))
    steps = files_of(tmp_path / "a", "0")
    assert list(steps) == [0, 2, 4, 6, 7]
    for step, params in read_trail(tmp_path / "a", "0")[1:]:
        assert params.keys() == states[step - 1]["model"].keys(), "all of it moves at last"
        assert all(torch.equal(v, states[step - 1]["model"][k]) for k, v in params.items())
    fit(body, inputs, examples, labels, 3, recipe, trail=Trail(tmp_path / "b", "0", asked=5), resume=states[2])
    names = [step for step in steps if step > 2]
    assert [files_of(tmp_path / "b", "0")[s].read_bytes() for s in names] == [steps[s].read_bytes() for s in names]
    head = Recipe(epochs=3, lr=0.01, strategy="head")
    fit(body, inputs, examples, labels, 3, head, trail=Trail(tmp_path / "c", "0", asked=5))
    assert read_trail(tmp_path / "c", "0")[0].params.keys() == {"head.weight", "head.bias"}, "what stays is not kept"


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("landscape") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
        meta_train.run(sinusoid(out))
        meta_train.run(sinusoid(out.parent / "without", snapshots=0))
    return out


def test_a_run_is_the_same_bytes_with_and_without_snapshots(curve: Path) -> None:
    one, other = (remains(path) for path in (curve, curve.parent / "without"))
    assert (
        other.pop("config") == one.pop("config") + b""
        or b"snapshots = 0" in (curve.parent / "without/config.toml").read_bytes()
    )
    assert one == other
    assert not (curve.parent / "without/snapshots").exists()
    for step, params in read_trail(curve / "snapshots", "meta"):
        assert step % 2 == 0 and params.keys() == open_subject(str(curve)).start.meta.keys()  # type: ignore[union-attr]


# ---- what is drawn --------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("GRID", 2), ("IMAGES", 6)):
        monkeypatch.setattr(importlib.import_module("metaft.views.landscape"), name, value)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("adapted")
    data = write_target(base / "target", {"train": 6, "test": 3}, noise=240)
    return finished(words(Path("none"), data, base / "run", epochs=4, batch_size=64, compare="none"))  # type: ignore[arg-type]


def test_the_loss_of_a_fit_is_the_one_that_it_was_trained_with(adapted: Path) -> None:
    subject = open_subject(str(adapted))
    assert subject.folder is not None and subject.config is not None
    position, header = read(subject.folder)
    setup = prepared(subject.config, None, "seed", header)  # type: ignore[arg-type]
    fits = retraced(subject.folder, setup, position, subject.classifier, 4, most=64)
    assert [one.label for one in fits] == header["starts"] and all(len(one.waypoints) == 5 for one in fits)
    for one in fits:
        losses = [row["loss"] for row in subject.rows if row["start"] == one.label]
        # One batch is all images, so the loss of an epoch is that of the parameters before it.
        assert [one.loss(w.params) for w in one.waypoints[:-1]] == pytest.approx(losses, rel=1e-4)
    assert fits[0].images == 18


def test_the_loss_of_meta_training_is_that_of_its_validation(curve: Path) -> None:
    subject = open_subject(str(curve))
    (parts, best), tasks = subject.assembled, subject.tasks("val", TASKS)
    found = _meta_loss(parts, best, tasks)(best.meta)
    c = parts.config
    source = parts.dataset.source(ways=1, shots=5, query_shots=5)
    with engine("vmap") as mapped:
        scores = score_episodes(
            mapped,
            parts.algorithm,
            best.meta,
            best.state,
            source,
            split="val",
            seed=c.test.eval_seed,
            episodes=4,
            steps=2,
        )
    assert found == pytest.approx(float(scores[:, 0, -1].mean()), rel=1e-5)


def test_the_loss_below_inner_paths_is_that_of_the_weights_as_they_are(curve: Path) -> None:
    subject = open_subject(str(curve))
    (parts, best), tasks = subject.assembled, subject.tasks("test", TASKS)
    scene = _inner_scene(parts, best, tasks)
    assert not isinstance(scene, str) and scene.title == INNER
    without, after = (_meta_loss(parts, best, tasks, steps)({}) for steps in (0, None))
    assert scene.loss({}) == without != after


@pytest.mark.parametrize(
    ("fixture", "shown"),
    [
        (
            "curve",
            ["The path of meta-training", "A random plane through the end", "Inner paths from one initialisation"],
        ),
        (
            "adapted",
            [
                "The path of the random start",
                "A random plane through the end of the random start",
                "The path of the none start",
            ],
        ),
    ],
)
def test_a_page_has_the_landscape_where_it_is_asked_for(
    fixture: str, shown: list[str], small: None, request: pytest.FixtureRequest, in_tmp: Path, capsys: Text
) -> None:
    subject = open_subject(str(request.getfixturevalue(fixture)))
    left = VIEWS["landscape"].of(subject)
    assert isinstance(left, Missing) and "--landscape" in left.why
    subject.landscape = True
    view = VIEWS["landscape"].of(subject)
    assert isinstance(view, View)
    pictures = [part for part in view.parts if isinstance(part, Picture)]
    assert [picture.title for picture in pictures][:3] == shown
    (table,) = [part for part in view.parts if isinstance(part, Table)]
    for row in table.rows:
        if row[1] is not None:
            assert sum(row[2:5]) == pytest.approx(1), "along both directions and in neither is all there is"  # type: ignore[arg-type]
    if fixture == "adapted":
        assert pictures[-1].title == "random and none in one plane"
    assert "landscape" in capsys.readouterr().err, "there is a progress bar"


def test_a_run_without_snapshots_has_its_random_plane_and_says_how_to_get_a_path(curve: Path, small: None) -> None:
    subject = open_subject(str(curve.parent / "without"))
    subject.landscape = True
    view = VIEWS["landscape"].of(subject)
    assert isinstance(view, View) and "--snapshots 25" in view.caption
    assert "A random plane through the end" in [part.title for part in view.parts if isinstance(part, Picture)]


@pytest.mark.parametrize("left", ["1-*", "none"])
def test_a_start_that_left_no_snapshots_has_the_random_plane_of_its_classifier(
    left: str, adapted: Path, small: None, in_tmp: Path
) -> None:
    shutil.copytree(adapted, "run")
    for file in Path("run/snapshots").glob("*"):
        if not file.match(left):
            file.unlink()
    subject = open_subject("run")
    subject.landscape = True
    view = VIEWS["landscape"].of(subject)
    assert isinstance(view, View)
    titles = [part.title for part in view.parts if isinstance(part, Picture)]
    path = ["The path of the none start"] if left == "1-*" else []
    assert titles == ["A random plane through the end of the random start", *path]
    assert "There is no path of the random start: the run has no snapshots of its training" in view.caption


def test_the_end_of_a_start_without_snapshots_is_what_its_snapshots_ended_with(adapted: Path, in_tmp: Path) -> None:
    def first() -> Retraced:
        subject = open_subject("run")
        assert subject.folder is not None
        position, header = read(subject.folder)
        setup = prepared(subject.config, None, "seed", header)  # type: ignore[arg-type]
        return retraced(subject.folder, setup, position, subject.classifier, 4, most=64)[0]

    shutil.copytree(adapted, "run")
    with_them = first()
    shutil.rmtree("run/snapshots")
    without = first()
    assert without.waypoints == [] and without.end.step == with_them.end.step == 4
    assert same(without.end.params, with_them.end.params)
    assert without.loss(without.end.params) == with_them.loss(with_them.end.params)


def test_two_starts_of_other_values_that_stay_share_no_plane(adapted: Path) -> None:
    subject = open_subject(str(adapted))
    assert subject.folder is not None
    position, header = read(subject.folder)
    setup = prepared(subject.config, None, "seed", header)  # type: ignore[arg-type]
    one, other = retraced(subject.folder, setup, position, subject.classifier, 4, most=8)
    one, other = (fit._replace(still={"body.frozen": torch.ones(2)}) for fit in (one, other))
    assert _joint(one, other) is not None
    for still in ({"body.frozen": torch.zeros(2)}, {"body.other": torch.ones(2)}):
        assert _joint(one, other._replace(still=still)) is None


def test_a_damaged_snapshot_and_a_start_are_refused(curve: Path, in_tmp: Path, capsys: Text, small: None) -> None:
    assert look.main(["none", "--landscape", "--out", "page.html"]) == 2
    one_line(capsys, "landscape", "none")
    assert [*in_tmp.iterdir()] == []
    run = RunFolder(Path(shutil.copytree(curve, in_tmp / "run")))
    file = files_of(run.snapshots, "meta")[2]
    file.write_bytes(file.read_bytes()[:-3])
    html = look.run(run.path, LookConfig(landscape=True)).read_text()
    assert "Gradient descent</b>: " in html and "damaged" in html
    result = json.loads(run.result.read_text())
    assert result["command"] == "meta_train" and checkpoint.load(run.last)
