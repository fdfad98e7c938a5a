"""What is handed over in Python takes the place of settings, and none that says otherwise is dropped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import images, pool, write_folder
from torch import nn

from metaft import evaluate, look, meta_train
from metaft.config import EvaluateConfig
from metaft.errors import CheckpointError, MetaftError
from metaft.runs import checkpoint
from metaft.runs.assemble import assemble
from metaft.starts.run import from_run
from metaft.tasks import ClassPool, load


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


SAID = [
    ({"dataset": "omniglot"}, "dataset: squares-8 comes from Python (given 'omniglot' too)"),
    ({"split": "finn"}, "split: squares-8 from Python brings its own (given 'finn')"),
    ({"data_root": "/data"}, "data_root: squares-8 from Python brings its own (given '/data')"),
    ({"download": True}, "download: squares-8 from Python brings its own (given True)"),
    ({"image_size": 84}, "image_size: squares-8 from Python brings its own (given 84)"),
    ({"channels": 3}, "channels: squares-8 from Python brings its own (given 3)"),
    ({"skip_bad": True}, "skip_bad: squares-8 from Python brings its own (given True)"),
]


@pytest.mark.parametrize(
    ("given", "said"), SAID, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_settings_of_data_do_not_go_with_a_data_set(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(MetaftError) as caught:
        meta_train.run(images(tmp_path / "r", **given), dataset=pool())
    assert str(caught.value) == said
    with pytest.raises(MetaftError) as caught:
        meta_train.resume_run(tmp_path / "r", images(**given), dataset=pool())
    assert str(caught.value) == said
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("given", "said"), [pair for pair in SAID if not {"image_size", "channels"} & pair[0].keys()])
def test_nor_do_those_of_a_test(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(MetaftError) as caught:
        evaluate.run(tmp_path / "r", EvaluateConfig(**given), dataset=pool())
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"width": 99}, "width: a module from Python brings its own (given 99)"),
        ({"model": "mlp"}, "model: a module from Python brings its own (given 'mlp')"),
        ({"dropout": 0.5}, "dropout: a module from Python brings its own (given 0.5)"),
    ],
)
def test_settings_of_the_model_do_not_go_with_a_module(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(MetaftError) as caught:
        meta_train.run(images(tmp_path / "r", **{"model": None, **given}), dataset=pool(), module=net())
    assert str(caught.value) == said
    assert not (tmp_path / "r").exists()


def test_what_a_run_records_can_be_given_again(tmp_path: Path) -> None:
    """The settings of a run with a module name it "custom", and have a width that nothing reads."""
    settled = assemble(images(model=None), dataset=pool(), module=net()).config
    assert (settled.learner.model, settled.data.dataset) == ("custom", "squares-8")
    again = images(tmp_path / "r", model="custom", width=settled.learner.width, dataset="squares-8", report=False)
    assert meta_train.run(again, dataset=pool(), module=net())["iterations"] == 5


def test_init_is_of_a_module(tmp_path: Path) -> None:
    with pytest.raises(MetaftError, match=r"^init: is of a module from Python, and none is given \(given 'seed'\)"):
        meta_train.run(images(tmp_path / "r"), dataset=pool(), init="seed")


def test_a_source_is_no_data_set(tmp_path: Path) -> None:
    source: Any = pool().source(ways=3, shots=1, query_shots=1)
    with pytest.raises(MetaftError, match=r"^dataset: ClassEpisodes is none, it has no source\(ways="):
        meta_train.run(images(tmp_path / "r"), dataset=source)


def test_a_folder_from_python_may_be_named_too(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "d")
    data = load(f"folder:{path}", image_size=8)
    settled = assemble(images(dataset=f"folder:{path}"), dataset=data).config
    assert settled.data.dataset == f"folder:{path}"
    config = images(tmp_path / "r", dataset=f"folder:{path}", iterations=1, report=False)
    assert meta_train.run(config, dataset=data)["dataset"] == f"folder:{path}"


def test_data_turn_as_they_say_however_they_come() -> None:
    """The command rotates Omniglot's published split; a loop in Python over the same data has to as well."""
    data = pool()
    assert not assemble(images(), dataset=data).config.data.rotate
    fields = {name: getattr(data, name) for name in ("name", "images", "class_names", "starts", "counts", "splits")}
    turning = ClassPool(**fields, inputs=data.inputs, default_rotate=True)
    assert assemble(images(), dataset=turning).config.data.rotate
    assert not assemble(images(rotate=False), dataset=turning).config.data.rotate
    assert turning.to("cpu").default_rotate


class Own:
    """A data set of a user's own, with as much as a run needs; its inputs are of this type."""

    name, loss, shape, split_hash = "own", "cross_entropy", (1, 8, 8), "0"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def describe(self) -> dict[str, object]:
        return {}

    def to(self, device: str) -> Own:
        return self

    def source(self, **sizes: Any) -> Any:
        drawn = pool().source(**sizes)

        def episodes(*which: Any) -> Any:
            tasks = drawn.episodes(*which)
            return tasks._replace(support_x=tasks.support_x.to(self.dtype), query_x=tasks.query_x.to(self.dtype))

        of_run = {name: getattr(drawn, name) for name in ("name", "loss", "ways", "shots", "query_shots", "shape")}
        return SimpleNamespace(episodes=episodes, **of_run)


def test_inputs_of_another_type_than_the_model_computes_in_are_one_line(tmp_path: Path) -> None:
    own: Any = Own(torch.float64)
    said = r"^dataset: own gives inputs in torch\.float64, and conv4 computes in torch\.float32"
    with pytest.raises(MetaftError, match=said):
        meta_train.run(images(tmp_path / "r"), dataset=own)
    assert not (tmp_path / "r").exists()
    assert (
        assemble(images(model=None), dataset=own, module=net().double()).model.params["1.weight"].dtype == torch.float64
    )


def test_a_page_is_made_of_a_module_on_data_that_only_have_a_shape(tmp_path: Path) -> None:
    own: Any = Own(torch.float32)
    meta_train.run(images(tmp_path / "r", model=None, iterations=1), dataset=own, module=net())
    assert "195" in look.run(tmp_path / "r", module=net()).read_text(encoding="utf-8"), "its parameters"
    assert from_run(tmp_path / "r", net()).shape == [1, 8, 8]
    for file in (tmp_path / "r" / "checkpoints").glob("*.safetensors"):
        tensors, header = checkpoint.load(file)
        checkpoint.save(file, tensors, {k: v for k, v in header.items() if k != "shape"})
    with pytest.raises(CheckpointError, match=r"^init: .*r does not say what shape its inputs have$"):
        from_run(tmp_path / "r", net())
