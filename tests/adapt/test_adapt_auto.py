"""`--auto MINUTES`: the start by its features, then strategy and rate by cross-validation, as long as there is time."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapting import put, result_of
from helpers import same
from torch import Tensor, nn

from metaft import adapt
from metaft.config import AdaptConfig, read_toml
from metaft.errors import MetaftError, NonFiniteError
from metaft.finetune import choose as choosing
from metaft.finetune import deciding, journal, ranking, report, study
from metaft.finetune.choose import Choice, candidates_of, choose
from metaft.finetune.contenders import Images
from metaft.finetune.deciding import time_to_choose
from metaft.finetune.examples import Part
from metaft.finetune.fit import Fitted, fit
from metaft.finetune.journal import Position
from metaft.finetune.setup import prepared
from metaft.inputs import ImageInputs
from metaft.runs import checkpoint
from metaft.settings.finetuning import Recipe
from metaft.starts import names
from metaft.targets import Target

Text = pytest.CaptureFixture[str]


@pytest.fixture
def at_hand(runs: dict[str, Path], in_tmp: Path) -> Path:
    """A folder with nothing in it but two runs that fit, under runs/."""
    put(runs["maml"], in_tmp / "runs/one", age=100)
    put(runs["protonet"], in_tmp / "runs/two", age=50)
    return in_tmp


def auto(data: Path, *more: str, minutes: float = 5, out: str = "out") -> list[str]:
    argv = ["--data", f"folder:{data}", "--auto", str(minutes), "--epochs", "2", "--batch-size", "7", "--no-probe"]
    return [*argv, *more, "--out", out]


@pytest.fixture(scope="module")
def whole(runs: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nothing stopped."""
    base = tmp_path_factory.mktemp("whole")
    put(runs["maml"], base / "runs/one", age=100)
    put(runs["protonet"], base / "runs/two", age=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_pictures", lambda *_: [])
        patch.chdir(base)
        assert adapt.main(auto(data)) == 0
    return base / "out"


@pytest.mark.slow
def test_it_chooses_the_start_and_how_it_trains(at_hand: Path, data: Path, capsys: Text) -> None:
    assert adapt.main(auto(data)) == 0
    result = result_of(at_hand / "out")
    ranked = result["ranked"]
    assert {Path(row["start"]).name for row in ranked} == {"one", "two"}
    assert [ranking.worth(row) for row in ranked] == sorted(map(ranking.worth, ranked), reverse=True)
    assert result["init"] == ranked[0]["start"] and result["auto"] == 5
    made = result["starts"][0]["chosen"]
    strategies = ["head", "head", "full", "full", "full", "lp-ft", "last:blocks=2"]
    assert [row["strategy"] for row in made["table"]] == strategies
    assert made["seconds"] > 0 and not any("late" in row for row in made["table"])
    text = (at_hand / "out/report.txt").read_text()
    assert f"start: {ranked[0]['shown']}, the best of 2 by a probe in 5 folds on the training images (" in text
    assert "the first that is within a standard error of the best (head at 0.003, 2 epochs: " in text
    assert read_toml(at_hand / "out/config.toml")["strategy"] == "chosen"
    assert not any("one start is chosen" in note for note in result["notes"])
    assert "features of " in capsys.readouterr().err


def test_a_start_that_is_named_is_not_chosen(at_hand: Path, data: Path, runs: dict[str, Path]) -> None:
    assert adapt.main(auto(data, "--init", str(runs["maml"]), "--lr", "0.01")) == 0
    result = result_of(at_hand / "out")
    assert result["ranked"] == [] and result["init"] == str(runs["maml"])
    tried = [(row["strategy"], row["lr"]) for row in result["starts"][0]["chosen"]["table"]]
    assert tried == [(strategy, 0.01) for strategy in ("head", "full", "lp-ft", "last:blocks=2")], "each once"


@pytest.mark.slow
def test_no_image_of_the_test_part_is_read_before_the_choice(
    at_hand: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[int] = set()
    allowed: set[int] = set()

    class Guarded:
        def __init__(self, whole: Tensor) -> None:
            self.whole = whole

        def __getattr__(self, name: str) -> Any:  # shape, and what a digest is made of
            return getattr(self.whole, name)

        def __len__(self) -> int:
            return len(self.whole)

        def __getitem__(self, rows: Tensor) -> Tensor:
            wanted = set(torch.as_tensor(rows).flatten().tolist())
            assert not allowed or wanted <= allowed, "an image that is not for training was read"
            read.update(wanted)
            return self.whole[rows]

    of, kept = Images.of, {}

    def guarded(self: Images, start: Any) -> Target:
        target = of(self, start)
        if not isinstance(target.examples, Guarded):
            _ = target.groups
            allowed.update(target.rows(shots_per_class=6, seed=1, validate=False).train.tolist())
            groups = target.groups
            target = dataclasses.replace(target, examples=Guarded(target.examples))
            object.__setattr__(target, "groups", groups)
        return kept.setdefault(start.name, target)

    def lifted(*args: Any, **more: Any) -> Fitted:
        assert read == allowed != set(), "all that trains has been looked at, and nothing else"
        allowed.clear()
        monkeypatch.setattr(study, "fit", fit)
        return fit(*args, **more)

    monkeypatch.setattr(Images, "of", guarded)
    monkeypatch.setattr(study, "fit", lifted)
    assert adapt.main(auto(data, "--shots-per-class", "6", "--seed", "1")) == 0
    assert not allowed, "the guard was lifted by the first fit after the choice"


def data_of() -> tuple[Part, Tensor]:
    labels = torch.arange(30) % 3
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (30, 1, 4, 4)).astype(np.uint8))
    return Part(images, torch.arange(30)), labels


