"""Structured pruning: whole channels of a classifier are taken out, with all that was computed from or for them.

Which channels of which layers go together (over residual additions, depthwise convolutions, normalisation and whatever
flattens maps) is found by torch-pruning's dependency graph (Fang et al. 2023, DepGraph,
https://arxiv.org/abs/2301.12900). Of each such group go those that the network's own predictions hang on least (see
`saliences`): on CIFAR-10 at 160 pixels, before any recovery, a classifier that is right about 76 % of 400 images is
right about 69 to 72 % with 80 % of the channels by that, and about 43 % by the squared norm of the weights that go
together (DepGraph, section 3.3, with p = 2), which is what is left to go by without images. Each group keeps the same
share, since different ones have different scales.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.errors import MetaftError
from metaft.finetune import heads
from metaft.finetune.classifier import Classifier
from metaft.models.functional import probe_of
from metaft.models.stored import StoredNorm

BLOCK, BLOCKED_FROM = 8, 32
"""Layers of so many channels or more keep a multiple of so many: kernels compute in vectors, and are hardly faster at
what lies between."""

CLOSE = 1e-6
"""Of the largest logit, in float64: how far a pruned network may be from the whole one in which what reads those
channels is zero."""


def check_installed() -> None:
    """Raises MetaftError where torch-pruning is missing."""
    if importlib.util.find_spec("torch_pruning") is None:
        raise MetaftError("run: to prune needs torch-pruning, not installed; pip install 'metaft[compress]'")


def kept_of(channels: int, share: float) -> int:
    """How many of a layer's channels a share of them is, at least one.

    >>> kept_of(24, 0.7), kept_of(64, 0.7), kept_of(3, 0.1)
    (17, 48, 1)
    """
    block = BLOCK if channels >= BLOCKED_FROM else 1
    return max(block, block * int(share * channels / block + 0.5))


def pruned(
    classifier: Classifier, original: Classifier, share: float, images: Tensor | None = None, seed: int = 0
) -> Classifier:
    """A copy with this share of the channels that `original` has in each group; classes and inputs stay. With
    `images`, as the backbone takes them, the channels are chosen by `saliences`, drawn from the seed, and stored
    moments are matched to those of `classifier` (see `match`).

    Raises MetaftError, naming `run`, for a network with layers that nobody can prune, of which nothing is left to
    prune, or of which the dependencies were not understood: what comes out is compared with the whole network in which
    the same channels are read as zero.
    """
    check_prunable(classifier)
    dtype = next(classifier.parameters()).dtype
    model = _traced(classifier)
    wide = {path: _channels(layer) for path, layer in _traced(original).named_modules()}
    x = probe_of(classifier.inputs.shape, torch.float64)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # of what a tracer meets
            head = copy.deepcopy(classifier.head).double()
            gates = None if images is None else saliences(model.get_submodule("body"), head, images, seed)
            done = _prune(model, wide, share, x, gates)
        with torch.no_grad():
            found, expected = model(x), done.masked(x)
    except MemoryError:
        raise
    except Exception as error:  # whatever a tracer meets in a module that is not made for it
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise MetaftError(f"run: the network cannot be pruned ({why})") from error
    if not done.groups:
        raise MetaftError(f"run: at {share:g} of the channels there is nothing to prune in the network")
    if not torch.allclose(found, expected, rtol=0, atol=CLOSE * max(1.0, float(expected.abs().max()))):
        raise MetaftError("run: the network cannot be pruned: it computes with its channels in a way that is not seen")
    body, surrogate = _untraced(model).to(dtype).children()
    if images is not None:
        match(body, classifier.body, {path.removeprefix("body."): kept for path, kept in done.left.items()}, images)
    return Classifier(body, _with_columns(classifier.head, surrogate), classifier.inputs, classifier.class_names)


def check_prunable(classifier: Classifier) -> None:
    """Raises MetaftError, naming `run`, for a backbone with parameters that no rule of pruning is about."""
    for path, layer in classifier.body.named_modules():
        known = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, StoredNorm))
        if not known and next(layer.parameters(recurse=False), None) is not None:
            raise MetaftError(
                "run: channels are pruned of convolutions, linear layers and batch normalisation, and the backbone "
                f"has {path!r} ({type(layer).__name__}); take a smaller start, which it teaches: --into START"
            )


@torch.no_grad()
def match(small: nn.Module, whole: nn.Module, left: Mapping[str, Tensor], images: Tensor) -> None:
    """Set the stored moments of a pruned backbone, in place, so that what each of its normalisation layers gives has,
    channel by channel over these images, mean and variance of what it gave in the whole one. A channel that hardly
    varies keeps its scale, none is scaled by more than 4, and a layer that a pass meets twice stays as it is.

    Without the channels that are gone a layer reads other values than those whose moments it holds (Jordan et al. 2023,
    REPAIR, https://arxiv.org/abs/2211.08403, section 4, reset such statistics of merged networks likewise, to given
    means and variances). `left` numbers the channels of `whole` that each layer has kept. Layers are set in the order
    in which the pass meets them, each behind those that are set already.
    """
    before: dict[str, tuple[Tensor, Tensor]] = {}
    twice: set[str] = set()

    def note(path: str, layer: StoredNorm, moments: tuple[Tensor, Tensor]) -> None:
        twice.update({path} & before.keys())
        before[path] = moments

    with _at_norms(whole, note):
        whole(images)
    layers = dict(whole.named_modules())

    def set_moments(path: str, layer: StoredNorm, moments: tuple[Tensor, Tensor]) -> None:
        if path in twice:
            return
        former, kept = layers[path], left[path]
        assert isinstance(former, StoredNorm)
        mean, var = (of[kept] for of in before[path])
        spread = former.var[kept] + former.eps
        known = (var > _STILL * spread) & (moments[1] > _STILL * spread)
        ratio = torch.where(known, moments[1] / var.clamp_min(1e-38), 1).clamp(1 / _MOST, _MOST)
        layer.var.copy_((spread * ratio - layer.eps).clamp_min(0))
        scale = ((layer.var + layer.eps) / spread).sqrt()
        layer.mean.copy_(moments[0] - (mean - former.mean[kept]) * scale)

    with _at_norms(small, set_moments):
        small(images)


_STILL, _MOST = 1e-6, 16.0  # below which share of its stored variance a channel is constant; bounds of a ratio


@contextlib.contextmanager
def _at_norms(module: nn.Module, see: Callable[[str, StoredNorm, tuple[Tensor, Tensor]], None]) -> Iterator[None]:
    """Inside, each StoredNorm that is met shows mean and biased variance of its input, before it uses its own."""
    with contextlib.ExitStack() as stack:
        for path, layer in module.named_modules():
            if isinstance(layer, StoredNorm):

                def hook(layer: StoredNorm, inputs: tuple[Tensor], path: str = path) -> None:
                    axes = [0, *range(2, inputs[0].dim())]
                    see(path, layer, (inputs[0].mean(axes), inputs[0].var(axes, correction=0)))

                stack.callback(layer.register_forward_pre_hook(hook).remove)
        yield


class _Pruned(NamedTuple):
    """What was done to a model."""

    masked: nn.Module
    """A copy of the whole one in which what is pruned is read as zero."""
    groups: int
    """How many lost any channels."""
    left: dict[str, Tensor]
    """Numbers of the channels that each normalisation layer had before and kept, by its path."""


class _Group(NamedTuple):
    """Channels that go together."""

    layer: Any
    prune: Any
    """torch-pruning's function for that layer."""
    channels: list[int]
    """Those to take out."""


