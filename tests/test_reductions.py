"""Members of the family against each other and against the paper's equations, in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
import torch.nn.functional as F
from helpers import images, pool
from torch import Tensor, nn

from metaft import algorithms, engines, inner, models, outer
from metaft.algorithms import ALGORITHMS, Algorithm
from metaft.algorithms.cavia import MAP
from metaft.algorithms.maml_plus_plus import LATER
from metaft.algorithms.meta_curvature import MODES
from metaft.algorithms.meta_sgd import RATE
from metaft.errors import MetaftError
from metaft.meta_train import run
from metaft.models import Model
from metaft.runs.folder import read_rows
from metaft.types import NORMS, Episode, Norm, Params

Moment = tuple[Tensor, Tensor]

every_norm = pytest.mark.parametrize("norm", NORMS)
every_order = pytest.mark.parametrize("first_order", [False, True])
ONE_STEP_OR_THREE = pytest.mark.parametrize("steps", [1, 3])


def gradient(algorithm: Algorithm, data: Episode, meta: Params | None = None) -> Params:
    first, state = algorithm.init(0)
    with engines.engine("threads", threads=1) as engine:
        return outer.meta_gradient(engine, algorithm, first if meta is None else meta, state, data).grads


def adapted(algorithm: Algorithm, task: Episode, steps: int, y: Tensor | None = None) -> Any:
    meta, state = algorithm.init(0)
    y = task.support_y if y is None else y
    ways = task.class_ids.shape[-1]
    return algorithm.adapt(meta, state, task.support_x, y, task.key, ways=ways, steps=steps)


def moved(algorithm: Algorithm, names: Params, steps: int = 1) -> set[str]:
    """Which parameters the inner loop moves."""
    task = scenarios.one(scenarios.episodes())
    before, after = (adapted(algorithm, task, s).params for s in (0, steps))
    return {k for k in names if not torch.equal(before[k], after[k])}


def head_only() -> Model:
    module = nn.Sequential(nn.Flatten(), nn.Linear(scenarios.SHAPE[1] * scenarios.SHAPE[2], 3)).double()
    return models.functional(models.initialise(module, 3))


def descent_reference(
    logits: Callable[[Params, Tensor], Tensor],
    start: Callable[[Params, Episode], Params],
    meta: Params,
    data: Episode,
    *,
    names: set[str],
    lr: float,
    steps: int,
    first_order: bool,
) -> Params:
    """The meta-gradient by torch.func and autograd alone, with `names` moving in the inner loop."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in meta.items()}
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(data.key)):
        task = scenarios.one(data, i)
        fast = start(leaves, task)
        for _ in range(steps):
            still = {k: v for k, v in fast.items() if k not in names}

            def loss(moving: Params, still: Params = still, task: Episode = task) -> Tensor:
                return F.cross_entropy(logits({**still, **moving}, task.support_x), task.support_y)

            grads = torch.func.grad(loss)({k: fast[k] for k in names})
            fast = {**fast, **{k: fast[k] - lr * (g.detach() if first_order else g) for k, g in grads.items()}}
        total = total + F.cross_entropy(logits(fast, task.query_x), task.query_y)
    (total / len(data.key)).backward()
    return {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}


def conv4_features(params: Params, x: Tensor) -> Tensor:
    """Conv-4's features, by a head that passes them on."""
    width = params["blocks.10.weight"].shape[0]
    eye = {"head.weight": torch.eye(width, dtype=x.dtype), "head.bias": torch.zeros(width, dtype=x.dtype)}
    return scenarios.conv4_reference({**params, **eye}, x)


def means_of(params: Params, task: Episode) -> Tensor:
    features = conv4_features(params, task.support_x)
    return torch.stack([features[task.support_y == n].mean(0) for n in range(task.class_ids.shape[-1])])


def from_prototypes(params: Params, task: Episode) -> Params:
    c = means_of(params, task)
    return {**params, "head.weight": 2 * c, "head.bias": -(c**2).sum(1)}


def from_one_row(params: Params, task: Episode) -> Params:
    ways = task.class_ids.shape[-1]
    return {k: p.repeat(ways, *[1] * (p.dim() - 1)) if k.startswith("head.") else p for k, p in params.items()}


# ---- ANIL and BOIL ------------------------------------------------------------------------------------------------


@ONE_STEP_OR_THREE
@every_order
@pytest.mark.parametrize("name", ["anil", "boil"])
def test_anil_and_boil_against_plain_autograd(name: str, first_order: bool, steps: int) -> None:
    model, data = scenarios.model(), scenarios.episodes()
    head = {"head.weight", "head.bias"}
    expected = descent_reference(
        scenarios.conv4_reference, lambda p, task: p, model.params, data,
        names=head if name == "anil" else set(model.params) - head, lr=0.3, steps=steps, first_order=first_order,
    )  # fmt: skip
    member = ALGORITHMS[name](model, inner_lr=0.3, inner_steps=steps, first_order=first_order)
    assert scenarios.relative_error(gradient(member, data), expected) < 1e-12


