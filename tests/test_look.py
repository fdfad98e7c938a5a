"""`metaft.look`: the numbers behind a page against closed forms, what pages hold, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    IMAGES,
    finished,
    in_float64,
    meta_trained,
    one_line,
    one_thread,
    options,
    settled,
    sinusoid,
    words,
    write_folder,
    write_target,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from metaft import adapt, algorithms, look, meta_train, models
from metaft.config import LookConfig
from metaft.defaults import hyper
from metaft.errors import MetaftError
from metaft.finetune import strategies
from metaft.finetune.phases import groups_of
from metaft.look import at_end as at_end
from metaft.models.architecture import build
from metaft.models.resnet12 import ResNet12
from metaft.starts.base import Start
from metaft.types import Episode
from metaft.views import VIEWS, moves
from metaft.views.base import Column, Missing, Of, Picture, Table, View
from metaft.views.calibration import surely
from metaft.views.checked import check
from metaft.views.distances import nearest, own_neighbours, principal
from metaft.views.episode import outputs_of
from metaft.views.layers import Layer, blocks_among, layers_of, without_fast_paths
from metaft.views.page import page, seen
from metaft.views.subject import Subject, open_subject
from metaft.views.template import FOLDER, rendered
from metaft.views.training import gap, meaning

Text = pytest.CaptureFixture[str]

ODD = ("<b>bold", "q\"uo'te & co", "😀 שלום")
"""Names of classes that a page must not take for its own words."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("look")
    return meta_trained(base / "trained", write_folder(base / "squares"))


@pytest.fixture(scope="module")
def adapted(trained: Path) -> Path:
    data = write_target(trained.parent / "target", {"train": 6, "test": 5}, classes=ODD, noise=240)
    return finished(words(trained, data, trained.parent / "adapted", epochs=2, strategy="lp-ft:share=0.5"))


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curve") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
        meta_train.run(sinusoid(out))
    return out


# ---- layers ---------------------------------------------------------------------------------------------------------


