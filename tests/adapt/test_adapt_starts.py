"""From which run fine-tuning starts, and what its two starts share."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from adapting import Seen, Text, learned, put, result_of
from helpers import (
    ADAPT,
    one_line,
    same,
    timeless,
    words,
)

import metaft
from metaft import adapt, models
from metaft.config import AdaptConfig, read_toml
from metaft.errors import MetaftError
from metaft.inputs import ImageInputs
from metaft.runs.folder import read_rows
from metaft.starts.run import newest_run


def test_the_newest_run_that_fits_is_taken(in_tmp: Path, runs: dict[str, Path], data: Path, capsys: Text) -> None:
    for name, age in (("fomaml", 300), ("protonet", 100), ("maml", 200), ("curve", 50)):
        put(runs[name], in_tmp / "runs" / name, age)
    put(runs["maml"], in_tmp / "runs/unfinished", 10)
    (in_tmp / "runs/unfinished/checkpoints/best.safetensors").unlink()
    put(runs["maml"], in_tmp / "runs/damaged", 10)
    (in_tmp / "runs/damaged/checkpoints/best.safetensors").write_bytes(b"nothing")
    (in_tmp / "runs/empty").mkdir()
    (in_tmp / "runs/note.txt").write_text("")
    argv = [word for word in words(runs["maml"], data, in_tmp / "o") if word not in ("--init", str(runs["maml"]))]
    assert adapt.main([*argv, "--epochs", "1"]) == 0
    assert "init: runs/protonet, the newest run that fits\n" in capsys.readouterr().err
    newest = str(in_tmp / "runs/protonet")  # in full, so that it can be opened from elsewhere
    assert result_of(in_tmp / "o")["init"] == read_toml(in_tmp / "o/config.toml")["init"] == newest
    put(runs["colour"], in_tmp / "runs/colour", 0)  # grey images can be made colour ones, not the other way round
    assert newest_run([1, 8, 8], any_size=True) == Path("runs/colour")
    assert newest_run([1, 8, 8], any_size=False) == Path("runs/protonet")
    assert newest_run([3, 50, 50], any_size=True) == Path("runs/colour")
    with pytest.raises(MetaftError, match=r"no run in runs/ takes images of shape \[3, 50, 50\]"):
        newest_run([3, 50, 50], any_size=False)


def test_adapt_runs_are_no_initialisations(in_tmp: Path, runs: dict[str, Path], data: Path, done: Path) -> None:
    put(runs["maml"], in_tmp / "runs/old", 10)
    shutil.copytree(done, in_tmp / "runs/adapted")
    assert newest_run([1, 8, 8], any_size=True) == Path("runs/old")


@pytest.mark.parametrize("init", ["auto", "named"])
def test_a_run_on_inputs_of_another_kind_is_refused_with_both_shapes(
    init: str, in_tmp: Path, runs: dict[str, Path], capsys: Text
) -> None:
    put(runs["curve"], in_tmp / "runs/curve", 0)
    assert adapt.main([] if init == "auto" else ["--init", "runs/curve"]) == 2
    one_line(capsys, "init: ", "runs/curve", "[1]", "[1, 28, 28]")
    assert os.listdir(in_tmp / "runs") == ["curve"]


def test_without_any_run_it_says_how_to_make_one(in_tmp: Path, capsys: Text) -> None:
    assert adapt.main([]) == 2
    one_line(capsys, "init: no run in runs/ ", "[1, 28, 28]", "python -m metaft.meta_train", "--init none")
    assert list(in_tmp.iterdir()) == []


def test_both_starts_share_all_but_the_backbones_parameters(
    runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen]
) -> None:
    assert adapt.main(words(runs["maml"], data, tmp_path / "o", seed=6, augment="basic", lr=1e-30, epochs=1)) == 0
    start, random = fits
    assert (start.recipe, start.seed) == (random.recipe, random.seed)
    for field in ("images", "labels", "val_images", "val_labels"):
        assert torch.equal(getattr(start, field), getattr(random, field)), field
    meta = learned(runs["maml"])
    assert same(start.body, {k: v for k, v in meta.items() if not k.startswith("head.")})
    fresh = models.build("conv4", ways=3, shape=(1, 8, 8), width=4, seed=6).params
    assert same(random.body, {k: v for k, v in fresh.items() if not k.startswith("head.")})
    assert not torch.equal(random.body["blocks.0.weight"], start.body["blocks.0.weight"])
    # At this rate nothing has moved but the zeros.
    assert torch.equal(start.fitted.head.weight, random.fitted.head.weight)
    assert same(dict(start.fitted.body.named_parameters()), start.body)
    assert start.fitted.head.weight.shape == meta["head.weight"].shape
    assert not torch.equal(start.fitted.head.weight, meta["head.weight"]), "the head is to be a fresh one"


def test_the_random_start_knows_nothing_of_the_run(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    results = []
    for init in ("maml", "fomaml"):
        assert adapt.main(words(runs[init], data, tmp_path / init)) == 0
        results.append(result_of(tmp_path / init))
    a, b = results
    assert timeless(a["scratch"]) == timeless(b["scratch"])
    rows = [read_rows(tmp_path / init / "metrics.jsonl") for init in ("maml", "fomaml")]
    random, first = ([[r for r in some if (r["start"] == "random") is want] for some in rows] for want in (True, False))
    assert random[0] == random[1]
    assert first[0] != first[1]


def test_from_none_there_is_a_random_start_alone(
    runs: dict[str, Path], data: Path, tmp_path: Path, fits: list[Seen], capsys: Text
) -> None:
    out = tmp_path / "o"
    config = AdaptConfig(**{**ADAPT, "init": "none", "data": f"folder:{data}", "out": str(out), "seed": 3})
    result = adapt.run(dataclasses.replace(config, epochs=1))
    assert (result["init"], result["scratch"], result["gain"], result["init_about"]) == ("none", None, None, {})
    assert len(fits) == 1
    fresh = models.build("conv4", ways=2, shape=(1, 28, 28), width=64, seed=3).params
    assert same(fits[0].body, {k: v for k, v in fresh.items() if not k.startswith("head.")})
    said = capsys.readouterr().out
    assert "random start" in said
    assert "meta-learned" not in said
    assert metaft.load(out).inputs == ImageInputs(1, 28, 28, polarity="bright-on-black")
    assert result["notes"] == ["images were fitted to what the start takes: resized from 8x8 to 28x28"]