def body() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8))


def chosen_of(candidates: list[Recipe], seconds: float | None, classes: int = 3, **more: Any) -> Choice:
    part, labels = data_of()
    labels = labels if classes else labels.double()
    return choose(
        body(), ImageInputs(1, 4, 4), part, labels, classes, candidates, groups=np.arange(30), seed=0, seconds=seconds,
        **more,
    )  # fmt: skip


def named(count: int) -> list[Recipe]:
    return [Recipe(strategy="full", lr=1e-3 * (i + 1), epochs=2) for i in range(count)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the choice takes for the time, in seconds."""
    now = [0.0]
    monkeypatch.setattr(choosing, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def with_figures(
    monkeypatch: pytest.MonkeyPatch, of: Callable[[float, int], float], passes: Callable[..., None]
) -> None:
    """Fits whose accuracy on validation images (and whose loss, of numbers) is given by rate and number of the fold."""
    folds: dict[float, int] = {}

    def fit(*args: Any, should_stop: Callable[[], None], **more: Any) -> Fitted:
        rate = args[5].lr
        fold = folds[rate] = folds.get(rate, -1) + 1
        passes(rate, should_stop)
        figure = of(rate, fold % 5)
        return Fitted(
            body(), nn.Linear(8, 3), [{"epoch": 1.0, "loss": 1.0, "val_loss": figure, "val_accuracy": figure}]
        )

    monkeypatch.setattr(choosing, "fit", fit)


def test_what_cannot_be_done_in_time_is_given_up_after_a_fold(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    began: list[float] = []

    def passes(rate: float, should_stop: Callable[[], None]) -> None:
        began.append(rate)
        clock[0] += {1: 1, 2: 10, 3: 1, 4: 2}[round(1e3 * rate)]

    with_figures(monkeypatch, lambda rate, fold: rate, passes)
    kinds = ("head", "full", "last:blocks=2", "full")
    candidates = [dataclasses.replace(recipe, strategy=kind) for recipe, kind in zip(named(4), kinds, strict=True)]
    made = chosen_of(candidates, 40)
    assert [row.get("late", False) for row in made.table] == [False, True, False, True]
    assert began == pytest.approx([1e-3] * 5 + [2e-3] + [3e-3] * 5), "full took 10 s, so it is not tried again"
    assert made.table[1]["loss"] is None and made.recipe.lr == pytest.approx(3e-3)
    assert report.candidate(made.table[1]) == "full at 0.002, 2 epochs: no time"
    clock[0], began[:] = 0.0, []
    longer = dataclasses.replace(candidates[0], lr=3e-3, epochs=20)
    assert chosen_of([candidates[0], longer], 40).table[1]["late"] and len(began) == 5, "5 s for 2 epochs, 50 for 20"
    assert "late" not in chosen_of([candidates[0], dataclasses.replace(longer, epochs=4)], 100).table[1]


def test_the_first_has_all_the_time_it_needs_and_another_is_stopped_within_a_fold(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    steps = [0]

    def passes(rate: float, should_stop: Callable[[], None]) -> None:
        for _ in range(4):
            clock[0] += 1
            should_stop()
            steps[0] += 1

    with_figures(monkeypatch, lambda rate, fold: rate, passes)
    kinds = [dataclasses.replace(r, strategy=s) for r, s in zip(named(3), ("head", "full", "lp-ft"), strict=True)]
    made = chosen_of(kinds, 3)
    assert [row.get("late", False) for row in made.table] == [False, True, True] and steps[0] == 20
    clock[0], steps[0] = 0.0, 0
    made = chosen_of(kinds[:2], 22)
    assert steps[0] == 22 and made.table[1]["late"], "the third step would have been beyond"


@pytest.mark.parametrize("classes", [3, 0])
def test_it_is_the_first_within_a_standard_error_of_the_best(monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """By hand from its definition, over tables of random figures by fold."""
    picked = set()
    for trial in range(12):
        means = np.array([[0.5], [0.55], [0.6], [0.58]])
        figures = np.random.default_rng(trial).normal(means if classes else 1 - means, 0.08, (4, 5))
        with_figures(monkeypatch, lambda rate, fold, f=figures: f[round(1e3 * rate) - 1, fold], lambda *_: None)
        made = chosen_of(named(4), 1e9, classes)
        worth = figures if classes else -figures
        best = int(worth.mean(1).argmax())
        for first in range(best + 1):
            less = worth[best] - worth[first]
            if less.mean() <= less.std(ddof=1) / math.sqrt(5):
                break
        assert made.recipe.lr == pytest.approx(1e-3 * (first + 1))
        assert chosen_of(named(4), None, classes).recipe.lr == pytest.approx(1e-3 * (best + 1)), "of chosen, the best"
        picked.add((first, best))
    assert any(first < best for first, best in picked) and any(first == best for first, best in picked)


def test_a_diverged_one_is_never_within_an_error_of_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    def passes(rate: float, should_stop: Callable[[], None]) -> None:
        if rate < 1.5e-3:
            raise NonFiniteError("epoch 1: nan")

    with_figures(monkeypatch, lambda rate, fold: 0.5, passes)
    assert chosen_of(named(3), 1e9).recipe.lr == pytest.approx(2e-3)


def test_further_candidates_move_published_weights_more() -> None:
    few, many = (candidates_of(Recipe(), published=True, images=40, many=wanted) for wanted in (False, True))
    assert many[: len(few)] == few
    assert [(r.strategy, r.lr, r.epochs, r.schedule, r.clip_norm) for r in many[len(few) :]] == [
        ("lp-ft:share=0.9,rise=0.05", 1e-4, 240, None, 1.0),
        ("lp-ft:rise=0.2", 1e-3, 24, "cosine", 1.0),
        ("last:blocks=2", 1e-3, 12, "cosine", 1.0),
        ("full", 1e-4, None, "cosine", 1.0),
    ]
    one = candidates_of(Recipe(epochs=3, schedule="linear"), published=True, images=40, many=True)
    assert all(r.epochs == 3 and r.schedule == "linear" for r in one[2:])
    assert len(one) == len(set(one)) == 7, "two that differ by their epochs alone are one"


def test_the_time_is_shared_by_the_choices_that_are_left(data: Path, runs: dict[str, Path]) -> None:
    config = AdaptConfig(init=str(runs["maml"]), data=f"folder:{data}", auto=2.0, seeds=3, epochs=1, probe=False)
    setup = prepared(config, None, "seed")
    assert time_to_choose(setup, Position()) == pytest.approx(40)
    ranked = setup._replace(ranked=({"seconds": 20.0}, {"seconds": 10.0}))
    assert time_to_choose(ranked, Position()) == pytest.approx(30)
    assert time_to_choose(ranked, Position(({"chosen": {"seconds": 80.0}}, {}))) == pytest.approx(5)
    assert time_to_choose(ranked, Position(({"chosen": {"seconds": 900.0}}, {}))) == 0
    plain = setup._replace(config=dataclasses.replace(setup.config, auto=None))
    assert time_to_choose(plain, Position()) is None


def test_half_of_the_time_is_for_starts(
    at_hand: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    now = [0.0]
    real = ranking.measured

    def slow(*args: Any, **more: Any) -> dict[str, Any]:
        now[0] += 40
        return {**real(*args, **more), "seconds": 40.0}

    monkeypatch.setattr(ranking, "time", types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: 1.0))
    monkeypatch.setattr(ranking, "measured", slow)
    monkeypatch.setattr(ranking, "_pace", lambda *_: 1.0)
    config = AdaptConfig(data=f"folder:{data}", auto=1.0, epochs=1)
    assert [Path(row["start"]).name for row in prepared(config, None, "seed").ranked] == ["two"], "the newest run"
    assert "no time to look at " in capsys.readouterr().err
    assert len(prepared(dataclasses.replace(config, auto=1.5), None, "seed").ranked) == 2


@pytest.mark.parametrize("after", [0, 3, 7, 8])
@pytest.mark.slow
def test_a_resume_ranks_nothing_again_and_knows_what_was_tried(
    after: int, at_hand: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the first candidate, after some of the seven, after all and after the choice."""
    real, tries, calls = journal.Journal.choice, [0], [0]

    def stopping(*args: Any) -> None:
        real(*args)
        tries[0] += 1
        if tries[0] == after:
            os.kill(os.getpid(), signal.SIGTERM)

    def first(*args: Any, **more: Any) -> list[Recipe]:
        if after == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return candidates_of(*args, **more)

    def counted(*args: Any, **more: Any) -> Fitted:
        calls[0] += 1
        return fit(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(deciding, "candidates_of", first)
        patch.setattr(journal.Journal, "choice", stopping)
        assert adapt.main(auto(data)) == 143
    monkeypatch.setattr("metaft.finetune.setup.ranked", lambda *_, **__: pytest.fail("ranked again"))
    monkeypatch.setattr(choosing, "fit", counted)
    assert adapt.main(["--resume", "out"]) == 0
    assert calls[0] == 5 * (7 - min(after, 7)), "five folds of each candidate that was not done"
    found, expected = result_of(at_hand / "out"), result_of(whole)
    assert found["ranked"][0]["start"] == found["init"]
    assert Path(found["init"]).name == Path(expected["init"]).name
    chosen, chosen_there = found["starts"][0]["chosen"], expected["starts"][0]["chosen"]
    assert {**chosen, "seconds": 0} == {**chosen_there, "seconds": 0}
    a, b = (checkpoint.load(path / "classifier.safetensors")[0] for path in (at_hand / "out", whole))
    assert same(a, b)


def test_what_was_spent_before_a_stop_counts(data: Path, runs: dict[str, Path]) -> None:
    config = AdaptConfig(init=str(runs["maml"]), data=f"folder:{data}", auto=2.0, epochs=1, probe=False)
    tried = Position(chosen={"tried": [], "seconds": 70.0})
    assert time_to_choose(prepared(config, None, "seed"), tried) == pytest.approx(50)


def test_where_all_diverge_the_fit_says_so(at_hand: Path, data: Path, runs: dict[str, Path], capsys: Text) -> None:
    """As with `--strategy chosen`; nothing is within an error of what has no figures."""
    wild = ["--init", str(runs["maml"]), "--lr", "1e30", "--optimizer", "sgd:weight_decay=0.1"]
    assert adapt.main(auto(data, *wild)) == 1
    assert "loss is" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_every_choice_is_in_the_report_and_the_kept_classifier_s_first(at_hand: Path, data: Path) -> None:
    assert adapt.main(auto(data / "train")) == 0
    result = result_of(at_hand / "out")
    whole, *folds = result["choices"]
    assert [made["fold"] for made in result["choices"]] == ["all", 0, 1, 2]
    assert result["starts"][0]["chosen"] == {k: v for k, v in whole.items() if k not in ("draw", "fold", "start")}
    text = (at_hand / "out/report.txt").read_text()
    said = "; ".join(
        f"{made['start']}, fold {made['fold'] + 1} of draw 1: {made['strategy']} at {made['lr']:g}, 2 epochs"
        for made in folds
    )
    assert f"chosen for others: {said}" in text
    told = "one start is chosen for all folds, on images that each of them may test"
    assert any(note.startswith(told) for note in result["notes"])


def test_minutes_that_draws_share_are_for_no_further_draws(at_hand: Path, data: Path, capsys: Text) -> None:
    assert adapt.main(auto(data, "--init", "runs/one")) == 0
    assert adapt.main(["--resume", "out", "--seeds", "2"]) == 2
    said = "seeds: the draws of a run share the minutes of --auto, and out was started with 1, given 2"
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_numbers_have_no_ranking(at_hand: Path, data: Path) -> None:
    table = at_hand / "labels.csv"
    files = sorted((data / "train").rglob("*.png"))
    table.write_text("path,label\n" + "".join(f"{file},{i}\n" for i, file in enumerate(files)))
    argv = ["--data", f"csv:{table}", "--loss", "mse", "--auto", "5", "--epochs", "2", "--no-probe", "--out", "out"]
    assert adapt.main(argv) == 0
    result = result_of(at_hand / "out")
    assert result["ranked"] == [] and Path(result["init"]).name == "two", "the newest"
    assert len(result["starts"][0]["chosen"]["table"]) == 7


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--strategy", "head"], "auto: the strategy is chosen, and head is given (--strategy or --freeze)"),
        (["--freeze", "backbone"], "auto: the strategy is chosen, and head is given (--strategy or --freeze)"),
        (["--method", "inner"], "auto: --method inner has no such setting (given 5.0)"),
        (["--data", "glyphs:Hebrew"], "auto: nothing at hand takes images of shape [1, 28, 28]"),
        (["--auto", "0"], "auto must be above 0, got 0.0"),
    ],
)
def test_what_contradicts_it_is_said(argv: list[str], said: str, data: Path, in_tmp: Path, capsys: Text) -> None:
    given = ["--data", f"folder:{data}", "--auto", "5", "--out", "out"]
    assert adapt.main([*given, *argv]) == 2
    assert said in capsys.readouterr().err and os.listdir(in_tmp) == []