@every_order
@every_norm
def test_anil_of_nothing_but_a_head_is_maml(first_order: bool, norm: Norm) -> None:
    model, data = head_only(), scenarios.episodes()
    hyper: dict[str, Any] = {"inner_lr": 0.05, "inner_steps": 3, "first_order": first_order, "norm": norm}
    found, expected = (gradient(make(model, **hyper), data) for make in (algorithms.anil, algorithms.maml))
    assert scenarios.relative_error(found, expected) < 1e-14
    other = gradient(algorithms.maml(model, **{**hyper, "inner_steps": 2}), data)
    assert scenarios.relative_error(other, expected) > 1e-2, "a scenario in which the inner loop does not count"


def test_boil_of_nothing_but_a_head_is_refused() -> None:
    with pytest.raises(MetaftError, match=r"boil adapts all but the head, and 1\.bias, 1\.weight leave it nothing"):
        algorithms.boil(head_only())


@pytest.mark.parametrize("adapt_norm", [True, False])
def test_anil_and_boil_part_what_maml_adapts(adapt_norm: bool) -> None:
    model = scenarios.model()
    head = moved(algorithms.anil(model), model.params)
    body = moved(algorithms.boil(model, adapt_norm=adapt_norm), model.params)
    whole = moved(algorithms.maml(model, adapt_norm=adapt_norm), model.params)
    assert head == {"head.weight", "head.bias"}
    assert not head & body
    assert head | body == whole


# ---- Meta-SGD -----------------------------------------------------------------------------------------------------


@ONE_STEP_OR_THREE
@every_order
@every_norm
@pytest.mark.parametrize("adapt_norm", [True, False])
def test_meta_sgd_with_constant_rates_has_mamls_gradient(
    adapt_norm: bool, norm: Norm, first_order: bool, steps: int
) -> None:
    model, data = scenarios.model(), scenarios.episodes()
    hyper: dict[str, Any] = {"inner_lr": 0.3, "inner_steps": steps, "first_order": first_order}
    hyper |= {"adapt_norm": adapt_norm, "norm": norm}
    found = gradient(algorithms.meta_sgd(model, **hyper), data)
    expected = gradient(algorithms.maml(model, **hyper), data)
    assert scenarios.relative_error({k: found[k] for k in model.params}, expected) < 1e-13


def test_meta_sgds_gradient_in_the_rates_of_one_step() -> None:
    """fast = meta - rate * g, so that it is minus the support gradient at meta times the query gradient at fast."""
    model, task = scenarios.model(), scenarios.one(scenarios.episodes())
    g = torch.Generator().manual_seed(4)
    meta, _ = algorithms.meta_sgd(model).init(0)
    rates = {k: 0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in model.params.items()}
    meta |= {k + RATE: rate for k, rate in rates.items()}

    def slope(at: Params, x: Tensor, y: Tensor) -> Params:
        return torch.func.grad(lambda p: F.cross_entropy(scenarios.conv4_reference(p, x), y))(at)

    support = slope(model.params, task.support_x, task.support_y)
    query = slope({k: p - rates[k] * support[k] for k, p in model.params.items()}, task.query_x, task.query_y)
    for order in (False, True):
        found = gradient(algorithms.meta_sgd(model, first_order=order), Episode(*(t[None] for t in task)), meta)
        assert scenarios.relative_error(
            {k: found[k + RATE] for k in rates}, {k: -support[k] * query[k] for k in rates}
        ) < 1e-12  # fmt: skip


def test_meta_sgds_rates_have_names_that_no_parameter_has() -> None:
    class Awkward(nn.Module):
        """Names that a suffix could run into."""

        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Linear(4, 4)
            self.weight = nn.ParameterDict({"rate": nn.Parameter(torch.ones(4))})
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rate(x) * self.weight["rate"])

    model = models.functional(Awkward())
    meta, _ = algorithms.meta_sgd(model, inner_lr=0.25).init(0)
    assert len(meta) == 2 * len(model.params)
    for name, p in model.params.items():
        assert torch.equal(meta[name], p)
        assert torch.equal(meta[name + RATE], torch.full_like(p, 0.25))
    layer = nn.Linear(2, 2)
    with pytest.raises(KeyError, match="already exists"):  # why there is no such name
        layer.add_module("weight", nn.ParameterDict())


# ---- MAML++ -------------------------------------------------------------------------------------------------------

OFF: dict[str, Any] = {"multi_step": 0, "order_annealing": 0, "learned_rates": False, "step_norm": False}


