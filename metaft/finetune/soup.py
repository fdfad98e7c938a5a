"""A greedy soup: the average of fits of one start that differ in the order of images and their random changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from metaft.finetune.classifier import Classifier
from metaft.finetune.contenders import Contender
from metaft.finetune.examples import Part, Prepared, like_of
from metaft.finetune.fit import Fitted
from metaft.finetune.training import stored
from metaft.metrics import mean_t95
from metaft.models.handed import copied
from metaft.runs.checkpoint import under
from metaft.sampler import Stream, raw_words
from metaft.starts.base import body
from metaft.targets.draws import Rows

Values = Mapping[str, Tensor]
"""Of a classifier, by name: "body/..." and "head/..."."""


class Soup(NamedTuple):
    """What came of it."""

    taken: tuple[int, ...]
    """Numbers of the fits that are in it, in the order in which they came."""
    values: Values
    accuracy: float
    """On validation examples."""


def order_of(seed: int, number: int) -> int:
    """The seed of the order of images, and of what becomes of them, in one of the fits; the first one's is the draw's
    own, so that it is the fit that there is without a soup."""
    return seed if number == 0 else int(raw_words(seed, "train", [number], 1, stream=Stream.SOUPS)[0, 0])


def greedy(fits: Sequence[Values], accuracies: Sequence[float], judge: Callable[[Values], float]) -> Soup:
    """Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, recipe 1: the fits by their validation accuracy, the best
    first (of equal ones that of the lower number), each of which is kept where the average of all that are kept is
    judged no worse with it than without."""
    order = sorted(range(len(fits)), key=lambda i: (-accuracies[i], i))
    taken, best = [order[0]], accuracies[order[0]]
    values = fits[order[0]]
    for number in order[1:]:
        tried = average([fits[i] for i in (*taken, number)])
        accuracy = judge(tried)
        if accuracy >= best:
            taken, values, best = [*taken, number], tried, accuracy
    return Soup(tuple(taken), values, best)


def average(fits: Sequence[Values]) -> dict[str, Tensor]:
    """The mean of each tensor, summed in float64; those that are alike in all, or whole numbers, are the first one's to
    the bit."""
    first, *others = fits
    mean: dict[str, Tensor] = {}
    for name, value in first.items():
        alike = all(torch.equal(value, other[name]) for other in others)
        mean[name] = value
        if value.is_floating_point() and not alike:
            mean[name] = torch.stack([fit[name].double() for fit in fits]).mean(0).to(value)
    return mean


def values_of(fitted: Fitted) -> dict[str, Tensor]:
    """Of a fit, on the CPU."""
    parts = (("body", fitted.body), ("head", fitted.head))
    return {f"{part}/{k}": v.detach().cpu() for part, module in parts for k, v in module.state_dict().items()}


def filled(values: Values, contender: Contender, rows: Rows, head: nn.Module, seed: int, device: str) -> Classifier:
    """A classifier with these values. Where layers are normalised by moments of the images, they are measured anew: the
    mean of the fits' moments is none of the mean of their weights."""
    start, target = contender.start, contender.target
    train = Part(target.examples, torch.from_numpy(rows.train))
    fresh = body(start, seed).to(device)
    own = {k: v for k, v in under(values, "body").items() if k in fresh.state_dict()}
    fresh.load_state_dict(own)
    made = stored(fresh, Prepared(train, target.inputs, like_of(fresh)))
    head = copied(head)
    head.load_state_dict(under(values, "head"))
    return Classifier(made, head.to(device), target.inputs, target.class_names)


def judged(classifier: Classifier, contender: Contender, some: np.ndarray) -> float:
    """The share of some of the target's images that get the right label."""
    rows, target = torch.from_numpy(some), contender.target
    right = classifier.logits(Part(target.examples, rows)).argmax(-1) == target.labels[rows]
    return float(right.double().mean())


def summary(fits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the fits of all draws, which hold their "soup": the soup beside the single fit that was best on validation,
    and beside the mean of all single ones, paired by draw."""
    soups = [fit["accuracy"] for fit in fits]
    beside = {
        "best_single": [fit["soup"]["fits"][fit["soup"]["taken"][0]]["accuracy"] for fit in fits],
        "mean_of_singles": [float(np.mean([row["accuracy"] for row in fit["soup"]["fits"]])) for fit in fits],
    }
    said: dict[str, Any] = {**fits[0]["soup"], "draws": len(fits)}
    for name, figures in beside.items():
        mean, ci95 = mean_t95(figures)
        gain, of_gain = mean_t95([mine - theirs for mine, theirs in zip(soups, figures, strict=True)])
        said[name] = {"accuracy": mean, "ci95": ci95, "gain": gain, "gain_ci95": of_gain}
    return said


def said_of(soup: Mapping[str, Any], accuracy: float) -> str:
    """What a report says of a soup, which was right about so many test images in the mean of all draws."""

    def percent(value: float, ci95: float | None) -> str:
        return f"{100 * value:.2f}" + ("" if ci95 is None else f" ± {100 * ci95:.2f}")

    beside = "".join(
        f"; {name} {percent(soup[key]['accuracy'], soup[key]['ci95'])}, gain "
        f"{percent(soup[key]['gain'], soup[key]['gain_ci95'])}"
        for name, key in (("best single fit", "best_single"), ("mean of the single fits", "mean_of_singles"))
    )
    where = " in the first draw" if soup["draws"] > 1 else ""
    return (
        f"soup: {len(soup['taken'])} of {len(soup['fits'])} fits averaged{where}, as validation decides "
        f"({100 * soup['val_accuracy']:.1f} % right); test accuracy {100 * accuracy:.2f}{beside}"
    )
