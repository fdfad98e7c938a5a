"""`metaft.look RUN --explain IMAGE...`: attributions against closed forms, what the page shows, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import finished, one_line, one_thread, words, write_target
from torch import Tensor, nn

from metaft import look
from metaft.config import LookConfig
from metaft.views import VIEWS
from metaft.views.attribution import (
    FAINT,
    GAP,
    STEPS,
    enlarged,
    grad_cam,
    has_captum,
    integrated_gradients,
    laid_over,
    strengths,
)
from metaft.views.explained import _of_gap

Text = pytest.CaptureFixture[str]

needs_captum = pytest.mark.skipif(not has_captum(), reason="needs captum (the extra explain)")

X = torch.randn(3, 2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CLASSES = torch.tensor([0, 2, 1])


def drawn(module: nn.Module) -> nn.Module:
    """The module in float64, with values of its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.double().parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# ---- Grad-CAM -------------------------------------------------------------------------------------------------------


def mapped(head: nn.Linear, maps: Tensor) -> Tensor:
    """The class activation map of a convolution, its mean, and a linear head, over the number of places."""
    return torch.einsum("nk,nkhw->nhw", head.weight[CLASSES], maps).relu() / maps[0, 0].numel()


def test_grad_cam_is_the_class_activation_map_where_that_is_defined() -> None:
    conv, head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)
    model = drawn(nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head))
    cam = grad_cam(model, X, CLASSES)
    assert cam is not None and cam.shape == (3, 4, 3) and bool((cam > 0).any()) and bool((cam == 0).any())
    torch.testing.assert_close(cam, mapped(head, conv(X)).detach(), rtol=1e-12, atol=1e-12)


def test_grad_cam_is_of_the_last_map_with_what_follows_the_convolution() -> None:
    first, conv, norm, head = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
    squeezed = nn.Conv2d(4, 4, 1)  # of one place: what squeeze-and-excitation or a convolution as a head has
    layers = (
        first,
        nn.ReLU(),
        conv,
        norm,
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        squeezed,
        nn.Flatten(),
        head,
    )
    model = drawn(nn.Sequential(*layers)).eval()
    with torch.no_grad():
        squeezed.weight.copy_(torch.eye(4)[:, :, None, None])
    cam = grad_cam(model, X, CLASSES)
    with torch.no_grad():
        expected = mapped(head, norm(conv(first(X).relu())).relu())
    assert cam is not None
    torch.testing.assert_close(cam, expected, rtol=1e-12, atol=1e-12)


def test_nothing_is_left_behind_and_twice_gives_the_same() -> None:
    model = drawn(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model.requires_grad_(False)
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (grad_cam(model, X, CLASSES) for _ in range(2))
    assert first is not None and second is not None and torch.equal(first, second)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(part.training for part in model.modules()) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert X.grad is None and not X.requires_grad


def test_without_a_map_there_is_no_grad_cam() -> None:
    assert grad_cam(drawn(nn.Sequential(nn.Flatten(), nn.Linear(60, 3))), X, CLASSES) is None
    patches = nn.Sequential(nn.Conv2d(2, 4, 2, 2), nn.Flatten(2), nn.MultiheadAttention(6, 1))
    assert grad_cam(patches.double(), X, CLASSES) is None, "a transformer's convolution cuts patches"


def test_attention_over_channels_is_no_transformer() -> None:
    class ChannelAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()

    parts = nn.Conv2d(2, 4, 3), ChannelAttention(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    assert grad_cam(drawn(nn.Sequential(*parts)), X, CLASSES) is not None


def test_the_strongest_hundredth_is_as_bright_as_can_be() -> None:
    strength = strengths(torch.arange(-200.0, 0).view(1, 10, 20))
    assert float(strength.max()) == 1 and int((strength == 1).sum()) == 2, "of 200 pixels"
    assert float(strength[0, 2]) == pytest.approx(198 / float(torch.arange(1.0, 201).quantile(0.99)))


def test_maps_are_laid_over_the_image_as_bright_as_they_are_strong() -> None:
    whole = enlarged(torch.tensor([[[0.0, 2.0], [0.0, 4.0]]]), (4, 4))
    assert whole.shape == (1, 4, 4) and float(whole.max()) == 1 and float(whole.min()) == 0
    over = laid_over(torch.full((1, 4, 4), 128, dtype=torch.uint8), whole[0])
    assert over.shape == (3, 4, 4) and over.dtype == torch.uint8
    yellow = over[0].long() + over[1].long() - over[2].long()
    assert int(yellow.argmax()) == int(whole[0].argmax())


# ---- integrated gradients -------------------------------------------------------------------------------------------

FIRST = 32  # steps before any piece is halved


@needs_captum
def test_integrated_gradients_of_a_linear_model_are_weight_times_change() -> None:
    model = drawn(nn.Sequential(nn.Flatten(), nn.Linear(60, 3)))
    black = torch.full_like(X[0], -0.5)
    found = integrated_gradients(model, X[0], black, 2)
    expected = model.get_parameter("1.weight")[2].detach().view(2, 6, 5) * (X[0] - black)
    # captum weighs its steps in float32, 2^-24 each.
    torch.testing.assert_close(found.attributions, expected, rtol=1e-6, atol=1e-6)
    assert found.gap < 1e-6 and found.steps == FIRST
    assert found.total == pytest.approx(float(expected.sum()))


class Steep(nn.Module):
    """A logit that changes within a small part of the way."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.rate * (x.flatten(1).mean(1, keepdim=True) - 0.37))


class Jump(nn.Module):
    """A logit whose change no gradient shows."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1, keepdim=True)
        return (mean > 0.37).to(x.dtype) + 0 * mean


@needs_captum
def test_a_product_s_parts_get_half_of_it_each() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2].prod(1, keepdim=True)

    x = torch.tensor([[[3.0, 5.0, 7.0]]]).double()
    found = integrated_gradients(Product(), x, torch.zeros_like(x), 0)
    torch.testing.assert_close(found.attributions, torch.tensor([[[7.5, 7.5, 0.0]]]).double())


@needs_captum
@pytest.mark.parametrize("rate", [400.0, 1e6])
def test_the_way_is_halved_where_it_is_steep_until_the_attributions_add_up(rate: float) -> None:
    one, black = torch.ones(1, 2, 2).double(), torch.zeros(1, 2, 2).double()
    one[0, 0, 0] = 3.0
    found = integrated_gradients(Steep(rate), one, black, 0)
    assert FIRST < found.steps < STEPS / 4 and found.gap <= GAP
    # By symmetry the logit's change is shared out by how far each pixel goes.
    torch.testing.assert_close(found.attributions, found.total * one / one.sum(), rtol=2 * GAP, atol=0)


class Hill(nn.Module):
    """A logit that rises by 10 on the way and comes back, but for so much."""

    def __init__(self, left: float) -> None:
        super().__init__()
        self.left = left

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1, keepdim=True)
        rise, fall = (torch.sigmoid(400 * (mean - at)) for at in (0.37, 0.81))
        return 10 * (rise - fall) + self.left * mean