class Tower(nn.Module):
    """Layers of each kind, one that is used twice, one that is not used, and a parameter by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.idle = nn.Linear(5, 7)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.first(x) * self.scale).mean((2, 3))
        return self.head(self.mix(self.mix(x)))


def by_path(module: nn.Module, x: torch.Tensor) -> dict[str, Layer]:
    return {layer.path: layer for layer in layers_of(module, x)}


def test_layers_have_the_shapes_parameters_and_operations_of_their_formulas() -> None:
    module = Tower()
    layers = by_path(module, torch.zeros(1, 3, 9, 8))
    assert list(layers) == ["first", "grouped", "mix", "head", "", "idle"]
    assert layers["first"].shape == (6, 5, 4) and layers["head"].shape == (4,) and layers["idle"].shape is None
    assert layers["first"].flops == 2 * 6 * 5 * 4 * 3 * 3 * 3
    assert layers["grouped"].flops == 2 * 6 * 5 * 4 * 1 * 3 * 3
    assert layers["mix"].flops == 2 * (2 * 6 * 6), "it is used twice"
    assert (layers["head"].flops, layers[""].flops, layers["idle"].flops) == (2 * 6 * 4, 0, 0)
    counts = {path: layer.parameters for path, layer in layers.items()}
    assert counts == {"first": 6 * 27 + 6, "grouped": 54, "mix": 42, "head": 28, "": 6, "idle": 42}
    assert sum(counts.values()) == sum(p.numel() for p in module.parameters())
    assert layers["grouped"].kind == "Conv2d 3×3, depthwise"


@pytest.mark.parametrize("x", [torch.zeros(1, 5, 8), torch.zeros(1, 3, 32, 32)], ids=["attention", "resnet12"])
def test_all_layers_together_have_the_operations_that_torchs_own_counter_finds(x: torch.Tensor) -> None:
    attention = x.dim() == 3
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) if attention else ResNet12(4, (3, 32, 32), 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), without_fast_paths():
        module.eval()(x)
    assert sum(layer.flops for layer in layers_of(module, x)) == counter.get_total_flops() > 1000


def test_attention_is_counted_where_it_is_done_and_no_hook_or_mode_is_left() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    before = torch.backends.mha.get_fastpath_enabled()
    layers = by_path(layer, torch.zeros(1, 5, 8))
    projections, scores = 2 * 5 * 8 * 24, 2 * (2 * 5 * 5 * 8)
    assert layers["self_attn"].flops + layers.get("self_attn.out_proj", layers["self_attn"]).flops >= projections
    total = sum(each.flops for each in layers.values())
    assert total in (projections + 2 * 5 * 8 * 8 + extra + 2 * (2 * 5 * 8 * 16) for extra in (0, scores)), (
        "torch counts the scores where they are matrix products"
    )
    assert sum(each.parameters for each in layers.values()) == sum(p.numel() for p in layer.parameters())
    assert torch.backends.mha.get_fastpath_enabled() == before and layer.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules())


def test_blocks_hold_all_layers_and_the_head_is_one() -> None:
    module = nn.Sequential()
    module.add_module("body", nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)]))
    module.add_module("head", nn.Linear(4, 2))
    layers = layers_of(module, torch.zeros(1, 4))
    names = [[f"body.{i}.0.{part}" for part in ("weight", "bias")] for i in range(3)]
    blocks = blocks_among(names, "head", layers)
    assert [block.name for block in blocks] == ["body.0.0", "body.1.0", "body.2.0", "head"]
    assert [len(block.layers) for block in blocks] == [2, 2, 2, 1]
    assert [block.parameters for block in blocks] == [20, 20, 20, 10]
    assert blocks[-1].flops == 2 * 4 * 2


# ---- what moves -----------------------------------------------------------------------------------------------------

MEMBERS = {
    # member: (what becomes of the body, of the head)
    "maml": (moves.ADAPTED, moves.ADAPTED),
    "anil": (moves.LEARNED, moves.ADAPTED),
    "boil": (moves.ADAPTED, moves.LEARNED),
    "reptile": (moves.ADAPTED, moves.ADAPTED),
    "protonet": (moves.LEARNED, moves.MADE),
    "proto-maml": (moves.ADAPTED, moves.MADE),
}


def run_of(member: str) -> Subject:
    """A run of a member that has learned nothing yet."""
    shape = [1, 16, 16]
    steps = 0 if member == "protonet" else 3
    settings = settled(algorithm=member, ways=3, test_ways=3, width=4, test_inner_steps=steps)
    architecture = {"name": "conv4", "ways": 3, "shape": shape, "width": 4}
    module, head = build(architecture, 0)
    model = models.functional(module, head=head, architecture=architecture)
    meta, state = algorithms.build(member, model, hyper(settings, "cross_entropy")).init(0)
    about = {"dataset": "squares", "algorithm": member, "step": 1}
    start = Start("run", architecture, shape, None, settings, meta, state, None, about)
    return Subject("run", "meta_train", opened=start)


@pytest.mark.parametrize("member", MEMBERS)
def test_what_a_task_adapts_is_what_the_member_says(member: str) -> None:
    subject = run_of(member)
    layers = layers_of(subject.built.module, subject.built.x)
    states, said = moves.moves_of(subject, layers)
    body, head = MEMBERS[member]
    assert {states[layer.path] for layer in layers if "Conv" in layer.kind} == {body}
    assert states["head"] == head
    assert member in said


def test_frozen_parameters_of_a_run_are_named() -> None:
    subject = run_of("maml")
    meta = subject.start.meta or {}
    frozen = frozenset(name for name in meta if name.startswith("blocks.0."))
    assert frozen
    opened = dataclasses.replace(subject.start, frozen=frozen, settings=None)
    assert set(moves._learned(opened, layers_of(subject.built.module, subject.built.x)[:1]).values()) == {moves.FROZEN}


HALF = "from 50 % of the fit's steps on"


@pytest.mark.parametrize(
    ("strategy", "body", "last", "head"),
    [
        ("full", "trained", "trained", "trained"),
        ("head", "frozen", "frozen", "trained"),
        ("last:blocks=1", "frozen", "trained", "trained"),
        ("gradual:every=5", "frozen", f"trained, {HALF}", "trained"),
        ("lp-ft:share=0.5", f"trained, {HALF}", f"trained, {HALF}", "trained"),
    ],
)
def test_what_a_strategy_trains_is_what_its_rates_say(strategy: str, body: str, last: str, head: str) -> None:
    model = nn.ModuleDict({"body": nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]), "head": nn.Linear(4, 2)})
    rates = [strategies.named(strategy).rates(groups_of(model), step, 100, 10) for step in range(100)]

    def state(path: str) -> str:
        return moves._state([moves._factor(rate, path) for rate in rates], list(range(100)), 100)

    assert (state("body.0"), state("body.2"), state("head")) == (body, last, head)


# ---- sentences ------------------------------------------------------------------------------------------------------


def test_calibration_in_words_is_of_the_bins() -> None:
    bins = [{"confidence": 0.6, "accuracy": 0.5, "images": 10}, {"confidence": 0.95, "accuracy": 0.75, "images": 30}]
    said = surely(bins, 0.175)
    assert "86.2 % sure and 68.8 % right: it is surer than it is right" in said and "17.5 %" in said
    assert "less sure" in surely([{"confidence": 0.6, "accuracy": 0.9, "images": 3}], 0.3)
    assert "about as sure" in surely([{"confidence": 0.6, "accuracy": 0.61, "images": 3}], 0.01)


def rows_of(train: Sequence[float], val: Sequence[float]) -> tuple[list[Any], list[Any]]:
    val_rows = [{"step": 10 * (i + 1), "transductive": {"accuracy": v, "ci95": 0.01}} for i, v in enumerate(val)]
    return [{"step": i, "loss": 1.0, "accuracy": v} for i, v in enumerate(train)], val_rows


def test_training_beside_validation_is_put_into_words() -> None:
    train, val = rows_of([0.1] * 20 + [0.9] * 10, [0.6, 0.7, 0.5])
    said = meaning(train, val, "accuracy", 20)
    assert "at 90.0 %" in said and "best at step 20 with 70.0 %" in said and "clearly worse at the end (50.0 %)" in said
    assert "(the mean of its last 10 rows)" in said
    train, val = rows_of([0.9], [0.6, 0.7, 0.695])
    assert "no sign" in meaning(train, val, "accuracy", 20), "within the intervals"
    last = meaning(train, val[:2], "accuracy", 20)
    assert "(its last row)" in last and "no sign" not in last and "more steps may do better yet" in last
    assert "nothing to compare" in meaning(train, [], "accuracy", 20)
    curves = {"a": [{"epoch": 1.0, "loss": 0.5, "val_loss": 0.6}, {"epoch": 2.0, "loss": 0.1, "val_loss": 0.4}]}
    assert "about as well" in gap(curves, {"a": 1}, "epoch")
    assert "0.4, 4 times as much" in gap(curves, {"a": 2}, "epoch")
    worse = {"a": [{"epoch": 1.0, "loss": 0.5, "val_loss": 0.9}]}
    assert "0.9, 1.8 times as much: new images fare worse" in gap(worse, {"a": 1}, "epoch")
    assert "no images were set aside" in gap({"a": [{"epoch": 1.0, "loss": 0.5}]}, {"a": 1}, "epoch")


# ---- features -------------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_all_distances() -> None:
    rng = np.random.default_rng(0)
    queries, features = rng.normal(size=(4, 3)), rng.normal(size=(9, 3))
    rows, distances = nearest(queries, features, 2)
    for i, query in enumerate(queries):
        every = np.linalg.norm(features - query, axis=1)
        assert rows[i].tolist() == np.argsort(every)[:2].tolist()
        np.testing.assert_allclose(distances[i], np.sort(every)[:2])
    labels = np.array([0, 0, 1, 1])
    assert own_neighbours(np.array([[0.0], [1.0], [10.0], [11.0]]), labels) == 1.0
    assert own_neighbours(np.array([[0.0], [10.0], [1.0], [11.0]]), labels) == 0.0


def test_principal_directions_are_those_of_the_covariance() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 5)) * [1, 5, 2, 0.1, 3] + 7
    points, shares = principal(features)
    values, vectors = np.linalg.eigh(np.cov(features.T))
    np.testing.assert_allclose(points.var(0, ddof=1), values[::-1][:2])
    np.testing.assert_allclose(shares, values[::-1][:2] / values.sum())
    for k in range(2):
        along = (features - features.mean(0)) @ vectors[:, -1 - k]
        np.testing.assert_allclose(points[:, k] * np.sign(points[0, k]), along * np.sign(along[0]), atol=1e-9)
    np.testing.assert_allclose(principal(-features)[1], shares)
    assert principal(np.ones((4, 1)))[1].tolist() == [0, 0]


# ---- a task ---------------------------------------------------------------------------------------------------------


def test_outputs_after_each_step_are_those_of_gradient_descent() -> None:
    with in_float64():
        model = models.functional(nn.Sequential(nn.Linear(3, 2)).double())
        maml = algorithms.maml(model, inner_lr=0.5)
        meta, state = maml.init(0)
        x, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 1, 0])
        task = Episode(x[:2], y[:2], x, y, torch.arange(2), torch.tensor(0))
        with torch.no_grad():
            outputs = outputs_of(maml, meta, state, task, ways=2, steps=2, norm="transductive")
    weight, bias = (meta[name].numpy().copy() for name in ("0.weight", "0.bias"))
    for step in range(3):
        np.testing.assert_allclose(outputs[step].numpy(), x.numpy() @ weight.T + bias, atol=1e-12)
        logits = x[:2].numpy() @ weight.T + bias
        error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(2)[y[:2].numpy()]
        weight -= 0.5 * error.T @ x[:2].numpy() / 2
        bias -= 0.5 * error.mean(0)


# ---- pages ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Its elements, text and what is open at its end."""

    VOID = ("meta", "img", "br", "line", "path", "rect")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def titles(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


@pytest.mark.parametrize(
    ("fixture", "shown"),
    [
        (
            "trained",
            ["Loss and accuracy", "A task step by step", "Parameter updates", "Updates in a task", "Structure"],
        ),
        (
            "adapted",
            ["Loss and accuracy", "Calibration", "Confusion", "Mistakes", "Features", "Parameter updates", "Structure"],
        ),
        ("curve", ["Loss and accuracy", "A task step by step", "Parameter updates", "Updates in a task", "Structure"]),
        ("none", ["Structure"]),
    ],
)
@pytest.mark.slow
def test_a_page_holds_all_that_applies_and_needs_nothing_else(
    fixture: str, shown: list[str], request: pytest.FixtureRequest, in_tmp: Path, capsys: Text
) -> None:
    of = fixture if fixture == "none" else request.getfixturevalue(fixture)
    out = look.run(of, LookConfig(out="a.html"))
    html = out.read_text(encoding="utf-8")
    parsed = Page(html)
    assert parsed.open == []
    assert [name for name in titles(html) if name in {viewed.title for viewed in VIEWS.values()}] == shown
    left = {viewed.title for viewed in VIEWS.values()} - set(shown)
    assert left == set(re.findall(r"<li><b>(.*?)</b>: .+</li>", html))
    assert len(out.read_bytes()) < 3e6
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "object", "embed")
        if tag == "img":
            assert attributes["alt"] and str(attributes["src"]).startswith("data:image/")
        assert (
            not str(attributes.get("src") or "data:").startswith(("http", "//")) and attributes.get("href", "#") != ""
        )
    captions = re.findall(r"<figcaption><b>.*?</b>(.*?)</figcaption>", html)
    assert captions and all(re.match(r"n: .+ · mode: .+ · step: .+", caption) for caption in captions)
    assert look.run(of, LookConfig(out="b.html")).read_bytes() == out.read_bytes(), "the same run, the same bytes"
    assert "page:     b.html" in capsys.readouterr().out


