"""Why images got their labels: where in each the prediction came from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metaft.errors import DataError, MetaftError
from metaft.inputs import Reading
from metaft.inputs.flaws import noted
from metaft.predict import list_files
from metaft.support.names import short_names
from metaft.support.progress import Progress
from metaft.views import attribution
from metaft.views.attribution import GAP, Integrated
from metaft.views.base import Explained, Explanation, Missing, Of, Overlay, Part, View
from metaft.views.images import raw_thumbnail
from metaft.views.subject import Subject

MOST = 24
"""Images of one page."""
_SIDE, _CLASSES = 160, 3
_PATIENCE = 3.0  # seconds before it is shown how far it is


def readings_of(subject: Subject, words: Sequence[str]) -> tuple[Reading, ...]:
    """The images that `--explain` names, read as the classifier's inputs. Raises MetaftError, naming the option, for
    what has no classifier of images, and for images that cannot be read."""
    if not words:
        return ()
    if subject.command != "adapt":
        raise MetaftError(
            f"explain: {subject.name} has no classifier, of which metaft.adapt makes one (given {words[0]})"
        )
    if not subject.result["classes"]:
        raise MetaftError(f"explain: {subject.name} predicts numbers, and has no labels to explain (given {words[0]})")
    inputs = subject.classifier.inputs
    if inputs.kind != "image":
        raise MetaftError(f"explain: the inputs of {subject.name} are no images (given {words[0]})")
    files, _ = list_files(words, "explain")
    if len(files) > MOST:
        raise MetaftError(f"explain: a page shows at most {MOST} images, got {len(files)}")
    with noted():
        readings = tuple(inputs.read(file) for file in files)
    bad = next((reading for reading in readings if reading.raw is None), None)
    if bad is not None:
        raise DataError(f"explain: {bad.error}")
    return readings


def explained(subject: Subject) -> View | Missing:
    if subject.command != "adapt" or not subject.result["classes"]:
        return Missing("a classifier gives labels, and metaft.adapt makes one")
    if not subject.explain:
        return Missing("it is of images that are named: python -m metaft.look RUN --explain IMAGE...")
    classifier = subject.classifier
    raw = torch.cat([reading.raw for reading in subject.explain if reading.raw is not None])
    probabilities = classifier.probabilities(raw)
    labels = probabilities.argmax(-1)
    model = nn.Sequential(classifier.body, classifier.head)
    dtype = next(classifier.parameters()).dtype
    x, black = (classifier.inputs(pixels).to(dtype) for pixels in (raw, torch.zeros_like(raw[:1])))
    size = (raw.shape[-2], raw.shape[-1])
    cams = _cams(model, x, labels, size)
    names = short_names(classifier.class_names)
    integrated = _integrated(model, x, black[0], labels) if attribution.has_captum() else []
    shown: list[Explanation] = []
    for i, reading in enumerate(subject.explain):
        overlays, name = [], names[int(labels[i])]
        if cams is not None:
            overlays.append(
                Overlay(
                    "Grad-CAM", raw_thumbnail(attribution.laid_over(raw[i], cams[i]), _SIDE), f"Grad-CAM for {name}"
                )
            )
        if integrated:
            over = raw_thumbnail(
                attribution.laid_over(raw[i], attribution.strengths(integrated[i].attributions)), _SIDE
            )
            overlays.append(Overlay("integrated gradients", over, f"integrated gradients for {name}"))
        top = probabilities[i].topk(min(_CLASSES, len(names)))
        classes = [(names[int(k)], float(p)) for p, k in zip(top.values, top.indices, strict=True)]
        note = _of_gap(integrated[i]) if integrated else ""
        shown.append(Explanation(raw_thumbnail(raw[i], _SIDE), reading.file.name, classes, overlays, note))
    of = Of(f"{len(shown)} images", "each image by itself", subject.kept)
    parts: list[Part] = [Explained("Images and what their labels rest on", shown, of)]
    return View(_said(cams is not None, integrated), parts)


def _cams(model: nn.Module, x: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor | None:
    cam = attribution.grad_cam(model, x, labels)
    return None if cam is None else attribution.enlarged(cam, size)


def _integrated(model: nn.Module, x: Tensor, black: Tensor, labels: Tensor) -> list[Integrated]:
    bar = Progress("explain", len(x), "image", after=_PATIENCE)
    found: list[Integrated] = []
    try:
        for image, label in zip(x, labels.tolist(), strict=True):
            found.append(attribution.integrated_gradients(model, image, black, label))
            bar.update(len(found), steps=str(found[-1].steps))
    finally:
        bar.close()
    return found


def _said(cam: bool, integrated: Sequence[Integrated]) -> str:
    said = "Each image as the model sees it, in grey, under what the logit of its most probable class rests on: yellow"
    said += " is much, blue is little."
    if cam:
        said += (
            " Grad-CAM (Selvaraju et al. 2017) weights the maps of the last convolution by their mean gradients, so it "
            "is coarse."
        )
    else:
        said += " Grad-CAM is left out: the model has no convolution whose map has places."
    if not integrated:
        return f"{said} Integrated gradients are left out: they need captum, pip install 'metaft[explain]'."
    worst = max(integrated, key=lambda each: each.gap)
    said += (
        " Integrated gradients (Sundararajan et al. 2017) follow the way from a black image; they should add up to the "
        f"logit's change along it, and are off by {100 * worst.gap:.2g} % at most of it, or of a twentieth of its "
        "largest change on the way, where that is more"
    )
    return said + (f", which is more than {100 * GAP:.0f} %: take them with care." if worst.gap > GAP else ".")


def _of_gap(integrated: Integrated) -> str:
    said = f"adds up to {integrated.total:+.3g} of the logit, off by {integrated.off:.2g}, in {integrated.steps} steps"
    faint = "; the logit hardly changes from black to the image" if integrated.off > GAP * abs(integrated.total) else ""
    return said + (f", which is not within {100 * GAP:.0f} %" if integrated.gap > GAP else faint)
