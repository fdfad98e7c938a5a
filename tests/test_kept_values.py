"""What of a module stays: frozen parameters and buffers, all values on request. What is drawn is drawn whole."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
from helpers import images, pool, remains, write_target
from torch import Tensor, nn

import metaft
from metaft import adapt, algorithms, engines, evaluate, meta_train, models, outer
from metaft.config import AdaptConfig
from metaft.errors import CheckpointError, MetaftError, MetaftWarning
from metaft.models import initialise
from metaft.models.architecture import build
from metaft.runs import checkpoint


class Net(nn.Module):
    """A frozen convolution, a buffer, a layer that is trained, and a head."""

    def __init__(self, seed: int = 0, side: int = 8, *, frozen: str = "body") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Conv2d(1, 4, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.register_buffer("mix", torch.randn(4 * (side // 2) ** 2, 6))
            self.middle = nn.Linear(6, 5)
            self.head = nn.Linear(5, 3)
        for name in frozen.split():
            self.get_submodule(name).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.body(x))).flatten(1) @ self.get_buffer("mix")
        return self.head(torch.tanh(self.middle(x)))


FROZEN = ("body.weight", "body.bias")


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])


def last(run: Path) -> dict[str, Tensor]:
    return checkpoint.load(run / "checkpoints/last.safetensors")[0]


def make(name: str, model: models.Model) -> algorithms.Algorithm:
    known = algorithms.hyper_parameters(name)
    given = {"inner_lr": 0.1, "inner_steps": 2, "layer": "middle", "classes": 12, "context": 3}
    return algorithms.build(name, model, {k: v for k, v in given.items() if k in known})


# ---- frozen parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(algorithms.ALGORITHMS))
def test_no_member_moves_or_learns_what_is_frozen(name: str) -> None:
    module = Net(side=16).double()
    algorithm = make(name, models.functional(module))
    meta, state = algorithm.init(0)
    assert meta
    assert not any(part in key for key in meta for part in FROZEN)
    data, task = scenarios.data_for(algorithm), scenarios.one(scenarios.episodes())
    grads = []
    for engine, chunk in (("threads", 1), ("vmap", None)):
        with warnings.catch_warnings(), engines.engine(engine, threads=1, chunk=chunk) as mapped:
            warnings.simplefilter("ignore", MetaftWarning)  # iMAML's of its curvature
            grads.append(outer.meta_gradient(mapped, algorithm, meta, state, data).grads)
    assert scenarios.relative_error(*grads) < 1e-9
    fast = algorithm.adapt(meta, state, *task[:2], task.key, ways=3, steps=2 * bool(algorithm.inner_steps))
    assert fast.params.keys().isdisjoint(FROZEN)
    other = models.functional(Net(1, side=16).double())  # another frozen convolution and another buffer
    model = models.functional(module)
    assert not torch.allclose(
        other.apply(model.params, task.query_x, None), model.apply(model.params, task.query_x, None)
    )


def test_the_meta_gradient_takes_frozen_parameters_for_constants() -> None:
    module = Net(side=16).double()
    model, data = models.functional(module), scenarios.episodes()
    module.norm.track_running_stats = False
    module.norm.running_mean = module.norm.running_var = None

    def net(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, params, (x,))

    expected = scenarios.maml_reference(net, model.params, data, lr=0.1, steps=2, first_order=False)
    with engines.engine("vmap") as engine:
        maml = algorithms.maml(model, inner_lr=0.1, inner_steps=2)
        found = outer.meta_gradient(engine, maml, model.params, {}, data).grads
    assert scenarios.relative_error(found, expected) < 1e-10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("anil", "anil adapts the head alone, and this module's is frozen"),
        ("proto-maml", r"^algorithm: proto-maml makes the head of a task anew, and 'head' is frozen"),
        ("unicorn-maml", r"^algorithm: unicorn-maml makes the head of a task anew, and 'head' is frozen"),
        ("baseline", r"^algorithm: baseline makes the head of a task anew, and 'head' is frozen"),
        ("baseline++", r"^algorithm: baseline\+\+ makes the head of a task anew, and 'head' is frozen"),
    ],
)
def test_members_that_need_a_head_of_their_own_refuse_a_frozen_one(name: str, message: str) -> None:
    with pytest.raises(MetaftError, match=message):
        make(name, models.functional(Net(side=16, frozen="head")))


@pytest.mark.parametrize("name", ["proto-maml", "unicorn-maml", "baseline"])
def test_members_that_need_a_head_of_their_own_refuse_one_that_is_more(name: str) -> None:
    module = Net(side=16, frozen="")
    nn.utils.parametrizations.weight_norm(module.head)
    with pytest.raises(MetaftError, match=r"'head' is no plain nn.Linear \(ParametrizedLinear"):
        make(name, models.functional(module))


def test_a_member_without_anything_to_learn_is_refused(in_tmp: Path) -> None:
    config = images(model=None, algorithm="protonet")
    with pytest.raises(MetaftError, match=r"^algorithm: protonet has nothing to learn here"):
        meta_train.run(config, dataset=pool(), module=Net(frozen="body norm middle"))
    assert list(in_tmp.iterdir()) == []


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"engine": "threads", "outer_optimizer": "sgd"},
        {"engine": "graph", "clip_norm": 1.0},
        {"algorithm": "reptile", "engine": "vmap"},
        {"engine": "vmap", "inner_checkpoint": True},
    ],
    ids=["processes", "threads", "graph", "reptile", "recomputed"],
)
def test_a_run_keeps_what_is_frozen_and_carries_it(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever goes on with a run need not have the same values again: those of the run count."""
    before = {k: v.clone() for k, v in Net().state_dict().items()}
    config = images(tmp_path / "r", model=None, width=None, **changes)
    result = meta_train.run(config, dataset=pool(), module=Net())
    said = next(line for line in capsys.readouterr().err.splitlines() if "run folder" in line)
    assert "custom (Net; its own values; frozen: body.weight, body.bias)" in said
    tensors = last(tmp_path / "r")
    assert all(torch.equal(tensors[f"meta/{name}"], before[name]) for name in FROZEN)
    assert torch.equal(tensors["buffers/mix"], before["mix"])
    assert not torch.equal(tensors["meta/middle.weight"], before["middle.weight"])
    assert not any(name.startswith("optimizer/body.") for name in tensors)
    assert evaluate.run(tmp_path / "r", dataset=pool(), module=Net(1))["test"] == result["test"]
    kept = remains(tmp_path / "r")
    meta_train.resume_run(tmp_path / "r", dataset=pool(), module=Net(2))
    assert remains(tmp_path / "r") == kept


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_frozen_values_it_began_with(tmp_path: Path) -> None:
    config = images(model=None)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    meta_train.run(whole, dataset=pool(), module=Net())
    meta_train.run(dataclasses.replace(config, out=str(tmp_path / "r"), iterations=3), dataset=pool(), module=Net())
    more = dataclasses.replace(config, iterations=5)
    meta_train.resume_run(tmp_path / "r", more, dataset=pool(), module=Net(1))
    assert all(torch.equal(last(tmp_path / "r")[f"meta/{name}"], Net().state_dict()[name]) for name in FROZEN)


