"""Memory that runs out is nobody's fault: no layer between calls it a mistake in what the user gave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from metaft import cli, plugin
from metaft.after import formats, int8
from metaft.errors import DataError, MetaftError
from metaft.models import drawn, handed, head, published
from metaft.models.functional import check_repeats
from metaft.objective import Objective, check
from metaft.runs import assemble
from metaft.starts import file
from metaft.starts import published as weights_of
from metaft.support.foreign import in_our_words, ran_out
from metaft.targets import torchvision
from metaft.tasks import learn2learn

OUT = [torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
Raise = Callable[..., Any]


def of_a_module(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    model: Any = SimpleNamespace(architecture={}, params={"w": nn.Parameter(torch.zeros(1))}, apply=fail, outputs=2)
    check_repeats(model, (3,))


def of_a_plugin(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    with plugin._blamed("mine.py"):
        fail()


def of_a_file(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "w.pt").write_bytes(b"")
    patch.setattr(torch, "load", fail)
    file.read(str(folder / "w.pt"))


def of_a_data_set(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    """One that loads all of its pictures at once."""

    class Whole:
        def __init__(self, root: str, train: bool = True, target_transform: None = None) -> None:
            fail()

    patch.setattr(torchvision, "_known", lambda: {"Whole": Whole})
    torchvision._opened("Whole", str(folder))


def of_a_picture(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(torchvision, "upright", fail)
    torchvision._picture({"train": [(None, 0)]}, {}, folder / "train" / "0")


def of_an_export(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    one = formats.FORMATS["torch-export"]
    patch.setattr(type(one), "_module", lambda *_: SimpleNamespace(write=fail))
    one.write(None, folder / "m", {})  # pyright: ignore[reportArgumentType]


def of_int8(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    quantisation = pytest.importorskip("onnxruntime.quantization", reason="the extra export is not installed")
    patch.setattr(quantisation, "quantize_static", fail)
    patch.setattr(int8, "untouched", lambda _: [])
    int8.quantise(folder / "m.onnx", folder / "out.onnx", [])  # pyright: ignore[reportArgumentType]


def of_an_exported_file(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    one = formats.FORMATS["torch-export"]
    patch.setattr(type(one), "_module", lambda *_: SimpleNamespace(opened=fail))
    one.opened(folder / "m")


def of_a_loss(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    check(Objective(fail), 2, torch.zeros(3), torch.zeros(1))


def of_a_part_that_is_drawn(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    part = nn.Linear(2, 2)
    patch.setattr(nn.Linear, "reset_parameters", fail)
    drawn.initialise(part, 0)


def of_a_part_that_is_copied(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(handed.copy, "deepcopy", fail)
    handed.copied(nn.Linear(2, 2))


class Kept(nn.Module):
    """A parametrization that cannot be given a value."""

    def __init__(self, fail: Raise) -> None:
        super().__init__()
        self.right_inverse = fail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def of_a_parametrization(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    part, kept = nn.Linear(2, 2), Kept(lambda x: x)
    parametrize.register_parametrization(part, "weight", kept)
    kept.right_inverse = fail
    drawn.initialise(part, 0)


def of_a_head(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x) if isinstance(self.head, nn.Linear) else fail()

    head.why_apart(Net(), "head", torch.zeros(1, 2))


def of_learn2learn(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(learn2learn, "_datasets", lambda: SimpleNamespace(**dict.fromkeys(learn2learn.NAMES.values(), fail)))
    learn2learn.named("cifarfs", folder)


def of_published_weights(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    from metaft.support.vision import models

    patch.setattr(models.ResNet18_Weights.DEFAULT.__class__, "get_state_dict", fail)
    weights_of.from_torchvision("resnet18", None)


def of_timms_weights(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    pytest.importorskip("timm", reason="the extra vision is not installed")
    timm = published.timm()
    made = timm.create_model
    patch.setattr(timm, "create_model", lambda *a, **k: fail() if k.get("pretrained") else made(*a, **k))
    weights_of.from_timm("resnet18", None)


def of_a_size(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    module[0].register_forward_hook(fail)
    published.headed(module, "mobilenet_v2", 2, (3, 8, 8))


def of_a_precision(fail: Raise, patch: pytest.MonkeyPatch, folder: Path) -> None:
    model: Any = SimpleNamespace(params={"w": nn.Parameter(torch.zeros(1))}, apply=fail)
    patch.setattr(assemble, "in_bf16", lambda model: model)
    settings: Any = SimpleNamespace(compute=SimpleNamespace(precision="bf16"))
    assemble._computing_as(model, settings, None, (3,))


@pytest.mark.parametrize("error", OUT, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "through",
    [
        of_a_module,
        of_a_plugin,
        of_a_file,
        of_a_data_set,
        of_a_picture,
        of_an_export,
        of_int8,
        of_an_exported_file,
        of_a_loss,
        of_a_part_that_is_drawn,
        of_a_part_that_is_copied,
        of_a_parametrization,
        of_a_head,
        of_learn2learn,
        of_published_weights,
        of_timms_weights,
        of_a_size,
        of_a_precision,
    ],
    ids=lambda each: each.__name__,
)
def test_it_passes_as_it_is(
    through: Callable[[Raise, pytest.MonkeyPatch, Path], None],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        through(fail, monkeypatch, tmp_path)
    assert caught.value is error


@pytest.mark.parametrize("error", [*OUT, type("Foreign", (Exception,), {})("std::bad_alloc")])
def test_a_command_says_so_in_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever class a library has for it: onnxruntime's is an Exception alone."""

    def command(_: object) -> None:
        raise error

    status = cli.guarded(command, [], smaller="less")
    said = capsys.readouterr().err
    assert status == 1 and said.startswith("metaft: error: not enough memory (") and said.endswith("; try less\n")


def test_another_error_is_no_such_thing() -> None:
    def command(_: object) -> None:
        raise ValueError("odd")

    assert not ran_out(ValueError("odd"))
    with pytest.raises(ValueError, match="odd"):
        cli.guarded(command, [], smaller="less")


def test_errors_of_other_code_are_in_our_words_but_for_a_full_memory() -> None:
    class Odd(ValueError):
        pass

    def raised(error: BaseException, **how: Any) -> BaseException:
        with pytest.raises(BaseException) as caught, in_our_words("field: it fails", **how):  # noqa: PT011
            raise error
        return caught.value

    said = raised(Odd("one\n  two"))
    assert (type(said), str(said)) == (MetaftError, "field: it fails (Odd: one two)")
    assert isinstance(said.__cause__, Odd)
    for kept in (MetaftError("ours"), MemoryError(), RuntimeError("bad_alloc"), KeyboardInterrupt()):
        assert raised(kept) is kept
    odd = Odd("so")
    assert raised(odd, passing=(Odd,)) is odd
    with pytest.raises(DataError, match=r"^data: so$"), in_our_words(lambda error: DataError(f"data: {error}")):
        raise odd
