"""`--soup N`: the rule, the average, and a run that goes on from every phase."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import adapted, write_target
from test_finetune import CLASSES, INPUTS, bits, body, same, toy
from torch import Tensor, nn

from metaft import adapt, load
from metaft.config import AdaptConfig
from metaft.errors import MetaftError
from metaft.finetune.fit import fit
from metaft.finetune.journal import Journal
from metaft.finetune.recipes import fits_alike
from metaft.finetune.soup import average, greedy, order_of, summary
from metaft.finetune.training import head_seed
from metaft.models import Conv4, initialise
from metaft.runs.folder import RunFolder, read_rows
from metaft.settings.finetuning import Recipe


def test_an_average_is_the_mean_and_what_is_alike_stays_to_the_bit() -> None:
    rng = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 4, generator=rng) for _ in range(3)]
    third = torch.tensor([0.1])
    fits = [{"head/w": value, "body/stays": third, "body/count": torch.tensor(7)} for value in values]
    mean = average(fits)
    torch.testing.assert_close(mean["head/w"], sum(values[1:], values[0]) / 3, rtol=0, atol=1e-6)
    assert mean["body/stays"] is third
    assert mean["body/count"] == 7


@pytest.mark.parametrize("seed", range(8))
def test_the_soup_is_the_papers_recipe_and_never_worse_than_its_best_fit(seed: int) -> None:
    """Against the recipe written down once more, with a judge that is any function of what is averaged."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(5, 2))
    fits = [{"w": torch.from_numpy(point)} for point in points]
    aim = rng.normal(size=2)

    def judge(values: Any) -> float:
        return -round(float(np.abs(np.asarray(values["w"]) - aim).sum()), 1)  # rounded, so that some are equal

    accuracies = [judge(fit) for fit in fits]
    soup = greedy(fits, accuracies, judge)
    ingredients: list[int] = []
    best = -np.inf
    for i in sorted(range(5), key=lambda i: accuracies[i], reverse=True):
        if (now := judge({"w": points[[*ingredients, i]].mean(0)})) >= best:
            ingredients, best = [*ingredients, i], now
    assert (list(soup.taken), soup.accuracy) == (ingredients, best)
    np.testing.assert_allclose(soup.values["w"], points[ingredients].mean(0))
    assert soup.accuracy >= max(accuracies)


def test_fits_of_other_orders_begin_alike_and_part() -> None:
    images, labels = toy(21)
    recipe = Recipe(epochs=1, batch_size=8, lr=0.01, augment="basic")

    def fitted(order: int | None, **changes: Any) -> dict[str, Tensor]:
        made = Recipe(**{"epochs": 1, "batch_size": 8, "lr": 0.01, "augment": "basic", **changes})
        return bits(fit(body(), INPUTS, images, labels, CLASSES, made, seed=3, order=order))

    assert recipe.soup is None
    assert same(fitted(order_of(3, 0)), fitted(None)), "the first is the fit that there is without a soup"
    assert not same(fitted(order_of(3, 1)), fitted(None))
    still = {"lr": 1e-30, "augment": "none", "batch_size": 32}
    for name, value in fitted(order_of(3, 1), **still).items():  # all begin with the same head
        torch.testing.assert_close(value, fitted(None, **still)[name], rtol=0, atol=1e-5, msg=name)
    orders = [order_of(seed, number) for seed in range(5) for number in range(5)]
    assert len({*orders}) == 25
    assert not {*orders} & {head_seed(seed) for seed in range(5)}


def test_a_summary_is_paired_by_draw() -> None:
    fits = [
        {
            "accuracy": soup,
            "soup": {"fits": [{"accuracy": a}, {"accuracy": b}], "taken": [1, 0], "val_accuracy": 1.0},
        }
        for soup, a, b in ((0.9, 0.6, 0.8), (0.7, 0.5, 0.7), (0.8, 0.8, 0.6))
    ]
    said = summary(fits)
    assert said["best_single"]["accuracy"] == pytest.approx(0.7)
    assert said["best_single"]["gain"] == pytest.approx(0.1)
    assert said["best_single"]["gain_ci95"] == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert said["mean_of_singles"]["accuracy"] == pytest.approx(2 / 3)


# ---- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("data") / "d", {"train": 10, "test": 4})


def module() -> nn.Module:
    return initialise(Conv4(3, (1, 8, 8), 4, "stride"), 1)


