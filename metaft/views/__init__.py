"""What there is to see of a run or a start: one file per view."""

from __future__ import annotations

from metaft.views.base import Viewed
from metaft.views.calibration import calibration
from metaft.views.confusion import confusion
from metaft.views.episode import episode
from metaft.views.explained import explained
from metaft.views.features import features
from metaft.views.inner_updates import inner_updates
from metaft.views.landscape import landscape
from metaft.views.mistakes import mistakes
from metaft.views.smaller import smaller
from metaft.views.structure import structure
from metaft.views.targets import targets
from metaft.views.training import training
from metaft.views.updates import updates_of_training

__all__ = ["VIEWS"]

VIEWS: dict[str, Viewed] = {
    "targets": Viewed("Targets", targets),
    "training": Viewed("Loss and accuracy", training),
    "smaller": Viewed("Made smaller", smaller),
    "landscape": Viewed("Gradient descent", landscape),
    "episode": Viewed("A task step by step", episode, slow=True),
    "calibration": Viewed("Calibration", calibration),
    "confusion": Viewed("Confusion", confusion),
    "mistakes": Viewed("Mistakes", mistakes, slow=True),
    "explained": Viewed("Why an image got its label", explained, slow=True),
    "features": Viewed("Features", features, slow=True),
    "updates": Viewed("Parameter updates", updates_of_training),
    "inner-updates": Viewed("Updates in a task", inner_updates, slow=True),
    "structure": Viewed("Structure", structure),
}
"""In their order on a page."""
