"""What every strategy and extra must do, and one more of each that is a function and two rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import ONE_PASS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_finetune import CLASSES, INPUTS, bits, body, same, toy
from torch import Tensor, nn

from metaft import schedules
from metaft.errors import CheckpointError, MetaftError
from metaft.finetune import optim
from metaft.finetune.examples import Prepared
from metaft.finetune.extras import Batch, Extra, Objective, Origin, composed, plain_loss
from metaft.finetune.features import features_of
from metaft.finetune.fit import Fitted, fit
from metaft.finetune.optim import put_moments
from metaft.finetune.phases import groups_of
from metaft.finetune.probe import probe
from metaft.finetune.states import flatten, unflatten
from metaft.finetune.strategies import AFTER_HEAD, STRATEGIES, Groups, Strategy, every, named
from metaft.finetune.strategies.bitfit import is_bias
from metaft.models import EpisodeNorm
from metaft.models.blocks import blocks_of
from metaft.models.stored import kept_statistics
from metaft.settings.finetuning import Recipe

STEPS, PER_EPOCH = 12, 3  # of `tune`
ALL = 9


def second_half(groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
    """The head alone in the first half, then all, the first layer at half the rate."""
    if step < steps / 2:
        return every(groups[-1:])
    return {**every(groups), **every(groups[:1], 0.5)}


class Expected(NamedTuple):
    """Of one strategy."""

    trains: tuple[int, int]
    """How many blocks of the body, from its end, move in the first and in the second half of the steps."""
    of_block: Callable[[str], bool] = lambda name: True
    """Which of their parameters do."""


CONTRACT = {
    "full": Expected((ALL, ALL)),
    "head": Expected((0, 0)),
    "last": Expected((2, 2)),
    "lp-ft": Expected((ALL, ALL)),  # its first 4 of 12 steps are tested below
    "gradual": Expected((1, 3)),  # one epoch of the head, then one more block in each of three
    "discriminative": Expected((ALL, ALL)),
    "layer-decay": Expected((ALL, ALL)),
    "bitfit": Expected((ALL, ALL), is_bias),
    "lora": Expected((ALL, ALL)),
    "lp-ft:then=lora": Expected((ALL, ALL)),
    "lp-ft:then=gradual": Expected((0, 2)),  # 4 steps of the head, and gradual's own epoch of it
    "lp-ft:share=0.5,then=bitfit": Expected((0, ALL), is_bias),
    "second-half": Expected((0, ALL)),
}


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "second-half", lambda: Strategy(second_half))


def tune(strategy: str, start: nn.Module | None = None, **more: Any) -> Fitted:
    recipe = Recipe(epochs=4, batch_size=8, lr=0.01, augment="basic")
    images, labels = toy(21)
    return fit(start or body(), INPUTS, images, labels, CLASSES, recipe, strategy=named(strategy), **more)


def states_of(strategy: str, **more: Any) -> list[Mapping[str, Any]]:
    states: list[Mapping[str, Any]] = []
    tune(strategy, on_epoch=states.append, **more)
    return states


def of_body(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k.startswith("body.")}


def test_every_strategy_is_in_the_table() -> None:
    assert STRATEGIES.keys() == {text.partition(":")[0] for text in CONTRACT}


@pytest.mark.parametrize("name", CONTRACT)
def test_what_is_frozen_is_equal_to_the_bit_and_the_rest_moves(name: str) -> None:
    states = states_of(name)
    model = named(name).prepare(nn.ModuleDict({"body": body(), "head": nn.Linear(3, 2)}), 0)
    begun, (trains, of_block) = of_body(model.state_dict()), CONTRACT[name]
    halves = [begun, states[1]["model"], states[3]["model"]]
    blocks = groups_of(model)[:-1]
    assert sum(map(len, blocks)) == sum(p.requires_grad for p in model.get_submodule("body").parameters())
    for before, after, moving in zip(halves, halves[1:], trains, strict=False):
        moved = {k for k in begun if not torch.equal(before[k], after[k])}
        assert moved == {k for block in blocks[max(0, len(blocks) - moving) :] for k in block if of_block(k)}
    heads = [{k: v for k, v in state["model"].items() if k.startswith("head.")} for state in states]
    assert not any(same(heads[i], heads[i + 1]) for i in range(3))


@pytest.mark.parametrize("name", CONTRACT)
def test_rates_are_of_parameters_that_there_are_and_a_function_of_the_step(name: str) -> None:
    model = nn.ModuleDict({"body": body(), "head": nn.Linear(3, 2)})
    groups, strategy = groups_of(model), named(name)
    assert [n for group in groups for n in group] == [n for n, _ in model.named_parameters()]
    assert groups[-1] == ("head.weight", "head.bias")
    for step in (0, 7, STEPS - 1, 2):
        rates = dict(strategy.rates(groups, step, STEPS, PER_EPOCH))
        assert rates.keys() <= dict(model.named_parameters()).keys()
        assert rates == dict(strategy.rates(groups, step, STEPS, PER_EPOCH))
        assert all(0 <= factor < 1e3 for factor in rates.values())


@pytest.mark.parametrize("name", CONTRACT)
def test_a_resume_takes_the_same_steps_and_freezes_nothing_anew(name: str) -> None:
    whole = tune(name)
    for state in states_of(name):
        again = tune(name, resume=copy.deepcopy(state))
        assert same(bits(again), bits(whole))
        assert again.curve == whole.curve


@pytest.mark.parametrize("name", CONTRACT)
def test_images_come_in_the_same_order_whatever_trains(name: str) -> None:
    seen: list[list[int]] = []
    look = Extra(lambda loss, origin: lambda model, batch: seen.append(batch.rows.tolist()) or loss(model, batch))
    for strategy in (name, "full"):
        tune(strategy, extras=(look,))
    assert len(seen) == 2 * STEPS
    assert seen[:STEPS] == seen[STEPS:]


@pytest.mark.parametrize("name", CONTRACT)
def test_what_the_user_froze_stays_whatever_the_strategy(name: str) -> None:
    start = body()
    kept, first = next(iter(start.named_parameters()))
    first.requires_grad_(False)
    fitted = tune(name, start)
    assert torch.equal(fitted.body.state_dict()[kept], first)


@pytest.mark.parametrize("name", CONTRACT)
def test_a_picture_is_predicted_without_its_neighbours(name: str) -> None:
    fitted, x = tune(name), INPUTS(toy(9, seed=1)[0])
    together, alone = fitted.body(x), torch.cat([fitted.body(one[None]) for one in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=ONE_PASS)


def test_the_optimisers_state_has_the_parameters_names_and_none_of_what_never_moved() -> None:
    states = states_of("second-half")
    assert states[0]["adam"].keys() == {"head.weight", "head.bias"}
    assert {f"body.{k}" for k, _ in body().named_parameters()} < states[-1]["adam"].keys()
    first, last = (float(states[i]["adam"]["head.weight"]["step"]) for i in (0, -1))
    assert (first, last) == (3, 12)


def test_a_rate_is_the_factor_of_the_recipes() -> None:
    """Of Adam's first step, which is the rate times the gradient's sign."""

    def tenth(groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
        return {**every(groups), **every(groups[:1], 0.1)} if step == 0 else {}

    recipe, (images, labels) = Recipe(epochs=1, batch_size=32, lr=0.01), toy(21)
    start = body(dtype=torch.float64)
    fitted = fit(start, INPUTS, images, labels, CLASSES, recipe, strategy=Strategy(tenth))
    names = [n for n, _ in start.named_parameters()]
    moves = {n: float((fitted.body.state_dict()[n] - start.state_dict()[n]).abs().max()) for n in names}
    for name, moved in moves.items():
        assert moved == pytest.approx(0.001 if name in blocks_of(start)[0] else 0.01, rel=0.01), name


def test_rates_follow_the_step_within_an_epoch() -> None:
    """Three steps an epoch, of which the second alone moves anything: one step of Adam each."""

    def second(groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
        assert steps == STEPS
        return every(groups) if step % 3 == 1 else {}

    recipe, (images, labels) = Recipe(epochs=4, batch_size=8, lr=0.01), toy(21)
    states: list[Mapping[str, Any]] = []
    fit(body(), INPUTS, images, labels, CLASSES, recipe, strategy=Strategy(second), on_epoch=states.append)
    for epoch, state in enumerate(states):
        assert {float(slots["step"]) for slots in state["adam"].values()} == {epoch + 1}


def test_patience_is_for_the_last_phase() -> None:
    """In the first one, in which nothing below the head moves, the loss may well stand still."""
    recipe, (images, labels) = Recipe(epochs=20, batch_size=8, lr=1e-30, patience=2), toy(21)
    val = toy(9, seed=3)
    curve = fit(
        body(), INPUTS, images, labels, CLASSES, recipe, strategy=STRATEGIES["second-half"](),
        val_examples=val[0], val_labels=val[1],
    ).curve  # fmt: skip
    assert len(curve) == 10 + 1 + 2, "nothing moves, so the first loss of a phase is its best"


def test_a_rate_of_what_is_no_parameter_is_refused() -> None:
    recipe, (images, labels) = Recipe(epochs=1), toy(21)
    strategy = Strategy(lambda groups, step, steps, per_epoch: {**every(groups), "body.nosuch": 1.0})
    with pytest.raises(MetaftError, match=r"^strategy: it has rates for \['body.nosuch'\]"):
        fit(body(), INPUTS, images, labels, CLASSES, recipe, strategy=strategy)


class Scaled(nn.Module):
    """A body whose features are multiplied by what is learned in its place, as LoRA's would be."""

    def __init__(self, body: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = body, nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.inner(x)


class Merged(nn.Module):
    def __init__(self, scaled: Scaled) -> None:
        super().__init__()
        self.inner, self.by = scaled.inner, float(scaled.scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.by * self.inner(x)


def test_a_strategy_may_put_other_layers_in_and_takes_them_out_again() -> None:
    seeds: list[int] = []

    def prepare(model: nn.Module, seed: int) -> nn.Module:
        seeds.append(seed)
        return nn.ModuleDict({"body": Scaled(model.get_submodule("body"), 2.0), "head": model.get_submodule("head")})

    def finish(model: nn.Module) -> nn.Module:
        scaled = model.get_submodule("body")
        assert isinstance(scaled, Scaled)
        assert any(isinstance(part, EpisodeNorm) for part in scaled.modules()), "moments are stored afterwards"
        return nn.ModuleDict({"body": Merged(scaled), "head": model.get_submodule("head")})

    def scale_and_head(groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
        return {**every(groups[-1:]), "body.scale": 1.0}

    recipe, (images, labels), val = Recipe(epochs=4, batch_size=8, lr=0.05), toy(21), toy(9, seed=3)
    strategy = Strategy(scale_and_head, prepare, finish)
    fitted = fit(
        body(dtype=torch.float64), INPUTS, images, labels, CLASSES, recipe, seed=7, strategy=strategy,
        val_examples=val[0], val_labels=val[1],
    )  # fmt: skip
    assert seeds == [7]
    assert isinstance(fitted.body, Merged)
    assert fitted.body.by != 2.0
    with torch.no_grad():
        logits = fitted.head(fitted.body(INPUTS(val[0]).double()))
    lowest = min(row["val_loss"] for row in fitted.curve)
    assert float(F.cross_entropy(logits, val[1])) == pytest.approx(lowest, abs=1e-9)


def test_state_of_adam_goes_where_its_parameter_is() -> None:
    p = nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.Adam([{"params": [p], "name": "head.weight"}])
    slots = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    put_moments(optimizer, {"head.weight": slots}, {"head.weight": 1.0})
    devices = {slot: value.device.type for slot, value in optimizer.state[p].items()}
    assert devices == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_numbers_of_older_checkpoints_are_of_what_trained() -> None:
    """There the frozen body was in no group of Adam's, so that 0 is the head's weight."""
    states = states_of("head")
    names = list(states[1]["adam"])
    old = {**states[1], "adam": {str(names.index(name)): slots for name, slots in states[1]["adam"].items()}}
    assert same(bits(tune("head", resume=old)), bits(tune("head")))
    wrong = {**old, "adam": {"9": old["adam"]["0"]}}
    with pytest.raises(CheckpointError, match=r"^resume: the optimiser's state for '9'"):
        tune("head", resume=wrong)


def test_the_head_alone_trains_in_the_first_share_of_the_steps() -> None:
    strategy = named("lp-ft:share=0.25")
    groups = groups_of(nn.ModuleDict({"body": body(), "head": nn.Linear(3, 2)}))
    for step in range(STEPS):
        rates = strategy.rates(groups, step, STEPS, PER_EPOCH)
        assert rates == every(groups[-1:] if step < 3 else groups)


@pytest.mark.parametrize("then", ['"gradual:every=2"', '"discriminative:decay=3"', "full", '"last:blocks=1"'])
def test_what_follows_the_head_goes_as_it_does_by_itself(then: str) -> None:
    """In so many steps; only its backbone's rates rise."""
    strategy, alone = named(f"lp-ft:share=0.25,rise=0.5,then={then}"), named(then.strip('"'))
    groups = groups_of(nn.ModuleDict({"body": body(), "head": nn.Linear(3, 2)}))
    for step in range(STEPS):
        wanted = every(groups[-1:])
        if step >= 3:
            rates = alone.rates(groups, step - 3, STEPS - 3, PER_EPOCH)
            wanted = {n: r * (1 if n in groups[-1] else min(1.0, (step - 2) / 6)) for n, r in rates.items()}
        assert strategy.rates(groups, step, STEPS, PER_EPOCH) == pytest.approx(wanted, rel=1e-12), step


def test_biases_are_known_by_their_names() -> None:
    layers = {"attention": nn.MultiheadAttention(8, 2, add_bias_kv=True), "recurrent": nn.LSTM(3, 4)}
    layers |= {"norm": nn.LayerNorm(8), "conv": nn.Conv2d(3, 4, 3), "embedding": nn.Embedding(3, 4)}
    names = {name for name, _ in nn.ModuleDict(layers).named_parameters() if is_bias(name)}
    assert names == {
        "attention.in_proj_bias", "attention.bias_k", "attention.bias_v", "attention.out_proj.bias", "norm.bias",
        "recurrent.bias_ih_l0", "recurrent.bias_hh_l0", "conv.bias",
    }  # fmt: skip
    assert not is_bias("layers.0.attn.relative_position_bias_table")


@pytest.mark.parametrize("frozen", [False, True])
def test_a_backbone_without_biases_is_refused(frozen: bool) -> None:
    start = nn.Sequential(nn.Conv2d(1, 4, 3, bias=frozen), nn.Flatten())
    for name, p in start.named_parameters():
        p.requires_grad_(name != "0.bias")
    with pytest.raises(MetaftError, match=r"^strategy: bitfit trains biases, and the backbone has none that could"):
        tune("bitfit", start)


@pytest.mark.parametrize("every_", [1, 2, 5])
def test_one_block_more_trains_after_each_so_many_epochs(every_: int) -> None:
    groups = groups_of(nn.ModuleDict({"body": body(), "head": nn.Linear(3, 2)}))
    assert len(groups) == 5
    for epoch in range(12):
        for step in range(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH):
            rates = named(f"gradual:every={every_}").rates(groups, step, 12 * PER_EPOCH, PER_EPOCH)
            assert rates == every(groups[max(0, 4 - epoch // every_) :]), step


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("discriminative", [1 / 45.6976, 1 / 17.576, 1 / 6.76, 1 / 2.6, 1]),
        ("discriminative:decay=2", [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]),
        ("layer-decay", [0.31640625, 0.421875, 0.5625, 0.75, 1]),
        ("layer-decay:d=1", [1, 1, 1, 1, 1]),
    ],
)
def test_rates_fall_from_block_to_block_below_the_head(text: str, wanted: list[float]) -> None:
    groups = groups_of(nn.ModuleDict({"body": body(), "head": nn.Linear(3, 2)}))
    for step in (0, STEPS - 1):
        rates = named(text).rates(groups, step, STEPS, PER_EPOCH)
        assert rates == pytest.approx({n: r for group, r in zip(groups, wanted, strict=True) for n in group}, rel=1e-12)


def test_the_backbones_rate_rises_once_the_head_has_trained() -> None:
    strategy = named("lp-ft:share=0.25,rise=0.5")
    *blocks, head = groups_of(nn.ModuleDict({"body": body(), "head": nn.Linear(3, 2)}))
    for step in range(STEPS):
        rates = strategy.rates((*blocks, head), step, STEPS, PER_EPOCH)
        assert {name: rates[name] for name in head} == every((head,))
        below = {name: rate for name, rate in rates.items() if name not in head}
        assert below == ({} if step < 3 else every(tuple(blocks), min(1.0, (step - 2) / 6))), step


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "lastt",
            f"strategy: no 'lastt', known are {', '.join(STRATEGIES)}, second-half, chosen; did you mean 'last'?",
        ),
        ("last:blocks=0", "strategy: blocks must be at least 1, got 0; head trains no block"),
        ("lp-ft:share=1", "strategy: share must be above 0 and below 1, got 1.0"),
        ("lp-ft:rise=1", "strategy: rise must be at least 0 and below 0.7, what share leaves, got 1.0"),
        ("gradual:every=0", "strategy: every must be at least 1, got 0"),
        ("discriminative:decay=0.5", "strategy: decay must be at least 1, got 0.5"),
        ("lora:rank=0", "strategy: rank must be at least 1, got 0"),
        ("lora:alpha=0", "strategy: alpha must be above 0, got 0.0"),
        ("layer-decay:d=0", "strategy: d must be above 0 and at most 1, got 0.0"),
        ("layer-decay:d=1.5", "strategy: d must be above 0 and at most 1, got 1.5"),
        ("lp-ft:then=head", f"strategy: then: no 'head', known are {', '.join(AFTER_HEAD)}"),
        ('lp-ft:then="last:blocks=0"', "strategy: blocks must be at least 1, got 0; head trains no block"),
        ("head:blocks=1", "strategy: head has no 'blocks' (given 'head:blocks=1'); it has none"),
    ],
)
def test_what_no_strategy_is_called_is_said(text: str, said: str) -> None:
    with pytest.raises(MetaftError) as caught:
        named(text)
    assert str(caught.value) == said


# Optimisers, schedules, and features that are computed once

OPTIMIZERS = {
    "adam:eps=1e-6": lambda ps: torch.optim.Adam(ps, lr=0.01, eps=1e-6),
    "adamw:weight_decay=0.3": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.3),
    "sgd:momentum=0.8,weight_decay=0.2": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.8, weight_decay=0.2),
    "sgd:nesterov=true": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_is_torchs_and_decays_no_bias_scale_or_shift(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    theirs = copy.deepcopy(model)
    mine = optim.named(name)(list(model.named_parameters()), 0.01)
    matrices, others = ([p for p in theirs.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    reference = [OPTIMIZERS[name](matrices), OPTIMIZERS[name](others)]
    for group in reference[1].param_groups:
        group["weight_decay"] = 0.0
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        for net, optimizers in ((model, [mine]), (theirs, reference)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            net(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    for (key, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=key)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adm", "optimizer: no 'adm', known are adam, adamw, sgd; did you mean 'adam'?"),
        ("sgd:momentum=1", "optimizer: momentum must be at least 0 and below 1, got 1.0"),
        ("adamw:weight_decay=-1", "optimizer: weight_decay must be at least 0, got -1.0"),
        ("sgd:nesterov=true,momentum=0", "optimizer: nesterov needs a momentum above 0, got 0.0"),
        ("adam:lr=1", "optimizer: adam has no 'lr' (given 'adam:lr=1'); it has beta1, beta2, eps"),
    ],
)
def test_what_no_optimiser_is_called_is_said(text: str, said: str) -> None:
    with pytest.raises(MetaftError) as caught:
        optim.named(text)
    assert str(caught.value) == said


def test_schedules_are_their_formulas() -> None:
    cosine, linear = schedules.make("cosine"), schedules.make("linear:warmup=0.2")
    assert [cosine(step, 4) for step in range(4)] == pytest.approx([1.0, 0.8535533906, 0.5, 0.1464466094])
    assert [linear(step, 10) for step in range(10)] == pytest.approx([0.5, 1, 1, *(1 - k / 8 for k in range(1, 8))])
    assert schedules.make("constant")(7, 9) == 1.0
    with pytest.raises(MetaftError, match=r"^warmup must be at least 0 and below 1, got 1.5$"):
        schedules.make("cosine:warmup=1.5")
    with pytest.raises(
        MetaftError, match=r"^schedule: no 'cosin', known are constant, linear, cosine, step, one-cycle, stlr, plateau"
    ):
        schedules.make("cosin")


def rates_of_torch(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    """Rates of a scheduler of PyTorch's over an optimiser at 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("text", "size", "gamma"), [("step", 30, 0.1), ("step:every=0.25,factor=0.5", 25, 0.5)])
def test_steps_are_those_of_torch(text: str, size: int, gamma: float) -> None:
    wanted = rates_of_torch(lambda o: torch.optim.lr_scheduler.StepLR(o, size, gamma), 100)
    assert [schedules.make(text)(step, 100) for step in range(100)] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("text", "rise"), [("one-cycle", 0.3), ("one-cycle:rise=0.1,low=0.2,end=0.01", 0.1)])
def test_one_cycle_is_that_of_torch(text: str, rise: float) -> None:
    div, final = (25.0, 1e4) if rise == 0.3 else (5.0, 20.0)
    wanted = rates_of_torch(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 1.0, total_steps=101, pct_start=rise, div_factor=div, final_div_factor=final, cycle_momentum=False
        ),
        101,
    )
    found = [schedules.make(text)(step, 101) for step in range(101)]
    assert found == pytest.approx(wanted, rel=1e-9)
    assert (found[0], found[-1]) == pytest.approx((1 / div, 1 / div / final))


@pytest.mark.parametrize(("cut", "ratio"), [(0.1, 32.0), (0.5, 4.0)])
def test_the_slanted_triangle_is_the_papers(cut: float, ratio: float) -> None:
    steps = 200
    top = math.floor(cut * steps)
    shares = [t / top if t < top else 1 - (t - top) / (top * (1 / cut - 1)) for t in range(steps)]
    wanted = [(1 + p * (ratio - 1)) / ratio for p in shares]
    found = [schedules.make(f"stlr:cut={cut},ratio={ratio}")(t, steps) for t in range(steps)]
    assert found == pytest.approx(wanted, rel=1e-12)
    assert found[top] == max(found) == 1
    assert found[0] == pytest.approx(1 / ratio)


@pytest.mark.parametrize(("text", "patience", "threshold"), [("plateau", 3, 1e-4), ("plateau:patience=0", 0, 1e-4)])
@given(losses=st.lists(st.sampled_from([1.0, 0.99995, 0.9998, 0.5, 0.49999, 0.2, 2.0, 0.0]), max_size=30))
@settings(max_examples=60, deadline=None)
def test_a_plateau_is_that_of_torch(text: str, patience: int, threshold: float, losses: list[float]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=patience, threshold=threshold, eps=0.0)
    for loss in losses:
        theirs.step(loss)
    mine = schedules.lowered(schedules.make(text), losses)
    assert mine == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("strategy", ["full", "second-half"])
def test_a_rate_falls_on_a_plateau_of_the_last_phase_and_again_after_a_resume(
    strategy: str, validated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing moves by so small a rate, so that every epoch of a phase but its first is no better. Of the training loss
    too, whose epochs see the same images in other batches: hence a wide threshold."""
    text = "plateau:factor=0.5,patience=1,threshold=0.5"
    recipe, (images, labels) = Recipe(epochs=8, batch_size=8, lr=1e-30, schedule=text), toy(21)
    val = toy(9, seed=3) if validated else (None, None)
    rates, plain = list[float](), optim.set_rates
    monkeypatch.setattr(optim, "set_rates", lambda o, r, lr: rates.append(lr) or plain(o, r, lr))
    states: list[Mapping[str, Any]] = []
    more: dict[str, Any] = {"strategy": named(strategy), "val_examples": val[0], "val_labels": val[1]}
    fit(body(dtype=torch.float64), INPUTS, images, labels, CLASSES, recipe, on_epoch=states.append, **more)
    whole, begins = rates[::PER_EPOCH], 4 if strategy == "second-half" else 0
    falls = [max(0, epoch - begins - 1) // 2 for epoch in range(8)]  # after two epochs that were no better, each
    assert whole == [1e-30 * 0.5**fall for fall in falls]
    rates.clear()
    fit(body(dtype=torch.float64), INPUTS, images, labels, CLASSES, recipe, resume=states[5], **more)
    assert rates == [rate for rate in whole[6:] for _ in range(PER_EPOCH)]


def test_meta_training_has_no_plateau() -> None:
    with pytest.raises(
        MetaftError, match=r"^schedule: plateau follows the loss of epochs, and meta-training has steps"
    ):
        schedules.of_steps("plateau")


@pytest.mark.parametrize("name", sorted(schedules.SCHEDULES))
@given(steps=st.integers(1, 300), warmup=st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=25, deadline=None)
def test_every_schedule_is_a_share_of_the_rate_after_its_warmup(name: str, steps: int, warmup: float) -> None:
    schedule = schedules.make(f"{name}:warmup={warmup}")
    factors = [schedule(step, steps) for step in range(steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    rising = max(1, round(warmup * steps)) if warmup else 0
    assert factors[:rising] == [(step + 1) / rising for step in range(rising)]
    plain = schedules.make(name)
    assert factors[rising:] == [plain(step, steps - rising) for step in range(steps - rising)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("plateau:factor=1", "factor must be above 0 and below 1, got 1.0"),
        ("plateau:patience=-1", "patience must be at least 0, got -1"),
        ("plateau:threshold=1", "threshold must be at least 0 and below 1, got 1.0"),
        ("step:every=0", "every must be above 0 and below 1, got 0.0"),
        ("step:factor=1", "factor must be above 0 and below 1, got 1.0"),
        ("one-cycle:rise=1", "rise must be above 0 and below 1, got 1.0"),
        ("one-cycle:low=2", "low must be 0 to 1, got 2.0"),
        ("stlr:cut=0", "cut must be above 0 and below 1, got 0.0"),
        ("stlr:ratio=0.5", "ratio must be at least 1, got 0.5"),
        ("cosine:rise=0.1", "rise"),
    ],
)
def test_settings_that_a_schedule_has_not_are_named(text: str, words: str) -> None:
    with pytest.raises(MetaftError, match=words):
        schedules.make(text)


@pytest.mark.parametrize("strategy", ["second-half", "lp-ft", "gradual", "discriminative", "layer-decay"])
def test_the_rate_of_each_parameter_is_the_formula_in_every_step_also_after_unfreezing(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, float]] = []
    plain = optim.set_rates

    def look(optimizer: torch.optim.Optimizer, rates: Mapping[str, float], lr: float) -> None:
        plain(optimizer, rates, lr)
        moving = [g for g in optimizer.param_groups if g["params"][0].requires_grad]
        seen.append({g["name"]: g["lr"] for g in moving})

    monkeypatch.setattr(optim, "set_rates", look)
    recipe, (images, labels) = Recipe(epochs=4, batch_size=8, lr=0.02, schedule="cosine:warmup=0.25"), toy(21)
    states: list[Mapping[str, Any]] = []
    made = STRATEGIES[strategy]()
    fit(body(), INPUTS, images, labels, CLASSES, recipe, strategy=made, on_epoch=states.append)
    groups = groups_of(nn.ModuleDict({"body": body(), "head": nn.Linear(3, 2)}))
    assert len(seen) == STEPS
    fit(body(), INPUTS, images, labels, CLASSES, recipe, strategy=made, resume=states[1])
    assert seen[STEPS:] == seen[2 * PER_EPOCH : STEPS]
    del seen[STEPS:]
    for step, rates in enumerate(seen):
        factor = (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 9))
        wanted = {k: 0.02 * factor * f for k, f in STRATEGIES[strategy]().rates(groups, step, STEPS, PER_EPOCH).items()}
        assert rates == pytest.approx(wanted), step


@pytest.mark.parametrize("optimizer", ["adam", "adamw:weight_decay=0.5", "sgd:momentum=0.9,weight_decay=0.5"])
@pytest.mark.parametrize("strategy", ["second-half", "last:blocks=1", "head"])
def test_frozen_values_stay_to_the_bit_and_a_resume_goes_on_alike(strategy: str, optimizer: str) -> None:
    """Neither decay nor momentum may reach them, with a schedule, clipping and early stopping at work."""
    made = STRATEGIES["second-half"]() if strategy == "second-half" else named(strategy)
    recipe = Recipe(
        epochs=4, batch_size=8, lr=0.01, optimizer=optimizer, schedule="cosine:warmup=0.1", clip_norm=0.5, patience=2
    )  # fmt: skip
    (images, labels), val = toy(21), toy(9, seed=3)
    states: list[Mapping[str, Any]] = []
    more: dict[str, Any] = {"strategy": made, "val_examples": val[0], "val_labels": val[1]}
    whole = fit(body(), INPUTS, images, labels, CLASSES, recipe, on_epoch=states.append, **more)
    frozen = {"second-half": 0, "last:blocks=1": 1, "head": 0}[strategy]
    still = {f"body.{name}" for block in blocks_of(body())[: -frozen or None] for name in block}
    begun = {f"body.{k}": v for k, v in body().state_dict().items()}
    for number, state in enumerate(states):
        if strategy != "second-half" or number < 2:
            assert all(torch.equal(state["model"][name], begun[name]) for name in still)
        again = fit(body(), INPUTS, images, labels, CLASSES, recipe, resume=copy.deepcopy(state), **more)
        assert same(bits(again), bits(whole)) and again.curve == whole.curve
    assert whole.curve


@pytest.mark.parametrize(("text", "ema"), [("bitfit", 0.9), ("lora:rank=2", None), ("head", 0.5), ("full", None)])
def test_a_checkpoint_holds_what_trains_and_no_backbone_that_stays(text: str, ema: float | None) -> None:
    (images, labels), val = toy(21), toy(9, seed=3)
    recipe = Recipe(epochs=3, batch_size=8, lr=0.01, ema=ema)
    states: list[Mapping[str, Any]] = []
    more: dict[str, Any] = {"strategy": named(text), "val_examples": val[0], "val_labels": val[1]}
    whole = fit(body(), INPUTS, images, labels, CLASSES, recipe, on_epoch=states.append, **more)
    weights = {name for name, p in body().named_parameters() if p.dim() > 1}
    for state in states:
        tensors, plain = flatten(state)
        left = {name.partition("/body.")[2].replace(".parametrizations.weight.original", ".weight") for name in tensors}
        assert weights & left == (weights if text == "full" else set())
        assert {"model", "best", *(["average"] if ema else [])} <= {name.partition("/")[0] for name in tensors}
        for read in (unflatten(tensors, plain), unflatten(*flatten(unflatten(tensors, plain)))):
            again = fit(body(), INPUTS, images, labels, CLASSES, recipe, resume=read, **more)
            assert same(bits(again), bits(whole)) and again.curve == whole.curve


@pytest.mark.parametrize("optimizer", ["adam", "adamw:weight_decay=0.5", "sgd:momentum=0.9,weight_decay=0.5"])
def test_what_is_frozen_again_stays_to_the_bit(optimizer: str) -> None:
    """An optimiser has moments of it by then, which would move it on, and a gradient, if one were left."""

    def first_half(groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
        return every(groups if step < steps / 2 else groups[-1:])

    recipe = Recipe(epochs=4, batch_size=8, lr=0.01, optimizer=optimizer)
    (images, labels), states = toy(21), list[Mapping[str, Any]]()
    fit(body(), INPUTS, images, labels, CLASSES, recipe, strategy=Strategy(first_half), on_epoch=states.append)
    first, second, _, last = (state["model"] for state in states)
    for name in (f"body.{k}" for k, _ in body().named_parameters()):
        assert not torch.equal(first[name], second[name]), name
        assert torch.equal(second[name], last[name]), name
    assert not torch.equal(second["head.weight"], last["head.weight"])


def test_a_gradient_is_clipped_by_its_norm() -> None:
    recipe, (images, labels) = (
        Recipe(epochs=1, batch_size=32, lr=1.0, optimizer="sgd:momentum=0", clip_norm=1e-3),
        toy(21),
    )
    start = body(dtype=torch.float64)
    fitted = fit(start, INPUTS, images, labels, CLASSES, recipe)
    moved = [fitted.body.state_dict()[n] - p for n, p in start.state_dict().items()]
    assert 0 < math.sqrt(sum(float(m.square().sum()) for m in moved)) <= 1.0001e-3


def test_features_of_a_backbone_that_stays_are_computed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path))
    recipe, (images, labels), val = Recipe(epochs=3, batch_size=8, lr=0.01), toy(90), toy(70, seed=3)
    passes: list[int] = []

    def counted(start: nn.Module) -> nn.Module:
        start.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
        return start

    def head(start: nn.Module, **more: Any) -> Fitted:
        return fit(
            counted(start), INPUTS, images, labels, CLASSES, recipe, strategy=named("head"),
            val_examples=val[0], val_labels=val[1], **more,
        )  # fmt: skip

    first = head(body())
    once = sum(passes)
    passes.clear()
    second = head(body())
    assert sum(passes) < once, "from the disk"
    assert same(bits(first), bits(second)) and first.curve == second.curve
    each = Extra(lambda objective, origin: lambda model, batch: objective(model, batch))  # which keeps nothing
    slow = head(body(), extras=(each,))
    for row, other in zip(first.curve, slow.curve, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    for damaged in tmp_path.iterdir():
        damaged.write_bytes(damaged.read_bytes()[:-40])
    assert same(bits(head(body())), bits(first))


def test_features_are_none_of_the_starts_once_the_backbone_has_moved() -> None:
    """The head alone, then all, then the head alone again: with and without what is computed once."""

    def between(groups: Groups, step: int, steps: int, per_epoch: int) -> Mapping[str, float]:
        return every(groups if steps / 3 <= step < 2 * steps / 3 else groups[-1:])

    recipe, (images, labels) = Recipe(epochs=6, batch_size=8, lr=0.01), toy(21)
    start = kept_statistics(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), unseen=True)
    each = Extra(lambda objective, origin: lambda model, batch: objective(model, batch))  # which computes all anew
    states: list[Mapping[str, Any]] = []
    made = Strategy(between)
    quick = fit(start, INPUTS, images, labels, CLASSES, recipe, strategy=made, on_epoch=states.append)
    slow = fit(start, INPUTS, images, labels, CLASSES, recipe, strategy=made, extras=(each,))
    for row, other in zip(quick.curve, slow.curve, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    for state in states:
        again = fit(start, INPUTS, images, labels, CLASSES, recipe, strategy=made, resume=state)
        assert same(bits(again), bits(quick))


def test_a_backbone_with_its_own_statistics_is_passed_through_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the head's fit, and not again by the probe; one example more tells whether its code is still the same."""
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path))
    passed: list[int] = []
    start = kept_statistics(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), unseen=True)
    start.register_forward_hook(lambda _, inputs, __: passed.append(len(inputs[0])))
    images, labels = toy(90)
    fit(start, INPUTS, images, labels, CLASSES, Recipe(epochs=3, batch_size=8), strategy=named("head"))
    assert sum(passed) == 91
    passed.clear()
    probe(start, INPUTS, images, labels, CLASSES)
    assert sum(passed) == 1


def test_features_of_other_code_with_the_same_values_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("METAFT_CACHE", str(tmp_path))

    class Body(nn.Module):
        factor = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * self.weight * x.flatten(1)

    x = Prepared(toy(70)[0], INPUTS, torch.empty(0))
    first = features_of(Body(), x)
    monkeypatch.setattr(Body, "factor", 2.0)
    assert torch.equal(features_of(Body(), x), 2 * first)


# Extras


def decay(strength: float = 1.0) -> Extra:
    """Pulls what is trained back to where it began."""

    def wrap(objective: Objective, origin: Origin) -> Objective:
        def pulled(model: nn.Module, batch: Batch) -> Tensor:
            far = sum((p - origin.params[name]).square().sum() for name, p in model.named_parameters())
            return objective(model, batch) + strength * far

        return pulled

    return Extra(wrap)


def test_an_extra_changes_the_loss_and_extras_compose() -> None:
    def distance(fitted: Fitted) -> float:
        begun = body().state_dict()
        return sum(float((fitted.body.state_dict()[k] - v).square().sum()) for k, v in begun.items())

    free, pulled, twice = (tune("full", extras=extras) for extras in ((), (decay(10),), (decay(5), decay(5))))
    assert distance(pulled) < 0.5 * distance(free)
    assert twice.curve[0]["loss"] == pytest.approx(pulled.curve[0]["loss"], rel=1e-4)
    states: list[Mapping[str, Any]] = []
    tune("full", extras=(decay(10),), on_epoch=states.append)
    assert same(bits(tune("full", extras=(decay(10),), resume=states[1])), bits(pulled))


def test_the_first_extra_is_the_innermost() -> None:
    def twice() -> Extra:
        return Extra(lambda objective, origin: lambda model, batch: 2 * objective(model, batch))

    def plus() -> Extra:
        return Extra(lambda objective, origin: lambda model, batch: objective(model, batch) + 1)

    plain, first, last = (tune("full", extras=e).curve[0]["loss"] for e in ((), (twice(), plus()), (plus(), twice())))
    assert plain < first < last
    model = nn.ModuleDict({"body": nn.Flatten(), "head": nn.Linear(4, 3)})
    batch, origin = Batch(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), torch.arange(2), 0), Origin({}, 0)
    with torch.no_grad():
        value = float(plain_loss(model, batch))
        assert float(composed((twice(), plus()), origin)(model, batch)) == pytest.approx(2 * value + 1)
        assert float(composed((plus(), twice()), origin)(model, batch)) == pytest.approx(2 * (value + 1))


def test_a_batch_says_which_examples_it_holds_in_which_epoch() -> None:
    """Random numbers of an extra are a function of both."""
    seen: list[Batch] = []

    def look() -> Extra:
        return Extra(lambda objective, origin: lambda model, batch: seen.append(batch) or objective(model, batch))

    recipe, (images, labels) = Recipe(epochs=2, batch_size=8), toy(21)
    fit(body(), INPUTS, images, labels, CLASSES, recipe, extras=(look(),))
    for epoch in (0, 1):
        batches = [batch for batch in seen if batch.epoch == epoch]
        assert sorted(torch.cat([batch.rows for batch in batches]).tolist()) == list(range(21))
        for batch in batches:
            assert torch.equal(batch.x, INPUTS(images[batch.rows]))
            assert torch.equal(batch.y, labels[batch.rows])