@ONE_STEP_OR_THREE
@every_order
@every_norm
@pytest.mark.parametrize("adapt_norm", [True, False])
def test_maml_plus_plus_with_every_switch_off_is_maml(
    adapt_norm: bool, norm: Norm, first_order: bool, steps: int
) -> None:
    model, data = scenarios.model(), scenarios.episodes()
    hyper: dict[str, Any] = {"inner_lr": 0.3, "inner_steps": steps, "first_order": first_order}
    hyper |= {"adapt_norm": adapt_norm, "norm": norm}
    member, maml = algorithms.maml_plus_plus(model, **hyper, **OFF), algorithms.maml(model, **hyper)
    found, expected = gradient(member, data), gradient(maml, data)
    assert found.keys() == expected.keys()
    assert scenarios.relative_error(found, expected) < 1e-14
    task = scenarios.one(data)
    assert scenarios.relative_error(adapted(member, task, 5).params, adapted(maml, task, 5).params) == 0


@pytest.mark.slow
def test_runs_of_maml_plus_plus_with_every_switch_off_are_mamls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cosine is the outer loop's, and on by default."""
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])
    off = tuple(f"{k}={str(v).lower()}" for k, v in OFF.items())
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, changes in {
        "maml": {"algorithm": "maml", "outer_schedule": "constant"},
        "off": {"algorithm": "maml++", "hyper": off, "outer_schedule": "constant"},
        "cosine": {"algorithm": "maml++", "hyper": off},
    }.items():
        run(
            images(tmp_path / name, inner_lr=0.1, inner_steps=2, adapt_norm=False, iterations=6, **changes),
            dataset=pool(),
        )
        rows[name] = read_rows(tmp_path / name / "metrics.jsonl")
    assert rows["off"] == rows["maml"]
    assert rows["cosine"] != rows["maml"]


@pytest.mark.parametrize("on", [None, "learned_rates", "step_norm", "step_statistics", "multi_step", "order_annealing"])
def test_each_switch_of_maml_plus_plus_alone(on: str | None) -> None:
    """What it adds to `meta`, and that at its first values only the weights and the order change MAML's gradient."""
    model, data = scenarios.model(), scenarios.episodes()
    values = {**OFF, **({} if on is None else {on: 0.5 if on in ("multi_step", "order_annealing") else True})}
    member = algorithms.maml_plus_plus(model, inner_lr=0.3, inner_steps=3, **values)
    found = gradient(member, data)
    added = {"learned_rates": RATE, "step_norm": LATER}.get(on or "")
    assert {k.removeprefix(name) for name in model.params for k in found if k.startswith(name)} == {"", added or ""}
    maml = functools.partial(algorithms.maml, model, inner_lr=0.3, adapt_norm=False)
    expected = gradient(maml(inner_steps=3, first_order=on == "order_annealing"), data)
    summed = {k: g + found[k + LATER].sum(0) if k + LATER in found else g for k, g in found.items() if k in expected}
    if on == "multi_step":
        each = [gradient(maml(inner_steps=steps), data) for steps in (1, 2, 3)]
        assert scenarios.relative_error(each[0], each[2]) > 1e-2
        expected = {k: torch.stack([g[k] for g in each]).mean(0) for k in expected}
    assert scenarios.relative_error(summed, expected) < 1e-13


def test_maml_plus_plus_anneals() -> None:
    member = algorithms.maml_plus_plus(
        scenarios.model(), inner_steps=4, multi_step=0.1, order_annealing=0.5, iterations=1000
    )
    for step, early in ((0, 1.0), (25, 0.75), (100, 0.0), (999, 0.0)):
        expected = torch.tensor([early / 4] * 3 + [1 - 0.75 * early], dtype=torch.float64)
        torch.testing.assert_close(member.schedule(step)["weights"], expected)
    assert [float(member.schedule(step)["order"]) for step in (0, 499, 500, 999)] == [0, 0, 1, 1]


@every_norm
@pytest.mark.parametrize("engine_name", ["threads", "vmap"])
def test_annealed_maml_plus_plus_is_first_then_second_order(engine_name: str, norm: Norm) -> None:
    model, data = scenarios.model(), scenarios.episodes()
    hyper: dict[str, Any] = {"inner_lr": 0.3, "inner_steps": 3, "norm": norm, "inner_optimizer": "momentum"}
    member = algorithms.maml_plus_plus(model, **hyper, iterations=10, order_annealing=0.5)
    meta, state = member.init(0)
    for step, first_order in ((4, True), (5, False)):
        static = algorithms.maml_plus_plus(model, **hyper, iterations=10, order_annealing=0, first_order=first_order)
        with engines.engine(engine_name) as engine:
            found, expected = (
                outer.meta_gradient(engine, a, meta, state, data, step=step).grads for a in (member, static)
            )
        assert scenarios.relative_error(found, expected) < 1e-13


