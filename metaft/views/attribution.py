"""Which pixels a prediction rests on: Grad-CAM of our own, and integrated gradients by captum."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaft.finetune.features import evaluating
from metaft.views.layers import without_fast_paths

STEPS = (32, 128, 512)
"""Of integrated gradients: the first at which the gap is small enough, else the last."""
GAP = 0.01
"""Of completeness, as a share of what the attributions are to add up to."""

_AT_ONCE = 8  # images that are passed through and back at once: more would take memory, and be no faster


def grad_cam(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor | None:
    """[n, h, w], one map for each of x [n, ...] and its class: ReLU(sum_k alpha_k A_k) with alpha_k the mean of
    dy/dA_k over places (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, equations 1 and 2), y the class's
    logit and A the activations of the last convolution.

    That is the last one whose map has more than one place, with what follows it and keeps the shape (its normalisation
    and ReLU). None where there is none, and for transformers, whose convolutions only cut an image into patches.
    """
    if any("attention" in type(part).__name__.lower() for part in model.modules()):
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


class Integrated(NamedTuple):
    """Integrated gradients of one image."""

    attributions: Tensor
    """Like the image [C, H, W]."""
    total: float
    """What they should add up to: the logit's change from the baseline to the image."""
    gap: float
    """How far off their sum is, as a share of that."""
    steps: int


def has_captum() -> bool:
    return importlib.util.find_spec("captum") is not None


def integrated_gradients(model: nn.Module, x: Tensor, baseline: Tensor, label: int) -> Integrated:
    """Of the logit of a class for x [C, H, W] (Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365, equation 1;
    completeness is proposition 1), by captum with Gauss and Legendre's rule."""
    from captum.attr import IntegratedGradients

    with evaluating(model), torch.enable_grad(), without_fast_paths():
        method = IntegratedGradients(model)
        with torch.no_grad():
            ends = model(torch.stack([x, baseline]))[:, label].double()
        total = float(ends[0] - ends[1])
        found = None
        for steps in STEPS:
            attributions = method.attribute(
                x[None], baselines=baseline[None], target=label, n_steps=steps, internal_batch_size=_AT_ONCE
            )[0].detach()
            missing = abs(float(attributions.double().sum()) - total)
            gap = missing / abs(total) if total else float(missing > 0)
            found = Integrated(attributions, total, gap, steps)
            if gap <= GAP:
                break
    assert found is not None
    return found


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
