"""`metaft.compress`: pruned against closed forms, the file that comes out of it, and the command."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    ONE_PASS,
    finished,
    meta_trained,
    one_line,
    one_thread,
    same,
    timeless,
    words,
    write_folder,
    write_target,
)  # fmt: skip
from torch import Tensor, nn

import metaft
from metaft import adapt, compress, look, predict
from metaft.after import formats, shrinking, shrunk
from metaft.config import AdaptConfig, CompressConfig, LookConfig
from metaft.errors import Interrupted, MetaftError
from metaft.finetune import heads
from metaft.finetune.classifier import Classifier, load
from metaft.inputs import ImageInputs
from metaft.models.architecture import build
from metaft.models.head import body_of
from metaft.models.narrowed import narrowed, sizes_of, widths_of
from metaft.models.norm import EpisodeNorm
from metaft.models.stored import StoredNorm, empty_stored
from metaft.runs import checkpoint
from metaft.runs.folder import RunFolder
from metaft.targets.draws import Rows
from metaft.views.base import Missing, Table, View

Text = pytest.CaptureFixture[str]

pytestmark = pytest.mark.skipif(
    not formats.is_there("torch_pruning"), reason="the extra compress is not installed"
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# ---- pruning --------------------------------------------------------------------------------------------------------


class Mobile(nn.Module):
    """A depthwise convolution between two others, and a sum with what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1, bias=False)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.thin = nn.Conv2d(12, 8, 1)
        self.norms = nn.ModuleList(EpisodeNorm(n) for n in (8, 12, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.stem(x)).relu()
        y = self.norms[1](self.wide(x)).relu()
        y = self.norms[2](self.deep(y)).relu()
        return (x + self.norms[3](self.thin(y))).mean((2, 3))


class Joined(nn.Module):
    """Two convolutions beside each other, under one normalisation layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 10, 1)
        self.norms = nn.ModuleList([EpisodeNorm(16)])
        self.thin = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.thin(self.norms[0](torch.cat([self.a(x), self.b(x)], 1)).relu()).mean((2, 3))


class Parts(nn.Module):
    """The two halves of each image by themselves, without normalisation, and a linear layer of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.top = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 12, 1), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.cat([half.unsqueeze(1) for half in x.chunk(2, -1)], 1).flatten(0, 1)
        found = self.b(self.a(halves).relu()).relu().mean((2, 3))
        return self.top(found.unflatten(0, (-1, 2))).relu().mean(1)


def of_name(name: str, side: int = 16) -> nn.Module:
    architecture = {"name": name, "ways": 3, "shape": [3, side, side], "width": 8, "norm": "keep"}
    return body_of(*build(architecture, None if ":" in name else 0))


def classifier_of(body: nn.Module, side: int = 16, head: str = "linear") -> Classifier:
    """In float64, with values of its own everywhere."""
    generator = torch.Generator().manual_seed(0)
    body = empty_stored(body).double().eval()
    with torch.no_grad():
        for layer in body.modules():
            if isinstance(layer, StoredNorm):
                layer.mean.copy_(torch.randn(layer.mean.shape, generator=generator) / 4)
                layer.var.copy_(torch.rand(layer.var.shape, generator=generator) + 0.5)
                assert layer.weight is not None and layer.bias is not None
                layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) + 0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) / 4)
        features = body(torch.randn(9, 3, side, side, generator=generator).double())
    top = heads.build(head, features, torch.arange(9) % 3, 3, seed=1)
    return Classifier(body, top, ImageInputs(3, side, side), ("a", "b", "c"))


@torch.no_grad()
def without(classifier: Classifier, share: float) -> None:
    """The first channels of each layer, as many as are to go, are zero, wherever they are made, and read."""
    from metaft.after.pruning import kept_of

    def first(n: int) -> int:
        return n - kept_of(n, share)

    for layer in classifier.body.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight[: first(layer.out_channels)] = 0
            if layer.groups == 1 and layer.in_channels > 3:
                layer.weight[:, : first(layer.in_channels)] = 0
            if layer.bias is not None:
                layer.bias[: first(layer.out_channels)] = 0
        elif isinstance(layer, StoredNorm):
            assert layer.weight is not None and layer.bias is not None
            for values in (layer.weight, layer.bias, layer.mean):
                values[: first(len(values))] = 0


def pictures(n: int = 5, side: int = 16) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, side, side), np.uint8))


LIBRARYS = [
    pytest.param("torchvision:resnet18", marks=pytest.mark.slow),
    pytest.param("timm:tf_efficientnet_lite0", marks=pytest.mark.slow),
]