def test_a_signal_while_starts_are_looked_at_leaves_nothing(
    at_hand: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    monkeypatch.setattr(ranking, "measured", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert adapt.main(auto(data)) == 143
    assert "stopped; nothing was written" in capsys.readouterr().err and os.listdir(at_hand) == ["runs"]


def test_a_run_that_nobody_named_stops_no_ranking(
    at_hand: Path, data: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    put(runs["maml"], at_hand / "runs/cut", age=10)
    best = at_hand / "runs/cut/checkpoints/best.safetensors"
    best.write_bytes(best.read_bytes()[:1000])
    real = ranking.features_of
    monkeypatch.setattr(ranking, "features_of", lambda b, x: real(b, x) * (math.nan if next(count) == 0 else 1))
    count = iter(range(9))
    config = AdaptConfig(data=f"folder:{data}", auto=1.0, epochs=1)
    assert [Path(row["start"]).name for row in prepared(config, None, "seed").ranked] == ["one"]
    said = capsys.readouterr().err
    assert "left out: runs/cut" in said and "runs/two are not finite" in said
    count = iter([0])
    images = Images(config.target)
    [start] = ranking.at_hand(images, "starts", named=["runs/two"], only=True)
    with pytest.raises(MetaftError, match="are not finite"):
        ranking.ranked([start, start], images, shots_per_class=None, seed=0, named=["runs/two"])


def test_packaged_weights_are_looked_at_before_runs(
    runs: dict[str, Path], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where time is short the likeliest start is known."""
    put(runs["colour"], in_tmp / "runs/colour", age=1)
    asked = []
    monkeypatch.setattr(names, "is_installed", lambda name: True)
    monkeypatch.setattr(ranking, "other", lambda name, *_: asked.append(name) or types.SimpleNamespace(name=name))
    monkeypatch.setattr(ranking, "_fitting", lambda start, *_: start)
    monkeypatch.setattr(ranking.dataclasses, "replace", lambda start, name: start)
    images: Any = types.SimpleNamespace(shape=([3, 8, 8], True))
    ranking.at_hand(images, "auto")
    assert asked == [*names.PACKAGED, str((in_tmp / "runs/colour").absolute())]
