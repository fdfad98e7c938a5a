"""Convolutions of tasks with a weight each: both forms are one function, and the faster is chosen and remembered."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
import torch.nn.functional as F
from helpers import SAME_RUN
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from metaft import algorithms, engines, models, outer
from metaft.config import MetaTrainConfig
from metaft.meta_train import resume_run, run
from metaft.models import convolution
from metaft.models.convolution import Form, Shape, TaskConv2d
from metaft.models.functional import plain_operations
from metaft.models.recomputed import recomputed
from metaft.runs import compute
from metaft.runs.snapshot import load_snapshot
from metaft.types import Params

SHAPE = Shape(2, 3, (3, 3), (1, 1), (1, 1), (1, 1), 6, 5, 2, 4, True, False, "torch.float64")


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(convolution, "_known", {})


def always(form: Form) -> Callable[[Shape], Form]:
    return lambda shape: form


# ---- both forms are one function ----------------------------------------------------------------------------------


def layer(**how: Any) -> TaskConv2d:
    made = convolution.task_convolutions(nn.Sequential(nn.Conv2d(2, 3, **how)))[0].double()  # type: ignore[index]
    assert isinstance(made, TaskConv2d)
    return made


@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1)},
        {"kernel_size": 2, "dilation": 2, "padding": 2},
        {"kernel_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
def test_both_forms_are_one_function_to_the_second_derivative(how: dict[str, Any], own: bool) -> None:
    made = layer(**how)
    g = torch.Generator().manual_seed(0)
    tasks = (4,) if own else ()
    params = {k: torch.randn(*tasks, *p.shape, generator=g).double() for k, p in made.named_parameters()}
    x = torch.randn(4, 2, 2, 7, 6, generator=g).double()

    def loss(params: Params, x: Tensor) -> Tensor:
        return torch.func.functional_call(made, params, (x,)).pow(3).sum()

    def of_gradient(params: Params, x: Tensor) -> Tensor:
        in_params, in_x = grad(loss, (0, 1))(params, x)
        return torch.stack([(v**2).sum() for v in (*in_params.values(), in_x)]).sum()

    found = []
    for form in convolution.FORMS:
        with convolution.forms(always(form)):
            dims = (0 if own else None, 0)
            each = [vmap(f, dims)(params, x) for f in (loss, grad(loss, (0, 1)), grad(of_gradient, (0, 1)))]
            found.append(pytree.tree_leaves(each))
    assert len(found[0]) == 1 + 2 * (1 + len(params))
    for grouped, im2col in zip(*found, strict=True):
        assert (grouped - im2col).abs().max() < 1e-12 * grouped.abs().max()


def test_im2col_against_finite_differences() -> None:
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    shape = SHAPE._replace(kernel=(2, 2), stride=(2, 2))
    assert torch.autograd.gradcheck(lambda x, w: convolution.im2col(x, w, None, shape), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: convolution.im2col(x, w, None, shape), (x, w))


def test_layers_that_im2col_does_not_cover_stay_as_they_are() -> None:
    odd = [
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding_mode="circular", padding=1),
    ]
    kinds = [type(part) for part in convolution.task_convolutions(nn.Sequential(*odd, nn.Conv1d(2, 2, 3))).children()]
    assert kinds == [nn.Conv2d] * 3 + [nn.Conv1d]


def member(model: models.Model, **hyper: Any) -> algorithms.Algorithm:
    return algorithms.maml(model, **{"inner_lr": 0.1, "inner_steps": 2, **hyper})


@pytest.mark.parametrize("name", ["conv4", "conv4-pool"])
@pytest.mark.parametrize("change", [lambda m: m, recomputed], ids=["plain", "recomputed"])
def test_the_meta_gradient_is_the_same_in_both_forms(name: str, change: Any) -> None:
    algorithm = member(change(scenarios.model(name)))
    meta, state = algorithm.init(0)
    data, found, used = scenarios.episodes(), {}, []
    with engines.engine("vmap") as engine, plain_operations():
        for form in convolution.FORMS:
            with convolution.forms(lambda shape, form=form: used.append(form) or form):
                found[form] = outer.meta_gradient(engine, algorithm, meta, state, data)
    assert set(used) == set(convolution.FORMS)
    for key, value in found["grouped"].grads.items():
        assert (found["im2col"].grads[key] - value).abs().max() < 1e-10 * value.abs().max().clamp(min=1)
    bits = [not torch.equal(found["im2col"].grads[k], v) for k, v in found["grouped"].grads.items()]
    assert any(bits), "im2col adds up in another order"


def test_what_is_recomputed_keeps_its_form_where_the_context_is_gone() -> None:
    """As in the thread in which a GPU's derivatives are computed."""
    model = recomputed(models.functional(module()))
    params = {k: p.expand(4, *p.shape).clone().requires_grad_() for k, p in model.params.items()}
    data, asked = scenarios.episodes(dtype=torch.float32), []
    with convolution.forms(lambda shape: asked.append(shape) or "im2col"):
        losses = vmap(lambda p, x, y: model.loss(p, x, y, "cross_entropy", curvature=True)[0])(
            params, data.support_x, data.support_y
        )
    before = len(asked)
    torch.autograd.grad(losses.sum(), list(params.values()))
    assert len(asked) > before > 0


