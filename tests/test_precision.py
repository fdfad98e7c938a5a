"""Precision and memory: what a model computes in, and what an inner loop keeps."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
from helpers import images, in_float64, pool, rounded_alike
from torch import nn

from metaft import algorithms, engines, meta_train, models, outer
from metaft.errors import MetaftError, MetaftWarning
from metaft.models import conv4
from metaft.models import recomputed as module
from metaft.models.functional import plain_operations
from metaft.models.precision import in_bf16, lacks_bf16, matrix_units
from metaft.models.recomputed import recomputed
from metaft.runs import assemble as assembling
from metaft.runs import report
from metaft.runs.assemble import assemble
from metaft.runs.compute import engine_for
from metaft.runs.folder import read_rows
from metaft.types import Params

MEMBERS: list[tuple[str, dict[str, Any]]] = [
    ("maml", {"inner_lr": 0.1, "inner_steps": 3}),
    ("maml", {"inner_lr": 0.1, "inner_steps": 2, "norm": "inductive"}),
    ("fomaml", {"inner_steps": 2}),
    ("anil", {"inner_steps": 2, "inner_augment": "shift"}),  # otherwise its body is not in the inner loop
    ("boil", {"inner_lr": 0.1}),
    ("meta-sgd", {"inner_lr": 0.1, "inner_steps": 2}),
    ("proto-maml", {"inner_steps": 2}),
    ("maml++", {"inner_steps": 2}),
    ("meta-curvature", {"inner_lr": 0.1}),
    ("unicorn-maml", {"inner_lr": 0.1, "inner_steps": 2}),
    ("cavia", {"inner_steps": 2}),
    ("imaml", {"inner_lr": 0.1, "strength": 5.0}),
]


@pytest.fixture(autouse=True)
def _some_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of which nothing is said, whatever this one has."""
    monkeypatch.setattr(assembling, "lacks_bf16", lambda: False)


def gradient(algorithm: algorithms.Algorithm, engine: str, chunk: int | None, data: Any) -> outer.MetaGradient:
    meta, state = algorithm.init(0)
    with engines.engine(engine, threads=1, chunk=chunk) as mapped:
        return outer.meta_gradient(mapped, algorithm, meta, state, data)


