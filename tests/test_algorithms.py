"""The contract, as one table: every member, real or toy, in both normalisation modes, through every check."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import scenarios
import torch
import toys
from torch import Tensor

from metaft import algorithms, engines, outer
from metaft.algorithms import ALGORITHMS, Algorithm
from metaft.algorithms.meta_sgd import RATE
from metaft.errors import MetaftError
from metaft.inner import at_step
from metaft.models import Model
from metaft.types import NORMS, Episode, Norm, Params


@dataclasses.dataclass(frozen=True)
class Row:
    """One member of the table."""

    name: str
    build: Callable[[Model, Norm], Algorithm]
    exact: bool = True
    """Whether its meta-gradient is the derivative of its task loss."""
    adapts: bool = True
    """Whether its parameters move in the inner loop."""
    measures: bool = True
    """Whether its moments are the support set's."""
    dropout: float = 0.0
    still: tuple[str, ...] = ()
    """Parameters whose gradient is 0 by symmetry."""


STRENGTH = {True: 300.0, False: 10.0}
"""Of iMAML, by whether a model is convolutional: its normalised layers are sharply curved."""

TABLE = [
    Row("maml", lambda m, norm: algorithms.maml(m, inner_lr=0.1, inner_steps=2, norm=norm)),
    Row(
        "maml-frozen-norm",
        lambda m, norm: algorithms.maml(m, inner_lr=0.1, inner_steps=2, norm=norm, adapt_norm=False),
    ),
    Row("fomaml", lambda m, norm: algorithms.fomaml(m, inner_lr=0.1, inner_steps=2, norm=norm), exact=False),
    *(
        Row(
            f"maml-{name.partition(':')[0]}",
            lambda m, norm, name=name: algorithms.maml(
                m, inner_lr=0.05, inner_steps=3, norm=norm, inner_optimizer=name
            ),
        )
        # eps: between +eps and -eps an entry of Adam's direction goes from 1 to -1, too fast for a finite difference
        for name in ("momentum", "nesterov", "adam:eps=1e-2")
    ),
    Row("maml-dropout", lambda m, norm: algorithms.maml(m, inner_lr=0.1, inner_steps=2, norm=norm), dropout=0.3),
    Row("maml-shift", lambda m, norm: algorithms.maml(m, inner_steps=2, norm=norm, inner_augment="shift")),
    Row("anil", lambda m, norm: algorithms.anil(m, inner_lr=0.1, inner_steps=2, norm=norm)),
    Row("boil", lambda m, norm: algorithms.boil(m, inner_lr=0.1, inner_steps=2, norm=norm)),
    Row("meta-sgd", lambda m, norm: algorithms.meta_sgd(m, inner_lr=0.1, inner_steps=2, norm=norm)),
    Row(
        "meta-sgd-first-order-frozen-norm",
        lambda m, norm: algorithms.meta_sgd(m, inner_steps=2, norm=norm, first_order=True, adapt_norm=False),
        exact=False,
    ),
    Row("maml++", lambda m, norm: algorithms.maml_plus_plus(m, inner_steps=2, norm=norm, order_annealing=0)),
    Row(
        "maml++-order-annealing",
        lambda m, norm: algorithms.maml_plus_plus(m, inner_steps=2, norm=norm),
        exact=False,
    ),
    Row(
        "maml++-statistics",
        lambda m, norm: algorithms.maml_plus_plus(m, inner_steps=2, norm=norm, order_annealing=0, step_statistics=True),
        measures=False,
    ),
    Row("meta-curvature", lambda m, norm: algorithms.meta_curvature(m, inner_lr=0.1, inner_steps=2, norm=norm)),
    Row("proto-maml", lambda m, norm: algorithms.proto_maml(m, inner_lr=0.1, inner_steps=2, norm=norm)),
    Row(
        "proto-maml-first-order",
        lambda m, norm: algorithms.proto_maml(m, inner_lr=0.1, inner_steps=2, norm=norm, first_order=True),
        exact=False,
    ),
    Row(
        "unicorn-maml",
        lambda m, norm: algorithms.unicorn_maml(m, inner_lr=0.3, inner_steps=2, norm=norm),
        still=("head.weight", "head.bias"),
    ),
    Row(
        "reptile",
        lambda m, norm: algorithms.reptile(m, inner_lr=0.01, inner_steps=3, batch_size=7, norm=norm),
        exact=False,
    ),
    Row(
        "reptile-dropout-shift",
        lambda m, norm: algorithms.reptile(m, inner_lr=0.01, inner_steps=3, norm=norm, inner_augment="shift"),
        exact=False,
        dropout=0.3,
    ),
    Row(
        "reptile-kept-moments",
        lambda m, norm: algorithms.reptile(m, inner_lr=0.01, inner_steps=3, keep_moments=True, norm=norm),
        exact=False,
    ),
    Row(
        "imaml",
        lambda m, norm: algorithms.imaml(
            m, inner_lr=0.002, inner_steps=3, strength=STRENGTH[m.convolutional], cg_steps=3, norm=norm
        ),
        exact=False,
    ),
    Row(
        "imaml-line-search",
        lambda m, norm: algorithms.imaml(
            m, inner_lr=1.0, inner_steps=3, strength=STRENGTH[m.convolutional], cg_steps=3, norm=norm, line_search=12
        ),
        exact=False,
    ),
    Row("cavia", lambda m, norm: algorithms.cavia(m, inner_steps=2, norm=norm, context=3)),
    Row("protonet", lambda m, norm: algorithms.protonet(m, norm=norm, scale=0.5), adapts=False),
    Row("matching-net", lambda m, norm: algorithms.matching_net(m, norm=norm, scale=3.0), adapts=False),
    Row("baseline", lambda m, norm: algorithms.baseline(m, norm=norm, classes=12, inner_lr=0.5)),
    Row("baseline++", lambda m, norm: algorithms.baseline_plus_plus(m, norm=norm, classes=12, inner_lr=0.5)),
    Row("toy-multi-step", toys.multi_step),
    Row("toy-state", toys.with_state),
]
LEARNED_HEAD = ["maml", "anil", "boil", "meta-sgd", "maml++", "meta-curvature", "reptile", "imaml", "cavia"]
NO_LEARNED_HEAD = ["protonet", "matching-net", "baseline", "baseline++"]
EQUAL_ROWS = ["proto-maml", "unicorn-maml"]
"""Whose equivariance is in test_reductions.py, beside what their heads begin from."""
every_row = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
every_norm = pytest.mark.parametrize("norm", NORMS)
every_model = pytest.mark.parametrize("model_name", ["conv4", "conv4-pool", "mlp"])


