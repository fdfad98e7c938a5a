"""`metaft.export`: the classifier as a file that runs without metaft, and only where it is the same one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TARGET, finished, inner_words, meta_trained, one_line, one_thread, words, write_folder, write_target
from PIL import Image
from torch import Tensor, nn

import metaft
from metaft import adapt, export, predict
from metaft.after import agreement, formats, int8
from metaft.after.exported import exported_file, open_exported
from metaft.after.script import script
from metaft.after.whole import Whole
from metaft.config import AdaptConfig, ExportConfig
from metaft.errors import MetaftError
from metaft.finetune.classifier import Classifier
from metaft.inputs import ImageInputs

Text = pytest.CaptureFixture[str]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what onnx and its converters import

needs_onnx = pytest.mark.skipif(
    not all(map(formats.is_there, formats.FORMATS["onnx"].needs)), reason="the extra export is not installed"
)
FORMATS = [pytest.param("onnx", marks=needs_onnx), "torch-export"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaft.after.measured.SECONDS", 0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports ü")


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    return write_target(base / "target", {"train": 9, "test": 6}, noise=90)


@pytest.fixture(scope="module")
def squares(base: Path) -> Path:
    return write_folder(base / "squares")


@pytest.fixture(scope="module")
def maml(base: Path, squares: Path) -> Path:
    return meta_trained(base / "maml", squares)


@pytest.fixture(scope="module")
def run(base: Path, maml: Path, data: Path) -> Path:
    """A finished adapt run that can tell its classes apart."""
    return finished(words(maml, data, base / "run", epochs=15, lr=0.05))


@pytest.fixture(scope="module")
def exported(base: Path, run: Path) -> Path:
    """Of that run, by torch.export, which needs no extra."""
    out = base / "exported"
    export.run(run, ExportConfig(format="torch-export", out=str(out)))
    return out


def of(head: nn.Module, *, channels: int = 3, double: bool = False) -> Classifier:
    """A classifier of 10x10 pictures with inputs that do something."""
    inputs = ImageInputs(channels, 10, 10, mean=(0.4,), std=(0.3,))
    body = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    classifier = Classifier(body, head, inputs, ("a", "b", "c"))
    return classifier.double() if double else classifier


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["linear", "cosine", "prototype", "double", "grey"])
@pytest.mark.slow
def test_a_file_is_the_classifier_at_any_batch(format: str, kind: str, tmp_path: Path) -> None:
    from metaft.finetune import heads

    features, labels = torch.randn(9, 24, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    head = heads.build(kind if kind in heads.HEADS else "linear", features, labels, 3, seed=0)
    classifier = of(head, channels=1 if kind == "grey" else 3, double=kind == "double")
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, *classifier.inputs.shape), np.uint8))
    path = tmp_path / formats.FORMATS[format].file
    about = json.loads(json.dumps({"class_names": ["a", "b", "c"], "inputs": classifier.inputs.plain()}))
    formats.FORMATS[format].write(Whole(classifier), path, about)
    back = open_exported(path)
    assert (back.class_names, back.inputs, back.about) == (("a", "b", "c"), classifier.inputs, about)
    for n in (1, 2, 7, 9):
        found, expected = back.logits(raw[:n]), classifier.logits(raw[:n])
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(MetaftError, match="the classifier takes uint8"):
        back.logits(raw.float())


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("member", ["matching-net", "protonet", "maml"])
def test_a_run_that_its_inner_loop_adapted(
    format: str, member: str, base: Path, squares: Path, data: Path, tmp_path: Path
) -> None:
    """With heads that hold the support set, or its prototypes."""
    init = meta_trained(tmp_path / member, squares, algorithm=member)
    adapted = finished(inner_words(init, data, tmp_path / "adapted"))
    export.run(adapted, ExportConfig(format=format, out=str(tmp_path / "o")))
    file = exported_file(tmp_path / "o")
    assert file is not None
    pictures = sorted((data / "test").rglob("*.png"))
    assert open_exported(file).label(pictures) == metaft.load(adapted).label(pictures)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written(
    format: str, run: Path, data: Path, tmp_path: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export.main([str(run), "--format", format, "--out", str(tmp_path / "o")]) == 0
    said = capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["o"], "and nothing beside it"
    assert sorted(os.listdir(tmp_path / "o")) == ["export.json", formats.FORMATS[format].file, "predict.py"]
    result = json.loads((tmp_path / "o/export.json").read_text())
    first, second = result["models"]
    about = open_exported(tmp_path / "o" / formats.FORMATS[format].file).about
    assert about["versions"]["metaft"] == metaft.__version__ and about["versions"]["torch"] == torch.__version__
    assert about.items() <= result.items() and result["run_is_finished"]
    digests = [run / "classifier.safetensors", tmp_path / "o" / formats.FORMATS[format].file]
    assert [row["sha256"] for row in result["models"]] == [hashlib.sha256(f.read_bytes()).hexdigest() for f in digests]
    assert first["sha256"] == about["classifier_sha256"]
    assert result["class_names"] == list(TARGET) and result["off_of_allowed"] <= 1 and not result["seen_in_training"]
    trained = json.loads((run / "result.json").read_text())
    assert first["accuracy"] == trained["starts"][0]["accuracy"], "on the run's own test part"
    assert (first["pictures"], second["agreement"], second["change"]) == (18, 1.0, 0.0)
    assert "18 pictures that it has not seen" in said and f"{tmp_path / 'o'}/predict.py" in said
    assert predict.main([str(run), str(data / "test")]) == 0
    expected = capsys.readouterr().out
    for path in (tmp_path / "o", tmp_path / "o" / formats.FORMATS[format].file):
        assert predict.main([str(path), str(data / "test")]) == 0
        assert capsys.readouterr().out == expected


# ---- predict.py -----------------------------------------------------------------------------------------------------


def namespace() -> dict[str, Any]:
    """What the script defines."""
    names: dict[str, Any] = {"__name__": "script", "__file__": "predict.py"}
    exec(compile(script(), "predict.py", "exec"), names)
    return names


def test_the_script_has_nothing_of_metaft() -> None:
    text = script()
    assert "import metaft" not in text and "from metaft" not in text
    packages = {line.split()[1].partition(".")[0] for line in text.splitlines() if line.startswith(("import", "from"))}
    assert packages - set(sys.stdlib_module_names) == {"numpy", "PIL"}


KINDS = ["L", "RGB", "1", "P", "LA", "RGBA", "CMYK", "I;16", "tall", "wide", "turned", "pgm"]


def write_picture(kind: str, folder: Path) -> Path:
    rng = np.random.default_rng(KINDS.index(kind))
    size = {"tall": (40, 13), "wide": (13, 40)}.get(kind, (24, 31))
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    path = folder / f"{kind.replace(';', '')}.png"
    if kind == "I;16":
        Image.fromarray(rng.integers(0, 4096, size).astype(np.uint16)).save(path)
    elif kind == "pgm":
        path = path.with_suffix(".pgm")
        numbers = rng.integers(0, 1000, size).astype(">u2")
        path.write_bytes(b"P5\n%d %d\n999\n" % (size[1], size[0]) + numbers.tobytes())
    elif kind == "CMYK":
        path = path.with_suffix(".jpg")
        image.convert("CMYK").save(path)
    elif kind == "turned":
        path, exif = path.with_suffix(".jpg"), Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    else:
        image.convert(kind if kind in ("L", "RGB", "1", "P", "LA", "RGBA", "CMYK") else "RGB").save(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_the_script_reads_pictures_as_metaft_does(kind: str, tmp_path: Path) -> None:
    path, picture_of = write_picture(kind, tmp_path), namespace()["picture_of"]
    for inputs in (
        ImageInputs(1, 12, 12, polarity="bright-on-black", invert=True, bits=12),
        ImageInputs(3, 12, 12, resize=15, interpolation="bicubic", bits=10),
        ImageInputs(3, 20, 20),
    ):
        raw = inputs.read(path).raw
        assert raw is not None
        plain = json.loads(json.dumps(inputs.plain()))
        np.testing.assert_array_equal(picture_of(path, plain), raw.numpy())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.slow
def test_the_script_says_what_predict_says(format: str, run: Path, data: Path, tmp_path: Path, capsys: Text) -> None:
    export.run(run, ExportConfig(format=format, out=str(tmp_path / "o")))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    capsys.readouterr()
    predict.main([str(run), str(data / "test"), "--top", "2"])
    expected = capsys.readouterr().out
    block = "import sys; sys.modules['metaft'] = None; import runpy; sys.argv = sys.argv[1:]; "
    argv = [sys.executable, "-c", block + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    argv += [str(tmp_path / "o/predict.py"), "--top", "2", str(data / "test")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    done = subprocess.run([*argv, str(broken)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, expected)
    assert done.stderr.startswith(f"unreadable: {broken}") and len(done.stderr.splitlines()) == 1


def test_which_files_the_script_labels(tmp_path: Path) -> None:
    names = namespace()
    for name in (".thumbs/t.png", "b/.hidden.png", "b/c.png", "a.txt", "a.png", "d.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    files = names["files_of"]([str(tmp_path), str(tmp_path / "a.png"), str(tmp_path / "a.txt")])
    assert [str(file.relative_to(tmp_path)) for file in files] == ["a.png", "b/c.png", "lost.png", "a.txt"]


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--top", "0"], "--top must be 1 to 3, got 0"),
        (["--top", "4"], "--top must be 1 to 3, got 4"),
        (["--model", "nope.pt2"], "nope.pt2 cannot be opened"),
        ([], "no model.onnx or model.pt2 beside it"),
    ],
)
def test_the_script_refuses_in_a_line(argv: list[str], part: str, exported: Path, in_tmp: Path, capsys: Text) -> None:
    names: dict[str, Any] = {"__name__": "script"}
    names["__file__"] = str(exported / "predict.py" if argv else in_tmp / "predict.py")
    exec(compile(script(), "predict.py", "exec"), names)
    with pytest.raises(SystemExit) as ended:
        names["main"](["x.png", *argv])
    assert ended.value.code == 2 and part in capsys.readouterr().err.splitlines()[-1]


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_another_model_is_not_written(run: Path, tmp_path: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Whole.forward
    monkeypatch.setattr(Whole, "forward", lambda self, pictures: right(self, pictures) + 0.01)
    argv = [str(run), "--format", "torch-export", "--out", str(tmp_path / "o")]
    assert export.main(argv) == 2
    err = capsys.readouterr().err
    assert "at batches of 1 logits of the exported model are off by up to 0.01" in err and "nothing was written" in err
    assert list(tmp_path.iterdir()) == []


def test_how_far_logits_may_be_off() -> None:
    def off(expected: list[float], found: list[float]) -> float:
        return agreement._difference(torch.tensor([expected]), torch.tensor([found]), 7)

    assert off([1.0, 0.0], [1.00005, 0.0]) == pytest.approx(0.5, rel=1e-2)
    assert off([1000.0, 0.0], [1000.05, 0.0]) == pytest.approx(0.5, rel=1e-2), "of what is large in proportion"
    assert off([1.0, 0.99999], [1.0, 1.00003]) < 1, "labels of a margin that small may change"
    for found in ([1.0003, 0.0], [float("nan"), 0.0]):
        with pytest.raises(MetaftError, match="batches of 7"):
            off([1.0, 0.0], found)
    with pytest.raises(MetaftError, match=r"gives \[1, 1\], not \[1, 2\]"):
        off([1.0, 0.0], [1.0])


class ByBatch(Classifier):
    """One that is right for one picture alone."""

    def logits(self, examples: Any, at_once: int | None = None) -> Tensor:
        right = super().logits(examples, at_once)
        return right if at_once in (None, 1) else 2 * right


def test_each_batch_size_is_looked_at() -> None:
    head = nn.Linear(24, 3)
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 10, 10), np.uint8))
    classifier = of(head)
    assert agreement.worst(classifier, classifier, raw) < 0.1
    with pytest.raises(MetaftError, match="at batches of 7"):
        agreement.worst(classifier, ByBatch(classifier.body, head, classifier.inputs, ("a", "b", "c")), raw)


BAD = [
    (["{maml}"], ["run: run folder", "holds no classifier", "metaft.adapt --init"]),
    (["/none/x"], ["run: ", "/none/x"]),
    (["{run}", "--out", "{data}"], ["out: ", "exists already"]),
    (["{run}", "--int8", "--format", "torch-export"], ["int8", "torch-export"]),
    (["{run}", "--format", "tflite"], ["format", "'tflite'", "onnx, torch-export"]),
    (["{run}", "--pictures", "/none/p.png"], ["pictures: /none/p.png does not exist"]),
    (["{run}", "--pictures", "{broken}"], ["pictures: ", "broken.png"]),
    (["{run}/classifier.safetensors", "--format", "torch-export"], ["pictures: ", "alone", "--pictures IMAGE"]),
]


@pytest.mark.parametrize(("argv", "parts"), BAD, ids=[" ".join(argv)[-40:] for argv, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(
    argv: list[str], parts: list[str], run: Path, maml: Path, data: Path, base: Path, in_tmp: Path, capsys: Text,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(formats, "is_there", lambda package: True)
    (base / "broken.png").write_bytes(b"\x89PNG")
    names = {"run": run, "maml": maml, "data": data, "broken": base / "broken.png"}
    before = sorted(run.iterdir())
    assert export.main([word.format(**names) for word in argv]) == 2
    one_line(capsys, *parts)
    assert list(in_tmp.iterdir()) == [] and sorted(run.iterdir()) == before


def test_a_missing_package_is_one_line(run: Path, in_tmp: Path, capsys: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "is_there", lambda package: package != "onnxscript")
    assert export.main([str(run), "--out", "o"]) == 2
    one_line(capsys, "format: model.onnx needs onnxscript, not installed; pip install 'metaft[export]'")
    assert list(in_tmp.iterdir()) == []


def test_data_that_are_gone_and_pictures_in_their_place(base: Path, maml: Path, tmp_path: Path, capsys: Text) -> None:
    target = write_target(tmp_path / "t", {"train": 4, "test": 2})
    adapted = finished(words(maml, target, tmp_path / "r"))
    target.rename(tmp_path / "moved")
    argv = [str(adapted), "--format", "torch-export", "--out", str(tmp_path / "o")]
    capsys.readouterr()
    assert export.main(argv) == 2
    one_line(capsys, "data: folder ", "does not exist", "name some pictures", "--pictures IMAGE|FOLDER...")
    assert export.main([*argv, "--pictures", str(tmp_path / "moved/test")]) == 0
    said = capsys.readouterr().out
    assert "accuracy" not in said and "same label" in said
    assert "accuracy" not in json.loads((tmp_path / "o/export.json").read_text())["models"][0]


def test_data_with_other_classes_are_refused(maml: Path, tmp_path: Path, capsys: Text) -> None:
    target = write_target(tmp_path / "t", {"train": 4, "test": 2})
    adapted = finished(words(maml, target, tmp_path / "r"))
    for part in ("train", "test"):
        (target / part / TARGET[0]).rename(target / part / "another")
    capsys.readouterr()
    assert export.main([str(adapted), "--format", "torch-export", "--out", str(tmp_path / "o")]) == 2
    assert "has the classes ['another'" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_data_that_changed_are_refused(maml: Path, tmp_path: Path, capsys: Text) -> None:
    """Another draw might test on what was trained on."""
    target = write_target(tmp_path / "t", {".": 6})
    adapted = finished(words(maml, target, tmp_path / "r", shots_per_class=4))
    next(target.rglob("*.png")).unlink()
    capsys.readouterr()
    assert export.main([str(adapted), "--format", "torch-export", "--out", str(tmp_path / "o")]) == 2
    one_line(capsys, f"data: the images of folder:{target} changed since {adapted} began", "--pictures")
    assert not (tmp_path / "o").exists()


def test_an_export_is_no_run(exported: Path, tmp_path: Path, capsys: Text) -> None:
    assert export.main([str(exported), "--format", "torch-export", "--out", str(tmp_path / "o")]) == 2
    one_line(capsys, f"run: {exported} is an export already")


def test_without_a_test_part_it_says_what_it_was_measured_on(maml: Path, tmp_path: Path, capsys: Text) -> None:
    adapted = finished(words(maml, write_target(tmp_path / "t", {".": 6}), tmp_path / "r"))
    export.run(adapted, ExportConfig(format="torch-export", out=str(tmp_path / "o")))
    assert "on 18 pictures that it was trained on (there is no test part)" in capsys.readouterr().out


def test_numbers(maml: Path, tmp_path: Path, capsys: Text) -> None:
    lines = ["path,label"]
    for i in range(20):
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{i / 10}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    argv = words(maml, Path("T"), tmp_path / "r", loss="mse")
    adapted = finished([word.replace("folder:T", f"csv:{tmp_path / 't.csv'}") for word in argv])
    result = export.run(adapted, ExportConfig(format="torch-export", out=str(tmp_path / "o")))
    assert (
        result["models"][1]["rmse"] == pytest.approx(result["models"][0]["rmse"]) and "RMSE" in capsys.readouterr().out
    )
    predict.main([str(adapted), str(tmp_path / "7.png")])
    expected = capsys.readouterr().out
    predict.main([str(tmp_path / "o"), str(tmp_path / "7.png")])
    assert capsys.readouterr().out == expected


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(784, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x.flatten(1)).tanh())


class Branches(Own):
    """With a forward pass that depends on values, which no tracer takes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if bool((x > 0).any()) else -x)


