"""Which fits of an adapt run leave snapshots of where they went."""

from __future__ import annotations

from metaft.finetune.setup import Planned, Setup
from metaft.runs.folder import RunFolder
from metaft.runs.trail import Trail


def followed(setup: Setup) -> list[Planned]:
    """The fits whose trail is kept: those of the first draw that gradients train, where there are folds of the first
    one, in the order of the contenders, by whose number each is named. Of several targets the first alone."""
    first = None if setup.folds == 1 else 0
    return [
        one
        for one in setup.fits
        if (one.draw, one.fold) == (0, first)
        and not one.contender.probe
        and one.contender.recipe is not None
        and not one.contender.others
        and not one.contender.which
    ]


def trail_for(run: RunFolder, setup: Setup, planned: Planned) -> Trail | None:
    """Of a fit that is to leave any."""
    fits = followed(setup)
    for number, one in enumerate(fits):
        if (one.draw, one.fold, one.contender.label) == (planned.draw, planned.fold, planned.contender.label):
            about = {"start": one.contender.label}
            asked = setup.config.output.snapshots
            return Trail(run.snapshots, str(number), asked=asked, trails=len(fits), about=about)
    return None