def conv4_normalised(params: Params, x: Tensor, given: list[Moment] | None = None) -> tuple[Tensor, list[Moment]]:
    """Conv-4 with its normalisation written out: by the batch's own moments, or by `given` ones; and those it met."""
    met: list[Moment] = []
    for i in range(0, 12, 3):
        x = F.conv2d(x, params[f"blocks.{i}.weight"], stride=2, padding=1)
        met.append((x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)))
        mean, var = (m[:, None, None] for m in (met if given is None else given)[i // 3])
        scale, shift = (params[f"blocks.{i + 1}.{kind}"][:, None, None] for kind in ("weight", "bias"))
        x = F.relu((x - mean) / (var + 1e-5).sqrt() * scale + shift)
    return F.linear(x.mean((2, 3)), params["head.weight"], params["head.bias"]), met


@pytest.mark.parametrize("multi_step", [0.1, 0.0], ids=["every-step", "last-step"])
@pytest.mark.parametrize("statistics", [False, True], ids=["", "statistics"])
@every_norm
def test_maml_plus_plus_against_plain_autograd(norm: Norm, statistics: bool, multi_step: float) -> None:
    """Rates, scales and shifts, and running moments, that differ from step to step: loss and gradient.

    Queries after a step are normalised by their own moments, by the support set's at the weights of that step, or by
    the running ones of that step, which are constants.
    """
    model, data, steps = scenarios.model(), scenarios.episodes(tasks=2), 3
    member = algorithms.maml_plus_plus(
        model, inner_steps=steps, iterations=100, order_annealing=0.02, norm=norm, step_statistics=statistics,
        multi_step=multi_step,
    )  # fmt: skip
    g = torch.Generator().manual_seed(4)
    meta, state = (
        {k: p + 0.1 * torch.rand(p.shape, generator=g, dtype=p.dtype) for k, p in part.items()}
        for part in member.init(0)
    )
    leaves = {k: v.clone().requires_grad_() for k, v in meta.items()}
    weights = [0.7 / 3, 0.7 / 3, 0.3 + 0.7 / 3] if multi_step else [0, 0, 1]  # 3 of the 10 steps over which they fall

    def norms(step: int) -> Params:
        return {k: leaves[k] if step == 0 else leaves[k + LATER][step - 1] for k in model.norm}

    total = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        task = scenarios.one(data, i)
        fast = {k: leaves[k] for k in model.params if k not in model.norm}
        for step in range(steps):
            loss = F.cross_entropy(conv4_normalised({**fast, **norms(step)}, task.support_x)[0], task.support_y)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {k: p - leaves[k + RATE][step] * d for (k, p), d in zip(fast.items(), grads, strict=True)}
            now, moments = {**fast, **norms(step)}, None
            if norm == "inductive":
                moments = conv4_normalised(now, task.support_x)[1]
                if statistics:
                    row = {k: v[step + 1] for k, v in state.items()}
                    moments = [(row[f"{n:03d}.mean"], row[f"{n:03d}.var"]) for n in range(4)]
            logits, _ = conv4_normalised(now, task.query_x, moments)
            total = total + weights[step] * F.cross_entropy(logits, task.query_y) / 2
    total.backward()
    with engines.engine("threads", threads=1) as engine:
        found = outer.meta_gradient(engine, member, meta, state, data, step=3)
    expected = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}
    assert scenarios.relative_error(found.grads, expected) < 1e-12
    assert found.metrics["loss"] == pytest.approx(float(total.detach()), rel=1e-12)


def test_steps_beyond_the_trained_ones_repeat_the_last() -> None:
    model, task = scenarios.model(), scenarios.one(scenarios.episodes())
    short, long = (algorithms.maml_plus_plus(model, inner_steps=k) for k in (2, 5))
    g = torch.Generator().manual_seed(4)
    meta = {k: p + 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in short.init(0)[0].items()}
    repeated = {
        k: torch.cat([v, v[-1:].expand(3, *v.shape[1:])]) if k.endswith((RATE, LATER)) else v for k, v in meta.items()
    }
    args = (task.support_x, task.support_y, task.key)
    found, expected = (
        member.adapt(at, {}, *args, ways=3, steps=5, trajectory=True)
        for member, at in ((short, meta), (long, repeated))
    )
    assert scenarios.relative_error(found.params, expected.params) == 0
    for norm in NORMS:
        assert torch.equal(*(short.predict(inner.at_step(f, 5), task.query_x, norm) for f in (found, expected)))


@every_norm
def test_step_statistics_are_running_means_that_inductive_predictions_take(norm: Norm) -> None:
    model, data = scenarios.model(), scenarios.episodes()
    member = algorithms.maml_plus_plus(model, inner_steps=2, step_statistics=True, norm=norm)
    plain = algorithms.maml_plus_plus(model, inner_steps=2, norm=norm)
    meta, state = member.init(0)
    g = torch.Generator().manual_seed(4)
    noise = {k: torch.rand(v.shape, generator=g, dtype=v.dtype) for k, v in state.items()}
    state = {k: v + noise[k] * (1 if k.endswith("var") else -1) for k, v in state.items()}  # as after some steps
    with engines.engine("threads", threads=1) as engine:
        result = outer.meta_gradient(engine, member, meta, state, data)
    every = [
        plain.adapt(meta, {}, t.support_x, t.support_y, t.key, ways=3, steps=2, trajectory=True).moments
        for t in (scenarios.one(data, i) for i in range(4))
    ]
    for layer in range(4):
        for i, name in enumerate(("mean", "var")):
            mean = torch.stack([task[layer][i] for task in every]).mean(0)
            expected = 0.9 * state[f"{layer:03d}.{name}"] + 0.1 * mean
            torch.testing.assert_close(result.state[f"{layer:03d}.{name}"], expected, rtol=0, atol=1e-13)
    task = scenarios.one(data)
    args = (task.support_x, task.support_y, task.key)
    for steps in (0, 2, 4):
        fast = member.adapt(meta, result.state, *args, ways=3, steps=steps)
        rows = {k: v[min(steps, 2)] for k, v in result.state.items()}
        moments = tuple((rows[f"{layer:03d}.mean"], rows[f"{layer:03d}.var"]) for layer in range(4))
        expected = model.apply(fast.params, task.query_x, moments)
        torch.testing.assert_close(member.predict(fast, task.query_x, "inductive"), expected, rtol=0, atol=0)
        own = plain.adapt(meta, {}, *args, ways=3, steps=steps)
        assert torch.equal(*(a.predict(f, task.query_x, "transductive") for a, f in ((member, fast), (plain, own))))
    with pytest.raises(MetaftError, match="step_statistics: needs a model of a known input shape"):
        algorithms.maml_plus_plus(head_only(), step_statistics=True)


def test_maml_plus_plus_has_no_step_norm_that_adapts() -> None:
    with pytest.raises(MetaftError, match="adapt_norm: with step_norm, scales and shifts are learned for each step"):
        algorithms.maml_plus_plus(scenarios.model(), adapt_norm=True)
    with pytest.raises(MetaftError, match="multi_step must be a share of the run, 0 to 1, got 100"):
        algorithms.maml_plus_plus(scenarios.model(), multi_step=100)


# ---- Meta-Curvature -----------------------------------------------------------------------------------------------


@ONE_STEP_OR_THREE
@every_order
@every_norm
@pytest.mark.parametrize("adapt_norm", [True, False])
def test_meta_curvature_with_identity_matrices_is_maml(
    adapt_norm: bool, norm: Norm, first_order: bool, steps: int
) -> None:
    model, data = scenarios.model(), scenarios.episodes()
    hyper: dict[str, Any] = {"inner_lr": 0.3, "inner_steps": steps, "first_order": first_order}
    hyper |= {"adapt_norm": adapt_norm, "norm": norm}
    found = gradient(algorithms.meta_curvature(model, **hyper), data)
    expected = gradient(algorithms.maml(model, **hyper), data)
    assert scenarios.relative_error({k: found[k] for k in model.params}, expected) < 1e-13


def test_meta_curvature_multiplies_the_gradient_along_each_mode() -> None:
    """Entry by entry, by einsum over the convolution's four axes; and the matrices' own gradient is not 0."""
    model, task = scenarios.model(), scenarios.one(scenarios.episodes())
    member = algorithms.meta_curvature(model, inner_lr=0.3)
    g = torch.Generator().manual_seed(4)
    meta = {k: p + 0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in member.init(0)[0].items()}
    start = {k: meta[k] for k in model.params}
    slope = torch.func.grad(
        lambda p: F.cross_entropy(scenarios.conv4_reference(p, task.support_x), task.support_y)
    )(start)  # fmt: skip
    fast = member.adapt(meta, {}, task.support_x, task.support_y, task.key, ways=3, steps=1).params
    name = "blocks.3.weight"
    filters = meta[f"{name}.filter"].view(3, 3, 3, 3)
    parts = (meta[f"{name}.out"], meta[f"{name}.in"], filters, slope[name])
    moved = torch.einsum("oa,ib,hwcd,abcd->oihw", *parts)
    torch.testing.assert_close(fast[name], start[name] - 0.3 * moved, rtol=0, atol=1e-13)
    head = slope["head.weight"] @ meta["head.weight.in"].T
    torch.testing.assert_close(fast["head.weight"], start["head.weight"] - 0.3 * head, rtol=0, atol=1e-13)
    bias = meta["blocks.4.bias.out"] @ slope["blocks.4.bias"]
    torch.testing.assert_close(fast["blocks.4.bias"], start["blocks.4.bias"] - 0.3 * bias, rtol=0, atol=1e-13)
    for name in ("head.bias", "head.weight"):
        assert f"{name}.out" not in meta, "classes have no order that a matrix could learn"
    torch.testing.assert_close(fast["head.bias"], start["head.bias"] - 0.3 * slope["head.bias"], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["maml", "anil", "boil", "meta-sgd", "meta-curvature"])
def test_a_step_knows_only_where_it_begins(name: str) -> None:
    """Three steps of plain descent are one step, three times; rates and matrices are not what they began as."""
    task, member = scenarios.one(scenarios.episodes()), algorithms.ALGORITHMS[name](scenarios.model(), inner_lr=0.3)
    g = torch.Generator().manual_seed(4)
    meta = {k: p + 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in member.init(0)[0].items()}

    def after(steps: int, at: Params) -> Params:
        return member.adapt(at, {}, task.support_x, task.support_y, task.key, ways=3, steps=steps).params

    at = meta
    for _ in range(3):
        at = {**at, **after(1, at)}
    found = after(3, meta)
    assert scenarios.relative_error(found, {k: at[k] for k in found}) < 1e-13


# ---- Proto-MAML ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3])
@every_order
def test_proto_maml_against_plain_autograd(first_order: bool, steps: int) -> None:
    model, data = scenarios.model(), scenarios.episodes()
    body = {k: p for k, p in model.params.items() if k not in model.head}
    expected = descent_reference(
        scenarios.conv4_reference, from_prototypes, body, data,
        names=set(model.params), lr=0.1, steps=steps, first_order=first_order,
    )  # fmt: skip
    member = algorithms.proto_maml(model, inner_lr=0.1, inner_steps=steps, first_order=first_order)
    assert scenarios.relative_error(gradient(member, data), expected) < 1e-12
    # Without torch.func, autograd sees the head as a function of the body; an inner gradient is to know nothing of it.
    task_loss = member.task_loss
    assert task_loss is not None
    leaves = {k: p.clone().requires_grad_() for k, p in body.items()}
    tasks = (scenarios.one(data, i) for i in range(len(data.key)))
    total = torch.stack([task_loss(leaves, {}, {}, task)[0] for task in tasks]).mean()
    plain = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert scenarios.relative_error(plain, expected) < 1e-12


@every_norm
@pytest.mark.parametrize("change", [{"inner_steps": 0}, {"inner_lr": 0.0, "inner_steps": 2}])
def test_proto_maml_that_takes_no_steps_is_protonet(change: dict[str, Any], norm: Norm) -> None:
    model, data = scenarios.model(), scenarios.episodes()
    member, protonet = algorithms.proto_maml(model, norm=norm, **change), algorithms.protonet(model, norm=norm)
    assert scenarios.relative_error(gradient(member, data), gradient(protonet, data)) < 1e-12
    task = scenarios.one(data)
    found, expected = (
        a.predict(adapted(a, task, a.inner_steps), task.query_x, norm).log_softmax(-1) for a in (member, protonet)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", scenarios.RENAMED, ids=["round", "swapped"])
@every_norm
@pytest.mark.parametrize("name", ["proto-maml", "unicorn-maml"])
def test_members_without_rows_of_their_own_are_equivariant_to_a_permutation_of_labels(
    name: str, norm: Norm, order: Tensor
) -> None:
    member = ALGORITHMS[name](scenarios.model(), norm=norm)
    task = scenarios.one(scenarios.episodes())
    plain = member.predict(adapted(member, task, 3), task.query_x, norm)
    renamed = member.predict(adapted(member, task, 3, order[task.support_y]), task.query_x, norm)
    torch.testing.assert_close(renamed[:, order], plain, rtol=0, atol=1e-12)
    assert float((renamed - plain).abs().max()) > 1e-2


@pytest.mark.parametrize("ways", [2, 7])
@pytest.mark.parametrize(("name", "start"), [("proto-maml", from_prototypes), ("unicorn-maml", from_one_row)])
def test_members_without_rows_of_their_own_learn_and_test_at_any_ways(name: str, start: Any, ways: int) -> None:
    model = scenarios.model(ways=3)
    data = scenarios.episodes(ways=ways)
    member = ALGORITHMS[name](model, inner_lr=0.1, inner_steps=2)
    assert member.any_ways
    task = scenarios.one(data)
    assert member.predict(adapted(member, task, 5), task.query_x, "inductive").shape == (3 * ways, ways)
    expected = descent_reference(
        scenarios.conv4_reference, start, member.init(0)[0], data,
        names=set(model.params), lr=0.1, steps=2, first_order=False,
    )  # fmt: skip
    assert scenarios.relative_error(gradient(member, data), expected) < 1e-12


def test_proto_maml_needs_a_bias() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.Linear(4, 3, bias=False))
    with pytest.raises(MetaftError, match=r"needs a head with weight and bias, and this one has weight$"):
        algorithms.proto_maml(models.functional(module))


# ---- UNICORN-MAML -------------------------------------------------------------------------------------------------


def at_equal_rows(loss: Any, first_order: bool) -> tuple[Params, Params]:
    """UNICORN-MAML's gradient after three inner steps, and MAML's where all its rows begin alike."""
    model, data = scenarios.model(), scenarios.episodes()
    if loss == "mse":
        ones = torch.eye(3, dtype=torch.float64)
        data = data._replace(support_y=ones[data.support_y], query_y=ones[data.query_y])
    hyper: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 3, "first_order": first_order, "loss": loss}
    unicorn = algorithms.unicorn_maml(model, **hyper)
    start = from_one_row(unicorn.init(0)[0], scenarios.one(data))
    return gradient(unicorn, data), gradient(algorithms.maml(model, **hyper), data, start)


