"""How far meta-steps move each layer, as `updates.jsonl` of a meta-training run (see `metaft.updates`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import Tensor

from metaft import updates
from metaft.algorithms.base import Algorithm
from metaft.config import Settled
from metaft.dist.ranks import Ranks
from metaft.errors import CheckpointError
from metaft.models.functional import plain_operations
from metaft.outer.static import Steps
from metaft.runs.folder import RunFolder, append_row
from metaft.runs.snapshot import Snapshot, load_snapshot
from metaft.types import Episode, Params, Source

_PASSES = 3
"""Forward passes that a gradient costs at least: one forth, and two back."""


class Measuring:
    """Of one run; on rank 0 alone, as all ranks take the same steps."""

    def __init__(
        self, run: RunFolder, config: Settled, algorithm: Algorithm, source: Source, start: Snapshot, ranks: Ranks
    ) -> None:
        self._run, self._config, self._algorithm, self._source = run, config, algorithm, source
        self._start = _begun(run, start) if ranks.rank == 0 else None
        self.every = None if self._start is None else every(config, self._start)
        """That of `metaft.updates`; None where nothing is measured."""

    def before(self, step: int, meta: Params) -> Params | None:
        """The parameters before step 1, 2, ..., where that one is measured."""
        return None if self.every is None or not updates.due(step, self.every) else updates.copied(meta)

    def write(self, step: int, before: Params, steps: Steps) -> None:
        """A row of the step that was taken."""
        assert self._start is not None
        dead = updates.dead_units(lambda: self._pass(step, steps.meta, steps.state), steps.meta)
        append_row(self._run.updates, updates.row(step, before, steps.meta, self._start, steps.gradient(), dead))

    def _pass(self, step: int, meta: Params, state: Params) -> None:
        """Pass the support images of a task of this step's number through the model, as a task begins with them."""
        source, (index, seed) = self._source, (step - 1, self._config.compute.seed)
        first = index * self._config.task.meta_batch
        task = Episode(*(t[0] for t in source.episodes(seed, "train", range(first, first + 1))))
        with plain_operations():
            fast = self._algorithm.adapt(
                meta, state, task.support_x, task.support_y, task.key, ways=source.ways, steps=0, moments=False
            )
            self._algorithm.predict(fast, task.support_x, "transductive")


def every(config: Settled, meta: Mapping[str, Tensor]) -> int:
    """Steps from one that is measured to the next. A step's FLOPs are counted as if each weight were used once for an
    image, as in dense layers, and as if nothing adapted: in truth they are more, and measuring takes less."""
    c, numbers = config.task, sum(p.numel() for p in meta.values())
    images = c.meta_batch * c.ways * (c.shots + c.query_shots)
    of_image = 2.0 * numbers
    return updates.every(
        config.output.log_every, numbers, _PASSES * of_image * images, passes=2 * of_image * c.ways * c.shots
    )


def _begun(run: RunFolder, start: Snapshot) -> Params | None:
    """The parameters that the run began with; None, with a note, where a run that goes on has none of them."""
    if start.position.step == 0:
        return updates.copied(start.meta)
    try:
        first = load_snapshot(run.first).meta
    except CheckpointError as error:
        print(
            f"metaft: note: {run.updates.name} ends here, since what the run began with is gone ({error})",
            file=sys.stderr,
        )
        return None
    return {name: p.to(start.meta[name].device) for name, p in first.items()}