def given_by_norms(body: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each normalisation layer gives, before its scale and shift, by its path."""
    met: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for path, layer in body.named_modules():
            if isinstance(layer, StoredNorm):

                def hook(layer: nn.Module, given: tuple[Tensor], path: str = path) -> None:
                    assert isinstance(layer, StoredNorm)
                    mean, var, eps = layer.mean, layer.var, layer.eps
                    met[path] = (given[0] - mean.view(-1, 1, 1)) / (var + eps).sqrt().view(-1, 1, 1)

                stack.callback(layer.register_forward_pre_hook(hook).remove)
        with torch.no_grad():
            body(x)
    return met


@pytest.mark.parametrize("name", ["own", "conv4", "resnet12"])
def test_moments_are_set_so_that_norms_give_the_moments_that_they_gave(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metaft.after import pruning
    from metaft.after.pruning import pruned

    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = classifier_of(Mobile() if name == "own" else of_name(name))
    images, state = classifier.inputs(pictures(32)).double(), classifier.state_dict()
    held = {key: value.clone() for key, value in state.items()}
    moved = pruned(classifier, classifier, 0.5, images)
    monkeypatch.setattr(pruning, "match", lambda *_: None)
    plain = pruned(classifier, classifier, 0.5, images)
    assert same(classifier.state_dict(), held), "the whole one stays as it is"
    assert all(torch.equal(a, b) for a, b in zip(moved.parameters(), plain.parameters(), strict=True))
    before, without, found = (given_by_norms(each.body, images) for each in (classifier, plain, moved))
    exact, off = [], []
    for path in before:
        kept = _columns_of(classifier.body, plain.body, path)
        var, whole = (each.body.get_submodule(path).get_buffer("var") for each in (moved, classifier))
        spread = found[path].std((0, 2, 3), correction=0)
        bounded = spread.lt(1e-3) | (var / whole[kept]).log2().abs().gt(3.99)
        for of in (lambda t: t.mean((0, 2, 3)), lambda t: t.std((0, 2, 3), correction=0)):
            expected = of(before[path][:, kept])
            exact.append((of(found[path]) - expected).abs()[~bounded])
            off.append((of(without[path]) - expected).abs())
    assert len(torch.cat(exact)) > 0.7 * len(torch.cat(off))
    assert torch.cat(exact).max() < 1e-9 and torch.cat(off).max() > 0.01


def _columns_of(whole: nn.Module, small: nn.Module, path: str) -> list[int]:
    """Which channels of the whole one a pruned layer's are: those with its own random shifts."""
    bias = [layer.get_submodule(path).get_parameter("bias").tolist() for layer in (whole, small)]
    return [bias[0].index(value) for value in bias[1]]


def test_a_channel_that_is_constant_keeps_its_scale() -> None:
    from metaft.after.pruning import match

    norm = EpisodeNorm(3)
    moments = [torch.tensor(v).double() for v in ([1.0, 2.0, 3.0], [1.0, 4.0, 9.0])]
    whole, small = (nn.Sequential(StoredNorm(norm, *moments)).double() for _ in range(2))
    x = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    x[:, 1] = 5.0
    match(small, whole, {"0": torch.arange(3)}, x)
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Mobile, Joined, Parts])
def test_a_channel_counts_by_what_predictions_lose_without_it(kind: Callable[[], nn.Module]) -> None:
    """Against derivatives by factors that multiply what each layer gives, of one image after the other."""
    from metaft.after.saliences import saliences
    from metaft.after.traced import traced

    classifier = classifier_of(kind())
    x = classifier.inputs(pictures(7)).double()
    model = traced(classifier)
    of_layers = saliences(model.get_submodule("body"), classifier.head.double(), x, 5)
    found = {path: of_layers[layer] for path, layer in model.named_modules() if layer in of_layers}

    def width(layer: nn.Module) -> int:
        return len(layer.mean) if isinstance(layer, StoredNorm) else len(layer.get_parameter("weight"))

    layers = {
        f"body.{path}": at
        for path, at in classifier.body.named_modules()
        if isinstance(at, (StoredNorm, nn.Conv2d, nn.Linear))
    }
    assert found.keys() == layers.keys()
    factors = {p: torch.ones(width(at), dtype=torch.float64, requires_grad=True) for p, at in layers.items()}
    for path, layer in layers.items():

        def multiplied(layer: nn.Module, _: Any, given: Tensor, path: str = path) -> Tensor:
            return given * factors[path].view(*[-1, 1, 1] if given.dim() == 4 else [-1])

        layer.register_forward_hook(multiplied)
    generator = torch.Generator().manual_seed(5)
    logits = classifier.head(classifier.body(x)).detach() / 2
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    expected = {path: torch.zeros_like(factor) for path, factor in factors.items()}
    for image, label in zip(x.split(1), labels, strict=True):
        chances = (classifier.head(classifier.body(image)) / 2).log_softmax(-1)[0]
        for path, slope in zip(factors, torch.autograd.grad(chances[int(label)], [*factors.values()]), strict=True):
            expected[path] += slope.square() / len(x)
    for path, of_channels in expected.items():
        torch.testing.assert_close(found[path], of_channels, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        # Which layers' channels go together, and which of them alone say what these are worth.
        (Mobile, {"norms.0": (["norms.0", "norms.3"], [8]), "norms.2": (["norms.1", "norms.2"], [12])}),
        (Joined, {"norms.0": (["norms.0"], [6, 10]), "thin": (["thin"], [8])}),
        (Parts, {"a": (["a"], [6]), "b": (["b"], [12]), "top": (["top"], [8])}),
    ],
)
def test_a_group_is_worth_what_its_layers_are_together(
    kind: Callable[[], nn.Module], groups: dict[str, tuple[list[str], list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its normalisation layers the sum, or where it has none of those that give it; by the channels' own numbers."""
    from metaft.after import pruning
    from metaft.after.pruning import pruned
    from metaft.after.traced import ROOTS, Norm

    worth: dict[str, Tensor] = {}

    def given(body: nn.Module, *_: Any) -> dict[nn.Module, Tensor]:
        generator = torch.Generator().manual_seed(3)
        for path, layer in body.named_modules():
            if isinstance(layer, (*ROOTS, Norm)):
                width = len(layer.get_parameter("weight"))
                worth[path] = torch.rand(width, generator=generator, dtype=torch.float64)
        return {body.get_submodule(path): values for path, values in worth.items()}

    monkeypatch.setattr(pruning, "saliences", given)
    classifier = classifier_of(kind())
    small = pruned(classifier, classifier, 0.5, classifier.inputs(pictures()).double())
    for path, (together, widths) in groups.items():
        total, first, expected = torch.stack([worth[each] for each in together]).sum(0), 0, []
        for width in widths:  # halves of what is joined lose their own
            best = total[first : first + width].argsort(descending=True)[: width // 2] + first
            expected += sorted(best.tolist())
            first += width
        assert _columns_of(classifier.body, small.body, path) == expected, path


def test_what_nothing_reads_goes_first_however_large_its_weights() -> None:
    from metaft.after.pruning import pruned

    classifier = classifier_of(Mobile())
    with torch.no_grad():
        classifier.body.get_parameter("thin.weight")[:, 6:] = 0
        for layer in ("wide", "deep"):
            classifier.body.get_parameter(f"{layer}.weight")[6:] *= 100
        for i in (1, 2):
            classifier.body.get_parameter(f"norms.{i}.bias").copy_(2 + torch.arange(12) / 10)  # none is dead
    images = classifier.inputs(pictures(16)).double()
    small = pruned(classifier, classifier, 0.5, images)
    assert _columns_of(classifier.body, small.body, "norms.2") == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["own", "conv4", "resnet12", *LIBRARYS])
def test_what_computes_nothing_is_pruned_first_and_changes_nothing(name: str) -> None:
    """Over sums, depthwise convolutions and normalisation; and only then what does."""
    from metaft.after import pruning
    from metaft.after.pruning import pruned

    side = 32 if ":" in name else 16
    classifier = classifier_of(Mobile() if name == "own" else of_name(name, side), side)
    without(classifier, 0.5)
    before = {path: sizes_of(layer) for path, layer in classifier.named_modules()}
    given = classifier.inputs(pictures(3, side)).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "match", lambda *_: None)
        small, raw = pruned(classifier, classifier, 0.5, given), pictures(side=side)
    torch.testing.assert_close(small.logits(raw), classifier.logits(raw), rtol=1e-9, atol=1e-9)
    assert {path: sizes_of(layer) for path, layer in classifier.named_modules()} == before, "and it stays as it is"
    after = {path: sizes_of(layer) for path, layer in small.named_modules()}
    for path, sizes in after.items():
        for key in {"out_channels", "features"} & sizes.keys():
            assert sizes[key] == pytest.approx(before[path][key] / 2, abs=4), path
    assert small.head.get_parameter("weight").shape[0] == 3, "classes are none of it"
    assert len(small.head.get_parameter("weight").T) < len(classifier.head.get_parameter("weight").T)


@pytest.mark.parametrize("head", ["cosine", "prototype"])
def test_heads_that_are_no_linear_layer_lose_columns(head: str) -> None:
    from metaft.after.pruning import pruned

    classifier = classifier_of(Mobile(), head=head)
    small = pruned(classifier, classifier, 0.5, classifier.inputs(pictures()).double())
    assert type(small.head) is type(classifier.head)
    name = {"cosine": "weight", "prototype": "points"}[head]
    columns = classifier.head.get_parameter(name).T.tolist()
    left = small.head.get_parameter(name).T.tolist()
    assert len(left) == 4 and all(column in columns for column in left)
    assert small.logits(pictures()).isfinite().all()


def test_shares_are_of_the_original_s_channels() -> None:
    from metaft.after.pruning import kept_of, pruned

    classifier = classifier_of(Mobile())
    images = classifier.inputs(pictures()).double()
    twice = pruned(pruned(classifier, classifier, 0.75, images), classifier, 0.5, images)
    assert sizes_of(twice.body.get_submodule("deep")) == {"in_channels": 6, "out_channels": 6, "groups": 6}
    assert [kept_of(n, 0.5) for n in (1, 3, 31, 32, 40, 100)] == [1, 2, 16, 16, 24, 48]
    with pytest.raises(MetaftError, match=r"run: at 0\.5 of the channels there is nothing to prune"):
        pruned(twice, classifier, 0.5, images)


class Rolled(Mobile):
    """What a tracer takes for an operation on each channel by itself. No choice of some channels is the same one place
    further (of those mirrored 6 in 70 are)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.stem(x)).relu().roll(1, 1)
        return self.norms[3](self.thin(self.norms[1](self.wide(x)).relu())).mean((2, 3))


class Gated(Mobile):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(8))


class Branching(Mobile):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, 8)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Rolled, "in a way that is not seen"),
        (Gated, r"the backbone has 'Gated' \(Gated\)|has '' \(Gated\)"),
        (Branching, r"cannot be pruned \(RuntimeError"),
    ],
)
def test_what_is_not_understood_is_refused(kind: Callable[[], nn.Module], said: str) -> None:
    from metaft.after.pruning import pruned

    classifier = classifier_of(kind())
    with pytest.raises(MetaftError, match=f"run: .*({said})"):
        pruned(classifier, classifier, 0.5, classifier.inputs(pictures()).double())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_too_little_memory_is_not_the_network_s_fault(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from metaft.after import pruning
    from metaft.after.pruning import pruned

    def out_of_memory(*_: Any) -> None:
        raise error

    monkeypatch.setattr(pruning, "saliences", out_of_memory)
    classifier = classifier_of(Mobile())
    with pytest.raises(type(error)) as caught:
        pruned(classifier, classifier, 0.5, classifier.inputs(pictures()).double())
    assert caught.value is error


def test_steps_are_no_smaller_than_a_hundredth(capsys: Text) -> None:
    """Or their number would have no end."""
    assert compress.main(["run", "--step", "0.001"]) == 2
    one_line(capsys, "step must be at least 0.01", "0.001")


def test_widths_are_built_again() -> None:
    architecture = {"name": "conv4", "ways": 3, "shape": [1, 16, 16], "width": 8}
    whole, _ = build(architecture, 0)
    conv = next(path for path, layer in whole.named_modules() if isinstance(layer, nn.Conv2d))
    widths = {conv: {"in_channels": 1, "out_channels": 5, "groups": 1}}
    assert widths_of(whole, whole) == {}
    small, _ = build({**architecture, "widths": widths}, None)
    assert widths_of(small, whole) == widths
    assert small.get_submodule(conv).get_parameter("weight").shape == (5, 1, 3, 3)
    deep = {"deep": {"in_channels": 5, "out_channels": 5, "groups": 5}, "norms.2": {"features": 5}}
    for body in (Mobile(), empty_stored(Mobile())):
        module = narrowed(body, deep)
        assert (
            widths_of(module, Mobile()) == deep and module.get_submodule("deep").get_parameter("weight").shape[1] == 1
        )
    still = Mobile().requires_grad_(False)
    assert not narrowed(still, deep).get_parameter("deep.weight").requires_grad


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small ü")


@pytest.fixture(scope="module")
def maml(base: Path) -> Path:
    return meta_trained(base / "maml", write_folder(base / "squares"), width=8)


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    return write_target(base / "target", {"train": 5, "test": 4}, noise=60)


@pytest.fixture(scope="module")
def run(base: Path, maml: Path, data: Path) -> Path:
    return finished(words(maml, data, base / "run", epochs=8, lr=0.05))


def by_size(models: Sequence[Any], pictures: Any) -> list[dict[str, Any]]:
    """In the place of a clock."""
    sizes = [float(sum(p.numel() for p in model.parameters())) for model in models]
    return [{key: {"median": n, "quartiles": [n, n], "n": 3} for key in ("1", "64")} for n in sizes]


@pytest.fixture(autouse=True)
def _by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrinking, "latencies", by_size)


STEPS = ["--step", "0.25", "--epochs", "2", "--latency", "0.4"]


@pytest.fixture(scope="module")
def small(base: Path, run: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shrinking, "latencies", by_size)
        assert compress.main([str(run), *STEPS, "--points", "100", "--out", str(base / "small")]) == 0
    return base / "small"


def test_what_is_written(small: Path, run: Path, data: Path, tmp_path: Path, capsys: Text) -> None:
    result = json.loads((small / "result.json").read_text(encoding="utf-8"))
    first, *steps = result["compressed"]["steps"]
    assert [row["share"] for row in (first, *steps)] == [1, 0.75, 0.5], "up to the one that is fast enough"
    assert steps[0]["latency"] > 0.4 >= steps[1]["latency"] == steps[1]["parameters"] / first["parameters"]
    assert first["flops"] > steps[0]["flops"] > steps[1]["flops"] and first["bytes"] > steps[1]["bytes"]
    assert {row["validation"]["held"] for row in (first, *steps)} == {15}, "each training image once"
    trained = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert first["accuracy"] == trained["accuracy"] == result["starts"][1]["accuracy"]
    assert result["accuracy"] == steps[1]["accuracy"] and result["compressed"]["kept"] == "50 % of channels"
    assert result["gains"][0]["mean"] == pytest.approx(steps[1]["change"])
    assert "kept: 50 % of channels" in (small / "report.txt").read_text(encoding="utf-8")
    classifier = metaft.load(small)
    again = load(small / "steps/2.safetensors")
    assert same(classifier.state_dict(), again.state_dict())
    tensors, header = checkpoint.load(small / "classifier.safetensors")
    assert {size["out_channels"] for size in header["architecture"]["widths"].values() if "out_channels" in size} == {4}
    assert same(checkpoint.under(tensors, "body"), classifier.body.state_dict())
    assert predict.main([str(small), str(data / "test")]) == 0
    said = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    assert said == classifier.label(sorted((data / "test").rglob("*.png")))
    html = look.run(small, LookConfig(out=str(tmp_path / "page.html"), landscape=True)).read_text(encoding="utf-8")
    assert "python -m metaft.compress WHOLE --latency 0.4 " in html
    assert "a classifier that was made smaller leaves no snapshots" in html


def test_an_export_of_it_is_the_same_classifier(small: Path, tmp_path: Path) -> None:
    from metaft import export
    from metaft.after.exported import open_exported
    from metaft.config import ExportConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metaft.after.measured.SECONDS", 0.0)
        export.run(small, ExportConfig(format="torch-export", out=str(tmp_path / "o")))
    raw = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = open_exported(tmp_path / "o/model.pt2").logits(raw)
    torch.testing.assert_close(found, metaft.load(small).logits(raw), rtol=ONE_PASS, atol=ONE_PASS)


def test_a_page_of_it(small: Path, run: Path) -> None:
    from metaft.views.smaller import smaller
    from metaft.views.subject import open_subject
    from metaft.views.training import training

    subject, report = open_subject(str(small)), (small / "report.txt").read_text()
    view = smaller(subject)
    assert isinstance(view, View) and isinstance(view.parts[1], Table)
    steps = subject.result["compressed"]["steps"]
    columns = [column.name for column in view.parts[1].columns]
    rows: list[dict[str, Any]] = [dict(zip(columns, row, strict=True)) for row in view.parts[1].rows]
    assert [(row["network"], row["parameters"]) for row in rows] == [(s["model"], s["parameters"]) for s in steps]
    for row, step in zip(rows, steps, strict=True):
        lost = rows[0]["validation"] - row["validation"]
        assert row["points lost"] == pytest.approx(100 * lost) and row["of its time"] == step["latency"]
        assert row["test"] == step["accuracy"]
        own, beside = (step[key]["1"]["median"] for key in ("seconds", "beside"))
        assert step["latency"] == pytest.approx(own / beside), "which the report shows beside each other"
        assert f"{1000 * own:.1f} (" in report and f" {1000 * beside:.1f} " in report
    assert "Asked for were 0.4 of the original's time and at most 100 points" in view.caption
    assert ("Both are reached" in view.caption) == (not subject.result["compressed"]["unmet"])
    assert isinstance(smaller(open_subject(str(run))), Missing)
    assert "50 % of channels" in str(training(subject))
    layers = {path: sizes_of(layer) for path, layer in subject.built.module.named_modules()}
    assert 4 in {sizes.get("out_channels") for sizes in layers.values()}


def test_settings_are_those_that_it_was_recovered_by(small: Path, run: Path) -> None:
    from metaft.after import comparing
    from metaft.after.settings import settings_of
    from metaft.finetune.extras import all_named
    from metaft.views.page import _settings
    from metaft.views.subject import open_subject

    result = json.loads((small / "result.json").read_text(encoding="utf-8"))
    assert {name: result[name] for name in ("epochs", "patience", "lr", "schedule", "soup", "clip_norm")} == {
        "epochs": 2, "patience": None, "lr": 0.003, "schedule": "cosine", "soup": None, "clip_norm": 1.0,
    }  # fmt: skip
    [followed] = all_named(result["extra"])
    assert followed.run == run, "what each step follows is a setting too"
    begun = AdaptConfig(
        init="x", data="folder:d", shots_per_class=5, image_size=8, seed=3, seeds=4, robust=("1/255",), epochs=9,
        patience=7, soup=3, ema=0.9, strategy="head", extra=("l2-sp",),
    )  # fmt: skip
    found = settings_of(RunFolder(small), begun, result)
    same = {"data": "folder:d", "shots_per_class": 5, "image_size": 8, "seed": 3}
    assert {name: found[name] for name in same} == same
    for name, value in {"robust": None, "soup": None, "ema": None, "patience": None, "seeds": 1}.items():
        assert found[name] == value, name
    for name in ("init", "strategy", "epochs", "extra", "method"):
        assert found[name] == result[name], name
    assert (found["compress run"], found["compress step"]) == (str(run), 0.25)
    whole, made = comparing.opened([run, small])
    assert (whole.config["epochs"], whole.config["lr"], made.config["epochs"], made.config["lr"]) == (8, 0.05, 2, 0.003)
    rows = {row[0]: row[1] for row in _settings(open_subject(str(small))).rows}
    assert (rows["epochs"], rows["lr"], rows["compress latency"]) == ("2", "0.003", "0.4") and "patience" not in rows


NOT_SET_ASIDE = "none are set aside for validation"


def test_its_page_says_by_which_images_it_was_judged(small: Path, run: Path, tmp_path: Path) -> None:
    from metaft.views.smaller import smaller
    from metaft.views.subject import of_folder
    from metaft.views.training import training

    def captions(changes: dict[str, Any], held: int) -> list[str]:
        shutil.copytree(small, tmp_path / "small", dirs_exist_ok=True)
        result = json.loads((small / "result.json").read_text(encoding="utf-8")) | changes
        for step in result["compressed"]["steps"]:
            step["validation"]["held"] = held
        (tmp_path / "small/result.json").write_text(json.dumps(result), encoding="utf-8")
        subject = of_folder(RunFolder(tmp_path / "small"))
        views = training(subject), smaller(subject)
        assert all(isinstance(view, View) for view in views)
        return [view.caption for view in views if isinstance(view, View)]

    for changes, held, judges in (
        ({}, 15, "15 training images, each held back once in cross-validation"),
        ({"val_images": 6}, 6, "6 validation images"),
        ({"val_images": 6, "folds": 3}, 21, "21 training images, each held back once in cross-validation"),
    ):
        of_training, of_steps = captions(changes, held)
        assert of_training.endswith(f"; no epoch was chosen, the network was: by {judges}."), changes
        assert f"points of its accuracy on {judges}; the network" in of_steps
    notes = json.loads((small / "result.json").read_text(encoding="utf-8"))["notes"]
    [about] = [note for note in notes if NOT_SET_ASIDE in note]
    assert about.startswith("of the original's own fits: a class has fewer than 10 images")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("steps", 3, "compressed has steps = '3', which no run writes"),
        ("steps", [{"model": "x"}], r"compressed.steps\[0\] lacks 'share', which a run writes"),
        ("kept", "y", "compressed: the kept network 'y' is none of its steps"),
    ],
)
def test_a_damaged_table_of_steps_is_said(key: str, value: Any, said: str, small: Path, tmp_path: Path) -> None:
    from metaft.views.subject import open_subject

    shutil.copytree(small, tmp_path / "small")
    file = tmp_path / "small/result.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    result["compressed"][key] = value
    file.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(MetaftError, match=said):
        open_subject(str(tmp_path / "small"))


def test_a_kill_before_its_settings_are_written_leaves_no_folder_that_nobody_can_go_on_with(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metaft.runs.checkpoint import write_atomically

    def killed(path: Path, content: bytes) -> None:
        if path.name == "compress.toml":
            raise KeyboardInterrupt
        write_atomically(path, content)

    monkeypatch.setattr("metaft.runs.checkpoint.write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        compress.run(run, CompressConfig(out=str(tmp_path / "o")))
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_at_the_beginning_leaves_is_begun_again_or_gone_on_with(
    small: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    from metaft.runs.checkpoint import write_atomically

    def killed(*given: Any) -> None:
        if given[0].name in ("compress.toml", "o"):
            raise KeyboardInterrupt
        write_atomically(*given)

    out = tmp_path / "o"
    argv = [str(run), *STEPS, "--points", "100", "--out", str(out)]
    with monkeypatch.context() as patch:  # before its settings are written, by SIGKILL, after which nothing tidies up
        patch.setattr("metaft.runs.checkpoint.write_atomically", killed)
        patch.setattr("metaft.support.whole.shutil.rmtree", lambda *_, **__: None)
        assert compress.main(argv) == 130
    [hidden] = tmp_path.iterdir()
    assert hidden.name.startswith(".o."), "nothing that could be taken for its folder"
    capsys.readouterr()
    assert compress.main([*argv, "--resume"]) == 2
    one_line(capsys, f"resume: {out} does not exist, so there is nothing to go on with; leave --resume away")
    with monkeypatch.context() as patch:  # before its first checkpoint
        patch.setattr(compress, "_shrink", lambda folder, *_: killed(folder.path))
        assert compress.main(argv) == 130
    assert sorted(p.name for p in out.iterdir()) == ["checkpoints", "compress.toml", "config.toml", "plots"]
    capsys.readouterr()
    assert compress.main(argv) == 2
    one_line(capsys, f"out: {out} is begun and not finished; go on with it by --resume, or name another folder")
    assert compress.main([*argv, "--resume"]) == 0
    for name in ("classifier.safetensors", "metrics.jsonl", "config.toml"):
        assert (out / name).read_bytes() == (small / name).read_bytes(), name
    capsys.readouterr()
    assert compress.main(argv) == 2
    one_line(capsys, f"out: {out} exists already; name another folder with --out")


def test_stopped_and_resumed_it_ends_alike_and_computes_nothing_twice(
    small: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    argv = [str(run), *STEPS, "--points", "100", "--out", str(tmp_path / "o")]
    calls, fits = [0], []
    judged, fit_it = shrinking.judged, shrinking._fitted

    def killed(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:  # the network of the second fold of the first step is a file already
            raise Interrupted("stopped", 15)
        return judged(*args)

    def noted(*args: Any) -> Any:
        fits.append((args[2], args[4].fold))
        return fit_it(*args)

    monkeypatch.setattr(shrinking, "_fitted", noted)
    with monkeypatch.context() as patch:
        patch.setattr(shrinking, "judged", killed)
        assert compress.main(argv) == 143
    done = len(fits)
    assert fits[-1] == (1, 2) and not (tmp_path / "o/result.json").exists()
    capsys.readouterr()
    assert compress.main([*argv, "--points", "3", "--resume"]) == 2
    one_line(capsys, "points: a resumed run keeps its settings", "100.0", "3.0")
    assert compress.main([str(run), "--out", str(tmp_path / "o"), "--resume"]) == 0
    assert fits[done - 1 : done + 1] == [(1, 2), (1, 2)] and len(fits) == 3 + 8 + 1
    for name in ("classifier.safetensors", "metrics.jsonl", "steps/1-fold-2.safetensors", "config.toml"):
        assert (tmp_path / "o" / name).read_bytes() == (small / name).read_bytes(), name
    mine, theirs = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "o", small))
    assert timeless(mine) == timeless(theirs)
    capsys.readouterr()
    monkeypatch.setattr("metaft.finetune.setup.prepared", lambda *_: pytest.fail("pictures were read for nothing"))
    assert compress.main([*argv, "--resume"]) == 2
    one_line(capsys, "resume: ", "is finished already")


def test_a_fit_in_progress_goes_on(small: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the first epoch of a step; the checkpoint has the fit's state."""
    argv = [str(run), *STEPS, "--points", "100", "--out", str(tmp_path / "o")]
    seen = [0]

    def check(self: Any, message: str) -> None:
        seen[0] += 1
        if seen[0] == 30 + 1:
            raise Interrupted(message, 15)

    with monkeypatch.context() as patch:
        patch.setattr("metaft.cli.StopSignals.check", check)
        assert compress.main(argv) == 143
    assert checkpoint.load(tmp_path / "o/checkpoints/last.safetensors")[1]["rows"]
    assert compress.main([*argv, "--resume"]) == 0
    for name in ("classifier.safetensors", "metrics.jsonl"):
        assert (tmp_path / "o" / name).read_bytes() == (small / name).read_bytes(), name


def test_where_there_is_a_validation_part_it_judges(base: Path, maml: Path, tmp_path: Path, capsys: Text) -> None:
    target = write_target(tmp_path / "t", {"train": 5, "val": 2, "test": 2}, noise=60)
    adapted = finished(words(maml, target, tmp_path / "r", epochs=4, lr=0.05))
    argv = [str(adapted), "--step", "0.5", "--epochs", "1", "--latency", "0.01", "--out", str(tmp_path / "o")]
    capsys.readouterr()
    assert compress.main(argv) == 0
    said = capsys.readouterr()
    result = json.loads((tmp_path / "o/result.json").read_text(encoding="utf-8"))
    assert [row["validation"]["held"] for row in result["compressed"]["steps"]] == [6, 6]
    assert sorted(p.name for p in (tmp_path / "o/steps").iterdir()) == ["1.safetensors"], "no folds"
    assert any(line.startswith("latency: ") for line in result["compressed"]["unmet"])
    assert "metaft: note: not reached: latency: 0." in said.err and "0.01 was asked for" in said.out


def test_a_smaller_start_is_taught(run: Path, base: Path, tmp_path: Path) -> None:
    tiny = meta_trained(tmp_path / "tiny", base / "squares", width=3)
    argv = [str(run), "--into", str(tiny), "--epochs", "2", "--out", str(tmp_path / "o")]
    assert compress.main(argv) == 0
    result = json.loads((tmp_path / "o/result.json").read_text(encoding="utf-8"))
    first, second = result["compressed"]["steps"]
    assert second["model"] == result["starts"][0]["name"] == "meta-learned"
    assert second["parameters"] < first["parameters"] and second["validation"]["held"] == 15
    conv = next(layer for layer in metaft.load(tmp_path / "o").modules() if isinstance(layer, nn.Conv2d))
    assert conv.out_channels == 3
    assert "was taught by" in result["notes"][0]
    assert result["init"] == str(tiny), "and not what its teacher began with"


def test_what_is_judged_by_folds_says_so_whatever_is_set_aside(run: Path) -> None:
    work, _ = compress._opened(run, CompressConfig(), None, "seed")
    train, none, row = work.rows.train, np.empty(0, np.int64), rows((0.5, 0.0))[0]
    for parts, folded in (
        (work.rows, True),
        (Rows(train[3:], train[:3], none), True),
        (Rows(train[3:], train[:3], work.rows.test), False),
    ):
        said = " ".join(shrunk._notes(work._replace(rows=parts), row))
        assert ("3-fold cross-validation of the training images" in said) is folded


def test_without_a_test_part_figures_are_of_what_was_held_back(maml: Path, tmp_path: Path, capsys: Text) -> None:
    adapted = finished(words(maml, write_target(tmp_path / "t", {".": 4}, noise=60), tmp_path / "r", epochs=3))
    argv = [str(adapted), "--step", "0.5", "--epochs", "1", "--latency", "0.5", "--out", str(tmp_path / "o")]
    assert compress.main(argv) == 0
    result = json.loads((tmp_path / "o/result.json").read_text(encoding="utf-8"))
    for start, row in zip(result["starts"][::-1], result["compressed"]["steps"], strict=True):
        assert start["accuracy"] == row["validation"]["accuracy"] and "accuracy" not in row
        assert sum(map(sum, start["confusion"])) == 12


def rows(*figures: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"latency": latency, "validation": {"points": points}} for latency, points in figures]


def test_the_step_that_is_kept() -> None:
    whole = (1.0, 0.0)
    assert shrunk.kept_of(rows(whole, (0.9, 0.0), (0.8, 2.0), (0.7, 2.5)), 2.0) == 2, "the fastest within the points"
    assert shrunk.kept_of(rows(whole, (0.8, -1.0), (0.9, 0.0)), 2.0) == 1
    assert shrunk.kept_of(rows(whole, (0.9, 4.0), (0.8, 3.0), (0.7, 3.0)), 2.0) == 3, "the one that lost least"
    fast, slow = rows((0.7, 2.5), (0.8, 1.0))
    assert [line[:8] for line in shrunk.unmet(slow, 0.75, 2.0)] == ["latency:"]
    (line,) = shrunk.unmet(fast, 0.75, 2.0)
    assert line.startswith("points: 2.5 are lost on validation, and at most 2 were asked for; more --epochs or")
    assert shrunk.unmet(rows((0.75, 2.0))[0], 0.75, 2.0) == []


def test_folds_share_no_image_and_keep_duplicates_together(run: Path, base: Path) -> None:
    work, _ = compress._opened(run, CompressConfig(), None, "seed")
    target = work.target
    kept, *folds = shrinking.tracks_of(work)
    assert len(folds) == 3 and not len(kept.held)
    assert sorted(np.concatenate([fold.held for fold in folds]).tolist()) == sorted(work.rows.train.tolist())
    for fold in folds:
        assert not set(fold.train.tolist()) & set(fold.held.tolist())
        assert len(fold.train) + len(fold.held) == len(work.rows.train)
        assert set(target.labels[torch.from_numpy(fold.train)].tolist()) == {0, 1, 2}
    train, none = work.rows.train, np.empty(0, np.int64)
    kept, *folds = shrinking.tracks_of(work._replace(rows=Rows(train[3:], train[:3], none)))
    assert kept.train.tolist() == train[3:].tolist(), "without a test part, too, but for the folds"
    assert not len(kept.held)
    assert sorted(np.concatenate([fold.held for fold in folds]).tolist()) == sorted(train.tolist())
    one = Rows(work.rows.train[:1], none, work.rows.test)
    with pytest.raises(MetaftError, match="run: a class has one image"):
        shrinking.tracks_of(work._replace(rows=one))


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_what_is_refused_is_one_line(
    run: Path, small: Path, maml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Text
) -> None:
    def refuse(argv: list[str], *parts: object) -> None:
        capsys.readouterr()
        assert compress.main([*argv, "--out", str(tmp_path / "o")]) == 2
        one_line(capsys, *parts)
        assert not (tmp_path / "o").exists()

    refuse([str(run / "classifier.safetensors")], "run: ", "alone, without its run's data")
    refuse([str(small)], "run: ", "is compressed already")
    refuse([str(run), "--into", "none"], "into: none has ", "no fewer than the run's")
    refuse([str(run), "--resume"], "resume: ", "does not exist, so there is nothing to go on with")
    capsys.readouterr()
    assert compress.main([str(maml), "--out", str(run), "--resume"]) == 2
    one_line(capsys, f"resume: {run} is no folder that metaft.compress made: it has no compress.toml")
    capsys.readouterr()
    assert adapt.main(["--resume", str(small)]) == 2
    one_line(capsys, f"resume: {small} is of metaft.compress")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse([str(run)], "run: to prune needs torch-pruning, not installed; pip install 'metaft[compress]'")