@every_order
def test_unicorns_row_has_the_sum_of_mamls_gradients_at_equal_rows(first_order: bool) -> None:
    """With squared errors, which see what all rows have in common."""
    found, rows = at_equal_rows("mse", first_order)
    expected = {k: g.sum(0, keepdim=True) if k.startswith("head.") else g for k, g in rows.items()}
    assert scenarios.relative_error(found, expected) < 1e-13
    assert all(float(found[k].abs().max()) > 1e-3 for k in ("head.weight", "head.bias"))


def test_unicorns_row_learns_through_the_inner_steps() -> None:
    (second, _), (first, _) = (at_equal_rows("mse", order) for order in (False, True))
    for k in ("head.weight", "head.bias"):
        assert float((second[k] - first[k]).abs().max()) > 0.1 * float(first[k].abs().max())


@every_order
def test_unicorns_row_learns_nothing_from_cross_entropy(first_order: bool) -> None:
    """Which is the same whatever is added to all logits of an image: MAML's rows have gradients whose sum is 0. The
    body is that of MAML with such a head."""
    found, rows = at_equal_rows("cross_entropy", first_order)
    for k in ("head.weight", "head.bias"):
        assert float(found[k].abs().max()) < 1e-14 and float(rows[k].abs().max()) > 1e-3
    body = [{k: g for k, g in grads.items() if not k.startswith("head.")} for grads in (found, rows)]
    assert scenarios.relative_error(*body) < 1e-13