@pytest.mark.parametrize("kind", [Own, Branches])
def test_a_module_from_python(kind: type[Own], data: Path, tmp_path: Path) -> None:
    config = AdaptConfig(init="none", data=f"folder:{data}", epochs=2, device="cpu", out=str(tmp_path / "r"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.finetune.report.draw_pictures", lambda *_: [])
        adapt.run(config, module=kind())
    asked = ExportConfig(format="torch-export", out=str(tmp_path / "o"))
    with pytest.raises(MetaftError, match="came from Python"):
        export.run(tmp_path / "r", asked)
    if kind is Branches:
        with pytest.raises(MetaftError, match=r"format: the model cannot be exported to model.pt2 \(\w+: "):
            export.run(tmp_path / "r", asked, module=kind())
        assert sorted(os.listdir(tmp_path)) == ["r"]
        return
    assert export.run(tmp_path / "r", asked, module=kind())["off_of_allowed"] < 1


@pytest.mark.parametrize("kind", ["damaged", "foreign", "cut"])
def test_a_file_that_is_no_export_is_one_line_of_predict(
    kind: str, exported: Path, data: Path, tmp_path: Path, capsys: Text
) -> None:
    file = tmp_path / "model.pt2"
    if kind == "foreign":
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), file)
    else:
        whole = (exported / "model.pt2").read_bytes()
        file.write_bytes(b"nothing" if kind == "damaged" else whole[: len(whole) // 2])
    capsys.readouterr()
    assert predict.main([str(file), str(data / "test")]) == 2
    one_line(capsys, "run: ", file)
    assert predict.main([str(tmp_path / "none.onnx"), str(data / "test")]) == 2
    one_line(capsys, "run: ", "none.onnx does not exist")


@needs_onnx
def test_a_damaged_onnx_file_is_one_line_of_predict(data: Path, tmp_path: Path, capsys: Text) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    assert predict.main([str(tmp_path / "x.onnx"), str(data / "test")]) == 2
    one_line(capsys, "run: ", "x.onnx", "cannot be read as ONNX")


# ---- stopping -------------------------------------------------------------------------------------------------------


def test_a_signal_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text) -> None:
    """At once, wherever it is, and a second one while it tidies up does not stop that."""

    def stopped(*_: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        return 0.0

    removed = shutil.rmtree

    def slowly(folder: Path, **how: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        removed(folder, **how)

    monkeypatch.setattr(agreement, "worst", stopped)
    monkeypatch.setattr("metaft.support.whole.shutil.rmtree", slowly)
    before = signal.getsignal(signal.SIGINT)
    argv = [str(run), "--format", "torch-export", "--out", str(tmp_path / "new/o")]
    assert export.main(argv) == 128 + signal.SIGTERM
    assert "metaft: stopped; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGINT) is before


# ---- int8 -----------------------------------------------------------------------------------------------------------


@needs_onnx
@pytest.mark.slow
def test_int8(run: Path, data: Path, tmp_path: Path, capsys: Text) -> None:
    assert export.main([str(run), "--int8", "--out", str(tmp_path / "o")]) == 0
    assert "int8" in capsys.readouterr().out
    models = json.loads((tmp_path / "o/export.json").read_text())["models"]
    assert [row["model"] for row in models] == ["torch", "onnx", "int8"]
    assert models[2]["agreement"] > 0.8
    assert predict.main([str(tmp_path / "o" / int8.FILE), str(data / "test")]) == 0
    import onnx

    graph = onnx.load(str(tmp_path / "o" / int8.FILE)).graph
    assert any(node.op_type == "QuantizeLinear" for node in graph.node)
    how = open_exported(tmp_path / "o" / int8.FILE).about["int8"]
    assert how["calibrated_with"] == 27 and how["reduce_range"] is not int8.has_vnni() and how["left_as_they_are"]


@needs_onnx
@pytest.mark.parametrize("vnni", [False, True])
def test_what_is_quantised_and_how(vnni: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "has_vnni", lambda: vnni)
    classifier = wide()
    path, raw = tmp_path / "m.onnx", torch.arange(16 * 64).remainder(256).to(torch.uint8).view(16, 1, 8, 8)
    formats.FORMATS["onnx"].write(Whole(classifier), path, {"class_names": [], "inputs": classifier.inputs.plain()})
    int8.quantise(path, tmp_path / "q.onnx", raw)
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(tmp_path / "q.onnx")).graph
    made = {output: node.op_type for node in graph.node for output in node.output}
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    first, second = (node for node in graph.node if node.op_type == "Conv")
    assert {made.get(name) for name in second.input[:2]} == {"DequantizeLinear"}
    assert "DequantizeLinear" not in {made.get(name) for name in first.input}, "with the preprocessing before it"
    assert not [
        n for n in graph.node if n.op_type == "QuantizeLinear" and made.get(n.input[0]) in ("Cast", "Mul", "Sub")
    ]
    scale = next(node for node in graph.node if second.input[1] in node.output)
    assert values[scale.input[1]].shape == (40,), "a scale per channel"
    assert int(np.abs(values[scale.input[0]].astype(int)).max()) == (127 if vnni else 64)


def wide() -> Classifier:
    """Its second convolution has nearly all of the weights."""
    inputs = ImageInputs(1, 8, 8, mean=(0.4,), std=(0.3,))
    body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 40, 5), nn.ReLU(), nn.Flatten())
    return Classifier(body, nn.Linear(160, 300), inputs, ("a", "b"))


