"""Operations of a user's module that torch cannot differentiate twice, or batch: done another way, or one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import scenarios
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import metaft
from metaft import algorithms, engines, outer
from metaft.errors import MetaftError
from metaft.outer import tuning
from metaft.types import Params

ENGINES = ("threads", "processes", "vmap")
WIDTH = 4


class Tokens(nn.Module):
    """An image as 16 tokens of WIDTH numbers, what `body` makes of them, and a head."""

    def __init__(self, body: Callable[[Tokens, Tensor], Tensor], part: nn.Module | None = None) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, WIDTH, 4, stride=4)
        self.part, self.body = part, body
        self.mid = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, self.patch(x).flatten(2).transpose(1, 2)))


def module(body: Callable[[Tokens, Tensor], Tensor], part: nn.Module | None = None, seed: int = 0) -> nn.Module:
    made = Tokens(body, part).double()
    g = torch.Generator().manual_seed(seed)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) / 2
    return made


def gradient(
    made: nn.Module,
    name: str = "maml",
    engine: str = "threads",
    *,
    chunk: int | None = None,
    steps: int = 1,
    **more: Any,
) -> Params:
    """Of two tasks, after one inner step each if nothing else is said."""
    algorithm = algorithms.ALGORITHMS[name](metaft.functional(made), inner_lr=0.3, inner_steps=steps, **more)
    data = scenarios.episodes(tasks=2)
    with engines.engine(engine, threads=2, chunk=chunk) as mapped:
        return outer.meta_gradient(mapped, algorithm, *algorithm.init(0), data).grads


def self_attention(tokens: Tokens, t: Tensor) -> Tensor:
    assert isinstance(tokens.part, nn.MultiheadAttention)
    return (t + tokens.part(t, t, t, need_weights=False)[0]).mean(1)


def plain_attention(tokens: Tokens, t: Tensor) -> Tensor:
    q = tokens.mid(t)[:, None]  # contiguous, as the fast kernels want it
    return F.scaled_dot_product_attention(q, q, q)[:, 0].mean(1)


def through_part(tokens: Tokens, t: Tensor) -> Tensor:
    assert tokens.part is not None
    return tokens.part(t).mean(1)


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "MultiheadAttention": lambda: module(self_attention, nn.MultiheadAttention(WIDTH, 2, batch_first=True)),
    "scaled_dot_product_attention": lambda: module(plain_attention),
    "TransformerEncoderLayer": lambda: module(through_part, layer()),
}


@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_second_order_goes_through_attention_on_every_engine(name: str) -> None:
    made = ATTENTION[name]()
    found = gradient(made)
    algorithm = algorithms.maml(metaft.functional(made), inner_lr=0.3, inner_steps=1)
    meta, state = algorithm.init(0)
    data = scenarios.episodes(tasks=2)
    task_loss = algorithm.task_loss
    assert task_loss is not None

    def mean_loss(shift: float) -> float:
        moved = {k: p + shift * way[k] for k, p in meta.items()}
        values = [task_loss(moved, state, {}, scenarios.one(data, i))[0].item() for i in range(2)]
        return sum(values) / 2

    g = torch.Generator().manual_seed(3)
    way = {k: torch.randn(p.shape, generator=g, dtype=torch.float64) for k, p in meta.items()}
    slope = sum((found[k] * way[k]).sum().item() for k in meta)
    assert slope == pytest.approx((mean_loss(1e-6) - mean_loss(-1e-6)) / 2e-6, rel=1e-5)
    for engine in ENGINES:
        assert scenarios.relative_error(gradient(made, engine=engine), found) < 1e-10, engine
    assert scenarios.relative_error(gradient(made.eval(), engine="vmap"), found) < 1e-10, "the fast path of eval mode"
    assert scenarios.relative_error(gradient(made.eval()), found) < 1e-10, "the fast path of eval mode"


@pytest.mark.slow
def test_attention_through_torch_compile_is_traced_in_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda traced, **_: traced)
    made = ATTENTION["MultiheadAttention"]()
    assert scenarios.relative_error(gradient(made, engine="compiled"), gradient(made)) < 1e-10


@pytest.mark.parametrize(("name", "more", "fast"), [("maml", {}, False), ("fomaml", {}, True), ("reptile", {}, True)])
def test_fast_attention_is_given_up_where_curvature_is_needed_alone(name: str, more: Any, fast: bool) -> None:
    seen: set[bool] = set()

    def look(tokens: Tokens, t: Tensor) -> Tensor:
        seen.add(torch.backends.cuda.flash_sdp_enabled())
        return tokens.mid(t).mean(1)

    gradient(module(look), name, **more)
    assert seen == {fast}
    assert torch.backends.cuda.flash_sdp_enabled(), "the process's choice was not given back"


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class OnceForVmap(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


def ctc(tokens: Tokens, t: Tensor) -> Tensor:
    p = tokens.mid(t).log_softmax(-1).transpose(0, 1)
    length, n, _ = p.shape
    sizes = torch.full((n,), length), torch.full((n,), 3)
    loss = F.ctc_loss(p, torch.ones(n, 3, dtype=torch.int64), *sizes, reduction="none")
    return torch.cat([loss[:, None], p[0, :, 1:]], 1)


def bag(tokens: Tokens, t: Tensor) -> Tensor:
    assert tokens.part is not None
    return tokens.part((t[:, :, 0] > 0).long()) + t.mean(1)


def normed(tokens: Tokens, t: Tensor) -> Tensor:
    """The operation itself; a layer under weight_norm computes by others, which can be differentiated."""
    assert tokens.part is not None
    v: Any = tokens.part.weight
    scaled = torch._weight_norm(v, v.norm(dim=1, keepdim=True).detach(), 0)  # type: ignore[reportPrivateImportUsage]
    return F.linear(tokens.mid(t), scaled).mean(1)


ONLY_ONCE: dict[str, Callable[[], nn.Module]] = {
    "ctc_loss": lambda: module(ctc),
    "cdist": lambda: module(lambda tokens, t: torch.cdist(tokens.mid(t), t)[:, :, :WIDTH].mean(1)),
    "embedding_bag": lambda: module(bag, nn.EmbeddingBag(2, WIDTH)),
    "Once": lambda: module(lambda tokens, t: Once.apply(tokens.mid(t)).mean(1)),  # type: ignore[reportGeneralTypeIssues]
    "OnceForVmap": lambda: module(lambda tokens, t: OnceForVmap.apply(tokens.mid(t)).mean(1)),  # type: ignore[reportGeneralTypeIssues]
    "weight_norm": lambda: module(normed, nn.Linear(WIDTH, WIDTH)),
}


@pytest.mark.parametrize("name", sorted(ONLY_ONCE))
def test_an_operation_without_a_second_derivative_is_named(name: str) -> None:
    made = ONLY_ONCE[name]()
    for engine in ENGINES:
        with pytest.raises(MetaftError, match=rf"\b{name}\b.*; use --algorithm fomaml, or another") as caught:
            gradient(made, engine=engine)
        assert "\n" not in str(caught.value)
    assert all(g.isfinite().all() for g in gradient(made, "fomaml").values()), "what the line says does not help"


def test_implicit_gradients_need_curvature_too() -> None:
    with pytest.raises(MetaftError, match="no second derivative of cdist"):
        gradient(ONLY_ONCE["cdist"](), "imaml")


def branch(tokens: Tokens, t: Tensor) -> Tensor:
    features = tokens.mid(t).mean(1)
    return features * 2 if features.sum() > 0 else features


def in_place(tokens: Tokens, t: Tensor) -> Tensor:
    total = torch.zeros(len(t), WIDTH, dtype=t.dtype)
    total += tokens.mid(t).mean(1)
    return total


def masked(tokens: Tokens, t: Tensor) -> Tensor:
    features = tokens.mid(t).mean(1)
    return features + features[features > 0].sum()


class Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


UNBATCHED: dict[str, Callable[[], nn.Module]] = {
    "branch": lambda: module(branch),
    "in place": lambda: module(in_place),
    "mask": lambda: module(masked),
    "function": lambda: module(lambda tokens, t: Plain.apply(tokens.mid(t)).mean(1)),  # type: ignore[reportGeneralTypeIssues]
}


@pytest.mark.parametrize("name", sorted(UNBATCHED))
def test_what_vmap_cannot_batch_names_an_engine_that_can(name: str) -> None:
    made = UNBATCHED[name]()
    for engine in ("vmap", "graph"):
        with pytest.raises(MetaftError, match=r"^engine: vmap cannot batch .*; use --engine processes or threads$"):
            gradient(made, engine=engine)
    expected = gradient(made, engine="threads", chunk=1)
    for engine in ("threads", "processes"):
        assert all(torch.equal(g, expected[k]) for k, g in gradient(made, engine=engine, chunk=2).items())


def test_what_cannot_be_compiled_names_an_engine_that_can() -> None:
    with pytest.raises(MetaftError, match=r"^engine: .*; use --engine processes or threads$"):
        gradient(UNBATCHED["branch"](), engine="compiled")


def test_engines_that_cannot_do_a_model_are_not_tuned_for() -> None:
    algorithm = algorithms.maml(metaft.functional(UNBATCHED["branch"]()))
    data = scenarios.episodes(tasks=2)
    times = tuning.tune(algorithm, *algorithm.init(0), data, convolutional=True, threads=2, seconds=0.01)
    assert ("threads", 1) in times
    assert ("vmap", None) not in times


def test_a_models_own_error_is_not_taken_for_an_engines() -> None:
    def wrong(tokens: Tokens, t: Tensor) -> Tensor:
        return tokens.mid(t[..., :2]).mean(1)

    for engine in ENGINES:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            gradient(module(wrong), engine=engine)


def test_draws_from_the_global_generator_are_refused_where_tasks_share_a_call() -> None:
    made = module(lambda tokens, t: F.dropout(tokens.mid(t).mean(1), 0.5))
    for engine, chunk in (("vmap", None), ("threads", 2)):
        with pytest.raises(MetaftError, match=r"^model: it draws from torch's global generator"):
            gradient(made, engine=engine, chunk=chunk)
