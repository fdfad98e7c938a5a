"""The target's features in two dimensions, before and after fine-tuning."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from metaft.errors import MetaftError
from metaft.finetune.examples import Part, evenly
from metaft.inputs import Inputs
from metaft.plots.embedding import embedding_figure
from metaft.starts.base import body
from metaft.starts.open import open_start
from metaft.support.names import short_names
from metaft.views.base import Missing, Of, View
from metaft.views.base import Part as Shown
from metaft.views.distances import as_stored, features_of, own_neighbours, principal
from metaft.views.images import chart
from metaft.views.subject import Subject

_MOST, _FEWEST = 400, 10
"""Images that are drawn, and from how many on t-SNE is."""


def features(subject: Subject) -> View | Missing:
    if subject.command != "adapt":
        return Missing("it is of a target, which metaft.adapt fine-tunes to")
    if not subject.result["classes"]:
        return Missing("labels are numbers")
    classifier = subject.classifier
    try:
        target, rows, seen = subject.images
    except MetaftError:
        return Missing("the run's images are not at hand, or changed since")
    part = rows.train if seen else rows.test
    part = part[evenly(len(part), _MOST)]
    if len(part) < 3:
        return Missing(f"there are {len(part)} images to draw")
    examples, train = (Part(target.examples, torch.from_numpy(each)) for each in (part, rows.train))
    labels, names = target.labels.numpy()[part], short_names(target.class_names)
    stages = {"after": features_of(classifier.body, classifier.inputs, examples)}
    before = _before(subject, classifier.inputs, train)
    note = " What it began with is not at hand, so there is nothing before."
    if before is not None:
        begun = features_of(before, classifier.inputs, examples)
        same = begun.shape == stages["after"].shape and np.allclose(begun, stages["after"], rtol=1e-5, atol=1e-6)
        note = " Fine-tuning left the backbone as it was: before is the same." if same else ""
        stages = stages if same else {"before": begun, **stages}
    kind = "training" if seen else "test"
    parts: list[Shown] = []
    for way in ("PCA", "t-SNE") if len(part) >= _FEWEST else ("PCA",):
        for stage, values in stages.items():
            step = "epoch 0" if stage == "before" else subject.kept
            of = Of(f"{len(part)} {kind} images", "each image by itself", step)
            parts.append(_drawn(way, stage, values, labels, names, of))
    shares = ", ".join(f"{100 * own_neighbours(values, labels):.1f} % {stage}" for stage, values in stages.items())
    said = (
        f"Each point is a {kind} image at its {stages['after'].shape[1]} features, in a plane: PCA keeps the "
        "two directions of the largest spread, t-SNE (scikit-learn's) neighbourhoods, neither all. In all dimensions "
        f"the nearest other image is of the same class for {shares} fine-tuning.{note}"
    )
    return View(said, parts)


def _before(subject: Subject, inputs: Inputs, train: Part) -> nn.Module | None:
    """The backbone that the run began with; None where it is not to be had."""
    result = subject.result
    try:
        start = open_start(
            result["init"], lambda: inputs, module=subject.module,
            image_size=inputs.shape[-1] if "weights" in result["init_about"] else None,
        )  # fmt: skip
        return as_stored(body(start, result["seed"]), inputs, train)
    except MetaftError:
        return None


def _drawn(way: str, stage: str, values: np.ndarray, labels: np.ndarray, names: list[str], of: Of) -> Shown:
    if way == "PCA":
        points, shares = principal(values)
        axes = (f"first direction, {100 * shares[0]:.0f} % of the variance", f"second, {100 * shares[1]:.0f} %")
    else:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(values) - 1) / 3)
        points = TSNE(2, init="pca", perplexity=perplexity, random_state=0).fit_transform(values.astype(np.float32))
        axes = ("t-SNE, first", "t-SNE, second")
    title = f"{way}, {stage} fine-tuning"
    alt = f"{title}: {of.n} of {len(names)} classes as points in the plane"
    return chart(title, embedding_figure(points, labels, names, axes), alt, of)
