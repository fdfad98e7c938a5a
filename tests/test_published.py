"""Architectures of torchvision and timm: which layer is the head, and that nothing before it changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.models import published
from metaft.models.architecture import build, filled
from metaft.models.head import body_of
from metaft.support.vision import models

ALL = models.list_models(module=models)

# The smallest of each family, and a size that it takes.
FAMILIES = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "googlenet": 64, "inception_v3": 80,
    "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32, "regnet_y_400mf": 32,
    "resnet18": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32, "swin_t": 32, "swin_v2_t": 64, "vgg11_bn": 32,
    "vit_b_32": 64,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("regnet")])
def test_every_classification_model_of_torchvision_gets_a_head_of_our_classes(name: str):
    """Without values: only shapes are computed. Regnets cannot be built so, and stand in the test below."""
    with torch.device("meta"):
        module = published.build(f"torchvision:{name}", 7, (3, 224, 224))
        assert module(torch.zeros(2, 3, 224, 224)).shape == (2, 7)
    assert not any("aux" in part.lower() for part, _ in module.named_parameters())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_what_comes_to_the_head_is_what_the_librarys_own_module_gave_it_to_the_bit(name: str):
    shape = (3, FAMILIES[name], FAMILIES[name])
    original = published.bare(f"torchvision:{name}", shape)
    _have_seen_data(original)
    layer = original.get_submodule(published.head_of(original))
    given: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].clone()))
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    headed = published.headed(copy.deepcopy(original), f"torchvision:{name}", 3, shape)
    with torch.no_grad():
        original(x)
        features = given[0].flatten(2).mean(-1) if given[0].dim() == 4 else given[0]
        theirs = headed.body(x)
        assert torch.equal(theirs, features) or (given[0].dim() == 4 and torch.allclose(theirs, features))
        headed.train()
        outputs = headed(x)
    assert isinstance(outputs, Tensor) and outputs.shape == (2, 3)  # no auxiliary ones while training


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"])
def test_a_backbone_with_kept_statistics_computes_what_the_module_does_in_evaluation_mode(name: str):
    architecture = {"name": f"torchvision:{name}", "ways": 2, "shape": [3, 32, 32], "norm": "keep"}
    original = published.build(architecture["name"], 2, (3, 32, 32))
    _have_seen_data(original)
    whole, _ = build(architecture, None, module=copy.deepcopy(original), norm="keep")
    params = {k: p.detach() for k, p in whole.named_parameters()}
    buffers = {k: b.detach() for k, b in whole.named_buffers()}
    again = filled(body_of(*build(architecture, None)), params, buffers)
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    last = torch.channels_last  # as a backbone lies that looks at no batch, since a CPU is faster so
    assert all(p.is_contiguous(memory_format=last) for p in again.parameters() if p.dim() == 4)
    with torch.no_grad():
        assert torch.equal(again(x), original.get_submodule("body").to(memory_format=last)(x))  # type: ignore[call-overload]
        assert not torch.equal(again(x), again(x + 1))


def test_batch_normalisation_with_an_activation_inside_keeps_it():
    """timm's BatchNormAct2d is a BatchNorm2d whose forward pass does more."""
    timm = pytest.importorskip("timm", reason="the extra vision is not installed")
    name, shape = "timm:tf_efficientnet_lite0", (3, 32, 32)
    assert timm
    original = published.build(name, 2, shape)
    _have_seen_data(original)
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    for norm in ("keep", "adapt"):
        architecture = {"name": name, "ways": 2, "shape": [*shape], "norm": norm}
        whole, _ = build(architecture, None, module=copy.deepcopy(original), norm=norm)
        reference = copy.deepcopy(original).train(norm == "adapt")
        with torch.no_grad():
            assert torch.allclose(whole(x), reference(x), atol=1e-5)


def test_batch_normalisation_with_a_forward_pass_of_its_own_is_refused():
    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    module = nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(MetaftError, match="Doubled is batch normalisation with a forward pass of its own"):
        build({"name": "custom"}, None, module=module)


@pytest.mark.parametrize("name", ["levit_128", "crossvit_9_240"])
def test_a_model_with_several_heads_is_refused_in_one_line(name: str):
    pytest.importorskip("timm", reason="the extra vision is not installed")
    with pytest.raises(MetaftError, match=rf"init: the head of timm:{name} is no single layer"):
        published.build(f"timm:{name}", 2, (3, 224, 224))


@pytest.mark.slow
def test_timms_families_get_a_head_or_a_reason():
    timm = pytest.importorskip("timm", reason="the extra vision is not installed")
    taken, refused = 0, []
    for family in timm.list_modules()[::6]:
        names = sorted(timm.list_models(module=family), key=len)
        if not names:
            continue
        with torch.device("meta"):
            shape = tuple(timm.create_model(names[0]).pretrained_cfg["input_size"])
            try:
                module = published.build(f"timm:{names[0]}", 7, shape)
            except MetaftError as error:
                refused.append(str(error))
                continue
            assert module(torch.zeros(2, *shape)).shape == (2, 7), names[0]
            taken += 1
    assert taken > 3 * len(refused)
    assert all(reason.startswith(("init: the head of", "image_size: ")) for reason in refused)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "torchvision:resnet19",
            "init: there is no classification model torchvision:resnet19; did you mean 'resnet18'?",
        ),
        ("torchvision:vit_b_16", "image_size: torchvision:vit_b_16 cannot be made for images [3, 40, 40]"),
    ],
)
def test_what_cannot_be_built_is_named(name: str, said: str):
    with pytest.raises(MetaftError) as caught:
        published.build(name, 2, (3, 40, 40))
    assert str(caught.value).startswith(said)


def test_the_global_generator_stays_as_it_is():
    before = torch.get_rng_state()
    published.build("torchvision:squeezenet1_1", 2, (3, 32, 32))
    assert torch.equal(before, torch.get_rng_state())


def _have_seen_data(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_(generator=generator).mul_(0.1)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