def test_unicorns_first_step_moves_the_head_alone() -> None:
    model = scenarios.model()
    member = algorithms.unicorn_maml(model)
    task = scenarios.one(scenarios.episodes())
    start, first, second = (adapted(member, task, n).params for n in range(3))
    steps = [{k for k in p if float((q[k] - p[k]).abs().max()) > 1e-9} for p, q in ((start, first), (first, second))]
    assert steps[0] == {"head.weight"}, "nor do the biases, since all classes have as many images"
    assert steps[1] == set(model.params)


# ---- CAVIA --------------------------------------------------------------------------------------------------------


def contextual_mlp(params: Params, x: Tensor) -> Tensor:
    """The context beside the input, as the paper has it, from the definition."""
    x = torch.cat([x.flatten(1), params["context"].expand(len(x), -1)], 1)
    first = torch.cat([params["hidden.0.weight"], params["hidden.0.bias" + MAP]], 1)
    h = F.relu(F.linear(x, first, params["hidden.0.bias"]))
    h = F.relu(F.linear(h, params["hidden.2.weight"], params["hidden.2.bias"]))
    return F.linear(h, params["head.weight"], params["head.bias"])


def contextual_conv4(params: Params, x: Tensor) -> Tensor:
    """FiLM behind the third normalisation, from the definition."""
    for i in range(0, 12, 3):
        x = F.conv2d(x, params[f"blocks.{i}.weight"], stride=2, padding=1)
        x = F.batch_norm(x, None, None, params[f"blocks.{i + 1}.weight"], params[f"blocks.{i + 1}.bias"], training=True)
        if i == 6:
            gamma, beta = (params[f"blocks.7.{kind}{MAP}"] @ params["context"] for kind in ("weight", "bias"))
            x = (1 + gamma[:, None, None]) * x + beta[:, None, None]
        x = F.relu(x)
    return F.linear(x.mean((2, 3)), params["head.weight"], params["head.bias"])