def gradient(
    algorithm: Algorithm, engine: engines.Engine, data: Any, meta: Params, state: Params
) -> outer.MetaGradient:
    return outer.meta_gradient(engine, algorithm, meta, state, data, step=3)


def test_every_published_member_is_in_the_table() -> None:
    assert set(ALGORITHMS) <= {row.name for row in TABLE}
    assert {*LEARNED_HEAD, *NO_LEARNED_HEAD, *EQUAL_ROWS} == {*ALGORITHMS} - {"fomaml"}  # whose adapt is maml's


@every_row
@every_norm
@every_model
@pytest.mark.slow
def test_batched_equals_looped(row: Row, norm: Norm, model_name: str) -> None:
    """In float64: float32 would hide that PyTorch's own batch norm is wrong at second order under vmap."""
    algorithm = row.build(scenarios.model(model_name, dropout=row.dropout), norm)
    meta, state = algorithm.init(5)
    data = scenarios.data_for(algorithm)
    results = []
    for make in (engines.Threads(1, 1), engines.Threads(2, 3), engines.Vmap(), engines.Vmap(chunk=3)):
        results.append(gradient(algorithm, make, data, meta, state))
        make.close()
    for other in results[1:]:
        assert scenarios.relative_error(other.grads, results[0].grads) < 1e-10
        for name, value in results[0].state.items():
            torch.testing.assert_close(other.state[name], value, rtol=1e-10, atol=1e-12)
        assert other.metrics == pytest.approx(results[0].metrics, rel=1e-10)