@pytest.fixture
def derivatives(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a derivative was made, to know that something was computed anew."""
    made, real = [0], module._derivative

    def counting(*arguments: Any) -> Any:
        made[0] += 1
        return real(*arguments)

    monkeypatch.setattr(module, "_derivative", counting)
    return made


@pytest.mark.filterwarnings("ignore::metaft.MetaftWarning")  # iMAML's, of small models' curvature
@pytest.mark.parametrize(("engine", "chunk"), [("vmap", None), ("threads", 1)])
@pytest.mark.parametrize("model", ["conv4", "conv4-pool", "mlp"])
@pytest.mark.parametrize(("name", "hyper"), MEMBERS)
def test_recomputed_inner_steps_give_the_same_in_float64(
    name: str, hyper: dict[str, Any], model: str, engine: str, chunk: int | None, derivatives: list[int]
) -> None:
    made, data = scenarios.model(model), scenarios.episodes(tasks=3)
    with plain_operations():  # as on a GPU; threads of their own do without, and have the fused operation
        expected, found = (
            gradient(algorithms.build(name, each, hyper), engine, chunk, data) for each in (made, recomputed(made))
        )
    assert scenarios.relative_error(found.grads, expected.grads) < 1e-11
    assert found.metrics == pytest.approx(expected.metrics)
    assert (derivatives[0] == 0) == (name == "fomaml"), "first order has nothing to compute anew"


@pytest.mark.parametrize("engine", ["vmap", "threads"])
def test_recomputed_steps_drop_what_the_plain_ones_drop(engine: str, derivatives: list[int]) -> None:
    """Masks follow from a key that is not an argument of the loss, and from the step in which the loss is first met."""
    made = models.build("conv4", ways=3, shape=scenarios.SHAPE, width=4, seed=1, dropout=0.3, dtype=torch.float64)
    data, hyper = scenarios.episodes(tasks=3), {"inner_lr": 0.1, "inner_steps": 3}
    plain, again = (
        gradient(algorithms.build("maml", each, hyper), engine, 1 if engine == "threads" else None, data)
        for each in (made, recomputed(made))
    )
    assert scenarios.relative_error(again.grads, plain.grads) < 1e-11
    assert derivatives[0] > 0
    without = models.build("conv4", ways=3, shape=scenarios.SHAPE, width=4, seed=1, dtype=torch.float64)
    kept = gradient(algorithms.build("maml", without, hyper), engine, None, data)
    assert scenarios.relative_error(again.grads, kept.grads) > 1e-3, "nothing was dropped"


MEMORY = """
import re, sys, torch
from metaft import algorithms, engines, models, outer
from metaft.models.functional import plain_operations
from metaft.models.recomputed import recomputed
from metaft.types import Episode

def peak():  # of getrusage a process inherits what the one that started it had
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

def step(steps, model):
    algorithm = algorithms.maml(model, inner_lr=0.01, inner_steps=steps)
    y = torch.arange(5).expand(2, 5)
    data = Episode(torch.rand(2, 5, 1, 28, 28), y, torch.rand(2, 5, 1, 28, 28), y, y, torch.arange(2))
    with plain_operations(), engines.engine("vmap") as engine:
        outer.meta_gradient(engine, algorithm, *algorithm.init(0), data)

model = models.build("conv4", ways=5, shape=(1, 28, 28), width=32, seed=0)
step(0, model)
before = peak()
if sys.argv[1] == "plain":
    step(10, model)
else:
    step(100, recomputed(model))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts resident memory in KiB")
def test_a_hundred_recomputed_steps_fit_where_ten_plain_ones_do() -> None:
    used = {}
    for kind in ("plain", "recomputed"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, kind],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
            env={"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(Path(models.__file__).parents[2])},
        )
        used[kind] = int(done.stdout)
    assert used["plain"] > 20_000, "too little to tell"
    assert used["recomputed"] < 1.5 * used["plain"], used


@pytest.mark.parametrize("engine", ["vmap", "threads"])
@pytest.mark.parametrize("model", ["conv4", "mlp"])
def test_bf16_is_near_fp32_and_keeps_gradients_in_fp32(model: str, engine: str) -> None:
    made, data = scenarios.model(model, width=8, dtype=torch.float32), scenarios.episodes(dtype=torch.float32)
    exact, short = (gradient(algorithms.maml(each, inner_lr=0.01), engine, 2, data) for each in (made, in_bf16(made)))
    assert {g.dtype for g in short.grads.values()} == {torch.float32}
    assert 1e-5 < distance(short.grads, exact.grads) < 0.2
    assert short.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.05)


def distance(found: Params, expected: Params) -> float:
    apart, norm = (
        torch.cat([v.reshape(-1) for v in values]).norm()
        for values in ([found[k] - expected[k] for k in expected], expected.values())
    )
    return float(apart / norm)


def test_a_fused_loss_stays_fused_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = scenarios.model("conv4", dtype=torch.float32), scenarios.episodes(dtype=torch.float32)
    x, y = data.query_x[0], data.query_y[0]
    value, logits = in_bf16(model).loss(model.params, x, y, "cross_entropy")
    fused_value, fused_logits = model.loss(model.params, x.bfloat16(), y, "cross_entropy")
    assert torch.equal(value, fused_value) and torch.equal(logits, fused_logits)
    kept: list[bool] = []
    monkeypatch.setattr(conv4, "conv4_loss", lambda *_, keep, **__: kept.append(keep) or (value, logits))
    for curvature in (True, False):
        in_bf16(model).loss(model.params, x, y, "cross_entropy", curvature=curvature)
    assert kept == [True, False], "what a second derivative needs"
    with plain_operations():
        composed, _ = in_bf16(model).loss(model.params, x, y, "cross_entropy")
    assert value != composed and float(value) == pytest.approx(float(composed), rel=0.05)