@ONE_STEP_OR_THREE
@every_order
@pytest.mark.parametrize(("name", "logits"), [("mlp", contextual_mlp), ("conv4", contextual_conv4)])
def test_cavia_against_plain_autograd(name: str, logits: Any, first_order: bool, steps: int) -> None:
    data = scenarios.episodes()
    member = algorithms.cavia(
        scenarios.model(name), inner_lr=0.8, inner_steps=steps, first_order=first_order, context=3
    )
    expected = descent_reference(
        logits, lambda p, task: {**p, "context": torch.zeros(3, dtype=torch.float64)}, member.init(0)[0], data,
        names={"context"}, lr=0.8, steps=steps, first_order=first_order,
    )  # fmt: skip
    assert scenarios.relative_error(gradient(member, data), expected) < 1e-12


def test_cavias_fast_weights_are_a_plain_models() -> None:
    model, task = scenarios.model(), scenarios.one(scenarios.episodes())
    member = algorithms.cavia(model, context=3)
    fast = adapted(member, task, 2)
    assert fast.params.keys() == model.params.keys()
    assert moved(member, model.params) == {"blocks.7.weight", "blocks.7.bias"}
    torch.testing.assert_close(
        member.predict(fast, task.query_x, "transductive"), scenarios.conv4_reference(fast.params, task.query_x)
    )