# ---- which shapes there are ---------------------------------------------------------------------------------------


def test_the_shapes_of_a_meta_step_tell_own_weights_from_shared_ones_and_data_from_features() -> None:
    algorithm = member(scenarios.model("conv4"), inner_steps=1)
    meta, state = algorithm.init(0)
    with engines.engine("vmap") as engine, plain_operations():
        knobs = algorithm.schedule(0)
        step = outer.task_grad_of(algorithm)
        found = convolution.shapes_of(lambda: engine.sum(step, (meta, state, knobs), scenarios.episodes()))
    support, query = (3 * 2, False), (3 * 3, True)  # the support pass is before the only inner step
    first = (1, 4, (3, 3), (2, 2), (1, 1), (1, 1), 16, 16)
    expected = [
        Shape(*(first if side == 16 else (4, *first[1:6], side, side)), images, 4, own, side == 16, "torch.float64")
        for images, own in (support, query)
        for side in (16, 8, 4, 2)
    ]
    assert list(found) == expected


# ---- the choice ---------------------------------------------------------------------------------------------------


class Clock:
    """A measure with times of its own, which counts what it is asked."""

    def __init__(self, **times: float) -> None:
        self.times, self.asked = times, []

    def __call__(self, shape: Shape, form: Form) -> float:
        self.asked.append((shape, form))
        if self.times[form] < 0:
            raise torch.OutOfMemoryError("no")
        return self.times[form]


@pytest.mark.parametrize(
    ("grouped", "im2col", "expected"),
    [(2.0, 1.0, "im2col"), (1.0, 2.0, "grouped"), (1.0, 0.96, "grouped"), (1.0, 0.94, "im2col"),
     (1.0, -1.0, "grouped"), (-1.0, 1.0, "im2col"), (-1.0, -1.0, "grouped")],
)  # fmt: skip
def test_the_faster_form_is_chosen(grouped: float, im2col: float, expected: str) -> None:
    chosen = convolution.choose([SHAPE], Clock(grouped=grouped, im2col=im2col), machine="m")
    assert chosen == {SHAPE.key: expected}
    form_of = convolution.by_key(chosen)
    assert form_of(SHAPE) == expected and form_of(SHAPE._replace(images=9)) == "grouped"


def test_a_choice_is_measured_once_per_machine_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [SHAPE._replace(**{name: value}) for name, value in (
        ("channels", 9), ("filters", 9), ("kernel", (1, 1)), ("stride", (2, 2)), ("padding", (0, 0)),
        ("dilation", (2, 2)), ("height", 9), ("width", 9), ("images", 9), ("tasks", 9), ("own", False), ("data", True),
        ("dtype", "torch.float32"))]  # fmt: skip
    assert len(others) == len(Shape._fields)
    first, second = Clock(grouped=2, im2col=1), Clock(grouped=1, im2col=2)
    chosen = convolution.choose([SHAPE], first, machine="m")
    assert convolution.choose([SHAPE], second, machine="m") == chosen and not second.asked, "in this process"
    monkeypatch.setattr(convolution, "_known", {})
    assert convolution.choose([SHAPE], second, machine="m") == chosen and not second.asked, "in the next one"
    assert set(convolution.choose([SHAPE, *others], second, machine="m").values()) == {"im2col", "grouped"}
    assert [shape for shape, _ in second.asked[::2]] == others
    assert convolution.choose([SHAPE], second, machine="another") == {SHAPE.key: "grouped"}


@pytest.mark.parametrize("damage", ["", "{", "[1]", "\x00", "other form", "folder"])
def test_a_damaged_cache_is_measured_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convolution.choose([SHAPE], Clock(grouped=2, im2col=1), machine="m")
    monkeypatch.setattr(convolution, "_known", {})
    path = tmp_path / "cache/convolutions.json"
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        text = json.dumps({f"m {SHAPE.key}": "triton"}) if damage == "other form" else damage
        path.write_text(text)
    clock = Clock(grouped=1, im2col=2)
    assert convolution.choose([SHAPE], clock, machine="m") == {SHAPE.key: "grouped"} and len(clock.asked) == 2
    if damage != "folder":
        assert json.loads(path.read_text()) == {f"m {SHAPE.key}": "grouped"}