@needs_onnx
def test_int8_leaves_the_preprocessing_and_small_first_layers(tmp_path: Path) -> None:
    inputs = ImageInputs(1, 8, 8, mean=(0.4,), std=(0.3,))
    body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 600), nn.ReLU())
    classifier = Classifier(body, nn.Linear(600, 2), inputs, ("a", "b"))
    path = tmp_path / "m.onnx"
    formats.FORMATS["onnx"].write(Whole(classifier), path, {"class_names": [], "inputs": inputs.plain()})
    import onnx

    kinds = {node.name: node.op_type for node in onnx.load(str(path)).graph.node}
    left = [kinds[name] for name in int8.untouched(path)]
    assert left == ["Cast", "Mul", "Sub", "Conv"], "18 of 44,418 weights, the next layer has nearly all"


@needs_onnx
def test_too_few_pictures_to_calibrate_with(maml: Path, tmp_path: Path, capsys: Text) -> None:
    adapted = finished(words(maml, write_target(tmp_path / "t", {"train": 3, "test": 2}), tmp_path / "r"))
    capsys.readouterr()
    assert export.main([str(adapted), "--int8", "--out", str(tmp_path / "o")]) == 2
    one_line(capsys, "int8: needs 10 pictures or more to calibrate with, and the run's training part has 9")
    assert not (tmp_path / "o").exists()