@every_row
@every_norm
def test_gradient_has_metas_names_and_shapes_and_reaches_it(row: Row, norm: Norm) -> None:
    algorithm = row.build(scenarios.model(dropout=row.dropout), norm)
    meta, state = algorithm.init(5)
    with engines.engine("threads", threads=1) as engine:
        result = gradient(algorithm, engine, scenarios.data_for(algorithm), meta, state)
    assert {k: g.shape for k, g in result.grads.items()} == {k: p.shape for k, p in meta.items()}
    assert all(bool(g.isfinite().all()) for g in result.grads.values())
    scale = max(float(g.abs().max()) for g in result.grads.values())
    learned = {k for k, g in result.grads.items() if float(g.abs().max()) > 1e-14 * scale}
    assert learned == meta.keys() - row.still, "a parameter that nothing learns"
    assert result.state.keys() == state.keys()
    assert set(result.metrics) == {"loss", "accuracy", *algorithm.cautions}


@every_row
def test_all_that_was_learned_is_in_meta(row: Row) -> None:
    """Built on a model of other values, a member does the same with the same meta: it never falls back on the first
    values, which tests that adapt from there could not see."""
    model = scenarios.model(width=2, dropout=row.dropout)
    other = dataclasses.replace(model, params={k: elsewhere(p, seed=1) for k, p in model.params.items()})
    task = scenarios.one(scenarios.episodes())
    found: list[Any] = []
    for algorithm in (row.build(model, "inductive"), row.build(other, "inductive")):
        meta, state = row.build(model, "inductive").init(5)
        meta = {k: elsewhere(p, seed=2) for k, p in meta.items()}
        fast = algorithm.adapt(
            meta, state, task.support_x, task.support_y, task.key, ways=3, steps=2 if row.adapts else 0, trajectory=True
        )
        with engines.engine("threads", threads=1) as engine:
            result = gradient(algorithm, engine, scenarios.data_for(algorithm, tasks=1), meta, state)
        found.append((fast, [algorithm.predict(at_step(fast, 0), task.query_x, n) for n in NORMS], result))
    assert_same(*found)


def elsewhere(values: Tensor, *, seed: int) -> Tensor:
    return values + 0.05 * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=values.dtype)


@every_row
@every_norm
def test_inputs_are_left_alone_and_the_same_seed_gives_the_same_bits(row: Row, norm: Norm) -> None:
    algorithm = row.build(scenarios.model(dtype=torch.float32, dropout=row.dropout), norm)
    meta, state = algorithm.init(5)
    again, _ = algorithm.init(5)
    data = scenarios.data_for(algorithm, dtype=torch.float32)
    before = copy.deepcopy((meta, state, data))
    generator = torch.get_rng_state()
    with engines.engine("threads", threads=2) as engine:
        first = gradient(algorithm, engine, data, meta, state)
        second = gradient(algorithm, engine, data, meta, state)
    assert_same(again, meta)
    assert_same(first, second)
    assert_same((meta, state, data), before)
    assert not any(p.requires_grad for p in meta.values())
    assert torch.equal(torch.get_rng_state(), generator), "the global generator was used"


@pytest.mark.parametrize("row", [r for r in TABLE if r.exact], ids=lambda r: r.name)
@every_norm
@every_model
def test_meta_gradient_against_finite_differences(row: Row, norm: Norm, model_name: str) -> None:
    algorithm = row.build(scenarios.model(model_name, dropout=row.dropout), norm)
    meta, state = algorithm.init(5)
    data = scenarios.data_for(algorithm, tasks=2)
    knobs = algorithm.schedule(3)
    task_loss = algorithm.task_loss
    assert task_loss is not None

    def value(at: Params) -> float:
        return sum(float(task_loss(at, state, knobs, scenarios.one(data, i))[0]) for i in range(2)) / 2

    with engines.engine("threads", threads=1) as engine:
        grads = gradient(algorithm, engine, data, meta, state).grads
    g = torch.Generator().manual_seed(0)
    h = 1e-8  # small: a ReLU that switches between the two points would count as error
    for _ in range(3):
        # A Rademacher direction, so that every parameter weighs alike.
        v = {k: torch.randint(2, p.shape, generator=g).double() * 2 - 1 for k, p in meta.items()}
        slope = (
            value({k: p + h * v[k] for k, p in meta.items()}) - value({k: p - h * v[k] for k, p in meta.items()})
        ) / (2 * h)
        exact = sum(float((grads[k] * v[k]).sum()) for k in v)
        scale = sum(float(x.abs().sum()) for x in grads.values())
        assert abs(slope - exact) < 1e-6 * scale


