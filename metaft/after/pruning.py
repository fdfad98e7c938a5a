"""Structured pruning: whole channels of a classifier are taken out, with all that was computed from or for them.

Which channels of which layers go together (over residual additions, depthwise convolutions, normalisation and whatever
flattens maps) is found by torch-pruning's dependency graph (Fang et al. 2023, DepGraph,
https://arxiv.org/abs/2301.12900). Of each such group go those that the network's own predictions hang on least (see
`saliences`): on CIFAR-10 at 160 pixels, before any recovery, a classifier that is right about 76 % of 400 images is
right about 69 to 72 % with 80 % of the channels by that, and about 43 % by the squared norm of the weights that go
together (DepGraph, section 3.3, with p = 2). Each group keeps the same share, since different ones have different
scales.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaft.after.saliences import saliences
from metaft.after.traced import ROOTS, Norm, traced, untraced, with_columns
from metaft.errors import MetaftError
from metaft.finetune.classifier import Classifier
from metaft.models.functional import probe_of
from metaft.models.stored import StoredNorm
from metaft.support.foreign import in_our_words

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


def pruned(classifier: Classifier, original: Classifier, share: float, images: Tensor, seed: int = 0) -> Classifier:
    """A copy with this share of the channels that `original` has in each group; classes and inputs stay. By `images`,
    as the backbone takes them, the channels are chosen (`saliences`, which draw from the seed), and stored moments
    matched to those of `classifier` (see `match`).

    Raises MetaftError, naming `run`, for a network with layers that nobody can prune, of which nothing is left to
    prune, or of which the dependencies were not understood: what comes out is compared with the whole network in which
    the same channels are read as zero.
    """
    check_prunable(classifier)
    dtype = next(classifier.parameters()).dtype
    model = traced(classifier)
    wide = {path: _channels(layer) for path, layer in traced(original).named_modules()}
    x = probe_of(classifier.inputs.shape, torch.float64)
    with in_our_words("run: the network cannot be pruned"):  # a module may not be made for a tracer
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # of what a tracer meets
            head = copy.deepcopy(classifier.head).double()
            gates = saliences(model.get_submodule("body"), head, images, seed)
            done = _prune(model, wide, share, x, gates)
        with torch.no_grad():
            found, expected = model(x), done.masked(x)
    if not done.groups:
        raise MetaftError(f"run: at {share:g} of the channels there is nothing to prune in the network")
    if not torch.allclose(found, expected, rtol=0, atol=CLOSE * max(1.0, float(expected.abs().max()))):
        raise MetaftError("run: the network cannot be pruned: it computes with its channels in a way that is not seen")
    body, surrogate = untraced(model).to(dtype).children()
    match(body, classifier.body, {path.removeprefix("body."): kept for path, kept in done.left.items()}, images)
    return Classifier(body, with_columns(classifier.head, surrogate), classifier.inputs, classifier.class_names)


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


def _prune(
    model: nn.Module, wide: dict[str, int], share: float, x: Tensor, gates: Mapping[nn.Module, Tensor]
) -> _Pruned:
    """Prune in place."""
    import torch_pruning

    masked = copy.deepcopy(model)
    paths = {layer: path for path, layer in model.named_modules()}
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x, verbose=False)
    groups = []
    for group in graph.get_all_groups(ignored_layers=[model.get_submodule("head")], root_module_types=ROOTS):
        root, function = group[0].dep.target.module, group[0].dep.handler
        surplus = _channels(root) - kept_of(wide[paths[root]], share)
        if surplus > 0 and not any(_is_grouped(dep.target.module) for dep, _ in group):
            order = torch.argsort(_of_group(graph, group, gates, _channels(root)), stable=True)
            groups.append(_Group(root, function, sorted(order[:surplus].tolist())))
    left = {path: torch.ones(len(layer.of[0].mean)) for layer, path in paths.items() if isinstance(layer, Norm)}
    for layer, function, channels in groups:  # while channels still have their own numbers
        for dep, numbers in graph.get_pruning_group(layer, function, channels):
            target = dep.target.module
            if isinstance(target, Norm):
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
    layers that give channels of it. As if these lost theirs one by one: a factor on all of them together would have
    the square of their summed slopes (Liu et al. 2021, Group Fisher Pruning, https://arxiv.org/abs/2108.00708)."""
    giving = [(each.dep.target.module, each) for each in map(group.__getitem__, range(len(group)))]
    norms = [(layer, each) for layer, each in giving if isinstance(layer, Norm) and layer in gates]
    others = [
        (layer, each) for layer, each in giving if layer in gates and graph.is_out_channel_pruning_fn(each.dep.handler)
    ]
    total = torch.zeros(channels, dtype=torch.float64)
    for layer, each in norms or others:
        total.index_add_(0, torch.tensor(each.root_idxs), gates[layer][list(each.idxs)])
    return total


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
