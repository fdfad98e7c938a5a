"""`--log tensorboard`: rows, pictures and settings read back, runs that are the same without, and resumes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adapted, one_line, one_thread, options, remains, sinusoid, words, write_target
from PIL import Image

from metaft import adapt, meta_train
from metaft.errors import Interrupted
from metaft.finetune import study
from metaft.runs import training
from metaft.runs.events import FILE, Events, check, scalars_of
from metaft.runs.folder import RunFolder

Text = pytest.CaptureFixture[str]

needs_it = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard (the extra of that name)"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of those that take long to draw."""

    def drawn(run: RunFolder, *_: Any) -> list[Path]:
        run.plots.mkdir(exist_ok=True)
        Image.new("RGB", (5, 3), "red").save(run.plots / "curves.png")
        return [run.plots / "curves.png"]

    monkeypatch.setattr("metaft.runs.report.draw_pictures", drawn)
    monkeypatch.setattr("metaft.finetune.report.draw_pictures", drawn)


def events_in(run: Path) -> list[Any]:
    """What is in the event file, in order."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[reportAttributeAccessIssue]

    (file,) = (run / "tensorboard").iterdir()
    return [Event.FromString(raw) for raw in RawEventFileLoader(str(file)).Load()]


def scalars_in(run: Path) -> list[tuple[int, str, float]]:
    values = [(event.step, value) for event in events_in(run) for value in event.summary.value]
    return [
        (step, value.tag, value.simple_value) for step, value in values if value.WhichOneof("value") == "simple_value"
    ]


def expected_of(run: Path) -> list[tuple[int, str, float]]:
    """The numbers of metrics.jsonl, as 32 bits hold them."""
    rows = [scalars_of(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(step, tag, float(torch.tensor(value))) for step, numbers in rows for tag, value in numbers.items()]


@needs_it
def test_meta_training_is_the_same_and_its_events_are_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_it, without, part = (tmp_path / name for name in ("with", "without", "part"))
    meta_train.run(sinusoid(with_it, log="tensorboard"))
    meta_train.run(sinusoid(without))
    assert {**remains(with_it), "config": 0} == {**remains(without), "config": 0}
    assert not (without / "tensorboard").exists()
    found = scalars_in(with_it)
    assert found == expected_of(with_it) and {tag for _, tag, _ in found} >= {"train/loss", "val/transductive/mse"}
    events = events_in(with_it)
    assert events[0].file_version == "brain.Event:2"
    values = {value.tag: (event.step, value) for event in events[1:] for value in event.summary.value}
    assert b"    iterations = 7\n" in values["settings/text_summary"][1].tensor.string_val[0]
    step, picture = values["plots/curves"]
    assert step == 7 and (picture.image.width, picture.image.height, picture.image.colorspace) == (5, 3, 3)
    assert picture.image.encoded_image_string == (with_it / "plots/curves.png").read_bytes()

    real, left = training._Loop.advance, iter(range(5))

    def advance(self: Any) -> None:
        if next(left, None) is None:
            raise Interrupted("stopped", 15)
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(training._Loop, "advance", advance)
        with pytest.raises(Interrupted):
            meta_train.run(sinusoid(part, log="tensorboard"))
    assert 0 < len(scalars_in(part)) < len(found), "as it goes"
    meta_train.resume_run(part)
    assert scalars_in(part) == found, "none twice"
    assert remains(part) == remains(with_it)


@needs_it
def test_fine_tuning_is_the_same_and_its_events_are_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_target(tmp_path / "target", {"train": 4, "test": 2})
    line = words(Path("none"), data, tmp_path / "with", seeds=2, epochs=2)
    assert adapt.main(["--log", "tensorboard", *line]) == 0
    assert adapt.main([*line[:-1], str(tmp_path / "without")]) == 0
    found, expected = adapted(tmp_path / "with"), adapted(tmp_path / "without")
    assert {**found, "config": 0} == {**expected, "config": 0}
    scalars = scalars_in(tmp_path / "with")
    assert scalars == expected_of(tmp_path / "with") and {step for step, *_ in scalars} == {1, 2}
    assert any(", draw 1/loss" in tag for _, tag, _ in scalars)
    real, left = study.fit, iter(range(3))

    def stopped(*given: Any, **more: Any) -> Any:
        def check() -> None:
            if next(left, None) is None:
                raise Interrupted("stopped", 15)

        return real(*given, **{**more, "should_stop": check})

    with monkeypatch.context() as patch:
        patch.setattr(study, "fit", stopped)
        assert adapt.main(["--log", "tensorboard", *line[:-1], str(tmp_path / "part")]) != 0
    assert adapt.main(["--resume", str(tmp_path / "part")]) == 0
    assert scalars_in(tmp_path / "part") == scalars and adapted(tmp_path / "part") == found


def test_without_the_package_there_is_one_line_and_nothing_is_trained(
    in_tmp: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaft.runs.events.importlib.util.find_spec", lambda name: None)
    check(None)
    (in_tmp / "images").mkdir()
    for main, argv in (
        (meta_train.main, options({"dataset": "sinusoid", "out": "run", "log": "tensorboard"})),
        (adapt.main, options({"data": "folder:images", "out": "run", "log": "tensorboard"})),
    ):
        assert main(argv) == 2
        one_line(capsys, "log: tensorboard is not installed", "pip install 'metaft[tensorboard]'")
        assert not Path("run").exists()


@needs_it
def test_a_disk_that_is_full_costs_the_events_alone(
    tmp_path: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Events(tmp_path / "tensorboard", "")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(events._records, "write", full)
    for step in range(3):
        events.row({"kind": "train", "step": step, "loss": 1.0})
    events.close()
    assert capsys.readouterr().err == "metaft: note: no more is logged for TensorBoard (No space left on device)\n"
    assert (tmp_path / "tensorboard" / FILE).exists()
