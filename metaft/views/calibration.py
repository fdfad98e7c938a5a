"""How sure a classifier is, against how often it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metaft.finetune.words import called
from metaft.plots.reliability import calibration_figure
from metaft.views.base import Column, Missing, Of, Table, View
from metaft.views.images import chart
from metaft.views.subject import Subject


def calibration(subject: Subject) -> View | Missing:
    if subject.command != "adapt":
        return Missing("a classifier is what this is of, and metaft.adapt makes one")
    result = subject.result
    if not result["classes"]:
        return Missing("labels are numbers, which have no probabilities")
    starts = {called(s): (s["calibration"], s["calibration_error"]) for s in result["starts"] if s["calibration"]}
    if not starts:
        return Missing("no test image was predicted")
    name, (bins, error) = next(iter(starts.items()))
    said = surely(bins, error)
    of = Of(f"{result['test_images']} test images", "each image by itself", f"{subject.kept} of the first draw")
    alt = "; ".join(f"{start}: calibration error {100 * e:.1f} %" for start, (_, e) in starts.items())
    columns = [Column("confidence", ".1%"), Column("right", ".1%"), Column("images")]
    table = Table(f"Bins of {name}", columns, [[b["confidence"], b["accuracy"], b["images"]] for b in bins])
    return View(said, [chart("Confidence and accuracy", calibration_figure(starts), alt, of), table])


def surely(bins: Sequence[Mapping[str, float]], error: float) -> str:
    """What the bins say: the mean confidence and accuracy of all images, and the mean distance of the two in a bin."""
    images = sum(b["images"] for b in bins)
    sure, right = (sum(b[key] * b["images"] for b in bins) / images for key in ("confidence", "accuracy"))
    word = "surer than it is right" if sure > right else "less sure than it is right"
    verdict = "about as sure as it is right" if abs(sure - right) < 0.02 else word
    return (
        f"On average it is {100 * sure:.1f} % sure and {100 * right:.1f} % right: it is {verdict}. Confidence and "
        f"accuracy differ by {100 * error:.1f} % on average (calibration error, Guo et al. 2017). Points below the "
        "diagonal are of images about which it was too sure; the larger a point, the more images."
    )