@needs_captum
def test_of_a_logit_that_hardly_changes_completeness_is_a_share_of_what_it_changes_on_the_way() -> None:
    one, black = torch.ones(1, 2, 2).double(), torch.zeros(1, 2, 2).double()
    found = integrated_gradients(Hill(1e-6), one, black, 0)
    assert found.gap <= GAP and found.off <= GAP * FAINT * 10.1
    assert "hardly changes from black" in _of_gap(found) and f"in {found.steps} steps" in _of_gap(found)
    large = integrated_gradients(Hill(8.0), one, black, 0)
    assert large.off <= GAP * abs(large.total) and "hardly" not in _of_gap(large)


@needs_captum
def test_it_ends_and_says_by_how_much_where_no_steps_would_do() -> None:
    one, black = torch.ones(1, 2, 2).double(), torch.zeros(1, 2, 2).double()
    found = integrated_gradients(Jump(), one, black, 0)
    assert STEPS - 8 < found.steps <= STEPS and found.gap == found.off == 1.0
    assert "which is not within 1 %" in _of_gap(found)


# ---- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("explain")
    data = write_target(base / "target", {"train": 4, "test": 3}, classes=("<b>a", "b c"))
    return finished(words(Path("none"), data, base / "run", epochs=1))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page without what it shows of other things."""
    monkeypatch.setattr("metaft.views.page.VIEWS", {"explained": VIEWS["explained"]})


def pictures(run: Path) -> list[str]:
    return [str(file) for file in sorted((run.parent / "target/test").rglob("*.png"))[::3]]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("captum", [pytest.param(True, marks=needs_captum), False])
def test_the_page_shows_images_labels_and_what_they_rest_on(
    captum: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaft.views.attribution.has_captum", lambda: captum)
    config = LookConfig(out=str(tmp_path / "page.html"), explain=tuple(pictures(run)))
    html = look.run(run, config).read_text(encoding="utf-8")
    assert "Why an image got its label" in html and "&lt;b&gt;a" in html and "<b>a" not in html
    assert html.count('alt="Grad-CAM for ') == 2 and html.count('alt="image 0') == 2
    assert html.count('alt="integrated gradients for ') == (2 if captum else 0)
    assert ("of the logit, off by" in html) == captum
    assert ("metaft[explain]" in html) != captum
    assert look.run(run, config).read_text(encoding="utf-8") == html, "twice the same"


@pytest.mark.usefixtures("alone")
def test_a_model_without_maps_is_left_out_with_a_word(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaft.views.attribution.has_captum", lambda: False)
    monkeypatch.setattr("metaft.views.attribution.grad_cam", lambda *_: None)
    config = LookConfig(out=str(tmp_path / "page.html"), explain=tuple(pictures(run)))
    html = look.run(run, config).read_text(encoding="utf-8")
    assert "Grad-CAM is left out" in html and 'alt="Grad-CAM' not in html


def test_what_cannot_be_explained_is_one_line_and_status_2(run: Path, in_tmp: Path, capsys: Text) -> None:
    Path("broken.png").write_bytes(b"\x89PNG no more")
    (many := Path("many")).mkdir()
    for i in range(25):
        (many / f"{i}.png").write_bytes(Path(pictures(run)[0]).read_bytes())
    cases = [
        (str(run), ["none/such.png"], "none/such.png does not exist"),
        (str(run), [pictures(run)[0], "broken.png"], "broken.png"),
        (str(run), ["many"], "at most 24 images, got 25"),
        ("none", pictures(run)[:1], "has no classifier"),
        (str(run), [], "name an image"),
    ]
    capsys.readouterr()
    for word, images, said in cases:
        assert look.main([word, "--explain", *images, "--out", "page.html"]) == 2
        one_line(capsys, "explain", said)
        assert not Path("page.html").exists()