def run(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    settings = {"epochs": 2, "lr": 0.05, "batch_size": 8, "soup": 3, "probe": False, "report": False, **changes}
    config = AdaptConfig(init="none", data=f"folder:{data}", image_size=8, device="cpu", out=str(out), **settings)
    return adapt.run(config, module=module(), init="keep")


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.finetune.report.draw_pictures", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(data, out)
    return out


def test_a_run_keeps_the_soup_beside_its_fits(data: Path, whole: Path, tmp_path: Path) -> None:
    result = json.loads((whole / "result.json").read_text())
    first, *others = result["starts"]
    soup = first["soup"]
    assert [start["name"] for start in others] == ["random"]
    assert "soup" not in others[0]
    assert len(soup["fits"]) == 3
    assert soup["val_accuracy"] >= max(row["val_accuracy"] for row in soup["fits"])
    assert result["val_images"] == 6
    report = (whole / "report.txt").read_text()
    assert f"soup: {len(soup['taken'])} of 3 fits averaged" in report
    # The first fit is the run without a soup, on the same parts.
    alone = run(data, tmp_path / "alone", soup=None)
    assert alone["starts"][0]["accuracy"] == soup["fits"][0]["accuracy"]
    assert alone["starts"][1]["accuracy"] == others[0]["accuracy"]
    rows = read_rows(RunFolder(whole).metrics)
    tags = {row["start"] for row in rows}
    assert tags == {"own values", *(f"own values, fit {n}" for n in (1, 2, 3)), "random"}
    assert not list((whole / "checkpoints").glob("single-*"))
    classifier = load(whole, module=module())
    pictures = sorted((data / "test").rglob("*.png"))
    right = [label == file.parent.name for label, file in zip(classifier.label(pictures), pictures, strict=True)]
    assert np.mean(right) == pytest.approx(first["accuracy"])


@pytest.mark.parametrize("stop", [1, 3, 4, 8, 9, 10])
def test_a_run_goes_on_from_every_phase_of_a_soup(
    stop: int, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after so many checkpoints: within the first fit, after it, within the second, within the last, when all
    are done, and when the soup is made."""
    monkeypatch.setattr("metaft.finetune.journal.SAVE_EVERY", -1.0)
    real, calls = Journal._keep, itertools.count(1)

    def keep(self: Journal, number: int) -> None:
        real(self, number)
        if next(calls) == stop:
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_keep", keep)
        with pytest.raises(RuntimeError, match="stopped"):
            run(data, tmp_path / "r")
    adapt.resume_run(tmp_path / "r", module=module(), init="keep")
    assert adapted(tmp_path / "r") == adapted(whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": "chosen"}, r"^soup: it is of fits by one strategy"),
        ({"shots_per_class": 4}, r"^soup: validation images decide .* fewer than 10 images .*\(given 3\)$"),
        ({"soup": 1}, r"^soup must be at least 2, got 1$"),
        ({"batch_size": 24}, r"^soup: the 24 training images are one batch, .* 3 would be alike; .* of at most 22$"),
        ({"batch_size": 23, "extra": ("l2-sp",)}, r"^soup: the 24 training images are one batch.* of at most 22$"),
    ],
)
def test_what_makes_no_soup_is_said(changes: dict[str, Any], said: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(MetaftError, match=said):
        run(data, tmp_path / "r", **changes)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "recipe",
    [
        {"batch_size": 22},
        {"batch_size": 12, "accumulate": 2},
        {"augment": "basic"},
        {"dropout": 0.1},
        {"extra": ("mixup",)},
        {"extra": ("adversarial",)},
    ],
)
def test_one_batch_is_enough_where_something_is_left_to_chance(recipe: dict[str, Any]) -> None:
    assert not fits_alike(Recipe(**{"batch_size": 32, **recipe}), 24)


def test_fits_of_one_batch_are_alike() -> None:
    """But for rounding: a sum in another order."""
    images, labels = toy(21)
    recipe = Recipe(epochs=3, batch_size=21, lr=0.01)
    assert fits_alike(recipe, 21)
    first, second = (bits(fit(body(), INPUTS, images, labels, CLASSES, recipe, seed=3, order=o)) for o in (1, 2))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-4, msg=name)


def test_a_run_that_began_with_fits_alike_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("metaft.finetune.setup.fits_alike", lambda *_: False)
        run(data, tmp_path / "r", batch_size=32, epochs=1)
    adapt.resume_run(tmp_path / "r", module=module(), init="keep")


def test_random_starts_and_folds_make_none(data: Path, tmp_path: Path) -> None:
    config = AdaptConfig(init="none", data=f"folder:{data}", soup=2, out=str(tmp_path / "r"))
    with pytest.raises(MetaftError, match=r"^soup: fits of a random start"):
        adapt.run(config)
    with pytest.raises(MetaftError, match=r"^soup: without a test part there are folds"):
        run(data / "train", tmp_path / "r")
    assert not (tmp_path / "r").exists()