@pytest.mark.parametrize("shape", [SHAPE, SHAPE._replace(own=False, data=True, stride=(2, 2), dtype="torch.float32")])
@pytest.mark.parametrize("form", convolution.FORMS)
def test_what_is_timed_is_that_form_of_that_shape(shape: Shape, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"grouped": 0, "im2col": 0}
    plain = {"grouped": F.conv2d, "im2col": convolution.im2col}

    def counted(name: Form) -> Any:
        def call(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
            calls[name] += 1
            assert len(x) == shape.images and x.shape[2:] == (6, 5) and w.shape == (3, 2, 3, 3)
            assert str(x.dtype) == str(w.dtype) == shape.dtype
            out = plain[name](x, w, *rest)
            assert out.shape[2:] == ((6, 5) if shape.stride == (1, 1) else (3, 3))
            return out

        return call

    monkeypatch.setattr(convolution.F, "conv2d", counted("grouped"))
    monkeypatch.setattr(convolution, "im2col", counted("im2col"))
    recorded: list[Any] = []
    state = torch.get_rng_state()
    took = convolution.seconds(shape, form, "cpu", record=lambda step: recorded.append(step) or step)
    assert 0 < took < 1 and len(recorded) == 1
    assert {name for name, n in calls.items() if n} == {form}
    assert torch.equal(state, torch.get_rng_state())


# ---- in a run -----------------------------------------------------------------------------------------------------


def settings(path: Path, **changes: Any) -> MetaTrainConfig:
    small = {"iterations": 2, "eval_every": 2, "eval_episodes": 4, "test_episodes": 4, **changes}
    return MetaTrainConfig(
        ways=3,
        shots=1,
        query_shots=2,
        meta_batch=4,
        engine="graph",
        seed=0,
        device="cpu",
        outer_schedule="constant",
        out=str(path),
        **small,
    )


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 7, 3))


def test_on_a_cpu_nothing_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "choose", lambda *given, **more: pytest.fail("timed"))
    run(settings(tmp_path / "r"), dataset=scenarios.noise_pool(), module=module())
    assert "convolutions" not in load_snapshot(tmp_path / "r/checkpoints/last.safetensors").header


@pytest.mark.usefixtures("float64_runs")
@pytest.mark.slow
def test_a_run_trains_in_the_forms_it_chose_and_goes_on_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, last = scenarios.noise_pool(), "checkpoints/last.safetensors"
    run(settings(tmp_path / "plain", iterations=4), dataset=pool, module=module())
    monkeypatch.setattr(compute, "times_convolutions", lambda *given: True)
    clock = Clock(grouped=2.0, im2col=1.0)
    monkeypatch.setattr(convolution, "seconds", lambda shape, form, device, record: clock(shape, form))
    used: list[Shape] = []
    plain = convolution.im2col
    monkeypatch.setattr(convolution, "im2col", lambda *given: used.append(given[-1]) or plain(*given))
    whole = settings(tmp_path / "whole", iterations=4)
    run(whole, dataset=pool, module=module())
    assert "convolutions: im2col for 2 layer shapes" in capsys.readouterr().err
    assert {(s.images, s.own, s.data) for s in used} == {(3, False, True), (6, True, True)}
    run(settings(tmp_path / "r"), dataset=pool, module=module())
    monkeypatch.setattr(convolution, "_known", {})
    (tmp_path / "cache/convolutions.json").unlink()
    asked = len(clock.asked)
    clock.times = {"grouped": 1.0, "im2col": 2.0}  # what another day would choose
    resume_run(tmp_path / "r", dataclasses.replace(whole, out=None), dataset=pool, module=module())
    assert len(clock.asked) == asked
    found, expected, other = (load_snapshot(tmp_path / n / last) for n in ("r", "whole", "plain"))
    assert found.header["convolutions"] == expected.header["convolutions"]
    for key, value in expected.meta.items():
        assert torch.equal(found.meta[key], value)
        assert (other.meta[key] - value).abs().max() < SAME_RUN


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("form", [*convolution.FORMS, "chosen"])
def test_recorded_steps_in_each_form_are_the_cpus_in_float64(form: Any) -> None:
    from test_static import Wide, apart, begun, settings, taken, walked

    from metaft.outer.static import StaticSteps, recorded

    config = settings()
    made = member(scenarios.model("conv4"))
    expected, _ = walked(made, config)
    on_gpu = models.build("conv4", ways=3, shape=scenarios.SHAPE, width=4, seed=1, dtype=torch.float64, device="cuda")
    algorithm = member(on_gpu)
    start = begun(made, "cuda")
    data = scenarios.noise_pool(classes=30, per_class=6).to("cuda")
    there = Wide(data.source(ways=3, shots=1, query_shots=2, rotate=True), "cuda")
    device = torch.device("cuda")
    with engines.engine("graph", device="cuda") as engine:
        shared = (start.meta, start.state, algorithm.schedule(0))
        step = outer.task_grad_of(algorithm)
        shapes = convolution.shapes_of(lambda: engine.sum(step, shared, there.episodes(0, "train", range(4))))
        assert len(shapes) > 4

        def measure(shape: Shape, form: Form) -> float:
            return convolution.seconds(shape, form, device, record=lambda run: recorded(run, device, said=False))

        chosen = convolution.by_key(convolution.choose(shapes, measure, machine="m"))
        with convolution.forms(chosen if form == "chosen" else always(form)):
            steps = StaticSteps(config, engine, algorithm, there, start)  # type: ignore[arg-type]
            taken(steps, config)
    assert getattr(steps._run, "__name__", "") == "replay", "nothing was recorded"
    assert apart({k: v.cpu() for k, v in steps.meta.items()}, expected.meta) < 1e-8
