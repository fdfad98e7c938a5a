"""What a module of the user's own may be: wrapped, recurrent, of tokens, double; and what is refused in one line."""

from __future__ import annotations

import importlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
from helpers import images, pool, remains
from torch import Tensor, nn

from metaft import algorithms, engines, evaluate, meta_train, models, outer
from metaft.cli import StopSignals
from metaft.engines import workers
from metaft.errors import Interrupted, MetaftError, MetaftWarning
from metaft.models import handed
from metaft.models.plain import plain_layers
from metaft.types import Episode, Loss, Split

needs_fork = pytest.mark.skipif(not workers.available(), reason="this system cannot fork")


class Net(nn.Module):
    """A body of one convolution, and a head."""

    def __init__(self, outputs: int = 3, side: int = 8) -> None:
        super().__init__()
        self.body: nn.Module = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.head: nn.Module = nn.Linear(4 * (side // 2) ** 2, outputs)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.body(x)).flatten(1))


class Rows(nn.Module):
    """A layer over the first rows of an image, then its last state."""

    def __init__(self, layer: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.layer = layer(16, 5, **options)
        self.head = nn.Linear(5 * (1 + bool(options.get("bidirectional"))), 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.RNNBase):
            return self.head(self.layer(x[:, 0, :5])[0][:, -1])
        state = None
        for row in x[:, 0, :5].unbind(1):
            state = self.layer(row, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Words(nn.Module):
    """An embedding of tokens."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, padding_idx=padding)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.words(x)).flatten(1))


class Tokens:
    """Tasks whose inputs are six tokens, of which the first tells the class."""

    name, ways, shots, query_shots, shape, split_hash = "tokens", 2, 2, 2, (6,), "none"
    loss: Loss = "cross_entropy"

    def describe(self) -> dict[str, object]:
        return {}

    def to(self, device: str) -> Tokens:
        return self

    def source(self, **_: Any) -> Tokens:
        return self

    def episodes(self, seed: int, split: Split, indices: Sequence[int]) -> Episode:
        def one(i: int) -> tuple[Tensor, ...]:
            x = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(1000 * seed + i))
            y = torch.arange(8) % 2
            x[y == 1, 0] = i % 20
            return x[:4], y[:4], x[4:], y[4:]

        a, b, c, d = map(torch.stack, zip(*(one(i) for i in indices), strict=True))
        n = len(indices)
        return Episode(a, b, c, d, torch.zeros(n, 2, dtype=torch.int64), torch.tensor(list(indices)))

    def batches(self, seed: int, split: Split, indices: Sequence[int], size: int) -> Any:
        raise NotImplementedError


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaft.runs.report.draw_pictures", lambda *_: [])


@pytest.fixture
def _dynamo() -> None:
    """torch.compile's import, which warns of what it imports itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._dynamo")


# ---- wrapped modules ----------------------------------------------------------------------------------------------


def _parallel_inside() -> nn.Module:
    net = Net()
    net.body = nn.DataParallel(net.body)
    return net


def _compiled_inside() -> nn.Module:
    net = Net()
    net.body = torch.compile(net.body, backend="eager")  # type: ignore[assignment]
    return net


def _compiled_in_place() -> nn.Module:
    net = Net()
    net.compile(backend="eager")
    return net


@pytest.mark.usefixtures("_dynamo")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda: nn.DataParallel(Net()),
        lambda: torch.compile(Net(), backend="eager"),
        lambda: torch.compile(nn.DataParallel(Net()), backend="eager"),
        _parallel_inside,
        _compiled_inside,
        _compiled_in_place,
    ],
    ids=["parallel", "compiled", "both", "parallel part", "compiled part", "compiled in place"],
)
def test_what_wraps_a_module_is_taken_away(wrap: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._dynamo.convert_frame.ConvertFrame.__call__", lambda *_: pytest.fail("was compiled"))
    module = wrap()
    model = models.functional(module)
    assert set(model.params) == {"body.weight", "body.bias", "head.weight", "head.bias"}
    assert model.architecture["class"] == "Net"
    plain = Net()
    plain.load_state_dict(model.params)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model.apply(model.params, x, None), plain(x))
    assert handed.wrappers(module) == sorted({type(part).__name__ for part in module.modules()} - _PLAIN)


_PLAIN = {"Net", "Conv2d", "Linear"}


@pytest.mark.usefixtures("_dynamo")
def test_functions_that_are_compiled_run_as_written_and_what_others_compile_stays_compiled() -> None:
    """No list of layers shows a decorated function, and none can be differentiated twice or survive a fork."""
    seen: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append("compiled")
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)

    class Hidden(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(double(x))

    model = models.functional(Hidden(side=16))
    data = scenarios.episodes(dtype=torch.float32)
    with engines.engine("threads", threads=2, chunk=1) as engine:
        outer.meta_gradient(engine, algorithms.maml(model, inner_lr=0.1), model.params, {}, data)
    assert seen == []
    assert double(torch.ones(2)).tolist() == [2, 2]
    assert seen == ["compiled"]


@pytest.mark.usefixtures("_no_pictures")
def test_a_run_says_what_became_of_a_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta_train.run(images(tmp_path / "r", model=None), dataset=pool(), module=nn.DataParallel(Net()))
    first = next(line for line in capsys.readouterr().err.splitlines() if "run folder" in line)
    assert "custom (Net; its own values; without DataParallel)" in first


# ---- waits and forks ----------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", ["the first part", "a later call"])
def test_a_wait_for_a_worker_ends_on_a_signal(number: int, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_LOOK_EVERY", 0.02)
    monkeypatch.setattr(StopSignals, "PATIENCE", 0.1)

    def slow(shared: Tensor, task: Tensor) -> Tensor:
        while at == "the first part" or float(shared):
            time.sleep(0.05)
        return task

    timer = threading.Timer(0.5, lambda: signal.pthread_kill(threading.main_thread().ident or 0, number))
    timer.name = workers.OWN_THREADS  # another one would be a reason not to fork
    before = workers.multiprocessing.active_children()  # of engines that other tests keep open
    with engines.engine("processes", threads=2, chunk=1) as engine:
        if at == "a later call":
            engine.sum(slow, torch.zeros(()), torch.ones(4))
        with StopSignals(message="stopped; all is well") as signals:
            timer.start()
            with pytest.raises(
                Interrupted, match=r"^stopped; all is well \(a worker process did not answer\)"
            ) as ended:
                engine.sum(slow, torch.ones(()), torch.ones(4))
        timer.join()
    assert ended.value.status == 128 + number
    assert signals.received == number
    assert set(workers.multiprocessing.active_children()) <= set(before)


@needs_fork
@pytest.mark.parametrize("kind", ["a thread", "a pool from before"])
def test_nothing_is_forked_where_the_users_code_may_wait_for_a_thread(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a forked worker the thread is not there, and what waits for it waits for ever."""
    with ThreadPoolExecutor(1, "the user's") as users, engines.engine("processes", threads=2, chunk=1) as engine:
        engine.sum(lambda shared, task: task, torch.ones(()), torch.ones(4))
        assert workers.multiprocessing.active_children()
        with engines.engine("threads", threads=2, chunk=1) as other:  # metaft's own threads are no obstacle
            other.sum(lambda shared, task: task, torch.ones(()), torch.ones(4))
            assert workers.others() == []

        def product(shared: Tensor, task: Tensor) -> Tensor:
            return users.submit(torch.mul, shared, task).result(timeout=20)

        product(torch.ones(()), torch.ones(()))  # which starts its thread
        if kind == "a pool from before":
            monkeypatch.setattr(workers, "_BEFORE", frozenset(threading.enumerate()))
        else:
            monkeypatch.setattr(workers, "_POOLS", ())
        with pytest.warns(MetaftWarning, match=r"there are threads \(\"the user's_0\"\), .*tasks run in threads"):
            assert engine.sum(product, torch.tensor(3.0), torch.ones(4)) == 12
        assert [float(row) for row in engine.map(product, torch.tensor(3.0), torch.ones(4))] == [3] * 4


# ---- what is refused ----------------------------------------------------------------------------------------------


class Pair(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Named(Net):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


class Short(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[:1]


class Broken(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.view(7))


class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class FullyShardedDataParallel(Net):
    """In the place of torch's, which needs a process group."""


def _mixed() -> nn.Module:
    net = Net()
    net.head = net.head.double()
    return net


REFUSED: list[tuple[Any, str]] = [
    (Pair, r"^module: the forward pass of Pair returns a tuple; it must return .* one tensor"),
    (Named, r"^module: the forward pass of Named returns a dict"),
    (Short, r"^module: Short gives \[1, 3\] for 2 inputs, not \[2, 3\]"),
    (Broken, r"^module: Broken cannot take inputs of float32 \[2, 1, 8, 8\] \(RuntimeError: shape"),
    (lambda: Net(side=10), r"^module: Net cannot take inputs .*\(RuntimeError: mat1 and mat2"),
    (Locked, r"^module: Locked cannot be copied \(TypeError: cannot pickle '_thread.lock'"),
    (FullyShardedDataParallel, r"^module: FullyShardedDataParallel shares its parameters out"),
    (lambda: Net().half(), r"^module: parameter 'body.weight' is float16; hand over module.float\(\)"),
    (lambda: Net().bfloat16(), r"^module: parameter 'body.weight' is bfloat16"),
    (_mixed, r"^module: .*'body.weight' is float32, 'head.weight' is float64"),
    (lambda: Net().to("meta"), r"^parameter 'body.weight' is on the meta device"),
    (lambda: Net().requires_grad_(False), r"^module: all parameters of Net are frozen"),
    (lambda: Net, r"^module: must be an nn.Module, and what was handed over is the class Net"),
    (lambda: torch.relu, r"^module: must be an nn.Module, and what was handed over is of type builtin"),
    (lambda: nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Flatten(), nn.Linear(512, 3)), r"'0' .*sparse=True"),
    (lambda: nn.Sequential(nn.Embedding(9, 8, max_norm=1.0), nn.Flatten(), nn.Linear(512, 3)), r"'0' .*max_norm=1.0"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_a_module_that_cannot_be_trained_is_refused_in_one_line(
    make: Callable[[], Any], message: str, in_tmp: Path
) -> None:
    with pytest.raises(MetaftError, match=message) as refused:
        meta_train.run(images(model=None), dataset=pool(), module=make())
    assert len(str(refused.value).splitlines()) == 1
    assert list(in_tmp.iterdir()) == []


def test_what_torchscript_made_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Net(), torch.zeros(2, 1, 8, 8))
    with pytest.raises(MetaftError, match=r"^module: TopLevelTracedModule is compiled by TorchScript"):
        models.functional(traced)  # type: ignore[reportArgumentType]


def test_an_unknown_word_for_the_first_values_is_refused(in_tmp: Path) -> None:
    with pytest.raises(MetaftError, match=r"^init: no 'kep', known are keep, seed; did you mean 'keep'"):
        meta_train.run(images(model=None), dataset=pool(), module=Net(), init="kep")  # type: ignore[arg-type]


# ---- what is trained ----------------------------------------------------------------------------------------------

RECURRENT: dict[str, Callable[[], Rows]] = {
    "lstm": lambda: Rows(nn.LSTM, batch_first=True),
    "lstm both ways": lambda: Rows(nn.LSTM, batch_first=True, bidirectional=True, num_layers=2),
    "gru": lambda: Rows(nn.GRU, batch_first=True, num_layers=2),
    "gru bare": lambda: Rows(nn.GRU, batch_first=True, bias=False),
    "rnn": lambda: Rows(nn.RNN, batch_first=True),
    "rnn relu": lambda: Rows(nn.RNN, batch_first=True, nonlinearity="relu"),
    "lstm cell": lambda: Rows(nn.LSTMCell),
    "gru cell": lambda: Rows(nn.GRUCell),
    "rnn cell": lambda: Rows(nn.RNNCell),
}


def _old_weight_norm(module: Rows) -> Rows:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module.layer = nn.utils.weight_norm(module.layer, "weight_hh_l0")
    return module


@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_weight_norm_of_plain_operations_is_pytorchs(dim: int | None) -> None:
    """For every axis that has a length of its own, and under vmap without PyTorch's warning of a loop."""
    layer: Any = nn.utils.parametrizations.weight_norm(nn.Linear(3, 5), dim=dim)  # pyright: ignore[reportArgumentType]
    expected = layer.weight.detach().clone()
    plain: Any = plain_layers(handed.copied(layer))
    torch.testing.assert_close(plain.weight, expected)
    given = layer.parametrizations.weight
    several = torch.func.vmap(plain.parametrizations.weight[0].forward)(
        torch.stack([given.original0, 2 * given.original0]), torch.stack([given.original1] * 2)
    )
    torch.testing.assert_close(several, torch.stack([expected, 2 * expected]))


def _weight_norm(module: Rows) -> Rows:
    nn.utils.parametrizations.weight_norm(module.layer, "weight_hh_l0")
    nn.utils.parametrizations.weight_norm(module.head)
    return module


TRAINED: dict[str, Callable[[], nn.Module]] = {
    **RECURRENT,
    "old weight_norm": lambda: _old_weight_norm(Rows(nn.GRU, batch_first=True)),
    "weight_norm": lambda: _weight_norm(Rows(nn.GRU, batch_first=True)),
}


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_layers_give_what_pytorchs_give_and_the_same_meta_gradient_on_every_engine(name: str) -> None:
    """Against one graph of PyTorch's own layers over all tasks, which the definition of MAML gives."""
    torch.manual_seed(0)
    module = TRAINED[name]().double()
    model, data = models.functional(module), scenarios.episodes(tasks=2)
    x = data.support_x[0]
    torch.testing.assert_close(model.apply(model.params, x, None), module(x), rtol=1e-12, atol=1e-12)

    def net(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, params, (x,))

    if "weight_norm" in name:  # torch's own layer with a weight that changes has no second derivative
        net = lambda params, x: model.apply(params, x, None)  # noqa: E731
    expected = scenarios.maml_reference(net, model.params, data, lr=0.1, steps=1, first_order=False)
    maml = algorithms.maml(model, inner_lr=0.1)
    for engine, chunk in (("threads", 1), ("vmap", None)):
        with engines.engine(engine, threads=1, chunk=chunk) as mapped:
            found = outer.meta_gradient(mapped, maml, model.params, {}, data).grads
        assert scenarios.relative_error(found, expected) < 1e-11, (engine, chunk)


def test_a_recurrent_layer_takes_all_that_pytorchs_takes() -> None:
    torch.manual_seed(0)
    for kind, options in ((nn.LSTM, {"proj_size": 3}), (nn.GRU, {}), (nn.RNN, {})):
        layer = kind(4, 6, num_layers=2, bidirectional=True, **options).double()
        ours = plain_layers(handed.copied(layer))
        states = [torch.randn(4, 2, options.get("proj_size", 6)).double()]
        states += [torch.randn(4, 2, 6).double()] if kind is nn.LSTM else []
        for x, hx in ((torch.randn(5, 2, 4).double(), states), (torch.randn(5, 4).double(), [s[:, 0] for s in states])):
            given = tuple(hx) if kind is nn.LSTM else hx[0]
            torch.testing.assert_close(ours(x, given), layer(x, given), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(ours(x), layer(x), rtol=1e-12, atol=1e-12)
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 4)])
    with pytest.raises(MetaftError, match="takes tensors here, not a PackedSequence"):
        plain_layers(nn.LSTM(4, 6))(packed)


@pytest.mark.parametrize("padding", [None, 3])
def test_the_meta_gradient_of_tokens_is_the_same_on_every_engine(padding: int | None) -> None:
    torch.manual_seed(0)
    module = Words(padding).double()
    model, data = models.functional(module), Tokens().episodes(0, "train", range(4))

    def net(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, params, (x,))

    expected = scenarios.maml_reference(net, model.params, data, lr=0.1, steps=2, first_order=False)
    assert padding is None or not expected["words.weight"][padding].any()
    maml = algorithms.maml(model, inner_lr=0.1, inner_steps=2)
    for engine, chunk in (("threads", 1), ("threads", 3), ("vmap", None)):
        with engines.engine(engine, threads=1, chunk=chunk) as mapped:
            found = outer.meta_gradient(mapped, maml, model.params, {}, data).grads
        assert scenarios.relative_error(found, expected) < 1e-12, (engine, chunk)


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize(
    "changes",
    [{}, {"engine": "graph"}, {"engine": "threads", "inner_checkpoint": True}, {"precision": "bf16"}],
    ids=["vmap", "graph", "recomputed", "bf16"],
)
def test_a_run_on_tokens_is_tested_and_goes_on(changes: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"ways": 2, "shots": 2, "model": None, "width": None, "iterations": 2, "test_query_shots": 2, **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetaftWarning)  # whole steps need a source that can draw and gather apart
        result = meta_train.run(images(tmp_path / "r", **sizes), dataset=Tokens(), module=Words())
        assert evaluate.run(tmp_path / "r", dataset=Tokens(), module=Words())["test"] == result["test"]
        before = remains(tmp_path / "r")
        meta_train.resume_run(tmp_path / "r", dataset=Tokens(), module=Words())
    assert remains(tmp_path / "r") == before
    assert result["test"]["pixel_nearest_neighbour"]["accuracy"] >= 0


class Choosy(Net):
    """Decides by its data, which nothing can do for many tasks at once."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x if x.mean() > 0 else -x)


class Opaque(Net):
    """Leaves PyTorch on the way, so that nothing can be differentiated."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("engine", ["auto", "vmap", "graph", "tune", "threads"])
def test_a_module_that_vmap_cannot_take_is_trained_one_task_at_a_time(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = meta_train.run(images(tmp_path / "r", model=None, engine=engine), dataset=pool(), module=Choosy())
    used = "threads" if engine == "threads" or not workers.available() else "processes"
    assert (
        f"engine: {used}, one task at a time: vmap cannot take this module (RuntimeError: " in capsys.readouterr().err
    )
    assert result["engine"] == used
    tested = evaluate.run(tmp_path / "r", dataset=pool(), module=Choosy())
    assert tested["test"] == result["test"]


def test_a_module_that_nothing_can_differentiate_is_refused(in_tmp: Path) -> None:
    with pytest.raises(MetaftError, match=r"^module: Opaque and maml do not go together \(RuntimeError: element 0"):
        meta_train.run(images(model=None), dataset=pool(), module=Opaque())
    assert list(in_tmp.iterdir()) == []


@pytest.mark.usefixtures("_no_pictures")
def test_a_double_module_is_trained_in_double(tmp_path: Path) -> None:
    result = meta_train.run(images(tmp_path / "r", model=None), dataset=pool(), module=Net().double())
    tensors = meta_train_tensors(tmp_path / "r")
    assert {t.dtype for name, t in tensors.items() if name.startswith("meta/")} == {torch.float64}
    assert evaluate.run(tmp_path / "r", dataset=pool(), module=Net().double())["test"] == result["test"]


def meta_train_tensors(run: Path) -> dict[str, Tensor]:
    from metaft.runs import checkpoint

    return checkpoint.load(run / "checkpoints/last.safetensors")[0]


def test_a_run_on_vectors_draws_the_pictures_that_there_are(tmp_path: Path) -> None:
    sizes = {"ways": 2, "shots": 2, "model": None, "width": None, "iterations": 2, "test_query_shots": 2}
    meta_train.run(images(tmp_path / "r", **sizes), dataset=Tokens(), module=Words())
    assert sorted(file.name for file in (tmp_path / "r/plots").iterdir()) == ["curves.png", "steps.png"]