@pytest.mark.usefixtures("_no_pictures")
def test_a_module_with_other_frozen_parameters_than_the_runs_is_refused(tmp_path: Path) -> None:
    meta_train.run(images(tmp_path / "r", model=None), dataset=pool(), module=Net())
    with pytest.raises(
        CheckpointError, match=r"frozen in the run are \['body.bias', 'body.weight'\], .* handed over \[\]"
    ):
        evaluate.run(tmp_path / "r", dataset=pool(), module=Net(frozen=""))
    with pytest.raises(MetaftError, match=r"'mix' has shape \[64, 6\] in the run, and \[16, 6\] in the module"):
        evaluate.run(tmp_path / "r", dataset=pool(), module=Net(side=4))


# ---- all values ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_pictures")
def test_a_run_begins_with_the_modules_values_or_with_the_seeds(tmp_path: Path) -> None:
    own = Net().state_dict()
    first = {}
    for out, module, init in (("keep", Net(), "keep"), ("seed", Net(), "seed"), ("again", Net(1), "seed")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("metaft.runs.training.meta_gradient", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                meta_train.run(images(tmp_path / out, model=None), dataset=pool(), module=module, init=init)  # type: ignore[arg-type]
        first[out] = last(tmp_path / out)
    assert all(torch.equal(first["keep"][f"meta/{name}"], own[name]) for name in ("middle.weight", *FROZEN))
    for name in ("middle.weight", "head.weight"):
        assert not torch.equal(first["seed"][f"meta/{name}"], own[name])
        assert torch.equal(first["seed"][f"meta/{name}"], first["again"][f"meta/{name}"])
    assert torch.equal(first["seed"]["meta/body.weight"], own["body.weight"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target") / "t", {"train": 3, "test": 2})


def settings(init: str, data: Path, out: Path, method: str = "finetune", **more: Any) -> AdaptConfig:
    loop: dict[str, Any] = {"epochs": 1, "lr": 0.02, "batch_size": 7} if method == "finetune" else {"method": "inner"}
    return AdaptConfig(init=init, data=f"folder:{data}", out=str(out), device="cpu", **loop, **more)


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("method", ["finetune", "inner"])
def test_adapting_keeps_what_the_run_kept(method: str, data: Path, tmp_path: Path) -> None:
    meta_train.run(images(tmp_path / "r", model=None), dataset=pool(), module=Net())
    before = {k: v.clone() for k, v in Net().state_dict().items()}
    adapt.run(settings(str(tmp_path / "r"), data, tmp_path / "o", method), module=Net(1))
    body = metaft.load(tmp_path / "o", module=Net(2)).body.state_dict()
    assert all(torch.equal(body[name], before[name]) for name in (*FROZEN, "mix"))
    assert not torch.equal(body["middle.weight"], last(tmp_path / "r")["meta/middle.weight"])
    if method == "inner":
        with pytest.raises(MetaftError, match=r"^method: frozen in the run are \['body.bias', 'body.weight'\]"):
            adapt.run(settings(str(tmp_path / "r"), data, tmp_path / "p", method), module=Net(frozen=""))
    else:
        adapt.run(settings(str(tmp_path / "r"), data, tmp_path / "p"), module=Net(1, frozen=""))
        moved = metaft.load(tmp_path / "p", module=Net()).body.state_dict()
        assert not torch.equal(moved["body.weight"], before["body.weight"])
        torch.testing.assert_close(moved["body.weight"], before["body.weight"], atol=0.2, rtol=0)


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.slow
def test_adapting_a_head_that_is_more_than_a_linear_layer(data: Path, tmp_path: Path) -> None:
    """Training takes such a module, so the inner method stores the head as it is, or says why it cannot."""

    def normed() -> Net:
        module = Net()
        nn.utils.parametrizations.weight_norm(module.head)
        return module

    meta_train.run(images(tmp_path / "r", model=None), dataset=pool(), module=normed())
    result = adapt.run(settings(str(tmp_path / "r"), data, tmp_path / "o", "inner"), module=normed())
    loaded = metaft.load(tmp_path / "o", module=normed())
    assert type(loaded.head).__name__ == "ParametrizedLinear"
    assert loaded(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 3)
    assert 0 <= result["accuracy"] <= 1
    four = write_target(tmp_path / "four", {"train": 4, "test": 3}, classes=("a", "b", "c", "d"))
    with pytest.raises(MetaftError, match=r"^method: .*no plain nn.Linear .*cannot have the 4 classes of the target"):
        adapt.run(settings(str(tmp_path / "r"), four, tmp_path / "p", "inner"), module=normed())
    adapt.run(settings(str(tmp_path / "r"), four, tmp_path / "p"), module=normed())


def test_adapting_from_a_modules_own_values(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Net(side=28, frozen="body middle")
    config = settings("none", data, tmp_path / "o")
    result = adapt.run(config, module=module, init="keep")
    said = capsys.readouterr()
    assert "from module (Net; frozen: body.weight, body.bias, middle.weight, middle.bias)" in said.err
    assert "from the values that the module was handed over with" in said.out
    assert "handed over start" in said.out
    assert result["scratch"] is not None
    body = metaft.load(tmp_path / "o", module=module).body.state_dict()
    assert torch.equal(body["middle.weight"], module.middle.weight)
    again = adapt.resume_run(tmp_path / "o", module=module, init="keep")
    assert again["accuracy"] == result["accuracy"]
    with pytest.raises(MetaftError, match="changed since"):
        adapt.resume_run(tmp_path / "o", module=Net(1, side=28, frozen="body middle"), init="keep")
    with pytest.raises(MetaftError, match=r"^init: 'keep' is for a module without a run .*no module"):
        adapt.run(dataclasses.replace(config, out=None), init="keep")


class Normed(nn.Module):
    """A net whose two normalisation layers have seen data of their own, or none."""

    def __init__(self, *, seen: bool = True) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, 2), nn.BatchNorm2d(6)
        self.line, self.second = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)
        models.initialise(self, 0)
        if seen:
            with torch.no_grad():
                g = torch.Generator().manual_seed(5)
                for _ in range(20):
                    self(3 + 2 * torch.randn(8, 1, 28, 28, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.second(self.line(features)).relu())


@pytest.mark.parametrize("freeze", ["none", "backbone"])
def test_running_statistics_are_kept_where_a_module_has_them(
    freeze: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Normed()
    config = settings("none", data, tmp_path / "o", freeze=freeze)
    result = adapt.run(config, module=module, init="keep")
    assert "from module (Normed; running statistics kept)" in capsys.readouterr().err
    body = metaft.load(tmp_path / "o", module=module).body
    for name in ("norm", "second"):
        kept, theirs = body.get_submodule(name), module.get_submodule(name)
        assert torch.equal(kept.get_buffer("mean"), theirs.get_buffer("running_mean"))
        assert torch.equal(kept.get_buffer("var"), theirs.get_buffer("running_var"))
        assert torch.equal(kept.get_parameter("weight"), theirs.get_parameter("weight")) == (freeze == "backbone")
    if freeze == "backbone":
        x, bare = torch.randn(4, 1, 28, 28), copy.deepcopy(module).eval()
        bare.head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        torch.testing.assert_close(body(x), bare(x), rtol=0, atol=1e-5)
    assert adapt.resume_run(tmp_path / "o", module=module, init="keep")["accuracy"] == result["accuracy"]
    module.norm.get_buffer("running_var").mul_(2)
    with pytest.raises(MetaftError, match="changed since"):
        adapt.resume_run(tmp_path / "o", module=module, init="keep")


def test_statistics_that_have_seen_nothing_are_not_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Normed(seen=False)
    adapt.run(settings("none", data, tmp_path / "o"), module=module, init="keep")
    assert "from module (Normed) on" in capsys.readouterr().err
    body = metaft.load(tmp_path / "o", module=module).body
    assert (body.get_submodule("norm").get_buffer("mean") != 0).all()


class Pair(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_a_module_is_held_to_the_same_rules_when_it_is_adapted(data: Path, tmp_path: Path) -> None:
    with pytest.raises(MetaftError, match=r"^module: the forward pass of Pair returns a tuple"):
        adapt.run(settings("none", data, tmp_path / "o"), module=Pair(side=28))
    with pytest.raises(MetaftError, match=r"^module: parameter 'body.weight' is float16"):
        adapt.run(settings("none", data, tmp_path / "o"), module=Net().half())
    adapt.run(settings("none", data, tmp_path / "o"), module=nn.DataParallel(Net(side=28).double()))


def corner(x: Tensor) -> Tensor:
    """[n, 64] of images of any size from 8 x 8."""
    return x[:, 0, :8, :8].flatten(1)


class Shaped(nn.Module):
    """A body, a head, and something that is done with them."""

    def __init__(self, end: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.end = nn.Linear(64, 8), nn.Linear(8, 3), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head, torch.tanh(self.body(corner(x))))


class Last(nn.Module):
    """Ends with another layer than its last nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(64, 3), nn.Bilinear(64, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(corner(x), self.gate(corner(x)))


def cosine(head: nn.Linear, features: Tensor) -> Tensor:
    return 10 * nn.functional.linear(nn.functional.normalize(features), nn.functional.normalize(head.weight))


APART: dict[str, Callable[[], nn.Module]] = {
    "log_softmax": lambda: Shaped(lambda head, f: head(f).log_softmax(-1)),
    "sine": lambda: Shaped(lambda head, f: 5 * head(f).sin()),
    "in place": lambda: Shaped(lambda head, f: head(f).clamp_(-99, 99)),
    "nothing to be seen": lambda: Shaped(lambda head, f: head(f).clamp(-99, 99)),
    "weight read": lambda: Shaped(cosine),
    "weight read before": lambda: Shaped(lambda head, f: head(f + 0 * head.weight.sum())),
    "twice": lambda: Shaped(lambda head, f: head(f + head(f).sum())),
    "another end": Last,
}


@pytest.mark.parametrize("name", sorted(APART))
def test_adapting_refuses_a_module_that_is_more_than_a_body_and_a_head(name: str, data: Path, tmp_path: Path) -> None:
    """Its body would be another function than the one that was trained, without a word."""
    with pytest.raises(MetaftError, match=r"^module: adapt takes \w+ for a body and a head, and .*end with") as refused:
        adapt.run(settings("none", data, tmp_path / "o"), module=APART[name]())
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("method", ["finetune", "inner"])
def test_adapting_a_run_refuses_such_a_module_too(method: str, data: Path, tmp_path: Path) -> None:
    meta_train.run(images(tmp_path / "r", model=None), dataset=pool(), module=APART["log_softmax"]())
    with pytest.raises(MetaftError, match=r"^module: adapt takes Shaped .*'head', its last nn.Linear, gives is not"):
        adapt.run(settings(str(tmp_path / "r"), data, tmp_path / "o", method), module=APART["log_softmax"]())
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "end", [lambda head, f: head(f).view(len(f), -1), lambda head, f: head(f.unsqueeze(1).squeeze(1)).flatten(1)]
)
def test_another_view_of_what_the_head_gives_is_no_reason_to_refuse(end: Any, data: Path, tmp_path: Path) -> None:
    adapt.run(settings("none", data, tmp_path / "o"), module=Shaped(end))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapting_a_module_that_is_a_head_alone(dtype: torch.dtype, data: Path, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 3)).to(dtype)
    adapt.run(settings("none", data, tmp_path / "o"), module=module)
    loaded = metaft.load(tmp_path / "o", module=module)
    assert loaded.logits(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, 3)


# ---- what is drawn ------------------------------------------------------------------------------------------------


class Many(nn.Module):
    """A layer of every kind that is drawn in another way."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.conv = norm(nn.Conv2d(3, 4, 3))
        self.gru = nn.GRU(4, 4)
        self.hung = norm(nn.LSTM(4, 4), "weight_hh_l0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.old = nn.utils.weight_norm(nn.Linear(4, 4))
        self.spectral = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.words = nn.Embedding(5, 4)
        self.layer = nn.LayerNorm(4)
        self.attend = nn.MultiheadAttention(4, 2)
        self.batch = nn.BatchNorm2d(4)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.still = nn.Linear(4, 4).requires_grad_(False)
        self.own = Own()
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.words.weight
        self.head = nn.Linear(4, 3)


class Own(nn.Module):
    """Draws its parameters itself, those of its parts too."""

    def __init__(self) -> None:
        super().__init__()
        self.bare, self.part = nn.Parameter(torch.full((4,), 7.0)), nn.Linear(4, 4)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.bare)
        nn.init.constant_(self.part.weight, 0.5)


def marked() -> Many:
    module = Many()
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(7.0)
    return module


@pytest.mark.parametrize("of", [lambda module: module, models.taken], ids=["itself", "copy"])
def test_every_parameter_is_drawn_from_the_seed(of: Callable[[nn.Module], nn.Module]) -> None:
    state = torch.get_rng_state()
    a, b, c = (initialise(of(marked()), seed) for seed in (1, 1, 2))
    torch.set_rng_state(state)
    values = dict(a.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in b.named_parameters())
    constant = [name for name, p in values.items() if p.numel() and (p == p.flatten()[0]).all()]
    allowed = {"layer.weight", "layer.bias", "batch.weight", "batch.bias", "own.part.weight"}
    assert {name for name in constant if not name.endswith("bias")} <= {*allowed, "still.weight"}
    assert (values["still.weight"] == 7).all()
    assert all((p != 7).all() for name, p in values.items() if not name.startswith("still"))
    assert (values["own.part.weight"] == 0.5).all()
    same = {name for name, p in c.named_parameters() if torch.equal(p, values[name])}
    assert {name for name in same if not name.endswith("bias")} <= {*allowed, "still.weight"}
    assert a.get_submodule("tied").weight is a.get_submodule("words").weight
    old = a.get_submodule("old")
    torch.testing.assert_close(old.weight_g, torch.norm_except_dim(old.weight_v, 2, 0))  # type: ignore[arg-type]


def test_drawing_leaves_the_global_generator_buffers_and_classes_alone() -> None:
    module = marked()
    before, buffers = torch.get_rng_state(), {k: v.clone() for k, v in module.named_buffers()}
    initialise(module, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, buffers[k]) for k, v in module.named_buffers())
    assert module.conv.weight.shape == (4, 3, 3, 3), "a parametrised layer lost its tensor"


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.zero = nn.Parameter(torch.full((4000,), 7.0)), nn.Parameter(torch.zeros(4000))
        self.spread = nn.Parameter(3 + 2 * torch.randn(4000, generator=torch.Generator().manual_seed(0)))


def test_a_bare_parameter_is_drawn_alike_and_named() -> None:
    with pytest.warns(MetaftWarning, match=r"nothing says how to draw 'token', 'zero', 'spread' anew.*of Bare"):
        module = initialise(Bare(), 0)
    for name, mean, spread in (("token", 7.0, 0.14), ("zero", 0.0, 0.02), ("spread", 3.0, 2.0)):
        p = module.get_parameter(name).detach()
        assert float(p.mean()) == pytest.approx(mean, abs=spread / 5)
        assert float(p.std()) == pytest.approx(spread, rel=0.1)


def test_a_parametrization_without_inverse_is_refused_and_the_module_stays() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square()

    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    nn.utils.parametrize.register_parametrization(module[0], "weight", Square())
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(MetaftError, match=r"^module: 'weight' of ParametrizedLinear cannot be drawn anew"):
        initialise(module, 0)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_another_number_of_classes_draws_nothing_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    net = Net()
    for seed in (None, 1):
        module, head = build({"name": "custom"}, seed, outputs=7, module=net)
        assert module.get_submodule(head).weight.shape == (7, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_registered_architecture_has_its_buffers_and_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "mine", lambda ways, shape, width, dropout: Net(3, shape[-1], frozen=""))
    a, b, c = (models.build("mine", ways=3, shape=(1, 8, 8), width=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.buffers["mix"], Net(3).state_dict()["mix"])
    assert all(torch.equal(a.params[k], b.params[k]) for k in a.params)
    assert not torch.equal(a.params["middle.weight"], c.params["middle.weight"])
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(a.apply(a.params, x, None), b.apply(b.params, x, None))


class Renewed(nn.Module):
    """Whose `reset_parameters` puts a new parameter in the place of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((3,), 7.0), requires_grad=False)
        self.head = nn.Linear(3, 2)

    def reset_parameters(self) -> None:
        self.w = nn.Parameter(torch.randn(3))


def test_a_frozen_parameter_stays_though_the_module_puts_another_in_its_place() -> None:
    net: Any = models.initialise(Renewed(), 3)
    assert not net.w.requires_grad and torch.equal(net.w, torch.full((3,), 7.0))


class Demanding(nn.Linear):
    def reset_parameters(self, std: float | None = None) -> None:
        if std is None and hasattr(self, "ready"):
            raise TypeError("std is missing")


def test_a_reset_that_fails_is_named_and_changes_nothing() -> None:
    net: Any = nn.Sequential(Demanding(3, 3), nn.Linear(3, 2))
    net[0].ready = True
    for p in net[0].parameters():  # which nothing has set: memory as it comes may hold NaN, which equals nothing
        nn.init.ones_(p)
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(
        MetaftError, match=r"^module: reset_parameters\(\) of Demanding fails.*TypeError: std is missing"
    ):
        models.initialise(net, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