def adapted(algorithm: Algorithm, task: Episode, steps: int, **kwargs: Any) -> Any:
    meta, state = algorithm.init(5)
    ways = task.class_ids.shape[-1]
    return algorithm.adapt(meta, state, task.support_x, task.support_y, task.key, ways=ways, steps=steps, **kwargs)


@every_row
def test_trajectory_ends_where_adapt_does_and_may_go_on_beyond_training(row: Row) -> None:
    algorithm = row.build(scenarios.model(dropout=row.dropout), "inductive")
    task = scenarios.one(scenarios.episodes())
    steps = algorithm.inner_steps + 2 if row.adapts else 0
    every = adapted(algorithm, task, steps, trajectory=True)
    assert all(t.shape[0] == steps + 1 for t in every.params.values())
    for s in {0, steps}:
        alone = adapted(algorithm, task, s)
        for norm in NORMS:
            torch.testing.assert_close(
                algorithm.predict(at_step(every, s), task.query_x, norm),
                algorithm.predict(alone, task.query_x, norm),
                rtol=0,
                atol=1e-13,
            )
    if algorithm.predict_steps is not None:
        for norm in NORMS:
            together = algorithm.predict_steps(every, task.query_x, norm)
            for s in range(steps + 1):
                alone = algorithm.predict(at_step(every, s), task.query_x, norm)
                torch.testing.assert_close(together[s], alone, rtol=0, atol=1e-13)
    moved = any(not torch.equal(t[0], t[-1]) for t in every.params.values())
    assert moved == row.adapts


@every_row
def test_inductive_prediction_does_not_depend_on_its_neighbours(row: Row) -> None:
    algorithm = row.build(scenarios.model(dropout=row.dropout), "inductive")
    task = scenarios.one(scenarios.episodes())
    fast = adapted(algorithm, task, 2)
    x = task.query_x
    others = torch.cat([x[:1], 3 * torch.randn(x[1:].shape, generator=torch.Generator().manual_seed(9)).double()])
    first, replaced = (algorithm.predict(fast, batch, "inductive")[0] for batch in (x, others))
    torch.testing.assert_close(first, replaced, rtol=0, atol=1e-12)
    first, replaced = (algorithm.predict(fast, batch, "transductive")[0] for batch in (x, others))
    assert float((first - replaced).abs().max()) > 1e-3


