"""Which pixels a prediction rests on: Grad-CAM of our own, and integrated gradients by captum."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.finetune.features import evaluating
from metaft.views.layers import without_fast_paths

GAP = 0.01
"""Of completeness, as a share of what the attributions are to add up to."""
FAINT = 0.05
"""Of the largest change of the logit on the way: where the image's is less, completeness is a share of this much."""
STEPS = 2048
"""Of integrated gradients at most: when they are used up, what has been found is taken, whatever its gap."""
_PIECES, _NODES = 8, 4  # of the way at first; points of Gauss and Legendre's rule in each piece

_AT_ONCE = 8  # images that are passed through and back at once: more would take memory, and be no faster


def grad_cam(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor | None:
    """[n, h, w], one map for each of x [n, ...] and its class: ReLU(sum_k alpha_k A_k) with alpha_k the mean of
    dy/dA_k over places (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, equations 1 and 2), y the class's
    logit and A the activations of the last convolution.

    That is the last one whose map has more than one place, with what follows it and keeps the shape (its normalisation
    and ReLU). None where there is none, and for transformers, whose convolutions only cut an image into patches.
    """
    if any(_attends(part) for part in model.modules()):
        return None
    kept: dict[str, Tensor] = {}

    def after(layer: nn.Module, given: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.dim() != 4 or output.shape[2] * output.shape[3] < 2:
            return
        if isinstance(layer, nn.Conv2d) or ("map" in kept and output.shape == kept["map"].shape):
            kept["map"] = output

    with evaluating(model), contextlib.ExitStack() as stack, torch.enable_grad():
        for part in model.modules():
            if next(part.children(), None) is None:
                stack.callback(part.register_forward_hook(after).remove)
        logits = model(x.detach().requires_grad_())  # so that each activation has a gradient, whatever is frozen
        if "map" not in kept:
            return None
        (gradient,) = torch.autograd.grad(_chosen(logits, classes).sum(), [kept["map"]])
    weights = gradient.mean((2, 3), keepdim=True)
    return F.relu((weights * kept["map"].detach()).sum(1))


def _attends(part: nn.Module) -> bool:
    """Whether a part is attention over places, by the names that libraries give its projections."""
    names = {name.partition(".")[0] for name, _ in part.named_parameters()}
    return "attention" in type(part).__name__.lower() and not names.isdisjoint(_PROJECTIONS)


_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "qkv", "q", "to_q", "to_qkv", "query", "q_proj")


class Integrated(NamedTuple):
    """Integrated gradients of one image."""

    attributions: Tensor
    """Like the image [C, H, W]."""
    total: float
    """What they should add up to: the logit's change from the baseline to the image."""
    off: float
    """How far off their sum is."""
    gap: float
    """The same as a share of the total, or of a twentieth of the logit's largest change on the way, where that is
    more."""
    steps: int


def has_captum() -> bool:
    return importlib.util.find_spec("captum") is not None


def integrated_gradients(model: nn.Module, x: Tensor, baseline: Tensor, label: int) -> Integrated:
    """Of the logit of a class for x [C, H, W] (Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365, equation 1;
    completeness is proposition 1), by captum with Gauss and Legendre's rule.

    The way from the baseline is cut into pieces, each with its own attributions, which add up. Those of a piece should
    come to the change of the logit over it, which two forward passes tell, so how far each is off is known and not
    estimated: pieces that are off most are halved until all together are within `GAP`, or `STEPS` are used up. A
    network of ReLUs bends most near a baseline of one colour, where all places bend at once, and equal steps along the
    way miss that.
    """
    from captum.attr import IntegratedGradients

    with evaluating(model), torch.enable_grad(), without_fast_paths():
        method = IntegratedGradients(model)
        logits: dict[float, float] = {}
        pieces: dict[Piece, tuple[Tensor, float]] = {}
        new: list[Piece] = [(i / _PIECES, (i + 1) / _PIECES) for i in range(_PIECES)]
        steps = 0
        while True:
            for some in (new[i : i + _AT_ONCE // _NODES] for i in range(0, len(new), _AT_ONCE // _NODES)):
                logits |= _logits(model, x, baseline, label, {end for piece in some for end in piece} - logits.keys())
                low, high = (_between(baseline, x, ends) for ends in zip(*some, strict=True))
                found = method.attribute(high, baselines=low, target=label, n_steps=_NODES).detach()
                for piece, part in zip(some, found, strict=True):
                    change = logits[piece[1]] - logits[piece[0]]
                    pieces[piece] = (part, float(part.double().sum()) - change)
            steps += _NODES * len(new)
            total, missing = logits[1.0] - logits[0.0], abs(math.fsum(off for _, off in pieces.values()))
            whole = max(abs(total), FAINT * max(abs(value - logits[0.0]) for value in logits.values()))
            gap = missing / whole if whole else float(missing > 0)
            left = (STEPS - steps) // (2 * _NODES)
            if not gap > GAP or not left:
                whole_way = functools.reduce(torch.add, (part for part, _ in pieces.values()))
                return Integrated(whole_way, total, missing, gap, steps)
            worst = _worst({piece: abs(off) for piece, (_, off) in pieces.items()})[:left]
            for piece in worst:
                del pieces[piece]
            new = [half for low, high in worst for half in ((low, (low + high) / 2), ((low + high) / 2, high))]


Piece = tuple[float, float]
"""From which share of the way to which."""


def _worst(off: Mapping[Piece, float]) -> list[Piece]:
    """Those that are off most, as many as make half of all that they are off by."""
    order = sorted(off, key=lambda piece: (-off[piece], piece))
    sums = list(itertools.accumulate(off[piece] for piece in order))
    return order[: 1 + next(i for i, so_far in enumerate(sums) if so_far >= sums[-1] / 2)]


def _between(baseline: Tensor, x: Tensor, shares: Sequence[float]) -> Tensor:
    """[n, C, H, W]: so far on the way from the baseline to x."""
    at = torch.tensor(shares, dtype=x.dtype, device=x.device).reshape(-1, *(1 for _ in x.shape))
    return baseline + at * (x - baseline)


def _logits(
    model: nn.Module, x: Tensor, baseline: Tensor, label: int, shares: AbstractSet[float]
) -> dict[float, float]:
    order = sorted(shares)
    if not order:
        return {}
    with torch.no_grad():
        return dict(zip(order, model(_between(baseline, x, order))[:, label].double().tolist(), strict=True))


def _chosen(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def enlarged(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [n, h, w] as [n, H, W], between 0 and 1 each."""
    whole = F.interpolate(cam[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return whole / whole.amax((1, 2), keepdim=True).clamp_min(1e-12)


def strengths(attributions: Tensor) -> Tensor:
    """[H, W] between 0 and 1: the size of a pixel's attributions over its channels, the strongest hundredth at 1."""
    size = attributions.sum(0).abs()
    return (size / size.flatten().quantile(0.99).clamp_min(1e-12)).clamp_max(1.0)


def laid_over(pixels: Tensor, strength: Tensor) -> Tensor:
    """uint8 [3, H, W]: an image uint8 [C, H, W] in grey, and over it strengths [H, W], yellow where they are 1."""
    from matplotlib import colormaps

    grey = pixels.float().mean(0, keepdim=True).expand(3, -1, -1)
    colours = torch.from_numpy(colormaps["cividis"](strength.double().cpu().numpy())[..., :3]).permute(2, 0, 1)
    share = 0.15 + 0.6 * strength.double().cpu()
    return ((1 - share) * grey.double().cpu() + share * 255 * colours).round().clamp(0, 255).to(torch.uint8)