def test_cavias_maps_are_drawn_from_the_key() -> None:
    model = scenarios.model("mlp", width=16)
    member = algorithms.cavia(model)
    maps = [member.init(key)[0]["hidden.0.bias" + MAP] for key in (0, 0, 1)]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])
    bound = (6 / 116) ** 0.5
    assert 0.9 * bound < float(maps[0].abs().max()) < bound
    drawn_by_the_key_itself = nn.init.xavier_uniform_(torch.empty(16, 100), generator=torch.Generator().manual_seed(1))
    assert not torch.equal(maps[2], drawn_by_the_key_itself.double()), "the model began with that key's numbers"
    films = algorithms.cavia(scenarios.model()).init(0)[0]
    assert not torch.equal(films["blocks.7.weight" + MAP], films["blocks.7.bias" + MAP])


@pytest.mark.parametrize(("name", "layer"), [("conv4", "blocks.7"), ("conv4-pool", "blocks.9"), ("mlp", "hidden.0")])
def test_where_cavias_context_enters(name: str, layer: str) -> None:
    """The third normalisation, or beside the input."""
    found = algorithms.cavia(scenarios.model(name)).init(0)[0]
    both = {f"{layer}.weight{MAP}", f"{layer}.bias{MAP}"}
    assert {k for k in found if k.endswith(MAP)} == (both if name != "mlp" else {f"{layer}.bias{MAP}"})


def test_cavia_of_a_module_of_ones_own_needs_the_layers_name() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(256, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    model = models.functional(models.initialise(module, 3))
    with pytest.raises(MetaftError, match=r"takes cavia's context into a module of your own, of \['1', '3'\]"):
        algorithms.cavia(model)
    assert moved(algorithms.cavia(model, layer="1"), model.params) == {"1.bias"}


# ---- all of them --------------------------------------------------------------------------------------------------


def has_steps(name: str) -> bool:
    return "inner_steps" in algorithms.hyper_parameters(name)


@pytest.mark.parametrize("change", [{"inner_lr": 0.0, "inner_steps": 3}, {"inner_steps": 0}], ids=["rate", "steps"])
@pytest.mark.parametrize("name", sorted(k for k in ALGORITHMS if k not in ("reptile", "imaml") and has_steps(k)))
def test_without_an_inner_loop_the_meta_gradient_is_the_query_gradient(name: str, change: dict[str, Any]) -> None:
    """At the weights that the inner loop would begin at, and in what they depend on."""
    model, data = scenarios.model(), scenarios.episodes()
    # MAML++ would spread the gradient of scales and shifts over its steps
    member = ALGORITHMS[name](model, **change, **({"step_norm": False} if name == "maml++" else {}))
    found = gradient(member, data)
    learned = {k: p for k, p in member.init(0)[0].items() if k in model.params}
    starts = {"proto-maml": from_prototypes, "unicorn-maml": from_one_row}
    expected = descent_reference(
        scenarios.conv4_reference, starts.get(name, lambda p, task: p), learned, data,
        names=set(), lr=0.0, steps=0, first_order=False,
    )  # fmt: skip
    for k in learned:  # not relative: where all rows are equal, it is 0
        torch.testing.assert_close(found[k], expected[k], rtol=0, atol=1e-13)
    for k, g in found.items():
        if k.endswith(RATE):
            assert (float(g.abs().max()) > 0) == (change["inner_steps"] > 0)
        elif k not in learned:  # of a context that stays at 0, or a matrix that nothing is multiplied by
            assert k.endswith((MAP, *MODES)) and not g.any()


# CAVIA's context is multiplied by learned maps, so that its gradient is no constant, however linear the loss.
LINEAR = sorted({k for k in ALGORITHMS if "first_order" in algorithms.hyper_parameters(k)} - {"cavia"})


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam"])
@pytest.mark.parametrize("name", LINEAR)
def test_first_order_is_second_order_where_the_support_loss_is_linear(name: str, optimizer: str) -> None:
    model, data = scenarios.model(), scenarios.episodes()
    g = torch.Generator().manual_seed(6)
    slopes = {k: torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in model.params.items()}

    def linear(params: Params, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        terms = [(x.mean() * slope * params[k]).sum() for k, slope in slopes.items()]
        return torch.stack(terms).sum(), model.apply(params, x, None).detach()

    # Inductive queries are judged by what the model predicts, not by its `loss`.
    hyper: dict[str, Any] = {"inner_lr": 0.05, "inner_steps": 3, "norm": "inductive", "inner_optimizer": optimizer}
    of_linear = dataclasses.replace(model, loss=linear, of_head=lambda params, x: None)
    first, second = (gradient(ALGORITHMS[name](of_linear, **hyper, first_order=order), data) for order in (True, False))
    assert scenarios.relative_error(first, second) < 1e-14
    first, second = (gradient(ALGORITHMS[name](model, **hyper, first_order=order), data) for order in (True, False))
    if name != "maml++":  # which is first-order at step 0
        assert scenarios.relative_error(first, second) > 1e-3