def test_a_page_takes_the_place_of_no_other_file(trained: Path, capsys: Text) -> None:
    result = trained / "result.json"
    before = result.read_bytes()
    assert look.main([str(trained), "--out", str(result)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"metaft: error: out: {result} is there, and is no page; name another file, or remove it"
    assert result.read_bytes() == before


@pytest.mark.parametrize(("fixture", "key"), [("trained", "episode"), ("adapted", "mistakes")])
def test_data_that_moved_are_found_where_it_is_said_that_they_are(
    fixture: str, key: str, request: pytest.FixtureRequest, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaft.views.page.VIEWS", {key: VIEWS[key]})
    view = VIEWS[key].title
    original: Path = request.getfixturevalue(fixture)
    shutil.copytree(original, "run")
    config = Path("run/config.toml")
    config.write_text(config.read_text().replace(str(original.parent), "/gone"))
    assert view not in titles(look.run("run", LookConfig(out="without.html")).read_text(encoding="utf-8"))
    html = look.run("run", LookConfig(out="with.html", data_root=str(original.parent))).read_text(encoding="utf-8")
    assert view in titles(html)
    with pytest.raises(MetaftError, match=r"^data_root: none is a start, which has no data \(given x\)$"):
        look.run("none", LookConfig(data_root="x"))


def test_names_of_users_are_text_and_nothing_else(adapted: Path, in_tmp: Path) -> None:
    html = look.run(adapted, LookConfig(out="page.html")).read_text(encoding="utf-8")
    parsed = Page(html)
    text = "".join(parsed.text)
    for name in ODD:
        assert name in text
    assert "bold" not in [tag for tag, _ in parsed.tags] and "<b>bold" not in html
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    odd = {"shape": "</svg><script>", "alt": '"><script>'}
    assert "<script>" not in rendered("drawing.svg", boxes=[], width=1, height=1, row=1, middle=1, **odd)
    of = Of("1 <i>", "</figcaption>", "\x00\udc80‮")
    view = View("<u>", [Table("<t>", [Column("<c>"), Column("n")], [["<r>\x00", 1.5]])])
    bare = Subject("<s>", "start", opened=run_of("maml").start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.views.page.seen", lambda *_, **__: ([("k", "<h>", view)], [("<m>", str(of))]))
        text = "".join(Page(page(bare, slow=False)).text)
    for odd in ("<u>", "<t>", "<c>", "<r>\ufffd", "<s>", "<h>", "<m>", "1 <i>", "</figcaption>", "step: \ufffd\ufffd"):
        assert odd in text
    assert "‮" not in text and "\x00" not in text


def test_a_page_names_no_place_but_those_that_the_runs_files_name(adapted: Path, in_tmp: Path) -> None:
    html = look.run(adapted, LookConfig(out="page.html")).read_text(encoding="utf-8")
    known = (adapted / "result.json").read_text() + (adapted / "config.toml").read_text()
    for path in re.findall(r"(?<![\w:/.])/[\w.-]+/[\w./-]+", re.sub(r'"data:image[^"]*"', "", html)):
        assert path.rstrip(".") in known, path
    assert str(in_tmp) not in html and str(Path.cwd()) not in html


def test_the_pages_views_leave_what_takes_long_to_look(adapted: Path) -> None:
    views, missing = seen(open_subject(str(adapted)), slow=False)
    slow = {viewed.title for viewed in VIEWS.values() if viewed.slow}
    assert slow == {"A task step by step", "Mistakes", "Features", "Updates in a task", "Why an image got its label"}
    assert not slow & {title for _, title, _ in views}
    assert all("metaft.look" in why for title, why in missing if title in slow)


@pytest.mark.slow
def test_what_a_page_showed_that_the_new_one_lacks_is_kept(adapted: Path, in_tmp: Path, capsys: Text) -> None:
    look.run(adapted, LookConfig(out="page.html"))
    whole = Path("page.html").read_text(encoding="utf-8")
    look.run(adapted, LookConfig(out="page.html"))
    assert not Path("page-before.html").exists(), "it shows the same"
    shown = whole.replace('<section id="structure"', '<section id="landscape"></section><section id="structure"')
    Path("page.html").write_text(shown, encoding="utf-8")
    look.run(adapted, LookConfig(out="page.html"))
    assert Path("page.html").read_text(encoding="utf-8") == whole
    assert Path("page-before.html").read_text(encoding="utf-8") == shown
    assert "shows more, and is kept as page-before.html" in capsys.readouterr().err


def test_how_to_repeat_a_run_names_no_folder_and_its_command_has_its_settings(adapted: Path, trained: Path) -> None:
    html = page(open_subject(str(adapted)), slow=False)
    assert "python -m metaft.predict RUN IMAGE_OR_FOLDER" in html and "python -m metaft.look RUN" in html
    command = re.findall(r"python -m metaft.adapt --init [^<]*", html)[0]
    assert "--strategy lp-ft:share=0.5" in command and "--epochs 2" in command and "--out" not in command
    assert "python -m metaft.evaluate RUN" in page(open_subject(str(trained)), slow=False)


def test_mistakes_are_the_surest_wrong_ones_with_the_nearest_training_images(adapted: Path) -> None:
    subject = open_subject(str(adapted))
    view = VIEWS["mistakes"].of(subject)
    assert isinstance(view, View)
    (shown,) = view.parts
    probabilities = [mistake.probability for mistake in shown.mistakes]  # type: ignore[union-attr]
    assert probabilities == sorted(probabilities, reverse=True)
    result = json.loads((adapted / "result.json").read_text())
    wrong = sum(n for i, row in enumerate(result["confusion"]) for j, n in enumerate(row) if i != j)
    assert wrong > 0 and f"{wrong} of {result['test_images']} test images" in view.caption
    for mistake in shown.mistakes:  # type: ignore[union-attr]
        assert mistake.label != mistake.predicted
        distances = [near.distance for near in mistake.neighbours]
        assert distances == sorted(distances) and len(distances) == 3


@pytest.mark.parametrize("row", range(0, 18, 6))
def test_mistakes_whose_nearest_is_of_the_class_that_was_taken_are_counted(
    row: int, adapted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_near(queries: Any, features: Any, count: int) -> Any:
        return torch.full((len(queries), count), row), torch.zeros(len(queries), count)

    monkeypatch.setattr(importlib.import_module("metaft.views.mistakes"), "nearest", all_near)
    view = VIEWS["mistakes"].of(open_subject(str(adapted)))
    assert isinstance(view, View)
    (shown,) = view.parts
    mistakes: Any = shown.mistakes  # type: ignore[union-attr]
    taken = sum(mistake.predicted == mistakes[0].neighbours[0].label for mistake in mistakes)
    assert f"For {taken} of them the nearest is of the class that it was taken for" in view.caption


def test_without_its_images_views_of_them_say_so(adapted: Path, in_tmp: Path) -> None:
    copy = shutil.copytree(adapted, in_tmp / "copy")
    config = copy / "config.toml"
    config.write_text(re.sub(r'data = "folder:.*"', 'data = "folder:/none/such"', config.read_text()))
    subject = open_subject(str(copy))
    for key in ("mistakes", "features"):
        left = VIEWS[key].of(subject)
        assert isinstance(left, Missing) and "not at hand" in left.why and "/none" not in left.why


def test_runs_without_what_older_ones_lack_say_so(trained: Path, in_tmp: Path) -> None:
    run = shutil.copytree(trained, in_tmp / "copy")
    (run / "updates.jsonl").unlink()
    (run / "checkpoints/first.safetensors").unlink()
    subject = open_subject(str(run))
    left, inner = VIEWS["updates"].of(subject), VIEWS["inner-updates"].of(subject)
    assert isinstance(left, Missing) and "no updates.jsonl" in left.why
    assert isinstance(inner, View) and "was not kept" in inner.caption and len(inner.parts) == 2


# ---- what is refused ------------------------------------------------------------------------------------------------


def _unfinished(run: Path) -> None:
    (run / "result.json").unlink()


def _garbled(run: Path) -> None:
    (run / "result.json").write_text('{"command": "meta_tr')


def _foreign(run: Path) -> None:
    (run / "result.json").write_text('{"command": "benchmark", "score": 3}')


def _list(run: Path) -> None:
    (run / "result.json").write_text("[1, 2]")


def _lacking(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    key = "test" if result["command"] == "meta_train" else "starts"
    del result[key]
    (run / "result.json").write_text(json.dumps(result))


def _of_another_type(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    result["seed"] = "zero"
    (run / "result.json").write_text(json.dumps(result))


def _rows(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"loss": }\n{}\n')


def _updates(run: Path) -> None:
    (run / "updates.jsonl").write_text('{"step": 1, "start": "x", "layers": {"a": {"weights": "much"}}}\n')


def _weights(run: Path) -> None:
    for file in [*run.glob("*.safetensors"), *run.glob("checkpoints/best*")]:
        file.write_bytes(file.read_bytes()[:-9])


def _settings(run: Path) -> None:
    (run / "config.toml").write_text("lr = 3\nname = 'theirs'\n")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all that a result holds, containers too; of a list the first and the last."""
    yield path
    some = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in some:
        if not isinstance(value, list) or key in (0, len(value) - 1):
            yield from leaves(each, (*path, key))


@pytest.mark.parametrize("kind", ["trained", "adapted"])
def test_whatever_is_wrong_in_a_result_is_said_or_does_not_matter(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Path = request.getfixturevalue(kind)
    file = run / "result.json"
    original, refused = json.loads(file.read_text()), 0
    for view, figures in {
        "training": ("curves_apart", "learning_apart", "steps_figure"), "calibration": ("calibration_figure",),
        "confusion": ("confusion_figure",),
    }.items():  # fmt: skip
        module = importlib.import_module(f"metaft.views.{view}")
        for name in figures:
            monkeypatch.setattr(module, name, lambda *_, **__: (None, None))
        monkeypatch.setattr(module, "chart", lambda title, figure, alt, of: Picture(title, "", alt, 1, of))
    only = {key: VIEWS[key] for key in ("training", "calibration", "confusion")}
    monkeypatch.setattr("metaft.views.page.VIEWS", only)
    skip = {"environment", "about", "draws", "suspects", "episodes_sha256"}
    for path in [way for way in leaves(original) if way and not skip.intersection(way)]:
        for by in ("x", None, {}, leaves):
            result = json.loads(json.dumps(original))
            holder = result
            for key in path[:-1]:
                holder = holder[key]
            if by is leaves:
                del holder[path[-1]]
            else:
                holder[path[-1]] = by
            try:
                check(result, "result.json")
            except MetaftError:
                refused += 1
                continue
            subject = dataclasses.replace(open_subject(str(run)), result=result)
            try:
                page(subject, slow=False)
            except MetaftError:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{path} = {by}") from error
    assert refused > 100


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (_unfinished, "not finished"), (_garbled, "not JSON"), (_foreign, "'benchmark'"), (_list, "no table"),
    (_lacking, "lacks"), (_of_another_type, "seed = 'zero'"), (_rows, "metrics.jsonl"), (_weights, "damaged"),
    (_settings, "unknown field"), (_updates, "updates.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("kind", ["trained", "adapted"])
def test_what_is_no_finished_run_is_one_line_and_status_2(
    kind: str, damage: Callable[[Path], None], said: str, request: pytest.FixtureRequest, in_tmp: Path, capsys: Text
) -> None:
    run = in_tmp / "run"
    shutil.copytree(request.getfixturevalue(kind), run)
    damage(run)
    before = sorted(in_tmp.rglob("*"))
    capsys.readouterr()
    assert look.main([str(run)]) == 2
    one_line(capsys, "run", said)
    assert sorted(in_tmp.rglob("*")) == before


# ---- at the end of a run --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_write_their_page_at_their_end(trained: Path, in_tmp: Path, capsys: Text) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.look.at_end", at_end)
        patch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
        patch.setattr("metaft.finetune.report.draw_pictures", lambda *_: [])
        squares = trained.parent / "squares"
        settings = {**IMAGES, "engine": "vmap", "dataset": f"folder:{squares}", "image_size": 8, "iterations": 2}
        assert meta_train.main([*options(settings, out="one")]) == 0
        assert meta_train.main([*options(settings, out="two"), "--no-report"]) == 0
        data = f"folder:{squares / 'test'}"
        line = [
            "--no-probe",
            *options({"init": "one", "data": data, "epochs": 1, "batch_size": 7, "shots_per_class": 3}),
        ]
        assert adapt.main([*line, "--out", "three"]) == 0
        assert adapt.main([*line, "--out", "four", "--no-report"]) == 0
    made = sorted(path.parent.name for path in in_tmp.rglob("report.html"))
    assert made == ["one", "three"]
    assert (
        "report = false" in Path("two/config.toml").read_text() and "report" not in Path("one/config.toml").read_text()
    )
    assert capsys.readouterr().out.count("page:     ") == 2
    assert look.main(["one"]) == 0, "which adds what takes longer"
    assert "A task step by step" in titles(Path("one/report.html").read_text())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("odd"), MemoryError()])
def test_a_page_that_cannot_be_made_takes_nothing_away(
    error: Exception, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("metaft.views.page.page", fails)
    assert at_end(trained) is None
    said = capsys.readouterr()
    assert said.err.startswith("metaft: note: no page could be made (") and said.err.count("\n") == 1
    assert not (trained / "report.html").exists()
    (copy := trained.parent / "unfinished").mkdir(exist_ok=True)
    assert at_end(copy) is None


# ---- what is seen ---------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative, of WCAG 2.1."""
    colour = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return math.fsum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_all_text_has_the_contrast_that_wcag_asks_for_in_light_and_dark_and_print() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5
    css = (FOLDER / "page.css").read_text()
    roots = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    schemes = [dict(re.findall(r"--([a-z]+): (#[0-9a-f]{3,6})", root)) for root in roots]
    assert len(schemes) == 3
    for scheme, (ink, ground) in itertools.product(
        schemes,
        itertools.product(
            ("text", "muted", "link", "learned", "adapted", "made", "frozen", "trained", "wrong"), ("ground", "card")
        ),
    ):
        assert contrast(scheme[ink], scheme[ground]) >= 4.5, (ink, ground, scheme)