@pytest.mark.parametrize("row", [r for r in TABLE if r.measures], ids=lambda r: r.name)
def test_moments_are_the_support_sets_at_the_fast_weights(row: Row) -> None:
    model = scenarios.model()
    algorithm = row.build(model, "inductive")
    task = scenarios.one(scenarios.episodes())
    fast = adapted(algorithm, task, 2)
    measured = model.measure({**model.params, **fast.params}, task.support_x)
    for found, expected in zip(fast.moments, measured, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@every_row
@every_norm
def test_training_and_inductive_prediction_ask_for_moments_only_where_needed(row: Row, norm: Norm) -> None:
    algorithm = row.build(scenarios.model(dropout=row.dropout), norm)
    task = scenarios.one(scenarios.episodes())
    bare = adapted(algorithm, task, 1, moments=False)
    assert bare.moments == ()
    with pytest.raises(MetaftError, match="normalisation layers than the 0"):
        algorithm.predict(bare, task.query_x, "inductive")
    algorithm.predict(bare, task.query_x, "transductive")


# Reptile trains on queries too, by definition, and a baseline on batches.
JUDGED = [row for row in TABLE if not row.name.startswith(("reptile", "baseline"))]


@pytest.mark.parametrize("row", JUDGED, ids=lambda row: row.name)
@every_norm
def test_query_labels_count_in_the_query_loss_alone(row: Row, norm: Norm) -> None:
    """The loss of a meta-step is a sum over queries of what each one's label costs, so that changing two labels costs
    what each change does by itself. Were the fast weights to depend on a label, all the other costs would too."""
    algorithm = row.build(scenarios.model(dropout=row.dropout), norm)
    meta, state = algorithm.init(5)
    task = scenarios.one(scenarios.episodes())

    def loss(*changed: int) -> float:
        y = task.query_y.clone()
        y[list(changed)] = (y[list(changed)] + 1) % 3
        found = outer.task_grad(algorithm, meta, state, algorithm.schedule(3), task._replace(query_y=y))
        return float(found.metrics["loss"])

    plain, first, second, both = loss(), loss(0), loss(4), loss(0, 4)
    assert abs(first - plain) > 1e-3 and abs(second - plain) > 1e-3
    assert abs(both - first - second + plain) < 1e-13


@pytest.mark.parametrize("order", scenarios.RENAMED, ids=["round", "swapped"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NO_LEARNED_HEAD)
def test_members_without_a_learned_head_are_equivariant_to_a_permutation_of_labels(
    name: str, norm: Norm, order: Tensor
) -> None:
    algorithm = ALGORITHMS[name](scenarios.model(), norm=norm)
    task = scenarios.one(scenarios.episodes())
    plain = algorithm.predict(adapted(algorithm, task, 5), task.query_x, norm)
    renamed = algorithm.predict(
        adapted(algorithm, task._replace(support_y=order[task.support_y]), 5), task.query_x, norm
    )
    torch.testing.assert_close(renamed[:, order], plain, rtol=0, atol=1e-12)
    assert float((renamed - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("order", scenarios.RENAMED, ids=["round", "swapped"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", LEARNED_HEAD)
def test_members_with_a_learned_head_are_equivariant_when_its_rows_follow_the_labels(
    name: str, norm: Norm, order: Tensor
) -> None:
    algorithm = algorithms.build(name, scenarios.model(), {"inner_lr": 0.1, "inner_steps": 2})
    meta, state = algorithm.init(0)
    g = torch.Generator().manual_seed(3)
    meta = {k: v + 0.1 * torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in meta.items()}
    task = scenarios.one(scenarios.episodes())
    back = order.argsort()
    rows = {"head.weight", "head.bias"}
    rows |= {k + RATE for k in rows} if name == "meta-sgd" else set()  # maml++ has one rate for all rows
    permuted = {k: v[back] if k in rows else v for k, v in meta.items()}
    assert all(len(meta[k]) == 3 for k in rows)

    def logits(at: Params, y: Tensor) -> Tensor:
        fast = algorithm.adapt(at, state, task.support_x, y, task.key, ways=3, steps=2)
        return algorithm.predict(fast, task.query_x, norm)

    renamed, plain = logits(permuted, order[task.support_y]), logits(meta, task.support_y)
    torch.testing.assert_close(renamed[:, order], plain, rtol=0, atol=1e-12)
    assert float((renamed - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("name", NO_LEARNED_HEAD)
def test_members_without_a_learned_head_take_any_number_of_ways(name: str) -> None:
    algorithm = ALGORITHMS[name](scenarios.model(ways=3))
    assert algorithm.any_ways
    for ways in (2, 7):
        task = scenarios.one(scenarios.episodes(ways=ways))
        logits = algorithm.predict(adapted(algorithm, task, 2), task.query_x, "inductive")
        assert logits.shape == (3 * ways, ways)


@pytest.mark.parametrize("scale", [1.0, 1 / 64])
def test_protonet_logits_are_minus_squared_distances_to_class_means(scale: float) -> None:
    model = scenarios.model("mlp")
    algorithm = algorithms.protonet(model, scale=scale)
    task = scenarios.one(scenarios.episodes())
    support, query = (model.features(model.params, x, None).numpy() for x in (task.support_x, task.query_x))
    logits = algorithm.predict(adapted(algorithm, task, 0), task.query_x, "transductive").numpy()
    for n in range(3):
        mean = support[task.support_y.numpy() == n].mean(0)
        for q in range(len(query)):
            assert logits[q, n] == pytest.approx(-scale * ((query[q] - mean) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("mamml", {}, "did you mean 'maml'?"),
        ("maml_plus_plus", {}, "did you mean 'maml++'?"),
        ("maml-plus-plus", {}, "did you mean 'maml++'?"),
        ("meta_sgd", {}, "did you mean 'meta-sgd'?"),
        ("maml", {"inner_lr": -0.1}, "inner_lr must be at least 0 and finite, got -0.1"),
        ("maml", {"inner_lr": float("inf")}, "inner_lr must be at least 0 and finite, got inf"),
        (
            "maml",
            {"norm": "inductiv"},
            "known are transductive, inductive; did you mean 'inductive'?",
        ),
        ("reptile", {"loss": "mae"}, "loss: no 'mae', known are cross_entropy, mse"),
        ("maml", {"inner_lr": "0.1"}, "inner_lr must be a number, got '0.1'"),
        ("maml", {"inner_steps": 1.5}, "inner_steps must be a whole number, got 1.5"),
        ("maml", {"inner_steps": -1}, "inner_steps must be at least 0, got -1"),
        ("maml", {"inner_optimizer": "adm"}, "inner_optimizer: no 'adm'"),
        ("maml", {"inner_augment": "flip"}, "inner_augment: no 'flip', known are none, shift"),
        ("anil", {"adapt_norm": False}, "adapt_norm: anil has no such setting"),
        ("meta-sgd", {"inner_lr": -0.1}, "inner_lr must be at least 0 and finite, got -0.1"),
        ("reptile", {"inner_lr": -0.1}, "inner_lr must be at least 0 and finite, got -0.1"),
        ("reptile", {"inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        ("reptile", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("imaml", {"strength": 0.0}, "strength must be above 0, got 0.0"),
        ("imaml", {"damping": -1.0}, "damping must be at least 0, got -1.0"),
        ("imaml", {"line_search": -1}, "line_search must be at least 0, got -1"),
        ("imaml", {"cg_steps": 0}, "cg_steps must be at least 1, got 0"),
        ("cavia", {"context": 0}, "context must be at least 1, got 0"),
        ("cavia", {"layer": "blocks.0"}, "one with a bias to enter by, of ['blocks.1', 'blocks.4', 'blocks.7',"),
        ("proto-maml", {"loss": "mse"}, "cannot learn a data set whose loss is 'mse'"),
        ("protonet", {"inner_lr": 0.1}, "inner_lr: protonet has no such setting (given 0.1)"),
        ("protonet", {"loss": "mse"}, "cannot learn a data set whose loss is 'mse'"),
        ("matching-net", {"loss": "mse"}, "cannot learn a data set whose loss is 'mse'"),
        ("protonet", {"scale": -1.0}, "scale must be above 0, got -1.0"),
        ("matching-net", {"scale": 0.0}, "scale must be above 0, got 0.0"),
        ("baseline", {"loss": "mse"}, "baseline classifies; it cannot learn a data set whose loss is 'mse'"),
        ("baseline", {"classes": 0}, "classes must be at least 1, got 0"),
        ("baseline++", {"inner_lr": -0.1}, "inner_lr must be at least 0 and finite, got -0.1"),
        ("baseline++", {"dampening": -0.1}, "dampening must be at least 0 and finite, got -0.1"),
        ("baseline", {"inner_steps": 5}, "--test-inner-steps is how many its head takes"),
        (
            "protonet",
            {"inner_steps": 5},
            "inner_steps: protonet has no such setting (given 5); it has loss, norm, scale",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(name: str, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(MetaftError) as error:
        algorithms.build(name, scenarios.model(), hyper)
    assert message in str(error.value)


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