WATCHED, AT_ONCE = 64, 8
"""Images at most by which channels are chosen, evenly among those given, and how many in one pass."""

SOFTENED = 2.0
"""The temperature of `distil`, by which what is left will follow the whole network."""

ROOTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""What a group of channels begins with."""


def saliences(body: nn.Module, head: nn.Module, images: Tensor, seed: int) -> dict[nn.Module, Tensor]:
    """[channels] for each layer of the body that gives channels: what the predictions lose, to second order, if what
    the channel gives is multiplied by a number a little below 1.

    That is the Fisher information of this number (Fisher pruning, Theis et al. 2018,
    https://arxiv.org/abs/1801.05787; with such gates Molchanov et al. 2019, https://arxiv.org/abs/1906.10771): the mean
    over images of the squared derivative by it of the log-likelihood of a label that is drawn from the network's own
    prediction. Labels of the images themselves would tell less, since a fitted network is sure of them and has no
    gradient; for the same reason predictions are softened.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[nn.Module, Tensor] = {}
    watched = images[torch.linspace(0, len(images) - 1, min(WATCHED, len(images))).long()].double()
    for some in watched.split(AT_ONCE):
        with _gated(body, len(some)) as gates:
            logits = head(body(some)) / SOFTENED
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        for layer, slope in zip(gates, torch.autograd.grad(loss, [*gates.values()], allow_unused=True), strict=True):
            if slope is not None:
                sums[layer] = sums.get(layer, 0) + slope.square().sum(0) / len(watched)
    return sums


@contextlib.contextmanager
def _gated(body: nn.Module, images: int) -> Iterator[dict[nn.Module, Tensor]]:
    """Inside, what each layer gives is multiplied by a one [images, channels] of its own, which can be differentiated
    by; a layer that is met twice has the same ones."""
    gates: dict[nn.Module, Tensor] = {}

    def multiplied(layer: nn.Module, _: Any, given: Tensor) -> Tensor:
        axis = -1 if isinstance(layer, nn.Linear) else 1
        if layer not in gates:
            gates[layer] = given.new_ones(images, given.shape[axis], requires_grad=True)
        gate = gates[layer].repeat_interleave(len(given) // images, 0)  # where parts of an image stand as images
        sides = [len(given), *[1] * (given.dim() - 1)]
        sides[axis] = given.shape[axis]
        return given * gate.view(sides)

    with contextlib.ExitStack() as stack:
        for layer in body.modules():
            if isinstance(layer, (*ROOTS, _Norm)):
                stack.callback(layer.register_forward_hook(multiplied).remove)
        yield gates


def _prune(
    model: nn.Module, wide: dict[str, int], share: float, x: Tensor, gates: Mapping[nn.Module, Tensor] | None
) -> _Pruned:
    """Prune in place."""
    import torch_pruning

    masked = copy.deepcopy(model)
    paths = {layer: path for path, layer in model.named_modules()}
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x, verbose=False)
    by_norm = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    groups = []
    for group in graph.get_all_groups(ignored_layers=[model.get_submodule("head")], root_module_types=ROOTS):
        root, function = group[0].dep.target.module, group[0].dep.handler
        surplus = _channels(root) - kept_of(wide[paths[root]], share)
        if surplus > 0 and not any(_is_grouped(dep.target.module) for dep, _ in group):
            of_channels = _finite(by_norm(group)) if gates is None else _of_group(graph, group, gates, _channels(root))
            order = torch.argsort(of_channels, stable=True)
            groups.append(_Group(root, function, sorted(order[:surplus].tolist())))
    left = {path: torch.ones(len(layer.of[0].mean)) for layer, path in paths.items() if isinstance(layer, _Norm)}
    for layer, function, channels in groups:  # while channels still have their own numbers
        for dep, numbers in graph.get_pruning_group(layer, function, channels):
            target = dep.target.module
            if isinstance(target, _Norm):
                left[paths[target]][numbers] = 0
            reads = (
                isinstance(target, ROOTS) and not _is_depthwise(target) and graph.is_in_channel_pruning_fn(dep.handler)
            )
            if reads:
                masked.get_submodule(paths[target]).get_parameter("weight").data[:, numbers] = 0
    for layer, function, channels in groups:
        graph.get_pruning_group(layer, function, channels).prune()
    return _Pruned(masked, len(groups), {path: kept.nonzero().flatten() for path, kept in left.items()})


def _of_group(graph: Any, group: Any, gates: Mapping[nn.Module, Tensor], channels: int) -> Tensor:
    """[channels] of the group's first layer: the sum over its normalisation layers, or, where it has none, over all
    layers that give channels of it."""
    giving = [(each.dep.target.module, each) for each in map(group.__getitem__, range(len(group)))]
    norms = [(layer, each) for layer, each in giving if isinstance(layer, _Norm) and layer in gates]
    others = [
        (layer, each) for layer, each in giving if layer in gates and graph.is_out_channel_pruning_fn(each.dep.handler)
    ]
    total = torch.zeros(channels, dtype=torch.float64)
    for layer, each in norms or others:
        total.index_add_(0, torch.tensor(each.root_idxs), gates[layer][list(each.idxs)])
    return total


def _finite(importance: Any) -> Tensor:
    """Of a group whose weights are all zero a mean of none is left, and any channel is as good as another."""
    return torch.nan_to_num(importance)


def _channels(layer: nn.Module) -> int:
    """That a layer gives, 0 where it is none of those that a group begins with."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.out_channels
    return layer.out_features if isinstance(layer, nn.Linear) else 0


def _is_depthwise(layer: Any) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd) and 1 < layer.groups == layer.in_channels == layer.out_channels


def _is_grouped(layer: Any) -> bool:
    """Whether a convolution has groups of several channels, whose widths would have to stay alike."""
    return isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1 and not _is_depthwise(layer)


# ---- in the form that a tracer takes --------------------------------------------------------------------------------


class _Norm(nn.BatchNorm2d):
    """A StoredNorm as the layer that torch-pruning knows."""

    def __init__(self, stored: StoredNorm) -> None:
        super().__init__(len(stored.mean), stored.eps, affine=stored.weight is not None)
        self.weight, self.bias = stored.weight, stored.bias  # pyright: ignore[reportAttributeAccessIssue]
        self.running_mean, self.running_var = stored.mean.clone(), stored.var.clone()
        self.then = nn.Identity() if stored.then is None else stored.then
        self.of = [stored]  # in a list, so that it is no part of the module

    def forward(self, input: Tensor) -> Tensor:
        x = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.then(x)

    def stored(self) -> StoredNorm:
        (stored,) = self.of
        assert self.running_mean is not None and self.running_var is not None
        stored.weight, stored.bias, stored.mean, stored.var = (
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
        )
        return stored


def _traced(classifier: Classifier) -> nn.Module:
    """A copy of "body" and "head" in float64, with layers that torch-pruning knows."""
    columns = _columns(classifier.head)
    head: nn.Module = classifier.head
    if not isinstance(head, nn.Linear):
        with torch.device("meta"):  # the constructor would draw from the global generator
            head = nn.Linear(columns.shape[1], len(columns), bias=False)
        head.weight = nn.Parameter(columns)  # pyright: ignore[reportAttributeAccessIssue]
    model = copy.deepcopy(nn.Sequential(OrderedDict(body=classifier.body, head=head))).double().requires_grad_(True)
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, StoredNorm):
            model.set_submodule(path, _Norm(layer).double())
    return model.eval()


def _untraced(model: nn.Module) -> nn.Module:
    """The inverse, in place."""
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, _Norm):
            model.set_submodule(path, layer.stored())
    return model


def _columns(head: nn.Module) -> Tensor:
    """The parameter of a head that has a column for each feature."""
    names = {heads.Prototype: "points", heads.Matching: "support"}
    return head.get_parameter(names.get(type(head), "weight")).detach()


def _with_columns(head: nn.Module, surrogate: nn.Module) -> nn.Module:
    """The head with the columns that are left."""
    if isinstance(head, nn.Linear):
        return surrogate
    head = copy.deepcopy(head)
    name = {heads.Prototype: "points", heads.Matching: "support"}.get(type(head), "weight")
    setattr(head, name, nn.Parameter(surrogate.get_parameter("weight").detach()))
    return head
