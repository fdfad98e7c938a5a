"""The test images about which a classifier was the surest and wrong, and what it may have taken them for."""

from __future__ import annotations

import torch

from metaft.errors import MetaftError
from metaft.finetune.examples import Part
from metaft.support.names import short_names
from metaft.views.base import Missing, Mistake, Mistakes, Neighbour, Of, View
from metaft.views.distances import features_of, nearest
from metaft.views.images import raw_thumbnail
from metaft.views.subject import Subject

_MOST, _NEAR = 12, 3


def mistakes(subject: Subject) -> View | Missing:
    if subject.command != "adapt":
        return Missing("a classifier makes mistakes, and metaft.adapt makes one")
    if not subject.result["classes"]:
        return Missing("labels are numbers")
    classifier = subject.classifier
    try:
        target, rows, seen = subject.images
    except MetaftError:
        return Missing("the run's images are not at hand, or changed since")
    if seen:
        return Missing("there is no test part, and the classifier that is kept has seen all images")
    test, train = (torch.from_numpy(part) for part in (rows.test, rows.train))
    top = classifier.probabilities(Part(target.examples, test)).max(-1)
    wrong = (top.indices != target.labels[test]).nonzero().flatten()
    if not len(wrong):
        return Missing("no test image was labelled wrong")
    most = wrong[top.values[wrong].argsort(descending=True, stable=True)][:_MOST]
    inputs = classifier.inputs
    features = [features_of(classifier.body, inputs, Part(target.examples, part)) for part in (test[most], train)]
    near, distances = nearest(features[0], features[1], _NEAR)
    names = short_names(target.class_names)
    listed = [
        Mistake(
            raw_thumbnail(target.examples[int(test[i])]), _name(target.files[int(test[i])]),
            names[int(target.labels[test[i]])], names[int(top.indices[i])], float(top.values[i]),
            [
                Neighbour(
                    raw_thumbnail(target.examples[int(train[row])]), names[int(target.labels[train[row]])], float(far)
                )
                for row, far in zip(near[number], distances[number], strict=True)
            ],
        )
        for number, i in enumerate(most.tolist())
    ]  # fmt: skip
    same = sum(m.predicted == m.neighbours[0].label for m in listed)
    said = (
        f"{len(wrong)} of {len(test)} test images are labelled wrong; shown are the {len(listed)} about which it was "
        f"the surest, each with the {len(listed[0].neighbours)} training images that are nearest to it in feature "
        f"space (Euclidean distance). For {same} of them the nearest is of the class that it was taken for."
    )
    of = Of(f"{len(listed)} of {len(wrong)} mistakes", "each image by itself", subject.kept)
    return View(said, [Mistakes("The surest mistakes", listed, of)])


def _name(file: str) -> str:
    """A file without the way to it, but for its folder."""
    return "/".join(file.split("/")[-2:])