def test_bf16_statistics_are_float32s() -> None:
    """A thousand and a bit has no spread in bfloat16, whose steps are 4 there; sums over it must not be in it."""
    x = (torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 8 + 100).bfloat16()
    norm = models.EpisodeNorm(3)
    found = norm(x).detach()
    assert found.dtype is torch.bfloat16
    assert float((found.double() - norm(x.float()).detach().double()).abs().max()) < 0.02
    mapped = torch.func.vmap(lambda part: torch.func.functional_call(norm, dict(norm.named_parameters()), (part,)))
    assert torch.allclose(mapped(x.unsqueeze(0))[0].detach().float(), found.float(), atol=0.02)


def losses(out: Path, **more: Any) -> list[float]:
    """The rows of a run of two inner steps, each the loss of one step of two tasks."""
    meta_train.run(images(out, inner_steps=2, engine="graph", log_every=1, **more), dataset=pool())
    return [row["loss"] for row in read_rows(out / "metrics.jsonl") if row["kind"] == "train"]


def test_a_run_with_recomputed_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_pictures", lambda *_: [])
    with in_float64():
        assert rounded_alike(losses(tmp_path / "b", inner_checkpoint=True), losses(tmp_path / "a"))


def test_a_run_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first loss is that of the same parameters on the same tasks; later ones are those of other parameters."""
    monkeypatch.setattr(report, "draw_pictures", lambda *_: [])
    # At larger rates the two steps decide how far the losses are apart, not the precision.
    long, short = (losses(tmp_path / name, precision=name, inner_lr=0.01) for name in ("fp32", "bf16"))
    # 8 bits, 2^-9 a rounding, some ten in a row.
    assert short[0] == pytest.approx(long[0], rel=0.02)
    assert short[0] != pytest.approx(long[0], rel=1e-5), "that is float32's rounding"
    with pytest.raises(MetaftError, match=r"^precision: .* started with 'bf16', given 'tf32'"):
        meta_train.resume_run(tmp_path / "bf16", images(precision="tf32", inner_steps=2, inner_lr=0.01), dataset=pool())


def test_a_processor_without_bf16_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembling, "lacks_bf16", lacks_bf16)
    said = "precision: this processor has no bf16 units"
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.warns(MetaftWarning, match=said):
        assemble(images(precision="bf16"), dataset=pool())
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assemble(images(precision="bf16"), dataset=pool())  # of which nothing is known
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assemble(images(), dataset=pool())
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assemble(images(precision="bf16"), dataset=pool())


def test_what_cannot_compute_in_bf16_is_one_line() -> None:
    class Scaled(nn.Module):
        scale: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(64))
            self.head = nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.flatten(1) * self.scale)

    with pytest.raises(MetaftError, match=r"^precision: this model cannot compute in bf16"):
        assemble(images(precision="bf16"), dataset=pool(), module=Scaled())


def noted(said: str, is_said: bool) -> Any:
    return pytest.warns(MetaftWarning, match=said) if is_said else contextlib.nullcontext()


@pytest.mark.parametrize("name", ["maml", "anil", "fomaml", "protonet", "reptile"])
def test_recomputed_steps_of_a_member_that_keeps_none_are_a_note(name: str) -> None:
    with noted(rf"^inner_checkpoint: {name} differentiates no inner step", name not in ("maml", "anil")):
        assemble(images(algorithm=name, inner_checkpoint=True), dataset=pool())


def test_tf32_is_switched_for_a_run_and_switched_back() -> None:
    def switches() -> tuple[Any, Any]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = switches()
    for precision, inside in (("tf32", True), ("fp32", False), ("bf16", False)):
        with noted(r"^precision: tf32 is for GPUs; on this CPU it is fp32$", precision == "tf32"):
            parts = assemble(images(precision=precision), dataset=pool())
        with engine_for(parts):
            assert switches() == (inside, inside)
        assert switches() == before
    with pytest.raises(KeyError), matrix_units("tf32"):
        raise KeyError
    assert switches() == before
